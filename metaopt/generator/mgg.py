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

:math:`x = (x_1, x_2)` are the features of :mod:`metaopt.generator.features`.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metaopt.errors import ConfigError
from metaopt.generator.features import Moments, gradient_features, init_moments
from metaopt.generator.memory import GradientMemoryLayer
from metaopt.parameters import flatten, unflatten
from metaopt.types import Parameters

VARIANTS = ("residual", "published", "step_sizes")


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
        if self.variant not in VARIANTS:
            raise ConfigError(f"generator {self.variant!r} is unknown; allowed are {', '.join(VARIANTS)}: choose one")
        for name, value, allowed in (
            ("lr", self.lr, math.isfinite(self.lr) and self.lr > 0),
            ("eps", self.eps, math.isfinite(self.eps) and self.eps > 0),
        ):
            if not allowed:
                raise ConfigError(f"generator.{name} is {value}; it must be positive and finite: set a positive value")
        if not self.clamp > 0:
            raise ConfigError(f"generator.clamp is {self.clamp}; it must be positive (inf: no clamp): set 3, say")
        if self.hidden != int(self.hidden) or self.hidden < 1:
            raise ConfigError(f"generator.hidden is {self.hidden}; it must be a whole number of at least 1: set 8, say")
        if len(self.betas) != 2 or not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ConfigError(
                f"generator.betas is {self.betas}; it must be two numbers in [0, 1): use for example (0.9, 0.99)"
            )

    def to_dict(self) -> dict[str, Any]:
        """Primitives for a checkpoint."""
        return {**asdict(self), "betas": list(self.betas)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "GeneratorConfig":
        """Inverse of :meth:`to_dict`."""
        return cls(**{**values, "betas": tuple(values["betas"])})


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

    def stride(self, factor: float) -> None:
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
