"""What there is to choose from, as code and as ``--help`` tell it, and that both name the same things."""

from pathlib import Path
from typing import Any

import pytest

import metaopt
from metaopt import registry
from metaopt.catalogue import CONFIGS, first_comment
from metaopt.cli import adapt
from metaopt.cli.compose import compose
from metaopt.cli.settings import BenchmarkSettings, MetaTrainSettings, OnlineSettings
from metaopt.errors import ConfigError
from metaopt.policy import MethodConfig
from tests.tiny import tiny_model, tiny_policy

METHODS = sorted(file.stem for file in (Path(__file__).resolve().parents[2] / "configs" / "method").glob("*.yaml"))


def test_every_file_is_a_method_with_one_line_on_it() -> None:
    listed = metaopt.list_methods("*")
    assert list(listed) == METHODS and listed == metaopt.list_methods()
    assert listed["source"] == "The source model as it is: nothing adapts."
    for name, line in listed.items():
        assert line and "\n" not in line and not line.startswith("#"), name
        assert line == first_comment(CONFIGS / "method" / f"{name}.yaml")


def test_patterns_choose_methods_and_parts() -> None:
    assert list(metaopt.list_methods("*tta")) == ["cotta", "mgtta"]
    assert list(metaopt.list_methods("tent")) == ["tent"] and metaopt.list_methods("ten") == {}
    assert list(metaopt.list_parts("*balance")) == ["class_balance"] and metaopt.list_parts("balance") == {}


def test_every_part_is_listed_in_the_order_in_which_it_acts() -> None:
    listed = metaopt.list_parts()
    assert list(listed) == list(registry.PARTS) and listed == metaopt.list_parts("*")
    for name, line in listed.items():
        kind = registry.get("part", name)
        assert kind.name == name and kind.__doc__.startswith(line) and line.strip() and "\n" not in line


@pytest.mark.parametrize("kind", registry.KINDS)
def test_every_row_of_the_registry_is_there_and_says_one_line(kind: str) -> None:
    described = registry.describe(kind)
    assert list(described) == list(registry.KINDS[kind])
    for name, line in described.items():
        assert line.strip() and "\n" not in line, name


def test_help_lists_methods_and_parts_with_one_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert adapt.main(["--help"]) == 0
    tables, title = dict[str, dict[str, str]](), ""
    for line in capsys.readouterr().out.splitlines():
        if line and not line.startswith(" "):
            title = line
        elif line and title.rstrip(":") in ("Methods", "Parts", "Objective terms"):
            name, words = line.split(maxsplit=1)
            tables.setdefault(title.rstrip(":"), {})[name] = words
    assert tables == {
        "Methods": metaopt.list_methods(),
        "Parts": metaopt.list_parts(),
        "Objective terms": registry.describe("objective term"),
    }


@pytest.mark.parametrize("name", METHODS)
def test_code_and_command_line_load_the_same_method(name: str) -> None:
    loaded = metaopt.load_method(name)
    assert isinstance(loaded, MethodConfig) and loaded.name == name
    assert compose(OnlineSettings, "online", [f"method={name}", "policy_path=ckpt.pt"]).method == loaded


def test_a_benchmark_knows_every_method_as_code_does() -> None:
    composed = compose(BenchmarkSettings, "benchmark", []).method
    assert composed == {name: metaopt.load_method(name) for name in METHODS}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_built_from_its_file(name: str) -> None:
    model, config = tiny_model(), metaopt.load_method(name)
    method = metaopt.build_method(config, policy=tiny_policy(model) if config.needs_policy else None)
    assert method.method == name and method.updates == (config.update != "none")
    assert set(config.named_parts()) <= set(method.parts)


def test_settings_may_be_changed_on_the_way() -> None:
    changed = metaopt.load_method("tent", lr=0.5, parts={"batch_statistics": 16})
    assert (changed.name, changed.lr, changed.parts) == ("tent", 0.5, {"batch_statistics": 16})
    assert metaopt.load_method("tent").lr == 0.001


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("tant", {}, "method 'tant' is unknown; allowed are adam, bn, cotta"),
        ("../online", {}, "is unknown; allowed are adam"),
        ("tent", {"learning_rate": 0.1}, "method.learning_rate is an unknown setting; allowed are name, update, lr"),
        ("tent", {"lr": -1.0}, "method.lr is -1.0; it must be positive"),
        ("tent", {"parts": {"gat": True}}, "unknown part 'gat'.*did you mean 'update_gate'"),
    ],
)
def test_what_there_is_not_is_refused(name: str, changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        metaopt.load_method(name, **changes)


def test_mgtta_descends_what_the_published_recipe_trains_on() -> None:
    """Mean entropy and, whatever the batch size, 0.4 / 64 of the discrepancy: the released code's loss."""
    recipe = compose(MetaTrainSettings, "meta_train", ["recipe=published"]).meta
    trained = {name: weight for name, weight in recipe.objective.items() if weight}
    assert metaopt.load_method("mgtta").objective == trained == {"entropy": 1.0, "discrepancy": 0.4 / 64}


@pytest.mark.parametrize("listing", [metaopt.list_methods, metaopt.list_parts])
@pytest.mark.parametrize("pattern", [None, 3, ["a"]])
def test_a_pattern_is_text(listing: Any, pattern: Any) -> None:
    with pytest.raises(ConfigError, match=r"^pattern is .*; allowed is text such as"):
        listing(pattern)


@pytest.mark.parametrize("name", [None, 3, ["tent"]])
def test_a_methods_name_is_text(name: Any) -> None:
    with pytest.raises(ConfigError, match=r"^method .* is unknown; allowed are"):
        metaopt.load_method(name)
