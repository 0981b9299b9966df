"""The adaptation policy: the composition of parts that decides how a model changes itself, batch by batch.

Every method is one instance of :class:`AdaptationPolicy`; what differs is which parts it holds:

========= ================= ============================ ======================
method    statistics        objective                    update rule
========= ================= ============================ ======================
source    of the source     --                           --
bn        of the batch      --                           --
tent      of the batch      entropy                      Adam
adam      of the batch      any                          Adam
mgtta     of the batch      entropy + discrepancy        ``published`` generator
policy    of the batch      learned weights              learned generator
========= ================= ============================ ======================
"""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from metaopt.data.seeding import generator_for
from metaopt.objectives import WeightedObjective, augmented_view
from metaopt.parameters import detached
from metaopt.policy.gate import Gate, init_gate, stepped
from metaopt.policy.restoration import SourceRestoration, restored
from metaopt.policy.shift import Sensed, distance, image_statistics, init_reference, merged
from metaopt.policy.state import PolicyState
from metaopt.sparsity import ActivationMemory, PruningRule
from metaopt.types import ApplyUpdate, Parameters, SourceStatistics, StepOutput, UpdateRule

if TYPE_CHECKING:
    from metaopt.policy.checkpoint import SourceRecord


class AdaptationPolicy(nn.Module):
    """Objective, update rule and normalisation statistics of one method.

    Args:
        method: name of the composition, for reports.
        batch_statistics: whether BatchNorm layers normalise by the batch (else by the source's running statistics).
        objective: label-free loss; None for a method that never updates.
        rule: update rule; None for a method that never updates. A learned rule is an ``nn.Module`` and its tensors are
            learned together with the objective's weights.
        statistics: source statistics of the features, where the objective needs them.
        seed: of the augmented views, where the objective compares two; with a step's number it tells its view.
        pruning: chooses what is kept of each layer's activations, where a step is told to keep less than all.
        restoration: how much of the source comes back before each batch; None: nothing ever does.
        gate: whether a batch is worth an update; None: every one is.
    """

    def __init__(
        self,
        method: str,
        *,
        batch_statistics: bool = True,
        objective: WeightedObjective | None = None,
        rule: UpdateRule | None = None,
        statistics: SourceStatistics | None = None,
        seed: int = 0,
        pruning: PruningRule | None = None,
        restoration: SourceRestoration | None = None,
        gate: Gate | None = None,
    ) -> None:
        super().__init__()
        if (objective is None) != (rule is None):
            raise ValueError("an objective needs an update rule, and an update rule an objective")
        self.method = method
        self.batch_statistics = batch_statistics
        self.objective = objective
        self.rule = rule
        self.statistics = statistics
        self.seed = seed
        self.pruning = pruning
        self.restoration = restoration
        self.gate = gate
        self.source: SourceRecord | None = None  # the model that it was meta-trained on, if it was
        self.training: dict[str, Any] = {}  # how it was meta-trained: primitives, for reports

    @property
    def updates(self) -> bool:
        """Whether the method changes parameters at all."""
        return self.rule is not None

    @property
    def watches(self) -> bool:
        """Whether the distance of each batch from those before it is measured."""
        return self.restoration is not None or self.gate is not None

    @property
    def known_shifts(self) -> frozenset[str]:
        """Names of the shifts that the policy was meta-trained or selected on: a score on those is no fair test."""
        config = self.training.get("config", {})
        return frozenset([*self.training.get("shifts", ()), *config.get("selection_shifts", ())])

    def init(self, parameters: Parameters) -> PolicyState:
        """State before the first batch."""
        first = next(iter(parameters.values()))
        return PolicyState(
            gate=None if self.gate is None else init_gate(first.detach()),
            shift=init_reference(first.shape[-1], first.detach()) if self.watches else None,
            rule=None if self.rule is None else self.rule.init(parameters),
            pruning=None if self.pruning is None else self.pruning.init(parameters),
        )

    def sense(self, model: nn.Module, parameters: Parameters, state: PolicyState, images: Tensor) -> Sensed | None:
        """How far a batch lies from those before it; None for a method that does not watch it."""
        if not self.watches:
            return None
        layer = next(iter(parameters)).rpartition(".")[0]
        statistics = image_statistics(model, layer, images)
        return Sensed(distance(state.shift, statistics), statistics)

    def restore(
        self, model: nn.Module, parameters: Parameters, state: PolicyState, sensed: Sensed | None
    ) -> tuple[Parameters, PolicyState]:
        """Parameters and state that a batch is predicted with: as they were, or nearer to the source.

        Args:
            model: source model, whose own tensors are what comes back.
            parameters: adapted tensors before this batch.
            state: state before this batch.
            sensed: what :meth:`sense` told of the batch.
        """
        if sensed is None:
            return parameters, state
        if self.restoration is not None:
            source = {name: model.get_parameter(name).detach() for name in parameters}
            parameters = restored(parameters, source, self.restoration(sensed.distance))
            if self.restoration.begins_anew(sensed.distance):
                state = self.init(parameters)
        return parameters, replace(state, shift=merged(state.shift, sensed.statistics))

    def opening(self, state: PolicyState, sensed: Sensed | None) -> Tensor | None:
        """z of the update gate, above 0 where a batch is worth an update; None for a method without one."""
        return None if self.gate is None or sensed is None else self.gate(state.gate, sensed.distance)

    def predict(self, model: nn.Module, parameters: Parameters, images: Tensor) -> StepOutput:
        """Predict alone: one forward pass without a graph or a loss; arguments as of :meth:`evaluate`."""
        with torch.no_grad():
            output = functional_call(model, parameters, (images,), {"batch_statistics": self.batch_statistics})
        return StepOutput(output.logits, updated=False)

    def evaluate(self, model: nn.Module, parameters: Parameters, images: Tensor, step: int = 0) -> StepOutput:
        """Predict and weigh the loss, without an update.

        Args:
            model: source model, called through ``torch.func.functional_call``.
            parameters: adapted tensors that stand in for the model's own.
            images: (B, 3, H, W) in [0, 1].
            step: number of updates before this one, which an augmented view of the images is drawn from.
        """
        arguments = {
            "batch_statistics": self.batch_statistics,
            "features": self.objective is not None and self.objective.needs_features,
        }
        output = functional_call(model, parameters, (images,), arguments)
        if self.objective is None:
            return StepOutput(output.logits)
        if self.objective.needs_view:
            view = augmented_view(images, generator_for("view", self.seed, step))
            viewed = functional_call(model, parameters, (view,), {"batch_statistics": self.batch_statistics})
            output = output._replace(view_logits=viewed.logits)
        loss, terms = self.objective.loss(output, self.statistics)
        return StepOutput(output.logits, loss, terms)

    def preview(
        self, model: nn.Module, parameters: Parameters, state: PolicyState, images: Tensor, step: int = 0
    ) -> StepOutput:
        """What :meth:`step` would predict on a batch, which then leaves no trace."""
        sensed = self.sense(model, parameters, state, images)
        return self.evaluate(model, self.restore(model, parameters, state, sensed)[0], images, step)

    def step(
        self,
        model: nn.Module,
        parameters: Parameters,
        state: PolicyState,
        images: Tensor,
        apply: ApplyUpdate | None,
        step: int = 0,
        memory: ActivationMemory | None = None,
    ) -> tuple[Parameters, PolicyState, StepOutput]:
        """The one adaptation step: predict on a batch, then update on it.

        Meta-training unrolls it with a differentiable ``apply``; deployment runs it with an in-place one.

        Args:
            model: source model.
            parameters: adapted tensors before this batch.
            state: state before this batch.
            images: (B, 3, H, W) in [0, 1].
            apply: how a loss becomes new parameters; None only for a method that never updates.
            step: as in :meth:`evaluate`.
            memory: how activations are kept for backward; None: as torch keeps them.

        Returns:
            Parameters and state after this batch, and the predictions made *before* the update.
        """
        if not self.updates or apply is None:
            return parameters, state, self.evaluate(model, parameters, images, step)
        sensed = self.sense(model, parameters, state, images)
        parameters, state = self.restore(model, parameters, state, sensed)
        with torch.no_grad():
            opening = self.opening(state, sensed)
        if opening is not None and opening.item() <= 0:
            parameters = detached(parameters)
            output = self.predict(model, parameters, images)
        else:
            parameters, state, output = self._update(model, parameters, state, images, apply, step, memory)
        if self.gate is not None:
            state = replace(state, gate=stepped(state.gate, output.logits, output.updated))
        return parameters, state, replace(output, distance=None if sensed is None else sensed.distance)

    def _update(
        self,
        model: nn.Module,
        parameters: Parameters,
        state: PolicyState,
        images: Tensor,
        apply: ApplyUpdate,
        step: int,
        memory: ActivationMemory | None,
    ) -> tuple[Parameters, PolicyState, StepOutput]:
        """Predict and update; arguments as of :meth:`step`."""
        if memory is None:
            output = self.evaluate(model, parameters, images, step)
            parameters, rule_state = apply(_loss(output), parameters, state.rule)
            return parameters, replace(state, rule=rule_state), output

        def loss_of(some: Tensor) -> Tensor:
            return _loss(self.evaluate(model, parameters, some, step))

        with memory.step(model, loss_of, parameters, state.pruning, images) as kept:
            output = self.evaluate(model, parameters, images, step)
            parameters, rule_state = apply(_loss(output), parameters, state.rule)
        refused = rule_state is state.rule and rule_state is not None
        if not refused:  # else nothing is to be learned from the batch
            state = replace(state, rule=rule_state, pruning=kept.state)
        return parameters, state, output

    def to(self, *args: Any, **kwargs: Any) -> "AdaptationPolicy":
        """Move the learned tensors and the source statistics."""
        super().to(*args, **kwargs)
        if self.statistics is not None:
            self.statistics = SourceStatistics(
                tuple(mean.to(*args, **kwargs) for mean in self.statistics.mean),
                tuple(std.to(*args, **kwargs) for std in self.statistics.std),
            )
        return self

    def save(self, path: str | Path) -> None:
        """Write the policy to ``path`` (see :mod:`metaopt.policy.checkpoint`)."""
        from metaopt.policy.checkpoint import save_policy

        save_policy(self, path)

    @classmethod
    def load(cls, path: str | Path) -> "AdaptationPolicy":
        """Read a policy from ``path`` (see :mod:`metaopt.policy.checkpoint`)."""
        from metaopt.policy.checkpoint import load_policy

        return load_policy(path)


def _loss(output: StepOutput) -> Tensor:
    """The loss of a method that updates, which has one."""
    assert output.loss is not None
    return output.loss
