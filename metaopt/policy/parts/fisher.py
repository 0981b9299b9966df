r"""The Fisher regulariser: parameters that matter to the source are held where they started.

.. math:: \beta \sum_j F_j\,(\theta_j - \theta_{0,j})^2, \qquad
    F = \mathrm{mean}_B\, \big(\nabla_\theta\, \mathrm{CE}(z_B, \arg\max z_B)\big)^2

over batches B of clean source images, whose labels are the source model's own predictions (EATA: Niu et al., ICML
2022, equations 8 and 9; β and the mean over batches of its released code).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from metaopt.errors import ConfigError, check_range
from metaopt.optimizers.update import gradients_of
from metaopt.parameters import adapted_layout, call_with, detached
from metaopt.policy.part import Part
from metaopt.policy.step import StepContext
from metaopt.types import ForwardOutput, Parameters


@dataclass(frozen=True)
class FisherConfig:
    """``weight``: β; 2000 is published for ImageNet, 1 for CIFAR-10."""

    weight: float = 2000.0

    def __post_init__(self) -> None:
        """Check the weight."""
        check_range("fisher.weight", self.weight, 0, example="2000")


class Fisher(Part):
    """Norm parameters that matter to the source are held where they started (EATA)."""

    Config = FisherConfig
    name = "fisher"

    def __init__(self, config: FisherConfig | None = None, information: Mapping[str, Tensor] | None = None) -> None:
        super().__init__(config)
        self.information = dict(information or {})  # F of each adapted tensor, by its name in the source model

    def prepare(self, model: nn.Module, images: Callable[[], Tensor], batch_size: int) -> None:
        """Estimate F from clean source images, by batch statistics, unless it is there."""
        if self.information:
            return
        leaves = detached(adapted_layout(model).take(model))
        squares = [
            {name: gradient.square() for name, gradient in _gradients(model, leaves, batch).items()}
            for batch in images().split(batch_size)
        ]
        self.information = {name: torch.stack([each[name] for each in squares]).mean(dim=0) for name in leaves}

    def terms(self, context: StepContext, _output: ForwardOutput) -> dict[str, tuple[float, Tensor]]:
        """The weighted squares of how far the parameters are from their start.

        Raises:
            ConfigError: nothing was told of the source.
        """
        if not self.information:
            raise ConfigError(
                "the part fisher knows nothing of the source; it needs clean unlabeled images: set source.images=PATH, "
                "or call policy.prepare(model, lambda: images) in code"
            )
        start = context.start
        held = [
            (information.to(start[name]) * (context.parameters[name] - start[name]).square()).sum()
            for name, information in self.information.items()
            if name in context.parameters
        ]
        return {"fisher": (self.config.weight, torch.stack(held).sum())}

    def to_dict(self) -> dict[str, Any]:
        """Settings and F."""
        return {**super().to_dict(), "information": {name: f.cpu() for name, f in self.information.items()}}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Inverse of :meth:`to_dict`."""
        return cls(cls.settings_of(values), values["information"])

    def transferred(self, model: nn.Module) -> tuple[Self, str]:
        """It has to be estimated anew."""
        return type(self)(self.config), "of this model's own images"


def _gradients(model: nn.Module, leaves: Parameters, images: Tensor) -> Parameters:
    """Of the cross-entropy with the model's own predictions."""
    with torch.enable_grad():
        logits = call_with(model, leaves, (images,), {"batch_statistics": True}).logits
        return gradients_of(cross_entropy(logits, logits.argmax(dim=1)), leaves)
