"""The inner-loop backends by name; a library is loaded where its backend is built."""

from metaopt.errors import check_one_of
from metaopt.optimizers.update import FuncApply
from metaopt.types import ApplyUpdate, UpdateRule

BACKENDS = ("func", "torchopt", "higher")
"""Differentiable updates. All take the same step and give the same meta-gradient."""


def build_backend(name: str, rule: UpdateRule) -> ApplyUpdate:
    """The differentiable update of that backend.

    Raises:
        ConfigError: there is no such backend, or it does not go with the rule.
    """
    check_one_of("meta.backend", name, BACKENDS)
    if name == "torchopt":
        from metaopt.optimizers.interop.torchopt import TorchOptApply

        return TorchOptApply(rule)
    if name == "higher":
        from metaopt.optimizers.interop.higher import HigherApply

        return HigherApply(rule)
    return FuncApply(rule)
