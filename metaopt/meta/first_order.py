r"""First-order unrolls:

.. math:: \sum_t \langle \nabla L_t(\theta_t), \partial\theta_t / \partial\varphi \rangle,

where the network's gradients along the way count as constants. It is computed as the *full gradient of the linearised
unroll*: a first pass adapts as deployment does and notes, at each position, the gradients of the inner loss and of the
meta-loss; a second pass replays the rule alone on losses :math:`\langle g_t, \theta \rangle`, whose gradients are the
noted ones. The network's graph never outlives its own step, so memory does not grow with K.

Learned first values of experts are where the replay starts: their gradient is :math:`\sum_t \nabla L_t`, and what the
rule's steps add to it. Learned gates and a learned prior act in the forward pass: theirs is the
direct derivative of each L_t.
"""

from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from metaopt.activation_memory.importance import gradient_importance, learning_layers
from metaopt.activation_memory.learned_precision import LearnedPrecision
from metaopt.meta.precision_gradient import PrecisionProbe, Spoiled, soft_choices
from metaopt.meta.unroll import MetaBatch, Unroll
from metaopt.optimizers.update import gradients_of
from metaopt.parameters import detached, flatten
from metaopt.policy.parts.update_gate import straight_through
from metaopt.policy.state import State, detached_state
from metaopt.policy.step import StepContext, decision, evaluate, meet, settle
from metaopt.types import LossOf, Parameters, StepOutput


@dataclass
class _Notes:
    """What the first pass of a first-order unroll leaves behind."""

    inner: list[list[tuple[Tensor, Parameters]]] = field(default_factory=list)  # per step: (weight, gradient) pairs
    meta: list[Parameters] = field(default_factory=list)  # per position: gradient of the meta-loss
    signals: list[dict[str, Tensor]] = field(default_factory=list)  # per position: what was told of the batch
    after: list[State] = field(default_factory=list)  # per step: the state after it
    refused: list[bool] = field(default_factory=list)  # per step: whether a part found nothing to learn from
    starts: dict[int, tuple[Parameters, State]] = field(default_factory=dict)  # at each cut


class FirstOrderUnroll(Unroll):
    """One unroll in progress, differentiated in first order."""

    term_steps: frozenset[int] = frozenset()  # at which each term of the objective gets its own backward pass
    precision_step = -1  # at which a learned allocation is asked
    spoiled: Spoiled | None = None  # what it did there

    def run(self, parameters: Parameters, state: State | None) -> tuple[Parameters, State]:
        """Adapt as deployment does, then differentiate the linearised steps."""
        self._pick_steps()
        fresh = state is None
        notes = _Notes()
        last = self._adapt(parameters, state, notes)
        with torch.enable_grad():
            for start, stop in self.segments():
                parameters, state = notes.starts[start]
                parameters = detached(parameters)
                if fresh and start == 0:
                    parameters = self.begin(parameters)
                    state = self.policy.init(parameters)
                self.accumulate(self._replay(parameters, state, notes, start, stop))
        return last

    def _replay(self, parameters: Parameters, state: State, notes: _Notes, start: int, stop: int) -> Tensor:
        """The linearised steps from one cut to the next: the sum of the positions' linearised meta-losses."""
        scores = []
        for position in range(start, stop + 1):
            context = self.context(parameters, state, position)
            meet(context, notes.signals[position])
            before, state = context.parameters, context.state
            if position > start:
                scores.append(torch.dot(flatten(notes.meta[position - 1]), flatten(before)))
            if position == stop:
                break
            z = decision(context)
            context.parameters, rule_state = self.apply(_linearised(notes.inner[position]), before, state["rule"])
            if position == self.precision_step and self.spoiled is not None and self.config.noise_price:
                noise = self.spoiled.in_update(
                    {name: before[name] - moved for name, moved in context.parameters.items()}
                )
                scores.append(self.config.noise_price * noise)
            context.remember("rule", rule_state)
            settle(context)
            parameters, after = context.parameters, context.state
            if z is not None:
                opened = straight_through(z)
                scores.append(self.lagrange_multiplier * opened)
                parameters = {name: torch.lerp(old, parameters[name], opened) for name, old in before.items()}
            if notes.refused[position]:
                parameters, after = before, state
            judged = {part.name: notes.after[position][part.name] for part in context.acting("judge")}
            state = {**(after if z is None or z.item() > 0 else state), **judged}
        return torch.stack(scores).sum()

    def _pick_steps(self) -> None:
        """Choose the steps that tell of the objective's weights and of the allocation."""
        count = min(self.config.term_steps or self.steps, self.steps)
        if self.policy.objective is not None and any(w.requires_grad for w in self.policy.objective.weights().values()):
            self.term_steps = frozenset(torch.randperm(self.steps, generator=self.generator)[:count].tolist())
        if self.budget is not None and self._head is not None:
            self.precision_step = int(torch.randint(self.steps, (), generator=self.generator))

    @property
    def _head(self) -> LearnedPrecision | None:
        """The learned allocation, if there is one."""
        part = self.policy.part("pruning")
        return part.allocation if part is not None and isinstance(part.allocation, LearnedPrecision) else None

    def _adapt(self, parameters: Parameters, state: State | None, notes: _Notes) -> tuple[Parameters, State]:
        """First pass: note the gradients along the way; return parameters and state after the last step."""
        starts = {start for start, _ in self.segments()}
        with torch.no_grad():
            if state is None:
                parameters = self.policy.start(parameters)
                state = self.policy.init(parameters)
        for position in range(self.steps + 1):
            if position in starts:
                notes.starts[position] = (detached(parameters), detached_state(state))
            context = self.context(parameters, state, position)
            with torch.no_grad():
                meet(context)
            context.parameters = detached(context.parameters)
            with torch.no_grad():
                z = decision(context)
            notes.signals.append({name: signal.detach() for name, signal in context.signals.items()})
            before = context.state
            inner, output = self._note(context, self.batches[position], notes)
            if inner is not None:
                notes.inner.append(inner)
                notes.refused.append(context.refused)
                self._decided(context, before, inner, output, z)
                notes.after.append(context.state)
                parameters, state = context.parameters, context.state
        return detached(parameters), detached_state(state)

    def _decided(
        self,
        context: StepContext,
        before: State,
        inner: list[tuple[Tensor, Parameters]],
        output: StepOutput,
        z: Tensor | None,
    ) -> None:
        """The update, unless gate or part refuse the batch: then the state is that of before but for what is judged."""
        context.opened = z is None or z.item() > 0
        if z is not None:
            self.opened.append(context.opened)
        updates = context.opened and not context.refused
        if updates:
            self._update(context, inner)
        else:
            context.state = before
        for part in context.acting("judge"):
            part.judge(context, StepOutput(output.logits.detach(), updated=updates))

    def _note(
        self, context: StepContext, batch: MetaBatch, notes: _Notes
    ) -> tuple[list[tuple[Tensor, Parameters]] | None, StepOutput]:
        """One forward pass and its backward passes. The network's graph ends with this call."""
        leaves, position = context.parameters, context.position - self.first_position
        probe = PrecisionProbe(self.model, learning_layers(leaves)) if position == self.precision_step else None
        with torch.enable_grad(), nullcontext() if probe is None else probe.watching():
            output = evaluate(context)
            errors = None
            if probe is not None and self.budget is not None and output.loss is not None:
                errors = probe.errors(output.loss, self.budget.table, leaves)
            score = self.meta_loss(output, batch) if position > 0 else None
            shared = self.meta_loss.own_objective and position not in self.term_steps  # the meta-loss is the loss
            inner = None
            if position < self.steps and (score is None or not shared):
                inner = self._inner_gradients(output, leaves, position, keep=score is not None)
            if score is not None:
                notes.meta.append(self._scored(score, leaves))
                self.losses.append(score.detach())
                if inner is None and position < self.steps:
                    inner = [(score.new_ones(()), notes.meta[-1])]
            if inner is not None and errors is not None:
                inner = [*inner, self._spoil(inner, errors, leaves, context.state)]
        return inner, output

    def _scored(self, score: Tensor, leaves: Parameters) -> Parameters:
        """Gradient of the meta-loss in the adapted tensors; that in `direct` is taken down at once."""
        if not score.requires_grad:  # a part has predicted in their place
            return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
        gradients = gradients_of(score, leaves | self.direct)
        for name in self.direct:
            self.gradients[name] = self.gradients[name] + gradients[name] / self.steps
        return {name: gradients[name] for name in leaves}

    def _spoil(
        self, inner: list[tuple[Tensor, Parameters]], errors: dict[str, Tensor], leaves: Parameters, state: State
    ) -> tuple[Tensor, Parameters]:
        """What a learned allocation changes of this step's gradient; it stands for all steps."""
        assert self._head is not None and self.budget is not None
        choices = soft_choices(self._head, self.budget, leaves, state["pruning"], float(self.steps))
        with torch.no_grad():
            exact = _weighed(inner)
        self.spoiled = Spoiled.by(choices, self.budget.table, errors, learning_layers(leaves), exact)
        return inner[0][0].new_ones(()), self.spoiled.correction

    def _inner_gradients(
        self, output: StepOutput, leaves: Parameters, position: int, keep: bool
    ) -> list[tuple[Tensor, Parameters]]:
        """Weights and gradients whose sum of products is the inner loss's gradient.

        At most steps the sum is one gradient of weight 1. At the chosen ones each term has its own, and its weight
        carries a graph: scaled, so that the sum over the chosen steps estimates the sum over all of them.
        """
        assert output.loss is not None
        if position not in self.term_steps:
            return [(output.loss.new_ones(()), gradients_of(output.loss, leaves, retain_graph=keep))]
        scale = self.steps / len(self.term_steps)
        pairs = []
        for name, weight in output.weights.items():
            gradient = gradients_of(output.terms[name], leaves, retain_graph=True)
            fixed = weight.detach()
            pairs.append((fixed + scale * (weight - fixed), gradient))
        return pairs

    def _update(self, context: StepContext, inner: list[tuple[Tensor, Parameters]]) -> None:
        """The rule's update on the noted gradients, without a graph."""
        assert self.policy.rule is not None
        leaves, pruning = context.parameters, self.policy.part("pruning")
        with torch.no_grad():
            gradients = _weighed(inner)
            updates, rule_state = self.policy.rule.update(gradients, context.state["rule"])
            context.remember("rule", rule_state)
            if pruning is not None:
                importance = gradient_importance(gradients, learning_layers(leaves))
                context.remember("pruning", pruning.allocation.observe(importance, context.state["pruning"]))
            context.parameters = {name: leaf - updates[name] for name, leaf in leaves.items()}
            settle(context)


def _linearised(inner: list[tuple[Tensor, Parameters]]) -> LossOf:
    """The loss whose gradient is the weighted sum of those noted, wherever it is taken."""

    def loss_of(parameters: Parameters) -> Tensor:
        flat = flatten(parameters)
        return torch.stack([weight * torch.dot(flatten(each), flat) for weight, each in inner]).sum()

    return loss_of


def _weighed(pairs: list[tuple[Tensor, Parameters]]) -> Parameters:
    """The sum of weighted gradients."""
    return {name: torch.stack([weight * each[name] for weight, each in pairs]).sum(dim=0) for name in pairs[0][1]}
