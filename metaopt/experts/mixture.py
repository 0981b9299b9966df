r"""One mixture of activation sparsity experts, on tokens.

.. math:: y = s \sum_e \varphi_e(x)\,\big(U_e\,\mathrm{SDD}_e(\phi(D_e x + b_e)) + c_e\big)

with the weights :math:`\varphi` of the domain-aware gate, dropout by the shares of the activation sparsity gate, U_e
and c_e zero at first, and the constant scale s (MoASE, AAAI 2026, section "Methods"; symbols D, b, U, c are
``down_weight``, ``down_bias``, ``up_weight``, ``up_bias``).
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from metaopt.experts.config import ExpertsConfig
from metaopt.experts.dropout import spatial_dropout
from metaopt.experts.gates import ActivationSparsityGate, DomainAwareGate

EXPERT_TENSORS = ("down_weight", "down_bias", "up_weight", "up_bias")
"""A mixture's tensors that belong to its experts, not to its gates; the first axis of each counts the experts."""

_ACTIVATIONS = {"relu": functional.relu, "gelu": functional.gelu, "identity": lambda hidden: hidden}


class ExpertMixture(nn.Module):
    """E experts and their gates; all experts of a mixture run in two matrix products.

    Args:
        width: d, features of a token.
        config: see `ExpertsConfig`.
    """

    signs: Tensor

    def __init__(self, width: int, config: ExpertsConfig) -> None:
        super().__init__()
        self.config = config
        self.width = width
        experts, bottleneck = config.experts, config.bottleneck or max(1, width // 4)
        self.down_weight = nn.Parameter(torch.empty(experts, bottleneck, width))
        self.down_bias = nn.Parameter(torch.zeros(experts, bottleneck))
        self.up_weight = nn.Parameter(torch.zeros(experts, width, bottleneck))
        self.up_bias = nn.Parameter(torch.zeros(experts, width))
        nn.init.uniform_(self.down_weight, -1 / math.sqrt(width), 1 / math.sqrt(width))  # as LoRA's, and as nn.Linear's
        self.dag = DomainAwareGate(width, config)
        self.asg = ActivationSparsityGate(width, config)
        low = config.low_experts
        signs = torch.tensor([-1.0] * low + [1.0] * (experts - low))
        self.register_buffer("signs", signs, persistent=False)  # (E,): −1 keeps the smallest activations

    def forward(self, x: Tensor) -> Tensor:
        """What the experts add: tokens (B, T, d) -> (B, T, d)."""
        weights = self.dag(x)  # (B, T or 1, E)
        hidden = functional.linear(x, self.down_weight.flatten(0, 1), self.down_bias.flatten())
        hidden = _ACTIVATIONS[self.config.activation](hidden).unflatten(-1, self.down_bias.shape)  # (B, T, E, h)
        if self.config.sdd:
            hidden = self._drop(hidden, self.asg(x))
        # The weights go to the narrow side, so that one product sums over all experts.
        weighted = (hidden * weights.unsqueeze(-1)).flatten(-2)  # (B, T, E·h)
        summed = functional.linear(weighted, self.up_weight.transpose(0, 1).flatten(1))
        return self.config.scale * (summed + weights @ self.up_bias.to(weights.dtype))

    def _drop(self, hidden: Tensor, shares: Tensor) -> Tensor:
        config = self.config
        options = {"mode": config.dropout, "temperature": config.temperature, "rank_by": config.rank_by}
        if config.scope == "token":
            return spatial_dropout(hidden, shares, self.signs, **options)
        rows = hidden.transpose(1, 2)  # (B, E, T, h)
        kept = spatial_dropout(rows.flatten(2), shares[:, 0], self.signs, **options)
        return kept.unflatten(-1, rows.shape[2:]).transpose(1, 2)
