"""One family of errors, and the checks that raise the commonest of them.

Every message is one line and says three things: the value that was met, what is allowed, and the fix. The commands in
``pretrain/`` and ``adapt/`` print it without a traceback and exit with code 2.
"""

import math
from collections.abc import Iterable


class MetaoptError(Exception):
    """Base of every error that a user can cause and mend."""


class ConfigError(MetaoptError):
    """A setting is unknown, out of range, or does not go with another one."""


class BudgetError(ConfigError):
    """A budget of bytes is below what a model needs at least: ``smallest``, in bytes."""

    def __init__(self, message: str, smallest: int) -> None:
        super().__init__(message)
        self.smallest = smallest


class CheckpointError(MetaoptError):
    """A checkpoint is missing, unreadable, unsafe, foreign, or made for another model."""


class ModelError(MetaoptError):
    """A model cannot be built, loaded or adapted."""


class DataError(MetaoptError):
    """Images or labels are missing or have the wrong shape, type or range."""


class OutputError(MetaoptError):
    """A result cannot be written where it was asked for."""


def check_positive(key: str, value: float, example: str = "0.001") -> None:
    """Refuse a number that is not positive and finite.

    Raises:
        ConfigError: it is not.
    """
    if not (_is_number(value) and value > 0):
        raise ConfigError(f"{key} is {value}; it must be positive and finite: set for example {example}")


def check_range(key: str, value: float, low: float, high: float = math.inf, *, example: str) -> None:
    """Refuse a number outside of [low, high].

    Raises:
        ConfigError: it is not in there.
    """
    if not (_is_number(value) and low <= value <= high):
        allowed = f"is [{low:g}, {high:g}]" if math.isfinite(high) else f"are finite values of at least {low:g}"
        raise ConfigError(f"{key} is {value}; allowed {allowed}: set for example {example}")


def _is_number(value: object) -> bool:
    """Whether it is a finite one."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_one_of(key: str, value: object, allowed: Iterable[object]) -> None:
    """Refuse a value that is not among the allowed ones.

    Raises:
        ConfigError: it is not.
    """
    allowed = [*allowed]
    if value not in allowed:
        raise ConfigError(f"{key} is {value!r}; allowed are {', '.join(map(str, allowed))}: choose one")


def check_kind(key: str, value: object, kind: type, allowed: str, fix: str) -> None:
    """Refuse a value of another type, where text or numbers stand for something that has to be made first.

    Raises:
        ConfigError: it is not of that type.
    """
    if not isinstance(value, kind):
        shown = repr(value) if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"
        raise ConfigError(f"{key} is {shown}; allowed is {allowed}: {fix}")
