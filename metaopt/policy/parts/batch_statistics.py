"""How BatchNorm layers normalise: by the batch, and for some images by the source's statistics beside it.

What the prior does to a layer is in :mod:`metaopt.models.source_prior`. A small batch tells little of its domain, so
the source should count for more there; N images of it do so by themselves.

Beside that the part remembers the moments of the stream since its domain began, of which :data:`WINDOW` images count.
Batches that are answered before they are learned from (`metaopt.online.gathering`) are too small to tell their own, and
go by the source, the stream and themselves; and the stream's are what an exported network can carry.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy
import torch
from torch import Tensor, nn

from metaopt.errors import ConfigError
from metaopt.models import ChannelMoments, SourceModel, merged_moments, prior_layers, running_statistics
from metaopt.policy.part import LayeredPart
from metaopt.policy.step import StepContext
from metaopt.types import Parameters

WINDOW = 200.0  # images of the stream that count: layers behind adapted ones see other inputs after some updates
EVERY = 8  # without a prior, whose way to normalise has the moments at hand, or compiled: one batch in so many tells


class StreamMemory(NamedTuple):
    """What the part remembers of the stream since its domain began."""

    batches: Tensor  # learned from, ()
    moments: ChannelMoments


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


class BatchStatistics(LayeredPart):
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
        super().__init__(config, layers)
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

    def init(self, parameters: Parameters) -> StreamMemory:
        """Nothing yet: the layers' widths are known after the first batch."""
        like = next(iter(parameters.values())).detach()
        empty = ChannelMoments(like.new_zeros(()), like.new_zeros(0), like.new_zeros(0))
        return StreamMemory(like.new_zeros(()), empty)

    def condition(self, context: StepContext) -> None:
        """Tell the source model."""
        context.statistics["batch_statistics"] = True
        if (counts := self.counts()) is not None:
            context.statistics["prior"] = counts
        memory = context.state[self.name]
        if context.few and memory.moments.mean.numel() > 0:
            context.statistics["stream"] = memory.moments
        compiled = getattr(context.model, "compiled", None) is not None
        # A pass that tells moments runs uncompiled: not the first, which shows whether the network can be compiled.
        if (counts is not None and not compiled) or int(memory.batches) % EVERY == compiled:
            context.moments = {}

    def settle(self, context: StepContext) -> None:
        """Remember what the batch has told of the stream."""
        memory, told = context.state[self.name], context.moments
        moments = memory.moments if not told else merged_moments(memory.moments, told, len(context.images), WINDOW)
        context.remember(self.name, StreamMemory(memory.batches + 1, moments))

    def rest(self, context: StepContext) -> None:
        """The same of a batch without an update: what the stream is like needs none."""
        self.settle(context)

    def exported_buffers(self, model: SourceModel, state: StreamMemory) -> Parameters:
        """Running statistics of the source and the stream, by their counts; none before the first batch."""
        if state.moments.mean.numel() == 0:
            return {}
        means, variances = running_statistics(model.module, self.counts(), state.moments)
        names = [f"module.{name}.running_" for name in prior_layers(model.module)]
        return {
            **{name + "mean": mean for name, mean in zip(names, means, strict=True)},
            **{name + "var": variance for name, variance in zip(names, variances, strict=True)},
        }

    def not_exported(self, state: StreamMemory) -> str | None:
        """A batch's own statistics, and without a batch so far any."""
        if state.moments.mean.numel() == 0:
            return "batch statistics, for no batch was met: BatchNorm goes by the source's"
        return "each batch's own statistics: BatchNorm goes by those of the source and of the stream so far"

    def direct(self) -> Iterable[Tensor]:
        """The counts act in the forward pass."""
        return self.parameters()

    def transferred(self, model: SourceModel) -> tuple[Self, str]:
        """The same prior on another model's layers: by depth, between neighbours linear in log N."""
        layers = prior_layers(model.module)
        found = type(self)(self.config, layers)
        if self.log_counts is not None and found.log_counts is not None:
            depths, known = (numpy.linspace(0, 1, len(names)) for names in (layers, self.layers))
            found.to(self.log_counts)
            found.log_counts.data.copy_(torch.from_numpy(numpy.interp(depths, known, self.log_counts.tolist())))
        return found, f"source prior of {len(layers)} BatchNorm layers by depth"
