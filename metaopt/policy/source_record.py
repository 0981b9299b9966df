"""Which source model a policy belongs to, and the refusal of any other."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import torch

from metaopt.errors import CheckpointError
from metaopt.models import ModelSpec, SourceModel
from metaopt.parameters import ParameterLayout, adapted_layout

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Types that weights of a wider one may be given in, by name."""


@dataclass(frozen=True)
class SourceRecord:
    """Which source model a policy was trained on.

    The same weights in another precision are the same model: two networks are compared as they are and, where one has
    tensors of a narrower type, both rounded to that.
    """

    spec: ModelSpec
    sha256: str  # of the weights (metaopt.files.weights_sha256)
    layout: ParameterLayout
    rounded: Mapping[str, str] = field(default_factory=dict, hash=False)  # the same of the weights in each precision
    types: tuple[str, ...] = ()  # of the network's tensors, by name; empty where nobody told

    @classmethod
    def of(cls, model: SourceModel, layout: ParameterLayout | None = None) -> "SourceRecord":
        """Record of a model, and of what adapts in it: its norm layers, unless told otherwise."""
        rounded = {name: model.weights_sha256(dtype) for name, dtype in PRECISIONS.items()}
        return cls(model.spec, model.weights_sha256(), layout or adapted_layout(model), rounded, _types(model))

    def to_dict(self) -> dict[str, Any]:
        """Primitives for a checkpoint."""
        digests = {f"sha256_{name}": digest for name, digest in self.rounded.items()}
        own = {"spec": self.spec.to_dict(), "sha256": self.sha256, "layout": self.layout.to_list()}
        return {**own, **digests, "types": list(self.types)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Inverse of :meth:`to_dict`; files of before there were precisions have one fingerprint.

        Raises:
            CheckpointError: the model's description is of no use.
            ValueError: a fingerprint or the list of tensors is.
        """
        layout = ParameterLayout.from_list(values["layout"])
        keys = ["sha256", *(f"sha256_{name}" for name in PRECISIONS if f"sha256_{name}" in values)]
        for key in keys:
            if not isinstance(values[key], str) or not re.fullmatch("[0-9a-f]{64}", values[key]):
                raise ValueError(f"its source model's fingerprint is {values[key]!r:.80}, no SHA-256")
        rounded = {key.removeprefix("sha256_"): values[key] for key in keys[1:]}
        types = tuple(map(str, values.get("types", ())))
        return cls(ModelSpec.from_dict(values["spec"]), values["sha256"], layout, rounded, types)

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
        self._check_weights(model)

    def _check_weights(self, model: SourceModel) -> None:
        found = model.weights_sha256()
        if self.sha256 == found:
            return
        types = _types(model)
        narrower = [name for name in PRECISIONS if name in types or name in self.types]
        if any(self.rounded.get(name) == model.weights_sha256(PRECISIONS[name]) for name in narrower):
            return
        if not self.rounded and any(name in ("bfloat16", "float16") for name in types):
            raise CheckpointError(
                f"the model's weights are in {' and '.join(types)} and the policy's file, of an earlier release, knows "
                "them in the precision of its training alone; allowed is that one: load the model in it, or train the "
                "policy again"
            )
        raise CheckpointError(
            f"the policy was trained on weights {self.sha256[:12]} and the model's are {found[:12]}; allowed "
            "are the same weights: set model.checkpoint to their file, train one for these, or set "
            "transfer=generator"
        )


def _types(model: SourceModel) -> tuple[str, ...]:
    """Names of the floating types of a network's tensors."""
    tensors = model.module.state_dict().values()
    names = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors if tensor.is_floating_point()}
    return tuple(sorted(names))


def _kept(spec: ModelSpec) -> str:
    """Which of a network's logits count, in a few words."""
    if spec.classes is None:
        return "all logits"
    shown = ", ".join(map(str, spec.classes[:5])) + (", ..." if len(spec.classes) > 5 else "")
    return f"logits [{shown}]"
