r"""The sample filter: only samples that are reliable, and not like those before, are learned from.

EATA (Niu et al., ICML 2022, equations 2 to 6; constants of its released code). With the entropy :math:`H_i` of the
prediction :math:`p_i` over C classes and the mean prediction :math:`\bar p` of the samples learned from so far, a
sample counts if

.. math:: H_i < E_0 = m \log C \quad\text{and}\quad |\cos(\bar p, p_i)| < \epsilon,

by :math:`\exp(E_0 - H_i)` where they are weighted; then :math:`\bar p \leftarrow 0.9\,\bar p + 0.1\,` their mean. The
weights are scaled so that the mean over the batch is the mean over the samples that count. A batch without any is
refused. Where a rule looks twice (SAR, ICLR 2023), a sample has to be reliable at both looks.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from metaopt.errors import check_range
from metaopt.objectives.entropy import softmax_entropy
from metaopt.policy.part import Part
from metaopt.policy.state import check_mean_prediction
from metaopt.policy.step import StepContext
from metaopt.types import Parameters

MOMENTUM = 0.9


@dataclass(frozen=True)
class SampleFilterConfig:
    """What counts; 0.05 is published for ImageNet's 1,000 classes, 0.4 for CIFAR-10's ten."""

    margin: float = 0.4  # m, E_0 as a share of the largest possible entropy
    similarity: float | None = 0.05  # ε; None: samples may be alike
    weighted: bool = True  # whether surer samples count more

    def __post_init__(self) -> None:
        """Check every value against its range."""
        check_range("sample_filter.margin", self.margin, 0, 1, example="0.4")
        if self.similarity is not None:
            check_range("sample_filter.similarity", self.similarity, 0, 1, example="0.05")


class SampleFilter(Part):
    """Only samples that are reliable, and unlike those before, are learned from (EATA, SAR)."""

    Config = SampleFilterConfig
    name = "sample_filter"
    events = ("refused",)

    def init(self, parameters: Parameters) -> Tensor:
        """The mean prediction of the samples learned from: empty before any."""
        return next(iter(parameters.values())).detach().new_zeros(0)

    def check_state(self, state: Tensor, classes: int) -> None:
        """A mean prediction, or none yet."""
        check_mean_prediction(self.name, state, classes)

    def weigh(self, context: StepContext, logits: Tensor) -> Tensor:
        """The weight of each sample, (B,)."""
        config, p, mean = self.config, logits.softmax(dim=1), context.state[self.name]
        entropy, threshold = softmax_entropy(logits), config.margin * math.log(p.shape[1])
        counts = entropy < threshold
        first_look = "counts" not in context.signals
        if not first_look:
            counts &= context.signals["counts"]
        elif config.similarity is not None and mean.numel() > 0:
            counts &= cosine_similarity(mean.unsqueeze(0), p, dim=1).abs() < config.similarity
        if first_look:
            context.signals["counts"] = counts
            context.refused = not bool(counts.any())
            if not context.refused:
                now = p[counts].mean(dim=0)
                context.remember(self.name, now if mean.numel() == 0 else torch.lerp(now, mean, MOMENTUM))
        weights = (threshold - entropy).exp() if config.weighted else torch.ones_like(entropy)
        return torch.where(counts, weights, 0.0) * len(counts) / counts.sum().clamp_min(1).to(entropy)
