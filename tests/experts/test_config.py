"""The experts' settings check themselves."""

import json
from dataclasses import asdict

import pytest

from metaopt.errors import ConfigError
from metaopt.experts import ExpertsConfig
from metaopt.settings import build


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"experts": 3}, r"experts\.experts is 3; allowed are 2, 4, 8, 16: choose one"),
        ({"top_k": 5}, r"experts\.top_k is 5; allowed are whole numbers from 1 to experts=4"),
        ({"top_k": 0}, r"experts\.top_k is 0; allowed"),
        ({"bottleneck": 0}, r"experts\.bottleneck is 0; allowed are whole numbers of at least 1"),
        ({"low_share": 0.3}, r"experts\.low_share is 0\.3; allowed are whole parts of experts=4"),
        ({"low_share": 1.5}, r"experts\.low_share is 1\.5; allowed"),
        ({"bases": (0.95,)}, r"experts\.bases has 0\.95; allowed are shares in \(0, 0\.9\]"),
        ({"bases": (0.0,)}, r"experts\.bases has 0\.0; allowed"),
        ({"scale": 0.0}, r"experts\.scale is 0\.0; it must be positive"),
        ({"temperature": float("inf")}, r"experts\.temperature is inf; it must be positive"),
        ({"dag_share": 0.0}, r"experts\.dag_share is 0\.0; allowed are shares in \(0, 1\]"),
        ({"asg_range": 1.0}, r"experts\.asg_range is 1\.0; allowed are values in \[0, 1\)"),
        ({"activation": "tanh"}, r"experts\.activation is 'tanh'; allowed are relu, gelu, identity"),
        ({"dropout": "medium"}, r"experts\.dropout is 'medium'; allowed are hard, soft, straight_through"),
        ({"scope": "sample", "asg_level": "token"}, r"experts\.asg_level is 'token' and scope is 'sample'"),
    ],
)
def test_experts_settings_out_of_range(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        ExpertsConfig(**settings)
    assert "\n" not in str(caught.value)


def test_base_shares_follow_the_published_rule() -> None:
    assert ExpertsConfig().base_shares == (0.25, 0.5, 0.25, 0.5)  # the released code's list
    assert ExpertsConfig(experts=2).base_shares == (0.5, 0.5)
    assert ExpertsConfig(experts=8).base_shares == (0.125, 0.25, 0.375, 0.5) * 2
    assert ExpertsConfig(experts=16).base_shares[:3] == (1 / 16, 2 / 16, 3 / 16)


def test_bases_repeat_over_each_kind_of_expert() -> None:
    config = ExpertsConfig(experts=8, low_share=0.375, bases=(0.1, 0.2))
    assert config.low_experts == 3
    assert config.base_shares == (0.1, 0.2, 0.1, 0.1, 0.2, 0.1, 0.2, 0.1)
    assert len(ExpertsConfig(low_share=0.0).base_shares) == len(ExpertsConfig(low_share=1.0).base_shares) == 4
    assert ExpertsConfig(bases=(1.0,), asg=False).base_shares == (1.0,) * 4


def test_settings_survive_a_checkpoint() -> None:
    config = ExpertsConfig(experts=8, bases=(0.25, 0.5), top_k=2, dag=False)
    assert build(ExpertsConfig, asdict(config), "experts") == config
    assert build(ExpertsConfig, json.loads(json.dumps(asdict(config))), "experts") == config  # where bases are a list
    with pytest.raises(ConfigError, match=r"experts\.expert is an unknown setting; allowed are experts, top_k"):
        build(ExpertsConfig, {"expert": 4}, "experts")
