r"""The two gates of a mixture (MoASE, AAAI 2026, equations 1, 3 and 4; g is an affine map and a softmax of the top k).

Domain-aware gate (DAG; "router" in the later paper): weights :math:`\varphi = g_{DAG}(\mathrm{SDD}_{1/2, low}(x))`,
from the weakly activated features, which carry the domain. Activation sparsity gate (ASG): each expert's share kept,
:math:`q_i + \eta\,\varepsilon_i` with :math:`\varepsilon = g_{ASG}(x)`, from all features.
"""

import torch
from torch import Tensor, nn

from metaopt.experts.config import ExpertsConfig
from metaopt.experts.dropout import hard_mask, spatial_dropout


def top_k_softmax(logits: Tensor, k: int) -> Tensor:
    """Softmax over the ``k`` largest of each row of (..., E), zero elsewhere; ties go to the lower index."""
    if k < logits.shape[-1]:
        kept = hard_mask(logits, k)
        logits = logits.masked_fill(~kept, -torch.inf)
    return logits.softmax(dim=-1)


class DomainAwareGate(nn.Module):
    """Weight of each expert, summing to one; the same for all where ``config.dag`` is off.

    Args:
        width: d, features of a token.
        config: uses ``dag*``, ``top_k``, ``scope``, ``sdd``, ``dropout`` and ``temperature``.
    """

    def __init__(self, width: int, config: ExpertsConfig) -> None:
        super().__init__()
        self.config = config
        self.router = nn.Linear(width, config.experts) if config.dag else None

    def forward(self, x: Tensor) -> Tensor:
        """Weights (B, T, E), or (B, 1, E) per sample, of tokens (B, T, d)."""
        config = self.config
        if self.router is None:
            return x.new_full((x.shape[0], 1, config.experts), 1 / config.experts)
        if config.dag_level == "sample":
            x = x.mean(dim=1, keepdim=True)  # first, for then dropout is nearly free
        if config.sdd and config.dag_reads != "all":
            x = self._decompose(x)
        return top_k_softmax(self.router(x), config.top_k or config.experts)

    def _decompose(self, x: Tensor) -> Tensor:
        config = self.config
        rows = x.flatten(1) if config.scope == "sample" else x
        sign = -1.0 if config.dag_reads == "low" else 1.0
        kept = spatial_dropout(rows, config.dag_share, sign, mode=config.dropout, temperature=config.temperature)
        return kept.view_as(x)


class ActivationSparsityGate(nn.Module):
    """Share of its activations that each expert keeps; its base share where ``config.asg`` is off.

    Args:
        width: d, features of a token.
        config: uses ``asg*``, ``bases``, ``low_share``, ``sdd`` and ``top_k``.
    """

    bases: Tensor

    def __init__(self, width: int, config: ExpertsConfig) -> None:
        super().__init__()
        self.config = config
        self.router = nn.Linear(width, config.experts) if config.asg and config.sdd else None
        self.register_buffer("bases", torch.tensor(config.base_shares), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Shares, broadcastable against (B, T, E), of tokens (B, T, d)."""
        config = self.config
        if self.router is None:
            return self.bases[None, None]
        raised = top_k_softmax(self.router(x), config.top_k or config.experts)  # (B, T, E)
        if config.asg_level != "token":
            raised = raised.mean(dim=(0, 1) if config.asg_level == "batch" else 1, keepdim=True)
        return self.bases + config.asg_range * raised
