r"""The learned initialization: where the normalisation layers start, in place of the source's own values.

.. math:: \theta_0 = \theta_S + \delta

with one learned number :math:`\delta` for each scalar of their weights and biases. Meta-training finds the start from
which the first updates help most, as MAML does (Finn et al., ICML 2017); where restoration brings something back, it
brings this back. The network's file stays as it is: :math:`\delta` is a part of the policy.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from metaopt.errors import check_positive, check_range
from metaopt.models import SourceModel
from metaopt.parameters import ParameterLayout, adapted_layout
from metaopt.policy.part import Part
from metaopt.types import Parameters


@dataclass(frozen=True)
class InitializationConfig:
    """How :math:`\\delta` is learned: thousands of numbers, of another scale than the policy's few."""

    lr: float = 3e-3  # peak of the meta-optimizer's rate
    decay: float = 0.03  # weight of the sum of squares in the meta-loss

    def __post_init__(self) -> None:
        """Check every value against its range."""
        check_positive("initialization.lr", self.lr)
        check_range("initialization.decay", self.decay, 0, example="0.03")


class Initialization(Part):
    """Norm layers start where meta-training found that adaptation goes best.

    Args:
        config: how it is learned.
        sizes: number of scalars in each tensor, by its name in the model; delta is 0 before meta-training.
    """

    Config = InitializationConfig
    name = "initialization"
    learned_only = True
    own_judge = "drop"  # an objective can be had cheaply by another start

    def __init__(self, config: InitializationConfig | None = None, sizes: Mapping[str, int] | None = None) -> None:
        super().__init__(config)
        self.sizes = dict(sizes or {})
        self.offset = nn.Parameter(torch.zeros(sum(self.sizes.values())))

    @classmethod
    def build(cls, config: InitializationConfig, model: SourceModel, seed: int = 0) -> Self:
        """For all normalisation layers of a model.

        Raises:
            ModelError: it has none.
        """
        return cls(config, {tensor.name: tensor.numel for tensor in adapted_layout(model).tensors})

    def start(self, parameters: Parameters) -> Parameters:
        """theta_S + delta; tensors that it does not know stay as they are."""
        pieces = dict(zip(self.sizes, self.offset.split([*self.sizes.values()]), strict=True))
        return {
            name: tensor + pieces[name].view_as(tensor).to(tensor) if name in pieces else tensor
            for name, tensor in parameters.items()
        }

    def meta_rate(self) -> float:
        """A rate and a gradient clip of its own."""
        return self.config.lr

    def penalty(self) -> Tensor:
        """Sum of squares of delta, weighted."""
        return self.config.decay * self.offset.square().sum()

    def to_dict(self) -> dict[str, Any]:
        """Settings and sizes."""
        return {**super().to_dict(), "sizes": self.sizes}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Inverse of :meth:`to_dict`."""
        if not all(isinstance(name, str) and type(size) is int and size >= 0 for name, size in values["sizes"].items()):
            raise ValueError("the initialization's sizes are no counts by name")
        return cls(cls.settings_of(values), values["sizes"])

    def check_layout(self, layout: ParameterLayout) -> None:
        """Refuse other sizes, and tensors that do not adapt."""
        numels = {tensor.name: tensor.numel for tensor in layout.tensors}
        for name, size in self.sizes.items():
            if numels.get(name) != size:
                raise ValueError(f"the initialization has {size} numbers for '{name}', which has {numels.get(name)}")

    def transferred(self, model: SourceModel) -> tuple[None, str]:
        """It stays behind."""
        return None, "left out, it belongs to the other model's tensors; they start at the source's values"
