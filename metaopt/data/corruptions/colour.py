"""Contrast, brightness and saturation, with published constants; nothing here draws from the generator.

The hexcone model of hue, saturation and value is A. R. Smith's ("Color gamut transform pairs", SIGGRAPH 1978).
"""

import torch
from torch import Tensor

from metaopt.data.corruptions.severity import constants, truncate, unit

LUMA = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)  # shares of red, green and blue in grey, ITU-R BT.601
CONTRAST = ((1.0,), (0.75,), (0.5,), (0.4,), (0.3,), (0.15,))  # share of the distance to the mean that is kept
BRIGHTNESS = ((0.0,), (0.05,), (0.1,), (0.15,), (0.2,), (0.3,))  # added to the value
# Factor and offset of the saturation. Published severities 1 and 2 take colour away, 3 to 5 add it: between 2 and 3
# the line passes the unchanged image.
SATURATE = ((1.0, 0.0), (0.3, 0.0), (0.1, 0.0), (1.5, 0.0), (2.0, 0.1), (2.5, 0.2))


def contrast(images: Tensor, severity: float, generator: torch.Generator) -> Tensor:
    """Pull each channel towards its mean over the image."""
    (kept,) = constants(CONTRAST, severity)
    values = unit(images)
    # Summed pixel by pixel, as NumPy does: the last bit of the mean decides where a truncation meets a whole byte.
    mean = values.flatten(2).cumsum(2)[:, :, -1, None, None] / values[0, 0].numel()
    return truncate((values - mean) * kept + mean, images)


def brightness(images: Tensor, severity: float, generator: torch.Generator) -> Tensor:
    """Add to the value (the largest channel) and keep hue and saturation."""
    (added,) = constants(BRIGHTNESS, severity)
    hue, saturation, value = to_hsv(unit(images))
    return truncate(to_rgb(hue, saturation, (value + added).clamp(0, 1)), images)


def saturate(images: Tensor, severity: float, generator: torch.Generator) -> Tensor:
    """Scale the saturation and add to it."""
    factor, added = constants(SATURATE, severity)
    hue, saturation, value = to_hsv(unit(images))
    return truncate(to_rgb(hue, (saturation * factor + added).clamp(0, 1), value), images)


def to_hsv(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Hue (in turns, [0, 1)), saturation and value of (B, 3, H, W), each (B, H, W); grey has hue 0."""
    red, green, blue = images.unbind(1)
    value = images.amax(1)
    spread = value - images.amin(1)
    divisor = torch.where(spread > 0, spread, torch.ones_like(spread))
    sextant = torch.where(value == red, (green - blue) / divisor, torch.zeros_like(value))
    sextant = torch.where(value == green, 2 + (blue - red) / divisor, sextant)
    sextant = torch.where(value == blue, 4 + (red - green) / divisor, sextant)
    hue = torch.where(spread > 0, (sextant / 6).remainder(1), torch.zeros_like(value))
    saturation = spread / torch.where(value > 0, value, torch.ones_like(value))
    return hue, saturation, value


def to_rgb(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """The inverse of ``to_hsv``: (B, 3, H, W)."""
    sextant = (hue * 6).floor()
    part = hue * 6 - sextant
    low = value * (1 - saturation)
    falling = value * (1 - part * saturation)
    rising = value * (1 - (1 - part) * saturation)
    at = [sextant % 6 == position for position in range(6)]

    def channel(sextants_on: int) -> Tensor:
        """Level of the channel whose peak lies so many sextants after red's, around the hexcone."""
        peak, down, up = at[sextants_on] | at[sextants_on - 1], at[(sextants_on + 1) % 6], at[sextants_on - 2]
        return torch.where(peak, value, torch.where(down, falling, torch.where(up, rising, low)))

    return torch.stack([channel(0), channel(2), channel(4)], dim=1)
