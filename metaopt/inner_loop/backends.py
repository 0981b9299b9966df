"""The inner-loop backends by name. All take the same step and give the same meta-gradient."""

from collections.abc import Callable

from metaopt.errors import ConfigError
from metaopt.inner_loop.func import FuncApply
from metaopt.inner_loop.higher import HigherApply
from metaopt.inner_loop.torchopt import TorchOptApply
from metaopt.types import ApplyUpdate, UpdateRule

BACKENDS: dict[str, Callable[[UpdateRule], ApplyUpdate]] = {
    "func": FuncApply,
    "torchopt": TorchOptApply,
    "higher": HigherApply,
}


def build_backend(name: str, rule: UpdateRule) -> ApplyUpdate:
    """The differentiable update of that backend.

    Raises:
        ConfigError: there is no such backend.
    """
    if name not in BACKENDS:
        raise ConfigError(f"meta.backend is {name!r}; allowed are {', '.join(BACKENDS)}: choose one")
    return BACKENDS[name](rule)
