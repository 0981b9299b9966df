"""What identifies a source model, in primitives only, so that it can be stored in a checkpoint."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from metaopt.errors import CheckpointError, ModelError

CUSTOM_PREFIX = "custom:"
"""Starts the name of a module that its user built: no registry can build it again."""


@dataclass(frozen=True)
class ModelSpec:
    """Architecture name, class count, input size (channels, height, width) and per-channel normalisation.

    ``mean`` and ``std`` are in units of images in [0, 1], with one value for each channel of the input. ``classes``
    are the logits of the network that are kept, by their index: ``num_classes`` counts those. None: all of them.

    Raises:
        ModelError: a value is out of range, or the values do not go together.
    """

    name: str
    num_classes: int
    input_size: tuple[int, int, int] | None = None  # None where any size goes and none is known
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    classes: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.num_classes < 2:
            raise ModelError(
                f"num_classes={self.num_classes}; allowed is 2 or more: give the model's class count, and of a network "
                "with one logit z give (0, z)"
            )
        if not all(map(math.isfinite, (*self.mean, *self.std))):
            raise ModelError(f"mean={self.mean} and std={self.std}; allowed are finite values: give the images' own")
        if min(self.std) <= 0:
            raise ModelError(f"std={self.std}; allowed are values above 0: give the images' standard deviations")
        if len(self.mean) != len(self.std):
            raise ModelError(
                f"mean={self.mean} and std={self.std}; allowed are as many values of each, one per channel: give both"
            )
        if self.input_size is not None and (len(self.input_size) != 3 or min(self.input_size) < 1):
            raise ModelError(f"input_size={self.input_size}; allowed is (channels, height, width), each 1 or more")
        if self.input_size is not None and self.input_size[0] != len(self.mean):
            raise ModelError(
                f"the model takes {self.input_size[0]} channels and mean={self.mean} has {len(self.mean)}; allowed is "
                f"one value per channel: give mean and std of {self.input_size[0]} values"
            )
        if self.classes is not None and len(self.classes) != self.num_classes:
            raise ModelError(
                f"num_classes={self.num_classes} and {len(self.classes)} classes are kept; allowed are as many: leave "
                "num_classes to the classes"
            )

    @property
    def channels(self) -> int:
        """Channels of the images that the model takes."""
        return len(self.mean)

    def to_dict(self) -> dict[str, Any]:
        """Primitives only, for a checkpoint under ``weights_only=True``."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ModelSpec":
        """Inverse of `to_dict`; of earlier files too, which have fewer keys.

        Raises:
            CheckpointError: keys are missing or unknown, or their values are of no use.
        """
        names = {field.name for field in fields(cls)}
        since = {"classes"}  # keys that came later
        if not names - since <= set(values) <= names:
            raise CheckpointError(f"model spec has keys {sorted(values)}; allowed are {sorted(names)}: save it again")
        try:
            if not isinstance(values["name"], str) or type(values["num_classes"]) is not int:
                raise TypeError("its name is text and its class count a whole number")
            size = values["input_size"]
            size = None if size is None else (int(size[0]), int(size[1]), int(size[2]))
            mean, std = (channel_values(label, values[label]) for label in ("mean", "std"))
            kept = values.get("classes")
            kept = None if kept is None else tuple(int(index) for index in kept)
            return cls(values["name"], values["num_classes"], size, mean, std, kept)
        except (TypeError, ValueError, LookupError, OverflowError, ModelError) as error:
            raise CheckpointError(f"model spec {dict(values)} is of no use ({error}); save it again") from error


def channel_values(label: str, values: Any) -> tuple[float, ...]:
    """One value per channel, as plain numbers.

    Args:
        label: what messages call them.
        values: numbers in a list, an array or a tensor of any shape.

    Raises:
        ModelError: they are no finite numbers, or there are none.
    """
    try:
        found = tuple(float(value) for value in _flat(values))
    except (TypeError, ValueError) as error:
        raise ModelError(f"{label}={values!r}; allowed are numbers, one per channel: give for example 3") from error
    if not found or not all(map(math.isfinite, found)):
        raise ModelError(f"{label}={found}; allowed are finite numbers, one per channel: give for example 3")
    return found


def class_indices(values: Any, available: int | None) -> tuple[int, ...]:
    """Which of a network's logits are kept, as plain integers.

    Args:
        values: indices in a list, an array or a tensor.
        available: logits of the network; None where nobody knows.

    Raises:
        ModelError: they are no distinct indices of logits, or fewer than two.
    """
    found = tuple(_flat(values))
    fix = "give the indices of two logits or more, each once"
    if not all(isinstance(index, int) and not isinstance(index, bool) for index in found):
        raise ModelError(f"classes={values!r}; allowed are integers: {fix}")
    if len(found) < 2 or len(set(found)) < len(found):
        raise ModelError(f"classes has {len(found)} indices, {len(set(found))} of them different; {fix}")
    if min(found) < 0 or (available is not None and max(found) >= available):
        top = "" if available is None else f" to {available - 1}"
        raise ModelError(f"classes reach from {min(found)} to {max(found)}; allowed is 0{top}: {fix}")
    return found


def _flat(values: Any) -> Iterable[Any]:
    """The entries of a list, an array or a tensor."""
    return values.reshape(-1).tolist() if hasattr(values, "reshape") else list(values)
