"""The registry of shifts: named ways in which images drift, with a strength.

A shift is a function ``f(images, strength, generator) -> images`` on a batch of float images (B, 3, H, W) in [0, 1],
with a strength in (0, 5] that stays the same over the batch. Add your deployment's own:

    register_shift("lens_dirt", my_function, family="meta")
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from metaopt.data.corruptions.blur import defocus_blur, gaussian_blur, glass_blur, motion_blur, zoom_blur
from metaopt.data.corruptions.colour import brightness, contrast, saturate
from metaopt.data.corruptions.digital import elastic_transform, jpeg_compression, pixelate
from metaopt.data.corruptions.noise import gaussian_noise, impulse_noise, shot_noise, speckle_noise
from metaopt.data.corruptions.procedural import (
    channel_gain,
    coloured_noise,
    gamma,
    hue,
    occlusion,
    posterise,
    random_convolution,
)
from metaopt.data.corruptions.severity import check_severity
from metaopt.data.corruptions.spatter import spatter
from metaopt.data.corruptions.weather import fog, frost, snow
from metaopt.data.images import validate_images
from metaopt.errors import DataError

ShiftFunction = Callable[[Tensor, float, torch.Generator], Tensor]

TEST, META, SELECTION, REPORT, WIDE, EXTRA = "test", "meta", "selection", "report", "wide", "extra"


@dataclass(frozen=True)
class Shift:
    """A named shift; calling it checks what its function gives."""

    name: str
    function: ShiftFunction
    family: str

    def __call__(self, images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
        """Shifted images of the same shape, type and device.

        Args:
            images: (B, 3, H, W) floating point in [0, 1].
            strength: in (0, 5]; 1 to 5 are the published severities where there are such.
            generator: source of everything random.

        Raises:
            DataError: the strength is out of range, or the function gave something else than such images.
        """
        shifted = self.function(images, check_severity(strength), generator)
        if _describe(shifted) != _describe(images):
            raise DataError(f"shift '{self.name}' gave {_describe(shifted)}: {_describe(images)} went in; return such")
        try:
            return validate_images(shifted)
        except DataError as error:
            raise DataError(f"shift '{self.name}' at strength {strength:g}: {error}") from error


_SHIFTS: dict[str, Shift] = {}


def register_shift(name: str, function: ShiftFunction, *, family: str) -> Shift:
    """Add a shift to the registry under a new name and give it back.

    Args:
        name: how configurations call it.
        function: ``f(images, strength, generator) -> images``.
        family: any word; the built-in ones are "test", "meta", "wide", "selection", "report" and "extra".

    Raises:
        DataError: the name is taken by another function.
    """
    if name in _SHIFTS and _SHIFTS[name].function is not function:
        raise DataError(f"a shift named '{name}' exists in family '{_SHIFTS[name].family}'; choose another name")
    _SHIFTS[name] = Shift(name, function, family)
    return _SHIFTS[name]


def get_shift(name: str) -> Shift:
    """The shift of that name.

    Raises:
        DataError: there is none; the message names the nearest.
    """
    if name not in _SHIFTS:
        near = difflib.get_close_matches(name, _SHIFTS, n=1, cutoff=0)
        raise DataError(f"unknown corruption '{name}': did you mean '{near[0]}'? Known are {', '.join(_SHIFTS)}")
    return _SHIFTS[name]


def shift_names(family: str | None = None) -> tuple[str, ...]:
    """Names in the order of registration, of one family or of all."""
    return tuple(shift.name for shift in _SHIFTS.values() if family in (None, shift.family))


def _describe(value: object) -> str:
    """Shape, type and device in words."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{tuple(value.shape)} {value.dtype} on {value.device}"


_BUILT_IN: dict[str, tuple[ShiftFunction, ...]] = {
    TEST: (  # the fifteen of CIFAR-10-C in their usual order: never seen in meta-training or selection
        *(gaussian_noise, shot_noise, impulse_noise, defocus_blur, glass_blur, motion_blur, zoom_blur),
        *(snow, frost, fog, brightness, contrast, elastic_transform, pixelate, jpeg_compression),
    ),
    META: (speckle_noise, gaussian_blur, spatter, saturate),  # its held-out four, for meta-training
    SELECTION: (gamma, posterise),  # outside these nineteen, as all below: to choose between policies
    REPORT: (hue, channel_gain),  # to report on what nobody chose by
    WIDE: (random_convolution, coloured_noise),  # for meta-training beside the held-out four
    EXTRA: (occlusion,),  # what may lie on top of a task's shift
}
for _family, _functions in _BUILT_IN.items():
    for _function in _functions:
        register_shift(_function.__name__, _function, family=_family)
