"""Methods with experts and teachers from their YAML files: the published settings, and what is refused."""

from pathlib import Path

import pytest

from metaopt.configs import OnlineSettings, compose
from metaopt.errors import ConfigError
from metaopt.experts import ExpertsConfig, TeacherConfig
from metaopt.policy import MethodConfig

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def method(*argv: str) -> MethodConfig:
    return compose(OnlineSettings, "online", argv, CONFIGS).method.config()


def test_moase_is_as_published() -> None:
    config = method("method=moase")
    assert (config.update, config.lr, config.betas, config.objective) == ("adam", 1e-4, (0.9, 0.99), {"teacher": 1})
    assert (config.adapts, config.predict_with) == ("experts_norm", "teacher")
    assert (config.experts, config.teacher) == (ExpertsConfig(), TeacherConfig())


def test_cotta_has_no_experts_and_adapts_all() -> None:
    config = method("method=cotta")
    assert (config.adapts, config.experts, config.teacher) == (
        "all",
        None,
        TeacherConfig(proximal=0.0, views=32, sure_above=0.92),
    )
    assert (config.lr, config.betas, config.predict_with) == (1e-3, (0.9, 0.999), "teacher")


def test_every_setting_of_the_parts_can_be_overridden() -> None:
    ablated = method(
        "method=moase", "method.experts.sdd=false", "method.experts.bases=[0.1,0.2]", "method.teacher.seed=3"
    )
    assert ablated.experts == ExpertsConfig(sdd=False, bases=(0.1, 0.2)) and ablated.teacher == TeacherConfig(seed=3)
    section = compose(OnlineSettings, "online", ["method=moase"], CONFIGS).method
    assert section.experts is not None and set(section.experts) | {"dropout", "temperature"} == set(
        ExpertsConfig.__dataclass_fields__
    )
    assert section.teacher is not None and set(section.teacher) == set(TeacherConfig.__dataclass_fields__)


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        ("method=moase method.experts.experts=3", "experts.experts is 3; allowed are 2, 4, 8, 16"),
        ("method=moase method.experts.sdd=maybe", "experts.sdd is 'maybe'; allowed are values of type bool"),
        (
            "method=moase method.experts.bottleneck=1.5",
            "experts.bottleneck is 1.5; allowed are values of type int | None",
        ),
        ("method=moase method.experts.bases=[a]", "experts.bases has a; allowed are shares"),
        ("method=moase method.teacher.momentum=x", "teacher.momentum is 'x'; allowed are values of type float"),
        ("method=moase method.teacher.seed=true", "teacher.seed is True; allowed are values of type int"),
        ("method=moase method.teacher.restore=2", "teacher.restore is 2; allowed are values in [0, 1]"),
        ("method=moase method.betas=[0.9]", "method.betas is [0.9]; it takes two numbers"),
        ("method=moase method.adapts=gates", "allowed are norm, experts, experts_norm, all"),
        ("method=moase method.update=sgd", "method.betas does not go with update=sgd"),
        ("method=moase method.predict_with=both", "allowed are student, teacher"),
        ("method=cotta method.adapts=experts", "there are no experts; allowed without them are norm, all"),
        ("method=tent method.experts.sdd=false", "choose it: add method=moase"),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_line(argv: str, part: str) -> None:
    with pytest.raises(ConfigError, match=r"^[^\n]*$") as caught:
        method(*argv.split())
    assert part in str(caught.value)
