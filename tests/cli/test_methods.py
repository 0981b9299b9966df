"""Methods with experts and teachers from their YAML files: the published settings, and what is refused."""

from dataclasses import fields
from typing import Any

import pytest

from metaopt import registry
from metaopt.cli.compose import compose
from metaopt.cli.settings import OnlineSettings
from metaopt.errors import ConfigError
from metaopt.experts import ExpertsConfig
from metaopt.optimizers.adam import Adam
from metaopt.policy import AdaptationPolicy, MethodConfig, build_method
from metaopt.policy.parts.batch_statistics import BatchStatisticsConfig
from metaopt.policy.parts.experts import ExpertsPartConfig
from metaopt.policy.parts.teacher import TeacherConfig


def method(*argv: str) -> MethodConfig:
    return compose(OnlineSettings, "online", argv).method


def configs_of(policy: AdaptationPolicy) -> dict[str, Any]:
    return {part.name: part.config for part in policy.listed}


def test_moase_is_as_published() -> None:
    config = method("method=moase")
    built = build_method(config)
    assert (config.update, built.rule) == ("adam", Adam(lr=1e-4, betas=(0.9, 0.99)))
    assert (config.objective, config.adapts, built.adapts) == ({"teacher": 1}, "experts_norm", "experts_norm")
    assert configs_of(built) == {
        "batch_statistics": BatchStatisticsConfig(),
        "experts": ExpertsPartConfig(),
        "teacher": TeacherConfig(predicts=True),
    }
    assert built.part("experts").config.mixtures == ExpertsConfig()


def test_cotta_has_no_experts_and_adapts_all() -> None:
    built = build_method(method("method=cotta"))
    assert built.adapts == "all"
    assert configs_of(built) == {
        "batch_statistics": BatchStatisticsConfig(),
        "teacher": TeacherConfig(proximal=0.0, views=32, sure_above=0.92, predicts=True),
    }
    assert built.rule == Adam(lr=1e-3, betas=(0.9, 0.999))


def test_every_setting_of_the_parts_can_be_overridden() -> None:
    ablated = build_method(
        method(
            "method=moase",
            "method.parts.experts.sdd=false",
            "method.parts.experts.bases=[0.1,0.2]",
            "method.parts.teacher.seed=3",
        )
    )
    assert ablated.part("experts").config == ExpertsPartConfig(sdd=False, bases=(0.1, 0.2))
    assert ablated.part("teacher").config == TeacherConfig(seed=3, predicts=True)


@pytest.mark.parametrize("part", registry.PARTS)
def test_the_command_line_knows_every_setting_of_every_part(part: str) -> None:
    settings = fields(registry.get("part", part).Config)
    texts = {
        each.name: "null" if each.default is None else "[]" if each.default == () else str(each.default)
        for each in settings
    }
    given = method("method=moase", *(f"method.parts.{part}.{name}={text}" for name, text in texts.items())).parts
    assert given.get(part, {}) == {each.name: [] if each.default == () else each.default for each in settings}


def test_a_part_may_be_any_methods() -> None:
    added = build_method(method("method=tent", "method.parts.restoration.base=0.1", "method.parts.class_balance=0.5"))
    assert list(added.parts) == ["batch_statistics", "restoration", "class_balance", "shift_distance"]
    assert added.part("restoration").config.base == 0.1 and added.part("class_balance").config.strength == 0.5
    without = build_method(method("method=tent", "method.parts.batch_statistics=false"))
    assert list(without.parts) == []


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        ("method=moase method.parts.experts.experts=3", "experts.experts is 3; allowed are 2, 4, 8, 16"),
        ("method=moase method.parts.experts.sdd=maybe", "experts.sdd='maybe' is not allowed; it takes true or false"),
        (
            "method=moase method.parts.experts.bottleneck=1.5",
            "experts.bottleneck=1.5 is not allowed; it takes a whole number",
        ),
        ("method=moase method.parts.experts.bases=[a]", "experts.bases='a' is not allowed; it takes a number"),
        ("method=moase method.parts.experts.bases=[2]", "experts.bases has 2.0; allowed are shares"),
        ("method=moase method.parts.teacher.momentum=x", "teacher.momentum='x' is not allowed; it takes a number"),
        ("method=moase method.parts.teacher.seed=true", "teacher.seed=True is not allowed; it takes a whole number"),
        ("method=moase method.parts.teacher.restore=2", "teacher.restore is 2.0; allowed is [0, 1]"),
        ("method=moase method.rule.betas=[0.9]", "method.rule.betas=[0.9] is not allowed; it takes 2 values"),
        ("method=moase method.rule.betas=[0.9,1]", "method.rule.betas is [0.9, 1.0]; it takes two numbers in [0, 1)"),
        ("method=moase method.rule={lr:0.1}", "method.rule.lr is 0.1; a rule's rate is method.lr"),
        ("method=moase method.adapts=gates", "allowed are norm, experts, experts_norm, all"),
        ("method=moase method.update=sgd", "method.rule.betas is an unknown setting; allowed are lr, momentum"),
        ("method=moase method.update=none", "method.rule does not go with update=none; allowed are adam, sgd"),
        ("method=moase method.parts.teacher.predicts=both", "predicts='both' is not allowed; it takes true or false"),
        ("method=cotta method.adapts=experts", "there are no experts; allowed without them are norm, all"),
        ("method=tent method.parts.expert.sdd=false", "did you mean method.parts.experts.sdd?"),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_line(argv: str, part: str) -> None:
    with pytest.raises(ConfigError, match=r"^[^\n]*$") as caught:
        method(*argv.split())
    assert part in str(caught.value)
