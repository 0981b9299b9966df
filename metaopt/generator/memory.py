r"""The gradient memory layer (GML): a linear memory that learns, at test time, to store the gradients it has seen.

Every adapted scalar is a batch element with its own memory, a TTT-Linear layer (Sun et al., 2024) of hidden size h:

.. math::
    q, k, v = W_q x,\; W_k x,\; W_v x \qquad
    \ell(W, b) = \tfrac12 \lVert \mathrm{LN}(kW + b) - (v - k) \rVert^2 \\
    \eta = \sigma(w \cdot x + c) / h \qquad
    (W, b) \leftarrow (W, b) - \eta \nabla \ell \qquad
    z = q + \mathrm{LN}(qW + b) \qquad
    y = W_o \cdot \mathrm{LN}'(z)

============ ==========================================
symbol       name here
============ ==========================================
W_q W_k W_v  ``query``, ``key``, ``value`` (h, 2)
W_0, b_0     ``initial_weight`` (h, h), ``initial_bias`` (h,)
w, c         ``rate_weight`` (2,), ``rate_bias`` ()
LN, LN'      ``norm_*``, ``readout_norm_*`` (h,)
W_o          ``readout_weight`` (h,), ``readout_bias`` ()
============ ==========================================

164 learned scalars at h = 8. Source: MGG (arXiv 2412.16901), section 3, gradient memory layer.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

NORM_EPS = 1e-6


class GradientMemoryLayer(nn.Module):
    """One memory step and read-out for N scalars at once.

    Args:
        hidden: h, the memory's width.
        zero_readout: start with a read-out of exactly zero (the layer then first learns, and only then acts).
    """

    def __init__(self, hidden: int = 8, zero_readout: bool = False) -> None:
        super().__init__()
        self.hidden = hidden
        bound = 1.0 / math.sqrt(2.0)  # torch's own start for a linear layer with two inputs
        self.query = nn.Parameter(torch.empty(hidden, 2).uniform_(-bound, bound))
        self.key = nn.Parameter(torch.empty(hidden, 2).uniform_(-bound, bound))
        self.value = nn.Parameter(torch.empty(hidden, 2).uniform_(-bound, bound))
        self.initial_weight = nn.Parameter(0.02 * torch.randn(hidden, hidden))
        self.initial_bias = nn.Parameter(torch.zeros(hidden))
        self.rate_weight = nn.Parameter(0.02 * torch.randn(2))
        self.rate_bias = nn.Parameter(torch.zeros(()))
        self.norm_weight = nn.Parameter(torch.ones(hidden))
        self.norm_bias = nn.Parameter(torch.zeros(hidden))
        self.readout_norm_weight = nn.Parameter(torch.ones(hidden))
        self.readout_norm_bias = nn.Parameter(torch.zeros(hidden))
        bound = 0.0 if zero_readout else 1.0 / math.sqrt(hidden)
        self.readout_weight = nn.Parameter(torch.empty(hidden).uniform_(-bound, bound))
        self.readout_bias = nn.Parameter(torch.zeros(()))

    def init(self, count: int) -> tuple[Tensor, Tensor]:
        """The learned start for ``count`` memories: weight (N, h, h) and bias (N, h), as views without copies."""
        return (
            self.initial_weight.expand(count, self.hidden, self.hidden),
            self.initial_bias.expand(count, self.hidden),
        )

    def forward(self, features: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Store the features, then read them out with the updated memory.

        Args:
            features: x, shape (N, 2).
            weight: W before this step, shape (N, h, h).
            bias: b before this step, shape (N, h).

        Returns:
            Read-out (N,), and the updated weight and bias.
        """
        query = features @ self.query.T  # (N, h)
        key = features @ self.key.T
        target = features @ self.value.T - key
        rate = torch.sigmoid(features @ self.rate_weight + self.rate_bias).unsqueeze(1) / self.hidden  # (N, 1)
        descent = rate * self._preactivation_gradient(_row_times(key, weight) + bias, target)  # (N, h)
        weight = torch.addcmul(weight, key.unsqueeze(2), descent.unsqueeze(1), value=-1.0)
        bias = bias - descent
        hidden = query + self._norm(_row_times(query, weight) + bias)
        hidden = functional.layer_norm(
            hidden, (self.hidden,), self.readout_norm_weight, self.readout_norm_bias, NORM_EPS
        )
        return hidden @ self.readout_weight + self.readout_bias, weight, bias

    def _norm(self, preactivation: Tensor) -> Tensor:
        return functional.layer_norm(preactivation, (self.hidden,), self.norm_weight, self.norm_bias, NORM_EPS)

    def _preactivation_gradient(self, preactivation: Tensor, target: Tensor) -> Tensor:
        """Gradient of the reconstruction loss in kW + b, in closed form: the backward of a layer norm, (N, h)."""
        variance, mean = torch.var_mean(preactivation, dim=1, correction=0, keepdim=True)
        inverse_std = torch.rsqrt(variance + NORM_EPS)
        normalised = (preactivation - mean) * inverse_std
        error = normalised * self.norm_weight + self.norm_bias - target
        upstream = error * self.norm_weight
        projection = (upstream * normalised).mean(dim=1, keepdim=True)
        return inverse_std * (upstream - upstream.mean(dim=1, keepdim=True) - normalised * projection)


def _row_times(rows: Tensor, matrices: Tensor) -> Tensor:
    """Row vector times matrix for each scalar: (N, h), (N, h, h) -> (N, h)."""
    return torch.bmm(rows.unsqueeze(1), matrices).squeeze(1)
