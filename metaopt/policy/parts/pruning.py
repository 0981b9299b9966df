"""Pruning: which allocation says what is kept of each layer's activations, where a step is to keep less than all."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from metaopt.activation_memory import (
    ALLOCATIONS,
    DEFAULT_ALLOCATION,
    Allocation,
    AllocationState,
    LearnedPrecision,
    LearnedPrecisionConfig,
    build_allocation,
)
from metaopt.errors import check_one_of
from metaopt.models import SourceModel
from metaopt.policy.part import Part
from metaopt.settings import build
from metaopt.types import Parameters

LEARNED = "learned"


@dataclass(frozen=True)
class PruningConfig:
    """``allocation``: one of `metaopt.activation_memory.ALLOCATIONS`, or "learned" by meta-training."""

    allocation: str = DEFAULT_ALLOCATION

    def __post_init__(self) -> None:
        """Check the name."""
        check_one_of("pruning.allocation", self.allocation, (*ALLOCATIONS, LEARNED))


class Pruning(Part):
    """What is kept of each layer's activations for backward, under a budget of bytes (SURGEON, arXiv 2503.20354).

    Args:
        config: which allocation.
        head: settings of the learned one.
    """

    Config = PruningConfig
    name = "pruning"

    def __init__(self, config: PruningConfig | None = None, head: LearnedPrecisionConfig | None = None) -> None:
        super().__init__(config)
        self.learned_only = self.config.allocation == LEARNED  # pyright: ignore[reportAttributeAccessIssue]
        self.allocation: Allocation = (
            LearnedPrecision(head or LearnedPrecisionConfig())
            if self.learned_only
            else build_allocation(self.config.allocation)
        )

    def init(self, parameters: Parameters) -> AllocationState:
        """Nothing seen of the layers yet."""
        return self.allocation.init(parameters)

    def to_dict(self) -> dict[str, Any]:
        """Settings, those of the learned head too."""
        head = asdict(self.allocation.config) if isinstance(self.allocation, LearnedPrecision) else None
        return {**super().to_dict(), "head": head}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Inverse of :meth:`to_dict`."""
        head = values["head"]
        return cls(cls.settings_of(values), None if head is None else build(LearnedPrecisionConfig, head, "rates"))

    def transferred(self, model: SourceModel) -> tuple[Self, str]:
        """It knows layers by what they are."""
        return self, "as learned, on this model's own layers"
