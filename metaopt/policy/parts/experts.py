"""Experts beside the network (MoASE, arXiv 2405.16486), and what meta-training learns of them.

Their gates stay as they are online; the experts adapt, from first values that are learned too.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor

from metaopt.errors import ModelError, check_one_of, check_positive, check_range
from metaopt.experts.adapter import NAME, Experts, get_experts, with_experts
from metaopt.experts.config import ExpertsConfig
from metaopt.experts.mixture import EXPERT_TENSORS
from metaopt.experts.sites import Site
from metaopt.models import SourceModel
from metaopt.policy.part import Part
from metaopt.policy.step import StepContext
from metaopt.settings import build
from metaopt.types import Parameters

LEARNING = ("learned", "frozen")
HANDING_ON = ("up_weight", "up_bias")


@dataclass(frozen=True)
class ExpertsPartConfig(ExpertsConfig):
    """The mixtures of every site, and which of their tensors meta-training learns.

    Attributes:
        gates: "learned" or "frozen". Under dropout="straight_through" predictions are those of "hard", and all gates
            have a gradient; under "hard" the activation sparsity gate has none.
        initial: the experts' values before the first batch, "learned" or "frozen".
        lr: peak of the meta-optimizer's rate on gates and first values.
        decay: weight of the sum of squares of what experts hand on at the start.

    Raises:
        ConfigError: a value is out of range.
    """

    gates: str = "learned"
    initial: str = "learned"
    lr: float = 1e-3
    decay: float = 0.01

    def __post_init__(self) -> None:
        """Check every value against its range."""
        super().__post_init__()
        check_one_of("experts.gates", self.gates, LEARNING)
        check_one_of("experts.initial", self.initial, LEARNING)
        check_positive("experts.lr", self.lr)
        check_range("experts.decay", self.decay, 0, example="0.01")

    @property
    def mixtures(self) -> ExpertsConfig:
        """Those of one mixture."""
        return ExpertsConfig(**{each.name: getattr(self, each.name) for each in fields(ExpertsConfig)})


class ExpertsPart(Part):
    """Mixtures of activation sparsity experts at each site of the network.

    Args:
        config: of the mixtures, and what is learned of them.
        sites: where learned ones go; None: nothing is learned, and each model gets its own at random.
    """

    Config = ExpertsPartConfig
    name = "experts"

    def __init__(self, config: ExpertsPartConfig | None = None, sites: Iterable[Site] | None = None) -> None:
        super().__init__(config)
        self.mixtures: Experts | None = None
        if sites is not None:
            self.mixtures = Experts(self.config.mixtures, [*sites])
            for tensors, learned in ((self.gates(), self.config.gates), (self.initial(), self.config.initial)):
                for tensor in tensors.values():
                    tensor.requires_grad_(learned == "learned")

    @classmethod
    def build(cls, config: ExpertsPartConfig, model: SourceModel, seed: int = 0) -> Self:
        """With the first values of the experts that the model would get."""
        experts = get_experts(with_experts(model, config.mixtures, seed=seed))
        part = cls(config, experts.sites).to(next(experts.parameters()))
        assert part.mixtures is not None
        part.mixtures.load_state_dict(experts.state_dict())
        return part

    def attach(self, model: SourceModel) -> SourceModel:
        """A model with these experts, which shares the network's tensors with ``model``.

        Raises:
            ModelError: the model has no place for experts, or others than they were learned at.
        """
        beside = with_experts(model, self.config.mixtures)
        if self.mixtures is not None:
            if get_experts(beside).sites != self.mixtures.sites:
                raise ModelError(
                    f"the policy's experts are at {len(self.mixtures.sites)} sites, and not at those of this model; "
                    "allowed is the model that they were learned on: train a policy for this one"
                )
            get_experts(beside).load_state_dict(self.mixtures.state_dict())
        return beside

    def start(self, parameters: Parameters) -> Parameters:
        """The learned first values."""
        initial = self.initial()
        return {name: initial.get(name, tensor) for name, tensor in parameters.items()}

    def condition(self, context: StepContext) -> None:
        """Learned gates stand in for the model's."""
        context.tensors.update(self.gates())

    def gates(self) -> Parameters:
        """The learned gates' tensors under their names in a source model."""
        return self._named(own=False)

    def initial(self) -> Parameters:
        """The learned experts' own tensors under their names in a source model."""
        return self._named(own=True)

    def _named(self, *, own: bool) -> Parameters:
        if self.mixtures is None:
            return {}
        tensors = self.mixtures.named_parameters()
        return {f"{NAME}.{name}": t for name, t in tensors if (name.rpartition(".")[2] in EXPERT_TENSORS) == own}

    def not_exported(self, state: Any) -> str:
        """They stand beside the network."""
        return "the experts, which export_experts() gives"

    def learned_groups(self) -> dict[str, dict[str, Tensor]]:
        """Gates and experts apart."""
        own = dict(self.named_parameters())
        kinds = {name: "experts" if name.rpartition(".")[2] in EXPERT_TENSORS else "gates" for name in own}
        return {kind: {n: own[n] for n, k in kinds.items() if k == kind} for kind in dict.fromkeys(kinds.values())}

    def direct(self) -> Iterable[Tensor]:
        """Gates act in the forward pass."""
        return self.gates().values()

    def meta_rate(self) -> float:
        """A rate and a gradient clip of their own."""
        return self.config.lr

    def penalty(self) -> Tensor | None:
        """Sum of squares of what the experts hand on, weighted; 0 where they add nothing."""
        handed_on = [t for name, t in self.initial().items() if name.rpartition(".")[2] in HANDING_ON]
        if not handed_on:
            return None
        return self.config.decay * torch.stack([tensor.square().sum() for tensor in handed_on]).sum()

    def to_dict(self) -> dict[str, Any]:
        """Settings and sites."""
        sites = None if self.mixtures is None else [site.to_dict() for site in self.mixtures.sites]
        return {**super().to_dict(), "sites": sites}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Inverse of :meth:`to_dict`."""
        sites = values["sites"]
        return cls(cls.settings_of(values), None if sites is None else [build(Site, site, "site") for site in sites])

    def transferred(self, model: SourceModel) -> tuple[None, str]:
        """They stay behind."""
        return None, "left out, they belong to the other model's blocks"
