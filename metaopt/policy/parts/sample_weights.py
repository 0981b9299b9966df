r"""Certainty and diversity weights: samples count in the loss by how sure they are and how unlike what came before.

ROID (Marsden, Döbler and Yang, WACV 2024, section 3.2; constants of its released code). With the running mean
:math:`\bar p` of the predictions :math:`p_i = \mathrm{softmax}(z_i)` and their entropy H,

.. math:: d_i = 1 - \cos(\bar p, p_i), \quad c_i = -H(p_i), \quad
    w_i = \exp(\tilde d_i \tilde c_i / T) \; [\tilde d_i \ge \mathrm{mean}\,\tilde d], \quad
    \bar p \leftarrow \beta \bar p + (1 - \beta) \, \mathrm{mean}_i\, p_i,

each of d and c brought to [0, 1] over the batch. Where all samples are alike, they count alike (the released code
gives NaN). The loss is the sum over the samples divided by the size of the batch, those left out included.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from metaopt.errors import check_positive, check_range
from metaopt.objectives.entropy import softmax_entropy
from metaopt.policy.part import Part
from metaopt.policy.state import check_mean_prediction
from metaopt.policy.step import StepContext


@dataclass(frozen=True)
class SampleWeightsConfig:
    """Temperature T, and momentum β of the mean prediction."""

    temperature: float = 1 / 3
    momentum: float = 0.9

    def __post_init__(self) -> None:
        """Check every value against its range."""
        check_positive("sample_weights.temperature", self.temperature, "0.33")
        check_range("sample_weights.momentum", self.momentum, 0, 1, example="0.9")


class SampleWeights(Part):
    """Samples count by their certainty and by their diversity from the predictions before (ROID)."""

    Config = SampleWeightsConfig
    name = "sample_weights"

    def init(self, parameters: dict[str, Tensor]) -> Tensor:
        """The mean prediction: empty, which stands for an even one, until the number of classes is seen."""
        return next(iter(parameters.values())).detach().new_zeros(0)

    def check_state(self, state: Tensor, classes: int) -> None:
        """A mean prediction, or none yet."""
        check_mean_prediction(self.name, state, classes)

    def weigh(self, context: StepContext, logits: Tensor) -> Tensor:
        """w, (B,)."""
        p, mean = logits.softmax(dim=1), context.state[self.name]
        mean = torch.full_like(p[0], 1 / p.shape[1]) if mean.numel() == 0 else mean
        diversity = _to_unit_range(1 - cosine_similarity(mean.unsqueeze(0), p, dim=1))
        certainty = _to_unit_range(-softmax_entropy(logits))
        context.remember(self.name, torch.lerp(p.mean(dim=0), mean, self.config.momentum))
        weights = (diversity * certainty / self.config.temperature).exp()
        return torch.where(diversity < diversity.mean(), 0.0, weights)


def _to_unit_range(values: Tensor) -> Tensor:
    """Shifted and scaled to [0, 1]; zeros where all are the same."""
    span = values.max() - values.min()
    return torch.where(span > 0, (values - values.min()) / span.clamp_min(torch.finfo(values.dtype).tiny), 0.0)
