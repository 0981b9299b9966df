"""What every arrangement is."""

from typing import ClassVar

import torch
from torch import Tensor

from metaopt.data.seeding import generator_for
from metaopt.data.stream import Stream


class Arrangement:
    """Arranges the images of a stream; a subclass is a frozen dataclass of its settings, which it checks.

    Attributes:
        needs_labels: whether it arranges by them; then every domain that it is given has some.
    """

    needs_labels: ClassVar[bool] = False

    def __call__(self, stream: Stream, seed: int, batch_size: int) -> Stream:
        """The stream as it is met.

        Args:
            stream: domains as read, each once; one at least.
            seed: of all that is drawn.
            batch_size: images that are met at once.
        """
        raise NotImplementedError


def shuffled(count: int, seed: int, *key: object) -> Tensor:
    """0 to ``count`` - 1, (count,) int64, in the order in which a domain is met that nothing else arranges.

    Args:
        count: of images.
        seed: of the order.
        key: tells it from others of that seed.
    """
    return torch.randperm(count, generator=generator_for(seed, "order", *key))
