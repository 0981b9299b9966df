"""The embedded data: scikit-learn's handwritten digits as small colour images.

The 1,797 scans of 8x8 pixels are part of scikit-learn's wheel (E. Alpaydin, C. Kaynak, "Optical Recognition of
Handwritten Digits", UCI, 1998), so nothing is fetched. Each scan is enlarged to 32x32 and drawn with its own random ink
on its own random paper: only then does a shift of colour, contrast or brightness mean something to a model.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from metaopt.data.images import ImageSet, to_bytes
from metaopt.data.readers.base import Reader
from metaopt.data.seeding import generator_for
from metaopt.data.shifts import TEST, shift_names
from metaopt.data.stream import Stream, shifted_stream
from metaopt.errors import ConfigError

SOURCE_SIZE, UNLABELED_SIZE = 1000, 128
PARTS = ("stream", "source")  # the labelled ones
SIDE = 32  # pixels
LEAST_CONTRAST = 0.35  # smallest difference in luma between ink and paper
LUMA = torch.tensor([0.299, 0.587, 0.114])  # ITU-R BT.601


@dataclass(frozen=True)
class DigitsParts:
    """Disjoint stratified parts of the digits."""

    source: ImageSet  # 1,000 labelled images to train a source model on
    unlabeled: ImageSet  # 128 images without labels, for meta-training
    stream: ImageSet  # 669 labelled images to deploy on


@cache
def load_digits(seed: int = 0) -> DigitsParts:
    """The three parts, each (N, 3, 32, 32) uint8; the same for the same seed.

    Args:
        seed: of the split and of the colours.
    """
    from sklearn.datasets import load_digits as load_scans

    scans, classes = load_scans(return_X_y=True)  # (1797, 64) in 0..16 and (1797,)
    labels = torch.from_numpy(np.asarray(classes)).long()
    strokes = torch.from_numpy(np.asarray(scans)).float().view(-1, 8, 8) / 16
    images = _colour(strokes, generator_for(seed, "digits"))
    rest, source = _split(np.arange(len(labels)), labels, SOURCE_SIZE, seed)
    stream, unlabeled = _split(rest, labels, UNLABELED_SIZE, seed)
    return DigitsParts(
        source=ImageSet(images[source], labels[source]),
        unlabeled=ImageSet(images[unlabeled]),
        stream=ImageSet(images[stream], labels[stream]),
    )


def _split(index: np.ndarray, labels: Tensor, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Shuffle and split off ``size`` of the indices, every class in proportion."""
    from sklearn.model_selection import train_test_split

    kept, parted = train_test_split(index, test_size=size, stratify=labels[index].numpy(), random_state=seed)
    return np.asarray(kept), np.asarray(parted)


def _colour(strokes: Tensor, generator: torch.Generator) -> Tensor:
    """Draw stroke densities (N, 8, 8) in [0, 1] with random ink on random paper: (N, 3, 32, 32) uint8."""
    count = strokes.shape[0]
    density = F.interpolate(strokes[:, None], size=(SIDE, SIDE), mode="bilinear", align_corners=False)
    colours = torch.rand(count, 2, 3, generator=generator)
    while (poor := _contrast(colours) < LEAST_CONTRAST).any():
        colours[poor] = torch.rand(int(poor.sum()), 2, 3, generator=generator)
    ink, paper = colours[:, 0, :, None, None], colours[:, 1, :, None, None]
    return to_bytes(paper + (ink - paper) * density)


def _contrast(colours: Tensor) -> Tensor:
    """Difference in luma between the two colours (N, 2, 3) of each image: (N,)."""
    return ((colours[:, 0] - colours[:, 1]) @ LUMA).abs()


@dataclass
class Digits(Reader):
    """The digits under corruptions of the registry; the digits themselves stay those of seed 0.

    Attributes:
        corruptions: None: the fifteen of CIFAR-10-C; none at all: the clean images, in one domain.
        part: "stream", 669 held-out digits, or "source", the labelled images that source models are trained on.
    """

    name = "digits"
    has_clean_images = True
    keeps_class_mirrored = False

    part: str = "stream"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.part not in PARTS:
            raise ConfigError(f"data.part={self.part} is unknown; allowed are {', '.join(PARTS)}: choose one")

    def clean_images(self) -> ImageSet:
        """The 128 images of the unlabeled part."""
        return load_digits().unlabeled

    def _domains(self, seed: int) -> Stream:
        names = shift_names(TEST) if self.corruptions is None else self.corruptions
        clean = getattr(load_digits(), self.part).take(self.limit)
        return shifted_stream(clean, names, self.severities, name=self.name, seed=seed)
