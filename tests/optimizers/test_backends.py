"""Differentiable updates by name."""

import pytest

from metaopt.errors import ConfigError
from metaopt.optimizers.adam import Adam
from metaopt.optimizers.backends import build_backend
from metaopt.optimizers.mgg import GeneratorConfig, GradientGenerator
from metaopt.optimizers.update import FuncApply


def test_backends_by_name() -> None:
    generator = GradientGenerator(GeneratorConfig())
    assert isinstance(build_backend("func", generator), FuncApply)
    with pytest.raises(ConfigError, match=r"meta\.backend is 'jax'; allowed are func, torchopt, higher: choose one"):
        build_backend("jax", generator)
    with pytest.raises(ConfigError, match=r"meta\.backend=higher got the rule Adam; it unrolls"):
        build_backend("higher", Adam())
