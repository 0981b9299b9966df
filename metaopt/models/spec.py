"""What identifies a source model, in primitives only, so that it can be stored in a checkpoint."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from metaopt.errors import CheckpointError, ModelError

Triple = tuple[float, float, float]

CUSTOM_PREFIX = "custom:"
"""Starts the name of a module that its user built: no registry can build it again."""


@dataclass(frozen=True)
class ModelSpec:
    """Architecture name, class count, input size (channels, height, width) and per-channel normalisation.

    ``mean`` and ``std`` are in units of images in [0, 1].

    Raises:
        ModelError: a value is out of range.
    """

    name: str
    num_classes: int
    input_size: tuple[int, int, int] | None = None  # None where any size goes and none is known
    mean: Triple = (0.0, 0.0, 0.0)
    std: Triple = (1.0, 1.0, 1.0)

    def __post_init__(self) -> None:
        if self.num_classes < 1:
            raise ModelError(f"num_classes={self.num_classes}; allowed is 1 or more: give the model's class count")
        if not all(map(math.isfinite, (*self.mean, *self.std))):
            raise ModelError(f"mean={self.mean} and std={self.std}; allowed are finite values: give the images' own")
        if min(self.std) <= 0:
            raise ModelError(f"std={self.std}; allowed are values above 0: give the images' standard deviations")
        if self.input_size is not None and (len(self.input_size) != 3 or min(self.input_size) < 1):
            raise ModelError(f"input_size={self.input_size}; allowed is (channels, height, width), each 1 or more")

    def to_dict(self) -> dict[str, Any]:
        """Primitives only, for a checkpoint under ``weights_only=True``."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ModelSpec":
        """Inverse of `to_dict`.

        Raises:
            CheckpointError: keys are missing or unknown, or their values are of no use.
        """
        names = {field.name for field in fields(cls)}
        if set(values) != names:
            raise CheckpointError(f"model spec has keys {sorted(values)}; allowed are {sorted(names)}: save it again")
        try:
            if not isinstance(values["name"], str) or type(values["num_classes"]) is not int:
                raise TypeError("its name is text and its class count a whole number")
            size = values["input_size"]
            size = None if size is None else (int(size[0]), int(size[1]), int(size[2]))
            mean, std = (triple(label, values[label]) for label in ("mean", "std"))
            return cls(values["name"], values["num_classes"], size, mean, std)
        except (TypeError, ValueError, LookupError, OverflowError, ModelError) as error:
            raise CheckpointError(f"model spec {dict(values)} is of no use ({error}); save it again") from error


def triple(label: str, values: Sequence[float]) -> Triple:
    """One value per RGB channel.

    Raises:
        ModelError: there are not three.
    """
    if len(values) != 3:
        raise ModelError(f"{label}={tuple(values)}; allowed are 3 values, one per RGB channel: give 3")
    red, green, blue = (float(value) for value in values)
    return (red, green, blue)
