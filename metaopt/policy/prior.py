"""The learned prior: for how many images the source's statistics count in each BatchNorm layer.

What it does to a layer is in :mod:`metaopt.models.source_prior`. A small batch tells little of its domain, so the
source should count for more there; N images of it do so by themselves.
"""

import math
from collections.abc import Sequence

import numpy
import torch
from torch import Tensor, nn

from metaopt.errors import ConfigError
from metaopt.models import SourceModel, prior_layers

DEFAULT_COUNT = 16.0
"""Where meta-training starts: what Schneider et al. (NeurIPS 2020) found good across batch sizes."""


class LearnedPrior(nn.Module):
    """N of each layer, as the exponential of a learned number.

    Args:
        layers: names of the layers, in the model's order (``metaopt.models.prior_layers``).
        count: N to start from.

    Raises:
        ConfigError: the count is not positive and finite.
    """

    def __init__(self, layers: Sequence[str], count: float = DEFAULT_COUNT) -> None:
        super().__init__()
        if not (math.isfinite(count) and count > 0):
            raise ConfigError(f"meta.prior is {count}; allowed is a positive number of images, or null: set 16")
        self.layers = tuple(layers)
        self.log_counts = nn.Parameter(torch.full((len(self.layers),), math.log(count)))

    def forward(self) -> Tensor:
        """N of each layer, (L,)."""
        return self.log_counts.exp()

    def on(self, layers: Sequence[str]) -> "LearnedPrior":
        """The same prior on another model's layers: by depth, between neighbours linear in log N."""
        found = LearnedPrior(layers).to(self.log_counts)
        depths, known = (torch.linspace(0, 1, len(names)).tolist() for names in (layers, self.layers))
        found.log_counts.data.copy_(torch.from_numpy(numpy.interp(depths, known, self.log_counts.tolist())))
        return found


def learned_prior(model: SourceModel, count: float | None) -> LearnedPrior | None:
    """A fresh prior on a model's layers that starts at ``count``; None without a count or such layers."""
    layers = prior_layers(model.module)
    return None if count is None or not layers else LearnedPrior(layers, count)


class FixedPrior(nn.Module):
    """The same N in every layer, and nothing to learn.

    Raises:
        ConfigError: the count is negative or not finite.
    """

    def __init__(self, count: float) -> None:
        super().__init__()
        if not (math.isfinite(count) and count >= 0):
            raise ConfigError(f"method.prior is {count}; allowed is 0 or more images, or null: set for example 16")
        self.count = count

    def forward(self) -> Tensor:
        """N, ()."""
        return torch.tensor(self.count)


Prior = LearnedPrior | FixedPrior
