"""Which source model a policy belongs to, and the refusal of any other."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from metaopt.errors import CheckpointError
from metaopt.models import ModelSpec, SourceModel
from metaopt.parameters import ParameterLayout, adapted_layout


@dataclass(frozen=True)
class SourceRecord:
    """Which source model a policy was trained on."""

    spec: ModelSpec
    sha256: str  # of the weights (metaopt.files.weights_sha256)
    layout: ParameterLayout

    @classmethod
    def of(cls, model: SourceModel, layout: ParameterLayout | None = None) -> "SourceRecord":
        """Record of a model, and of what adapts in it: its norm layers, unless told otherwise."""
        return cls(model.spec, model.weights_sha256(), layout or adapted_layout(model))

    def to_dict(self) -> dict[str, Any]:
        """Primitives for a checkpoint."""
        return {"spec": self.spec.to_dict(), "sha256": self.sha256, "layout": self.layout.to_list()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Inverse of :meth:`to_dict`."""
        layout = ParameterLayout.from_list(values["layout"])
        return cls(ModelSpec.from_dict(values["spec"]), str(values["sha256"]), layout)

    def check(self, model: SourceModel) -> None:
        """Refuse any other model.

        Raises:
            CheckpointError: another architecture, class count, normalisation or weights.
        """
        trained, given = self.spec, model.spec
        if trained.name != given.name:
            raise CheckpointError(
                f"the policy was trained on {trained.name} and the model is {given.name}; allowed is the same "
                f"architecture: set model={trained.name}, train a policy for {given.name}, or set transfer=generator"
            )
        if trained.num_classes != given.num_classes:
            raise CheckpointError(
                f"the policy was trained on {trained.num_classes} classes and the model has {given.num_classes}; "
                "allowed is the same number: load the model that the policy was trained on"
            )
        if trained.classes != given.classes:
            raise CheckpointError(
                f"the policy was trained on {_kept(trained)} and the model keeps {_kept(given)}; allowed are the same "
                "classes: set model.classes, or SourceModel(..., classes=...), as in meta-training"
            )
        if (trained.mean, trained.std) != (given.mean, given.std):
            raise CheckpointError(
                f"the policy's model normalised images by {trained.mean} and {trained.std}, this one by {given.mean} "
                f"and {given.std}; allowed are the same: wrap the module by SourceModel(module, mean=..., std=...)"
            )
        found = model.weights_sha256()
        if self.sha256 != found:
            raise CheckpointError(
                f"the policy was trained on weights {self.sha256[:12]} and the model's are {found[:12]}; allowed "
                "are the same weights: set model.checkpoint to their file, train one for these, or set "
                "transfer=generator"
            )


def _kept(spec: ModelSpec) -> str:
    """Which of a network's logits count, in a few words."""
    if spec.classes is None:
        return "all logits"
    shown = ", ".join(map(str, spec.classes[:5])) + (", ..." if len(spec.classes) > 5 else "")
    return f"logits [{shown}]"
