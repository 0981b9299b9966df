"""The adaptation policy: the composition of parts that decides how a model changes itself, batch by batch.

Every method is one :class:`AdaptationPolicy`: an objective, an update rule and a list of parts. ``configs/method/`` has
a file for each, and `metaopt.registry` a row for each part. The step that runs them is `metaopt.policy.step`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self, cast

from torch import Tensor, nn

from metaopt import registry
from metaopt.errors import CheckpointError, check_one_of
from metaopt.files import atomic_save, is_finite, safe_load, says
from metaopt.models import SourceModel
from metaopt.norm_layers import chosen_layers
from metaopt.objectives import WeightedObjective
from metaopt.optimizers.mgg import GeneratorConfig, GradientGenerator
from metaopt.parameters import ParameterLayout, adapted_layout
from metaopt.policy.adapts import ADAPTS, layout_of
from metaopt.policy.part import Part
from metaopt.policy.policy_file import check_fields, check_weights
from metaopt.policy.source_record import SourceRecord
from metaopt.policy.state import State
from metaopt.settings import build
from metaopt.types import Parameters, UpdateRule

FORMAT = "metaopt-policy"
VERSION = 2


class AdaptationPolicy(nn.Module):
    """Objective, update rule and parts of one method.

    Args:
        method: name of the composition, for reports.
        objective: label-free loss; None for a method that never updates.
        rule: update rule; None for a method that never updates. A learned rule is an ``nn.Module`` whose tensors are
            learned together with the objective's weights.
        parts: in the order in which they act where several do so at the same place; what one uses is added beside it.
        adapts: which tensors change (`metaopt.policy.adapts.ADAPTS`).
        seed: of what is drawn online: augmented views, and a teacher's restores.
        layers: patterns of the normalisation layers that adapt (`metaopt.norm_layers.chosen_layers`); None: all.
    """

    def __init__(
        self,
        method: str,
        objective: WeightedObjective | None = None,
        rule: UpdateRule | None = None,
        parts: Sequence[Part] = (),
        adapts: str = "norm",
        seed: int = 0,
        layers: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        if (objective is None) != (rule is None):
            raise ValueError("an objective needs an update rule, and an update rule an objective")
        self.method, self.adapts, self.seed = method, adapts, seed
        self.objective, self.rule = objective, rule
        self.layers = None if layers is None else tuple(layers)
        named = {part.name: part for part in with_used(parts)}
        if (
            objective is not None
            and "teacher" in objective.needs
            and not any("teach" in p.acts for p in named.values())
        ):
            raise ValueError("an objective that learns from a teacher needs a part that is one")
        self.parts = nn.ModuleDict(named)
        self.source: SourceRecord | None = None  # the model that it was meta-trained on, if it was
        self.training: dict[str, Any] = {}  # how it was meta-trained: primitives, for reports

    @property
    def updates(self) -> bool:
        """Whether the method changes parameters at all."""
        return self.rule is not None

    @property
    def listed(self) -> list[Part]:
        """The parts in order."""
        return [cast(Part, part) for part in self.parts.values()]

    @property
    def lasting(self) -> frozenset[str]:
        """Names of the parts whose state outlives a domain."""
        return frozenset(part.name for part in self.listed if part.lasting)

    def part(self, name: str) -> Any:
        """The part of that name; None without it."""
        return dict(self.parts.items()).get(name)

    @property
    def batch_size(self) -> int | None:
        """Images in a batch of the policy's meta-training, the fewest where it had several sizes; None: it had none."""
        config = self.training.get("config", {})
        sizes = config.get("sizes")
        return config.get("batch_size") if sizes is None else sizes[0]

    @property
    def known_shifts(self) -> frozenset[str]:
        """Names of the shifts that the policy was meta-trained or selected on: a score on those is no fair test.

        Those of the policies that its training began with count too, and those that a verdict was fitted on.
        """
        training, config = self.training, self.training.get("config", {})
        listed = [training.get(name, ()) for name in ("shifts", "start_shifts", "verdict_shifts")]
        return frozenset(name for names in (*listed, config.get("selection_shifts", ())) for name in names)

    def attach(self, model: SourceModel) -> SourceModel:
        """The model that the method adapts: a skeleton of its own, which shares every tensor with the one given.

        Raises:
            ModelError: the model has no place for experts, or not the layers that adapt.
        """
        model = self.restricted(model)
        for part in self.listed:
            model = part.attach(model)
        return model

    def restricted(self, model: SourceModel) -> SourceModel:
        """A skeleton of the model in which the layers of this policy alone adapt.

        Raises:
            ModelError: the model has no such layers.
        """
        model = model.skeleton()
        if self.layers is not None:
            assert model.fixed is not None
            model.fixed |= chosen_layers(model, self.layers)
        return model

    def layout(self, model: SourceModel) -> ParameterLayout:
        """The tensors that adapt, of a model that :meth:`attach` gave.

        Raises:
            ModelError: there are none.
        """
        return layout_of(self.adapts, model)

    def prepare(self, model: nn.Module, images: Callable[[], Tensor], batch_size: int = 64) -> None:
        """Let objective and parts take what they need of clean source images.

        Args:
            model: source model.
            images: gives them, (n, 3, H, W) in [0, 1]; called only where something is needed that is not there yet.
            batch_size: images at a time.
        """
        model = self.restricted(model) if isinstance(model, SourceModel) else model
        if self.objective is not None:
            self.objective.prepare(model, images, batch_size)
        for part in self.listed:
            part.prepare(model, images, batch_size)

    def start(self, parameters: Parameters) -> Parameters:
        """The adapted tensors before the first batch: the given ones, or where learned, others."""
        for part in self.listed:
            parameters = part.start(parameters)
        return parameters

    def init(self, parameters: Parameters) -> State:
        """State before the first batch."""
        states = {part.name: part.init(parameters) for part in self.listed}
        found: State = {name: state for name, state in states.items() if state is not None}
        if self.rule is not None:
            found["rule"] = self.rule.init(parameters)
        of_domain = {name: state for name, state in found.items() if name not in self.lasting}
        beside = {part.name: part.init_beside(parameters, of_domain) for part in self.listed}
        return found | {name: state for name, state in beside.items() if state is not None}

    def to_dict(self) -> dict[str, Any]:
        """All of a learned policy as primitives and tensors.

        Raises:
            CheckpointError: the policy has no learned generator, or is not tied to a source model.
        """
        if not isinstance(self.rule, GradientGenerator) or self.objective is None or self.source is None:
            raise CheckpointError(
                f"method {self.method!r} cannot be saved as a policy; allowed is a meta-trained one: train it first"
            )
        return {
            "format": FORMAT,
            "version": VERSION,
            "method": self.method,
            "adapts": self.adapts,
            "seed": self.seed,
            "layers": None if self.layers is None else list(self.layers),
            "generator": asdict(self.rule.config),
            "tensors": list(self.rule.tensors),
            "objective": self.objective.to_dict(),
            "parts": {part.name: part.to_dict() for part in self.listed},
            "weights": {name: tensor.detach().cpu().clone() for name, tensor in self.state_dict().items()},
            "source": self.source.to_dict(),
            "training": dict(self.training),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], path: str | Path = "policy") -> Self:
        """Inverse of :meth:`to_dict`.

        Args:
            values: what it gave.
            path: where they are from, for messages.

        Raises:
            CheckpointError: another format or version, or a part is missing or does not fit.
        """
        if not says(values, "format", FORMAT):
            raise CheckpointError(
                f"'{path}' is not a policy; allowed are files written by pretrain/meta_train.py: give one of those"
            )
        if not says(values, "version", VERSION):
            found = " ".join(str(values.get("version")).split())[:80]
            raise CheckpointError(
                f"'{path}' has version {found}; this release reads version {VERSION}: train the policy again"
            )
        try:
            return cls._built(values)
        except Exception as error:  # values of any type can raise nearly anything
            reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            raise CheckpointError(
                f"'{path}' is damaged ({reason}); train the policy again or restore the file"
            ) from error

    @classmethod
    def _built(cls, values: Mapping[str, Any]) -> Self:
        check_fields(values)
        check_one_of("adapts", values["adapts"], ADAPTS)
        check_weights(lambda: cls._composed(values), values["weights"])
        policy = cls._composed(values)
        dtypes = {tensor.dtype for tensor in values["weights"].values()}
        if len(dtypes) == 1:
            policy.to(dtypes.pop())
        policy.load_state_dict(values["weights"])
        if not all(map(is_finite, policy.state_dict().values())):
            raise ValueError("a tensor holds NaN or infinity")
        policy.source = SourceRecord.from_dict(values["source"])
        if tuple(values["tensors"]) not in ((), policy.source.layout.names):
            raise ValueError("its step sizes are of other tensors than its source model's")
        for part in policy.listed:
            part.check_layout(policy.source.layout)
        policy.training = dict(values["training"])
        return policy

    @classmethod
    def _composed(cls, values: Mapping[str, Any]) -> Self:
        """What a file's settings describe, with nothing learned yet."""
        return cls(
            values["method"],
            WeightedObjective.from_dict(values["objective"]),
            GradientGenerator(build(GeneratorConfig, values["generator"], "generator"), values["tensors"]),
            [registry.get("part", name).from_dict(part) for name, part in values["parts"].items()],
            values["adapts"],
            int(values.get("seed", 0)),  # which files of older releases lack
            layers=values.get("layers"),  # files from before there was a choice have none
        )

    def save(self, path: str | Path) -> None:
        """Write the policy atomically; what was at ``path`` stays until the new file is complete.

        Raises:
            CheckpointError: the policy cannot be saved (see :meth:`to_dict`).
            OutputError: the file cannot be written.
        """
        atomic_save(self.to_dict(), path)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a policy; no code in the file is ever run.

        Raises:
            CheckpointError: the file is missing, unreadable, unsafe, foreign or damaged.
        """
        return cls.from_dict(safe_load(path, checksums=True), path)

    def check_source(self, model: nn.Module) -> None:
        """Refuse a model that the policy was not trained on. A method that was never trained fits any model.

        Raises:
            CheckpointError: another architecture, class count, normalisation or weights, or other layers that adapt.
        """
        if self.source is None or not isinstance(model, SourceModel):
            return
        self.source.check(model)
        if isinstance(self.rule, GradientGenerator) and self.rule.tensors and self.adapts in ("norm", "experts_norm"):
            known = {name for name in self.rule.tensors if not name.startswith("experts.")}
            found = set(adapted_layout(self.restricted(model)).names)
            if known != found:
                raise CheckpointError(
                    f"the policy adapts {len(known)} tensors of norm layers and of this model {len(found)} would, "
                    f"'{min(known ^ found)}' for one differs; allowed are the same: set requires_grad of the norm "
                    "layers as in meta-training"
                )


def with_used(parts: Sequence[Part]) -> list[Part]:
    """The parts with those that they use: before or behind the first that does, as their rows in the registry stand."""
    found, rows = list(parts), list(registry.PARTS)
    for part in parts:
        for kind in part.uses:
            if kind.name not in {each.name for each in found}:
                before = part.name in rows and kind.name in rows and rows.index(kind.name) < rows.index(part.name)
                found.insert(found.index(part), kind()) if before else found.append(kind())
    return found
