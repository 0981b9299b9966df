"""How BatchNorm layers normalise: by the batch, and for some images by the source's statistics beside it.

What the prior does to a layer is in :mod:`metaopt.models.source_prior`. A small batch tells little of its domain, so
the source should count for more there; N images of it do so by themselves.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy
import torch
from torch import Tensor, nn

from metaopt.errors import ConfigError
from metaopt.models import SourceModel, prior_layers
from metaopt.policy.part import Part
from metaopt.policy.step import StepContext


@dataclass(frozen=True)
class BatchStatisticsConfig:
    """``prior``: N, the images for which the source's statistics count; None or 0: for none."""

    prior: float | None = None

    def __post_init__(self) -> None:
        """Check the count."""
        if self.prior is not None and not (math.isfinite(self.prior) and self.prior >= 0):
            raise ConfigError(
                f"batch_statistics.prior is {self.prior}; allowed is 0 or more images, or null: set for example 16"
            )


class BatchStatistics(Part):
    """BatchNorm normalises by the batch, with the source's statistics as a prior of N images beside it.

    Args:
        config: N at the start.
        layers: names of the layers with an N of their own, which is learned (`metaopt.models.prior_layers`); without
            any, N is the same for all, and fixed.
    """

    Config = BatchStatisticsConfig
    name = "batch_statistics"
    own_judge = "freeze"  # an objective can be had cheaply by other statistics

    def __init__(self, config: BatchStatisticsConfig | None = None, layers: Sequence[str] = ()) -> None:
        super().__init__(config)
        self.layers = tuple(layers)
        self.log_counts: nn.Parameter | None = None
        if self.layers and self.config.prior:
            self.log_counts = nn.Parameter(torch.full((len(self.layers),), math.log(self.config.prior)))

    @classmethod
    def build(cls, config: BatchStatisticsConfig, model: SourceModel, seed: int = 0) -> Self:
        """With an N for each BatchNorm layer."""
        return cls(config, prior_layers(model.module))

    def counts(self) -> Tensor | None:
        """N of each layer, (L,), or one for all, (); None without a prior."""
        if self.log_counts is not None:
            return self.log_counts.exp()
        return None if self.layers or not self.config.prior else torch.tensor(self.config.prior)

    def condition(self, context: StepContext) -> None:
        """Tell the source model."""
        context.statistics["batch_statistics"] = True
        if (counts := self.counts()) is not None:
            context.statistics["prior"] = counts

    def direct(self) -> Iterable[Tensor]:
        """The counts act in the forward pass."""
        return self.parameters()

    def to_dict(self) -> dict[str, Any]:
        """Settings and layers."""
        return {**super().to_dict(), "layers": list(self.layers)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Inverse of :meth:`to_dict`."""
        if not isinstance(values["layers"], list) or not all(isinstance(name, str) for name in values["layers"]):
            raise ValueError("the layers of batch_statistics are no list of names")
        return cls(cls.settings_of(values), values["layers"])

    def transferred(self, model: SourceModel) -> tuple[Self, str]:
        """The same prior on another model's layers: by depth, between neighbours linear in log N."""
        layers = prior_layers(model.module)
        found = type(self)(self.config, layers)
        if self.log_counts is not None and found.log_counts is not None:
            depths, known = (numpy.linspace(0, 1, len(names)) for names in (layers, self.layers))
            found.to(self.log_counts)
            found.log_counts.data.copy_(torch.from_numpy(numpy.interp(depths, known, self.log_counts.tolist())))
        return found, f"source prior of {len(layers)} BatchNorm layers by depth"
