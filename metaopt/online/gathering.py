"""Small batches, gathered until there are enough images for an update.

What a policy has learned holds for batches of about the size that it was meta-trained with: its rates, the weights of
its objective and what it takes for a shift are of that size, and a few images under them end in a collapse. So smaller
batches are answered as they come, and their images wait until an update can be made on all of them.
"""

import logging
from typing import Self

import torch
from torch import Tensor

from metaopt.errors import check_range
from metaopt.policy import AdaptationPolicy

_LOG = logging.getLogger(__name__)

WAITING = "waiting"  # event: answered, and waiting for more images


class Gathering:
    """The images that wait for an update.

    Args:
        least: images that an update is made on at least.

    Raises:
        ConfigError: fewer than 1.
    """

    def __init__(self, least: int = 1) -> None:
        check_range("gather", least, 1, example="32")
        self.asked = least
        self.reset()

    def reset(self) -> None:
        """Nothing waits, and as many images are waited for as at first."""
        self.least = self.asked
        self.waiting: Tensor | None = None  # (n, C, H, W), fewer than least

    @classmethod
    def of(cls, policy: AdaptationPolicy) -> Self:
        """For updates on at least half of what the policy's meta-training had in a batch, in its smallest one.

        Half does as well as all of it, and twice as often: on the digits' transformer (batch 64) and on ResNet-20
        (batch 100), in batches of 1 to 16.
        """
        return cls(max(1, -(-(policy.batch_size or 1) // 2)))

    def completed_by(self, images: Tensor) -> bool:
        """Whether images that wait would be enough with these."""
        return self.waiting is not None and len(self.waiting) + len(images) >= self.least

    def fewer(self, gathered: Tensor, own: int) -> Tensor:
        """The latest of the gathered images, half as many, where a budget of bytes is too small for all; until a reset.

        Args:
            gathered: (n, C, H, W).
            own: how many of them are new, which stay.
        """
        self.least = max(own, len(gathered) // 2)
        _LOG.warning("the budget is too small for updates on %d images: they are made on %d", len(gathered), self.least)
        return gathered[-self.least :]

    def add(self, images: Tensor) -> Tensor | None:
        """All that have come together with these, (n, C, H, W), where that is enough; else None, and they wait.

        Images of another size than those that wait take their place.
        """
        if self.waiting is not None and self.waiting.shape[1:] == images.shape[1:]:
            images = torch.cat([self.waiting, images])
        if len(images) >= self.least:
            self.waiting = None
            return images
        self.waiting = images.clone()  # the caller may use its memory again
        return None
