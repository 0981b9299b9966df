"""What meta-training learns of experts: their gates, which stay as they are online, and where the experts start."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from metaopt.errors import ConfigError
from metaopt.experts.adapter import NAME, Experts, get_experts, with_experts
from metaopt.experts.config import ExpertsConfig
from metaopt.experts.mixture import EXPERT_TENSORS
from metaopt.experts.sites import Site
from metaopt.models import SourceModel
from metaopt.types import Parameters

LEARNING = ("learned", "frozen")
HANDING_ON = ("up_weight", "up_bias")


@dataclass(frozen=True)
class LearnedExpertsConfig:
    """The mixtures, and which of their tensors are learned.

    Attributes:
        mixtures: of every site. Their dropout stays the same online. Under "straight_through" predictions are those of
            "hard", and all gates have a gradient; under "hard" the activation sparsity gate has none.
        gates: "learned" or "frozen".
        initial: the experts' values before the first batch, "learned" or "frozen".

    Raises:
        ConfigError: neither of these.
    """

    mixtures: ExpertsConfig = field(default_factory=lambda: ExpertsConfig(dropout="straight_through"))
    gates: str = "learned"
    initial: str = "learned"

    def __post_init__(self) -> None:
        """Check which parts are learned."""
        for name in ("gates", "initial"):
            if getattr(self, name) not in LEARNING:
                value = getattr(self, name)
                raise ConfigError(f"experts.{name} is {value!r}; allowed are {', '.join(LEARNING)}: choose one")

    def to_dict(self) -> dict[str, Any]:
        """Primitives for a checkpoint."""
        return {"gates": self.gates, "initial": self.initial, **self.mixtures.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LearnedExpertsConfig":
        """Inverse of :meth:`to_dict`.

        Raises:
            ConfigError: an unknown key, or a value of another type or out of range.
        """
        parts = {name: values[name] for name in ("gates", "initial") if name in values}
        mixtures = ExpertsConfig.from_dict({name: value for name, value in values.items() if name not in parts})
        return cls(mixtures, **parts)


class LearnedExperts(nn.Module):
    """The learned tensors by site. They are no part of a source model: :meth:`attach` makes one that starts with them.

    Args:
        config: mixtures, and what is learned of them.
        sites: where they go.
    """

    def __init__(self, config: LearnedExpertsConfig, sites: tuple[Site, ...]) -> None:
        super().__init__()
        self.config = config
        self.mixtures = Experts(config.mixtures, [*sites])
        for tensor in self.gates().values():
            tensor.requires_grad_(config.gates == "learned")
        for tensor in self.initial().values():
            tensor.requires_grad_(config.initial == "learned")

    @classmethod
    def of(cls, model: SourceModel, config: LearnedExpertsConfig) -> "LearnedExperts":
        """With the first values of a model's experts.

        Raises:
            ModelError: the model has none.
        """
        experts = get_experts(model)
        learned = cls(config, experts.sites).to(next(experts.parameters()))
        learned.mixtures.load_state_dict(experts.state_dict())
        return learned

    def attach(self, model: SourceModel) -> SourceModel:
        """A model with these experts, which shares the network's tensors with ``model``.

        Raises:
            ModelError: the model has no place for experts.
        """
        beside = with_experts(model, self.config.mixtures)
        get_experts(beside).load_state_dict(self.mixtures.state_dict())
        return beside

    def gates(self) -> Parameters:
        """The gates' tensors under their names in a source model."""
        return self._named(own=False)

    def initial(self) -> Parameters:
        """The experts' own tensors under their names in a source model."""
        return self._named(own=True)

    def penalty(self) -> Tensor:
        """Sum of squares of what the experts hand on, 0 where they add nothing; scalar."""
        handed_on = [t for name, t in self.initial().items() if name.rpartition(".")[2] in HANDING_ON]
        return torch.stack([tensor.square().sum() for tensor in handed_on]).sum()

    def _named(self, *, own: bool) -> Parameters:
        tensors = self.mixtures.named_parameters()
        return {f"{NAME}.{name}": t for name, t in tensors if (name.rpartition(".")[2] in EXPERT_TENSORS) == own}

    def to_dict(self) -> dict[str, Any]:
        """What it was built from, as primitives; learned values travel in the ``state_dict``."""
        return {"config": self.config.to_dict(), "sites": [site.to_dict() for site in self.mixtures.sites]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LearnedExperts":
        """Inverse of :meth:`to_dict`."""
        sites = tuple(Site(**site) for site in values["sites"])
        return cls(LearnedExpertsConfig.from_dict(values["config"]), sites)
