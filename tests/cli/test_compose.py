"""The bridge from the command line: every YAML file, every refusal, every exit code."""

import dataclasses
import warnings
from pathlib import Path

import pytest

from metaopt.catalogue import list_methods
from metaopt.cli.command import PROGRAMS
from metaopt.cli.compose import compose, help_text
from metaopt.cli.settings import (
    BenchmarkSettings,
    DigitsModelSettings,
    FootprintSettings,
    MetaTrainSettings,
    OnlineSettings,
    SpeedSettings,
)
from metaopt.errors import ConfigError
from metaopt.policy import MethodConfig

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SCHEMAS = {
    "meta_train": MetaTrainSettings,
    "online": OnlineSettings,
    "benchmark": BenchmarkSettings,
    "source": DigitsModelSettings,
    "speed": SpeedSettings,
    "footprint": FootprintSettings,
}


def online(*argv: str) -> OnlineSettings:
    return compose(OnlineSettings, "online", argv)


def refusal(*argv: str) -> str:
    with pytest.raises(ConfigError) as caught:
        online("policy_path=ckpt.pt", *argv)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_every_command_has_its_schema() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(SCHEMAS) == set(PROGRAMS)


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_command_composes_and_shows_its_launch_command(name: str) -> None:
    argv = ["--policy", "ckpt.pt"] if name == "online" else []
    config = compose(SCHEMAS[name], name, argv)
    assert config.model.name == "cifar_resnet20"
    assert f"/{name}.py" in help_text(SCHEMAS[name], name, argv)


def test_tasks_like_life_are_settings_of_meta() -> None:
    argv = ["meta.sizes=[16,128]", "meta.changing=0.5", "meta.skewed=0.3", "meta.clean=0.1"]
    argv += ["meta.alternating=0.2", "meta.mixed=0.2", "meta.gradual=0.25"]
    meta = compose(MetaTrainSettings, "meta_train", argv).meta
    assert (meta.sizes, meta.changing, meta.skewed, meta.clean) == ((16, 128), 0.5, 0.3, 0.1)
    assert (meta.alternating, meta.mixed, meta.gradual) == (0.2, 0.2, 0.25)
    assert compose(MetaTrainSettings, "meta_train", ["meta.sizes=16,128"]).meta.sizes == (16, 128)
    assert compose(MetaTrainSettings, "meta_train", ["meta.sizes=null"]).meta.sizes is None
    for wrong, message in (
        ("meta.sizes=[16]", "meta.sizes=[16] is not allowed; it takes 2 values"),
        ("meta.sizes=[128,16]", "allowed are whole numbers 2 <= low <= high"),
        ("meta.sizes=64", "meta.sizes"),
        ("meta.skewed=2", "meta.skewed is 2.0; allowed is [0, 1]"),
        ("meta.skew=0.2", "did you mean meta.skewed?"),
    ):
        with pytest.raises(ConfigError) as caught:
            compose(MetaTrainSettings, "meta_train", [wrong])
        assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*/*.yaml")), ids=lambda path: f"{path.parent.name}={path.stem}")
def test_every_choice_composes(path: Path) -> None:
    group, option = path.parent.name, path.stem
    command = "meta_train" if group in ("generator", "recipe") else "online"
    files = {
        "arrays": ["model.checkpoint=m.pt", "source.images=s.npy", "data.images=i.npy"],
        "cifar_c": ["model.checkpoint=m.pt", "source.images=s.npy", "data.root=folder"],
        "timm": ["model.name=resnet50", "model.checkpoint=m.pt"],
    }
    policy = ["policy_path=ckpt.pt"] if command == "online" else []
    config = compose(SCHEMAS[command], command, [f"{group}={option}", *policy, *files.get(option, [])])
    if group == "recipe":
        assert (config.meta.generator.variant == "published") == (option == "published")
    else:
        section = getattr(config.meta if group == "generator" else config, group)
        found = section.variant if group == "generator" else section.name
        assert found == ("resnet50" if option == "timm" else option)
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any(".py " in line for line in header)


def test_a_command_takes_the_groups_of_the_file_that_it_includes() -> None:
    config = compose(SpeedSettings, "speed", ["model=digits_vit", "generator=published", "meta.steps=4"])
    assert (config.model.name, config.meta.generator.variant, config.meta.steps) == ("digits_vit", "published", 4)


def test_published_recipe_is_the_paper_and_gives_way_to_the_command_line() -> None:
    config = compose(MetaTrainSettings, "meta_train", ["recipe=published", "meta.epochs=2"])
    meta = config.meta
    assert (meta.generator.variant, meta.generator.lr, meta.batch_size) == ("published", 1e-4, 2)
    assert (meta.loss, meta.steps, meta.update_every, meta.truncation) == ("unsupervised", 64, 1, 1)
    assert (meta.lr, meta.schedule, meta.epochs) == (0.01, "constant", 2)
    assert {name: weight for name, weight in meta.objective.items() if weight} == {
        "entropy": 1.0,
        "discrepancy": 0.00625,
    }
    parts = MethodConfig("policy", parts=meta.parts).named_parts()
    assert list(parts) == ["batch_statistics"] and parts["batch_statistics"][1].prior is None


def test_gate_recipe_learns_the_gate_alone() -> None:
    config = compose(MetaTrainSettings, "meta_train", ["recipe=gate", "start=start.pt"])
    assert (config.meta.only, config.meta.gate_share, config.start) == (("update_gate",), 0.28, "start.pt")


def test_defaults_are_the_published_contract() -> None:
    config = compose(MetaTrainSettings, "meta_train", [])
    assert (config.data.name, config.meta.batch_size, config.n_unlabeled, config.meta.seed) == ("digits", 64, 128, 0)
    assert (config.meta.loss, config.meta.gradient, config.meta.backend) == ("clean_teacher", "first_order", "func")
    assert (config.meta.generator.variant, config.device) == ("residual", "cpu")
    assert config.out is None, "a folder that no other run has is made when the run starts"
    assert online("--policy", "p").setting == "reset"


@pytest.mark.parametrize("argv", [("--policy", "a/b"), ("--policy=a/b",), ("policy_path=a/b", "method=policy")])
def test_policy_option(argv: tuple[str, ...]) -> None:
    config = online(*argv)
    assert (config.policy_path, config.method.name) == ("a/b", "policy")


PATHS = [
    ("online", "--policy={}", lambda config: config.policy_path),
    ("online", "policy_path={}", lambda config: config.policy_path),
    ("online", "out={}", lambda config: config.out),
    ("online", "model.checkpoint={}", lambda config: config.model.checkpoint),
    ("online", "source.images={}", lambda config: config.source.images),
    ("online", "source.cache={}", lambda config: config.source.cache),
    ("benchmark", "policy_path=[{}]", lambda config: config.policy_path[0]),
    ("benchmark", "out={}", lambda config: config.out),
    ("meta_train", "out={}", lambda config: config.out),
    ("meta_train", "start={}", lambda config: config.start),
    ("meta_train", "resume={}", lambda config: config.resume),
    ("source", "cache={}", lambda config: config.cache),
    ("footprint", "images={}", lambda config: config.images),
]


@pytest.mark.parametrize(("command", "argument", "found"), PATHS)
def test_home_is_expanded_in_every_path(command, argument, found, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    more = ["method=tent"] if command in ("footprint", "online") else []
    for written, meant in (("~/a b.npy", "/home/me/a b.npy"), ("b/~x", "b/~x")):
        assert found(compose(SCHEMAS[command], command, [*more, argument.format(written)])) == meant


def test_home_is_expanded_in_the_paths_of_readers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    files = ("data=arrays", "data.images=~/x.npy", "data.labels=~/y.npy", "model.checkpoint=w.pt")
    arrays = online("method=bn", *files)
    assert (arrays.data.images, arrays.data.labels) == ("/home/me/x.npy", "/home/me/y.npy")
    assert online("method=bn", "data=cifar_c", "data.root=~", "model.checkpoint=w.pt").data.root == "/home/me"


def test_arguments_that_are_no_text_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"'out=\\udcff' is no UTF-8 text"):
        online("out=\udcff")


def test_policy_option_keeps_a_method_that_was_asked_for() -> None:
    config = online("--policy", "ckpt.pt", "method=adam", "method.lr=0.02")
    assert (config.policy_path, config.method.name, config.method.lr) == ("ckpt.pt", "adam", 0.02)


def test_benchmark_takes_the_policy_as_one_of_a_list() -> None:
    argv = ["--policy", "a.pt", "methods=tent,policy", "method.tent.lr=0.1", "seeds=3"]
    config = compose(BenchmarkSettings, "benchmark", argv)
    assert (config.policy_path, config.methods, config.seeds) == (["a.pt"], ["tent", "policy"], [3])
    assert config.method["tent"].lr == 0.1 and config.method["adam"].lr == 0.01


@pytest.mark.parametrize("path", ["runs/lr=0.1,x/a (1).pt", "it's.pt", "a\\'b.pt", "end\\", "a b#.pt", "'quoted'.pt"])
def test_any_path_arrives_as_it_was_written(path: str) -> None:
    assert online("--policy", path).policy_path == path


@pytest.mark.parametrize("name", ["resnet50", "vit_base_patch16_224.augreg_in21k", "hf_hub:timm/resnet50.a1_in1k"])
def test_any_other_model_name_is_a_timm_name(name: str) -> None:
    config = online("method=bn", f"model={name}", "model.checkpoint=weights.safetensors", "model.num_classes=7")
    assert dataclasses.astuple(config.model) == (name, "weights.safetensors", 7, None)


def test_lists_may_be_written_with_and_without_brackets() -> None:
    for corruptions in ("[contrast,fog]", "contrast,fog"):
        config = online("method=bn", f"data.corruptions={corruptions}", "data.severities=3")
        assert (config.data.corruptions, config.data.severities) == (["contrast", "fog"], [3.0])


@pytest.mark.parametrize(
    ("argument", "nearest"),
    [
        ("batch_siz=3", "batch_size"),
        ("+batch_siz=3", "batch_size"),
        ("++batch_siz=3", "batch_size"),
        ("~batch_siz", "batch_size"),
        ("lr=0.1", "method.lr"),
        ("data.limt=3", "data.limit"),
        ("models=resnet50", "model"),
        ("metod=bn", "method"),
        ("model@source=resnet50", "model"),
    ],
)
def test_an_unknown_setting_names_the_nearest(argument: str, nearest: str) -> None:
    assert f"unknown setting; did you mean {nearest}?" in refusal(argument)


@pytest.mark.parametrize("argument", ["memory=pruned", "budget_mib=4"])
@pytest.mark.parametrize("command", ["meta_train", "speed"])
def test_meta_training_refuses_the_memory_of_deployment(command: str, argument: str) -> None:
    with pytest.raises(ConfigError, match=f"^{argument.partition('=')[0]} is an unknown setting"):
        compose(SCHEMAS[command], command, [argument])


@pytest.mark.parametrize("argument", ["start=a.pt", "resume=last.pt", "stop_after=1", "out=folder"])
def test_a_measurement_of_speed_refuses_what_it_would_ignore(argument: str) -> None:
    with pytest.raises(ConfigError, match=f"^{argument.partition('=')[0]} is an unknown setting"):
        compose(SCHEMAS["speed"], "speed", [argument])


@pytest.mark.parametrize("argument", ["+batch_size=3", "++batch_size=3", "~seed"])
def test_settings_are_not_added_or_removed(argument: str) -> None:
    assert f"write {argument.strip('+~').split('=')[0]}=VALUE" in refusal(argument)


@pytest.mark.parametrize(
    ("argument", "part"),
    [
        ("batch_size=abc", "batch_size='abc' is not allowed"),
        ("batch_size=1.5", "batch_size=1.5 is not allowed"),
        ("batch_size=0", "batch_size is 0; allowed are finite values of at least 1"),
        ("seed=1,2", "seed='1,2' is not allowed"),
        ("seed=null", "seed=null is not allowed"),
        ("seed=-1", "seed is -1; allowed"),
        ("device=null", "device=null is not allowed"),
        ("setting=sometimes", "allowed are reset, continual"),
        ("memory=sparse", "allowed are dense"),
        ("data=digit", "did you mean data=digits?"),
        ("method=tents", "did you mean method=tent?"),
        ("method=bn,tent", f"allowed are {', '.join(list_methods())}"),
        ("model=", "allowed are cifar_resnet20"),
        ("model=timm", "model.name is not set"),
        ("data.root=x", "choose it: add data=cifar_c"),
        ("data.limit=0", "data.limit=0 is out of range"),
        ("data.severities=[0]", "allowed are values in (0, 5]"),
        ("data.severities=[]", "set data.severities=[5]"),
        ("method.lr=-1", "method.lr is -1.0; it must be positive and finite"),
        ("method.lr=nan", "method.lr is nan; it must be positive and finite"),
        ("method.betas=[0.9,0.99]", "unknown setting; did you mean method.rule.betas?"),
        ("method.rule.betas=[0.9,0.99]", "method.rule does not go with update=generator; allowed are adam, sgd"),
        ("method.rule={lr:0.1}", "method.rule does not go with update=generator"),
        ("method.parts.update_gat=true", "unknown setting; did you mean method.parts.update_gate?"),
        ("method.parts.update_gate.evry=2", "unknown setting; did you mean method.parts.update_gate.every?"),
        (
            "method.parts.update_gate={evry:2}",
            "method.parts.update_gate.evry is an unknown setting; allowed are share, every",
        ),
        ("method.parts.update_gate.every=0", "update_gate.every is 0; it must be at least 1"),
        ("method.parts.update_gate=maybe", "method.parts.update_gate.share='maybe' is not allowed; it takes a number"),
        ("method.parts=3", "method.parts holds method.parts.batch_statistics"),
        ("method.objective.slrr=1", "unknown setting; did you mean method.objective.slr?"),
        ("source=x.npy", "source holds source.images"),
        ("seed", "settings are written key=value"),
        ("--multirun", "allowed are --policy, --help and key=value"),
        ("out=${oc.env:METAOPT_NO_SUCH_VARIABLE}", "METAOPT_NO_SUCH_VARIABLE"),
        ("--policy", "--policy has no path"),
    ],
)
def test_a_bad_value_gets_one_clear_line(argument: str, part: str) -> None:
    assert part in refusal(argument)


@pytest.mark.parametrize(
    ("command", "argv", "part"),
    [
        ("online", [], "policy_path is not set"),
        ("online", ["method=mgtta"], "policy_path is not set"),
        ("online", ["method=bn", "data=cifar_c", "model.checkpoint=m.pt"], "data.root is not set"),
        ("online", ["method=bn", "data=arrays", "model.checkpoint=m.pt"], "data.images is not set"),
        ("online", ["method=bn", "data=arrays", "data.images=i.npy"], "model.checkpoint is not set"),
        (
            "online",
            ["method=adam", "method.objective.slr=-1"],
            "method.objective.slr is -1.0; allowed are finite values of at least 0",
        ),
        ("meta_train", ["data=arrays", "model.checkpoint=m.pt"], "source.images is not set"),
        ("meta_train", ["generator=adam"], "allowed are published, residual, step_sizes"),
        ("meta_train", ["batch_size=1"], "batch_size is 1; allowed"),
        ("meta_train", ["batch_size=abc"], "error: batch_size='abc' is not allowed"),
        ("meta_train", ["generator.betas=[0.5]"], "error: generator.betas=[0.5] is not allowed; it takes 2 values"),
        ("meta_train", ["objective.entropy=much"], "error: objective.entropy='much' is not allowed; it takes a number"),
        ("meta_train", ["meta.batch_size=8"], "unknown setting; did you mean batch_size?"),
        ("meta_train", ["parts.update_gate=2"], "update_gate.share is 2.0; allowed are 0 < share < 1"),
        (
            "meta_train",
            ["parts.update_gate=0.5", "meta.gradient=full"],
            "parts.update_gate does not go with meta.gradient=full",
        ),
        ("meta_train", ["--policy=ckpt.pt"], "policy_path is an unknown setting"),
        ("benchmark", ["methods=[tant]"], "methods is 'tant'; allowed are adam, bn"),
        ("benchmark", ["methods=[]"], "methods=[] is empty"),
        ("benchmark", ["methods=[policy]"], "add --policy PATH"),
        ("benchmark", ["method=tent"], "method holds method.adam, method.bn"),
        ("benchmark", ["settings=reset,never"], "settings is 'never'; allowed are reset, continual"),
        ("source", ["batch_size=3"], "batch_size is an unknown setting"),
    ],
)
def test_what_settings_need_of_one_another(command: str, argv: list[str], part: str) -> None:
    with pytest.raises(ConfigError, match=r"^[^\n]*$") as caught:
        compose(SCHEMAS[command], command, argv)
    assert part in f"error: {caught.value}"


def test_composing_writes_nothing_and_stays_in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        online("method=bn")
        online("method=bn")
    assert Path.cwd() == tmp_path and not list(tmp_path.iterdir())
