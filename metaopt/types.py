"""Tensor aliases, small records and the protocols that the parts meet through.

Shapes are written with B images in a batch, C classes, H x W pixels, D_l features in block l, N adapted scalars.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)
"""Types in which neither a sum over a batch nor a small update keeps its digits."""

Parameters = dict[str, Tensor]
"""The adapted tensors by their name in the source model, in the model's order."""


class ForwardOutput(NamedTuple):
    """What one forward pass of the source model gives, and what an objective may read beside it."""

    logits: Tensor  # (B, C)
    features: tuple[Tensor, ...] = ()  # one (B, D_l) per block; empty where nobody asked for them
    view_logits: Tensor | None = None  # (B, C), of an augmented view of the same images; None where nobody asked
    teacher_logits: Tensor | None = None  # (B, C), of a teacher on the same images; None where nobody asked


@dataclass(frozen=True)
class SourceStatistics:
    """Mean and biased standard deviation of each block's features over clean source images (MGG, section 3)."""

    mean: tuple[Tensor, ...]  # one (D_l,) per block
    std: tuple[Tensor, ...]  # one (D_l,) per block

    def to(self, *args: Any, **kwargs: Any) -> "SourceStatistics":
        """The same on another device or in another type, as of ``Tensor.to``."""
        return SourceStatistics(
            tuple(mean.to(*args, **kwargs) for mean in self.mean), tuple(std.to(*args, **kwargs) for std in self.std)
        )


@dataclass(frozen=True)
class StepOutput:
    """What one adaptation step hands back: the predictions made before its update, and the loss it descended."""

    logits: Tensor  # (B, C)
    loss: Tensor | None = None  # scalar; None for a method without an objective
    terms: Mapping[str, Tensor] = field(default_factory=dict)  # unweighted scalar value of each part of the objective
    weights: Mapping[str, Tensor] = field(default_factory=dict)  # scalar weight of each of them
    signals: Mapping[str, Tensor] = field(default_factory=dict)  # scalars told of the batch: shift_distance
    events: tuple[str, ...] = ()  # what parts did out of the ordinary, such as "restored"
    updated: bool = False  # whether the batch was updated on: no gate stayed closed and nothing refused it
    passes: float = 0.0  # of the network, counted for each image; with its backward pass, one counts twice
    looked: float = 0.0  # of these, those of parts that only look on, once all is done


class UpdateRule(Protocol):
    """A pure ``init``/``update`` pair over all adapted scalars at once.

    ``update`` returns what is to be *subtracted* from the parameters. It mutates nothing and is differentiable in the
    gradients, in the state and in the rule's own learned tensors. A rule of two passes (SAM) also has
    ``ascend(gradients) -> Parameters``: what is added to the parameters for the second, whose gradient ``update`` gets.
    """

    def init(self, parameters: Parameters) -> Any:
        """State before the first step."""
        ...

    def update(self, gradients: Parameters, state: Any) -> tuple[Parameters, Any]:
        """Subtrahend of each parameter, and the next state."""
        ...


LossOf = Callable[[Parameters], Tensor]
"""The batch's loss at some parameters, a scalar with its graph."""


class ApplyUpdate(Protocol):
    """Turns a loss into new parameters: what tells the inner-loop backends and the in-place deployment apart."""

    def __call__(self, loss_of: LossOf, parameters: Parameters, state: Any) -> tuple[Parameters, Any]:
        """New parameters and new state after one update on ``loss_of``; the very ``state`` where it was refused."""
        ...


def widened(tensor: Tensor) -> Tensor:
    """Half precision as float32, differentiably; the tensor itself in any wider type."""
    return tensor.float() if tensor.dtype in HALF else tensor
