"""README and docs/ say what is there: links, commands, tables, and a section for all that may be named."""

import importlib.util
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest

from metaopt import registry
from metaopt.catalogue import list_methods
from metaopt.cli.compose import compose
from metaopt.cli.settings import (
    BenchmarkSettings,
    DigitsModelSettings,
    FootprintSettings,
    MetaTrainSettings,
    OnlineSettings,
    SpeedSettings,
)
from metaopt.meta import MetaTrainConfig, TaskConfig
from metaopt.optimizers.mgg import VARIANTS, GeneratorConfig

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = [README, *(ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md")), *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = {
    ("metaopt", "meta-train"): ("meta_train", MetaTrainSettings),
    ("metaopt", "adapt"): ("online", OnlineSettings),
    ("metaopt", "benchmark"): ("benchmark", BenchmarkSettings),
    ("metaopt", "footprint"): ("footprint", FootprintSettings),
    ("metaopt", "source"): ("source", DigitsModelSettings),
    ("metaopt", "speed"): ("speed", SpeedSettings),
    ("python", "pretrain/meta_train.py"): ("meta_train", MetaTrainSettings),
    ("python", "adapt/online.py"): ("online", OnlineSettings),
    ("python", "adapt/benchmark.py"): ("benchmark", BenchmarkSettings),
    ("python", "adapt/footprint.py"): ("footprint", FootprintSettings),
}


def text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def tables() -> Any:
    """The script that writes the tables."""
    spec = importlib.util.spec_from_file_location("write_results", ROOT / "docs" / "write_results.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sections() -> dict[str, dict[str, str]]:
    """Chapters of docs/methods.md, each with its sections by name and, under "", what stands before them."""
    found: dict[str, dict[str, str]] = {}
    for chapter in re.split(r"^## ", text(ROOT / "docs" / "methods.md"), flags=re.MULTILINE)[1:]:
        title, _, body = chapter.partition("\n")
        head, *rest = re.split(r"^### ", body, flags=re.MULTILINE)
        found[title] = {"": head} | {part.partition("\n")[0].strip("`"): part for part in rest}
    return found


def shown(value: Any) -> str:
    """A default as YAML has it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, tuple | list):
        return f"[{', '.join(shown(item) for item in value)}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def commands() -> Iterator[tuple[str, str]]:
    for page in PAGES:
        for block in re.findall(r"^```sh\n(.*?)^```", text(page), flags=re.MULTILINE | re.DOTALL):
            for line in block.splitlines():
                if tuple(line.split()[:2]) in COMMANDS:
                    yield page.name, line.partition("#")[0].strip()


def test_readme_is_short() -> None:
    assert len(text(README).splitlines()) <= 200


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", text(page)):
        file, _, anchor = link.partition("#")
        if "://" in link:
            continue
        target = page.parent / file if file else page
        assert target.exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.*)$", text(target), flags=re.MULTILINE)
            anchors = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
            assert re.sub(r"-\d+$", "", anchor) in anchors, link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_in_the_text_exist(page: Path) -> None:
    if page.name == "CHANGELOG.md":  # it says what was
        return
    for path in re.findall(r"`((?:metaopt|configs|tests|docs)/[\w/.*]+)`", text(page)):
        assert path.endswith("NAME.yaml") or list(ROOT.glob(path.rstrip("/"))), path


@pytest.mark.parametrize(("page", "command"), [*commands()])
def test_commands_compose(page: str, command: str) -> None:
    program, name, *arguments = shlex.split(command)
    config_name, schema = COMMANDS[program, name]
    assert isinstance(compose(schema, config_name, arguments), schema)


def test_tables_are_those_of_the_saved_results() -> None:
    module = tables()
    assert module.main(["--check"]) == 0
    placed = [name for _, name, _ in module.PLACE.findall(text(ROOT / "docs" / "results.md"))]
    assert sorted(placed) == sorted(path.stem for path in (ROOT / "docs" / "results").glob("*.csv"))


def test_a_changed_table_is_noticed() -> None:
    module = tables()
    page = text(ROOT / "docs" / "results.md")
    assert module.written(page.replace("| 29.88 ±", "| 19.88 ±")) == page


def test_readme_shows_rows_of_the_full_table() -> None:
    rows = [line for line in text(README).splitlines() if re.match(r"\| .* \| \d+\.\d+", line)]
    assert len(rows) > 5
    assert set(rows) <= set(text(ROOT / "docs" / "results.md").splitlines())


@dataclass
class Named:
    """What has no settings."""


ROWS = [
    *(("Parts", name, registry.get("part", name).Config) for name in registry.PARTS),
    *(("Update rules", name, registry.get("update rule", name)) for name in registry.RULES),
    *(("Objective terms", name, None) for name in registry.TERMS),
    ("The learned rule", "", GeneratorConfig),
    *(("The learned rule", name, None) for name in VARIANTS),
    ("Tasks of meta-training", "", TaskConfig),
    *(("Method files", name, None) for name in list_methods()),
    *(("Streams", name, registry.get("arrangement", name)) for name in registry.ARRANGEMENTS),
]


@pytest.mark.parametrize(("chapter", "name", "config"), ROWS, ids=lambda value: value if isinstance(value, str) else "")
def test_all_that_may_be_named_has_a_section_with_its_settings(chapter: str, name: str, config: Any) -> None:
    section = sections()[chapter][name]
    # What tasks are like in meta-training, which sets some of their defaults itself.
    defaults = {
        each.name: each.default for each in fields(MetaTrainConfig if config is TaskConfig else config or Named)
    }
    for each in fields(config or Named):
        assert f"| `{each.name}` | `{shown(defaults[each.name])}` |" in section, each.name


def test_no_section_is_left_of_what_is_gone() -> None:
    known = {(chapter, name) for chapter, name, _ in ROWS}
    found = {(chapter, name) for chapter, named in sections().items() for name in named if name}
    assert found <= known
