r"""The meta gradient generator (MGG): turns gradients into updates, in place of SGD or Adam.

Three variants, by configuration:

``published``
    :math:`\theta \leftarrow \theta - \alpha \tanh(\mathrm{GML}(x))` from a random start (arXiv 2412.16901, section 3).
``residual`` (default)
    :math:`\theta \leftarrow \theta - \alpha e^{s_l} \big(\mathrm{clamp}(x_1, \pm c) + \tanh(\mathrm{GML}(x))\big)` with
    a read-out that starts at zero and a learned log step size :math:`s_l` for each adapted tensor: it starts as Adam
    and learns the rest.
``step_sizes``
    the same without the memory: what the memory has to beat.

:math:`x = (x_1, x_2)` are the features of :mod:`metaopt.optimizers.adam`.

The gradient memory layer (GML) is a linear memory that learns, at test time, to store the gradients it has seen.

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
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from metaopt.errors import ConfigError, check_one_of, check_positive
from metaopt.optimizers.adam import Moments, gradient_features, init_moments
from metaopt.parameters import flatten, unflatten
from metaopt.types import Parameters

VARIANTS = ("residual", "published", "step_sizes")
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


@dataclass(frozen=True)
class GeneratorConfig:
    """Settings of a generator; ``lr`` is the base rate alpha, the rest as in the module's equations."""

    variant: str = "residual"
    lr: float = 1e-2
    hidden: int = 8
    clamp: float = 3.0
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        """Check every value against its range."""
        check_one_of("generator", self.variant, VARIANTS)
        check_positive("generator.lr", self.lr)
        check_positive("generator.eps", self.eps)
        if not self.clamp > 0:
            raise ConfigError(f"generator.clamp is {self.clamp}; it must be positive (inf: no clamp): set 3, say")
        if self.hidden != int(self.hidden) or self.hidden < 1:
            raise ConfigError(f"generator.hidden is {self.hidden}; it must be a whole number of at least 1: set 8, say")
        if len(self.betas) != 2 or not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ConfigError(
                f"generator.betas is {self.betas}; it must be two numbers in [0, 1): use for example (0.9, 0.99)"
            )


class GeneratorState(NamedTuple):
    """All that the generator remembers: h² + h + 2 floats for each adapted scalar, and one counter."""

    moments: Moments
    memory_weight: Tensor | None  # W, (N, h, h); None without a memory
    memory_bias: Tensor | None  # b, (N, h)


class GradientGenerator(nn.Module):
    """A learned update rule, as the pure pair :meth:`init` and :meth:`update` (see ``metaopt.types.UpdateRule``).

    Args:
        config: variant and constants.
        tensors: names of the adapted tensors that get a learned log step size each, in order. Empty: one step size is
            shared by all, so that the generator runs on any model.
    """

    def __init__(self, config: GeneratorConfig, tensors: Sequence[str] = ()) -> None:
        super().__init__()
        self.config = config
        self.tensors = tuple(tensors)
        self.memory: GradientMemoryLayer | None = None
        if config.variant != "step_sizes":
            self.memory = GradientMemoryLayer(config.hidden, zero_readout=config.variant == "residual")
        self.log_step_sizes: nn.Parameter | None = None
        if config.variant != "published":
            self.log_step_sizes = nn.Parameter(torch.zeros(max(1, len(self.tensors))))

    def init(self, parameters: Parameters) -> GeneratorState:
        """State before the first gradient, on the parameters' device and in their type."""
        self._check(parameters)
        flat = flatten(parameters).detach()
        weight = bias = None
        if self.memory is not None:
            weight, bias = self.memory.init(flat.numel())
        return GeneratorState(init_moments(flat), weight, bias)

    def update(self, gradients: Parameters, state: GeneratorState) -> tuple[Parameters, GeneratorState]:
        """Generate the update that is to be subtracted.

        Args:
            gradients: gradient of each adapted tensor, in the order of :meth:`init`.
            state: state before this gradient; it is not changed.

        Returns:
            The subtrahend of each tensor, and the new state.
        """
        config = self.config
        momentum, gradient, moments = gradient_features(flatten(gradients), state.moments, config.betas, config.eps)
        weight, bias = state.memory_weight, state.memory_bias
        direction = torch.zeros_like(momentum)
        if self.memory is not None and weight is not None and bias is not None:
            readout, weight, bias = self.memory(torch.stack((momentum, gradient), dim=1), weight, bias)
            direction = torch.tanh(readout)
        if self.log_step_sizes is not None:
            direction = (momentum.clamp(-config.clamp, config.clamp) + direction) * self._step_sizes(gradients)
        return unflatten(config.lr * direction, gradients), GeneratorState(moments, weight, bias)

    def scale_step_sizes(self, factor: float) -> None:
        """Multiply all learned step sizes by a factor; where they are frozen, or there are none, nothing changes."""
        if self.log_step_sizes is not None and self.log_step_sizes.requires_grad:
            self.log_step_sizes.data += math.log(factor)

    def penalty(self) -> Tensor:
        """Mean square of the log step sizes, which meta-training shrinks towards 0; scalar."""
        if self.log_step_sizes is None:
            return torch.zeros(())
        return self.log_step_sizes.square().mean()

    def _step_sizes(self, gradients: Parameters) -> Tensor:
        """Step size of each scalar, (N,), or (1,) where one is shared."""
        assert self.log_step_sizes is not None
        sizes = self.log_step_sizes.exp()
        if not self.tensors:
            return sizes
        counts = [gradient.numel() for gradient in gradients.values()]
        # With the total given, no device has to wait for the counts.
        return sizes.repeat_interleave(torch.tensor(counts, device=sizes.device), output_size=sum(counts))

    def _check(self, parameters: Parameters) -> None:
        if self.tensors and tuple(parameters) != self.tensors:
            differing = sorted(set(parameters).symmetric_difference(self.tensors))[:3]
            raise ConfigError(
                f"the generator has step sizes for {len(self.tensors)} tensors and got {len(parameters)} "
                f"(differing: {', '.join(differing) or 'the order'}); build it with this model's tensor names"
            )
