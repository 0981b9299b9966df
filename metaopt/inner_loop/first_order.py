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
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from metaopt.activation_memory.importance import gradient_importance, learning_layers
from metaopt.activation_memory.learned_precision import LearnedPrecision
from metaopt.inner_loop.func import gradients_of
from metaopt.inner_loop.rates import RateProbe, Spoiled, soft_choices
from metaopt.inner_loop.unroll import MetaBatch, Unroll
from metaopt.parameters import detached, flatten
from metaopt.policy.gate import GateState, stepped, straight_through
from metaopt.policy.response import opening, respond, sense
from metaopt.policy.shift import Sensed
from metaopt.policy.state import PolicyState, detached_state
from metaopt.policy.taught import settle
from metaopt.types import Parameters, StepOutput


@dataclass
class _Notes:
    """What the first pass of a first-order unroll leaves behind."""

    inner: list[list[tuple[Tensor, Parameters]]] = field(default_factory=list)  # per step: (weight, gradient) pairs
    meta: list[Parameters] = field(default_factory=list)  # per position: gradient of the meta-loss
    sensed: list[Sensed | None] = field(default_factory=list)  # per position: what was told of the batch beforehand
    logits: list[Tensor] = field(default_factory=list)  # of the latest batch
    gates: list[GateState] = field(default_factory=list)  # per step: what the gate remembers after it
    starts: dict[int, tuple[Parameters, PolicyState]] = field(default_factory=dict)  # at each cut


class FirstOrderUnroll(Unroll):
    """One unroll in progress, differentiated in first order."""

    term_steps: frozenset[int] = frozenset()  # at which each term of the objective gets its own backward pass
    rate_step = -1  # at which learned rates are asked
    spoiled: Spoiled | None = None  # what they did there

    def run(self, parameters: Parameters, state: PolicyState | None) -> tuple[Parameters, PolicyState]:
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

    def _replay(self, parameters: Parameters, state: PolicyState, notes: _Notes, start: int, stop: int) -> Tensor:
        """The linearised steps from one cut to the next: the sum of the positions' linearised meta-losses."""
        scores = []
        for position in range(start, stop + 1):
            parameters, state = respond(self.policy, self.model, parameters, state, notes.sensed[position])
            flat = flatten(parameters)
            if position > start:
                scores.append(torch.dot(flatten(notes.meta[position - 1]), flat))
            if position < stop:
                products = [weight * torch.dot(flatten(each), flat) for weight, each in notes.inner[position]]
                moved, rule_state = self.apply(torch.stack(products).sum(), parameters, state.rule)
                if position == self.rate_step and self.spoiled is not None and self.config.noise_price:
                    noise = self.spoiled.in_update({name: parameters[name] - moved[name] for name in moved})
                    scores.append(self.config.noise_price * noise)
                moved, teacher = settle(self.policy, self.model, moved, state.teacher)
                after = replace(state, rule=rule_state, teacher=teacher)
                z = opening(self.policy, state, notes.sensed[position])
                if z is None:
                    parameters, state = moved, after
                else:
                    decision = straight_through(z)
                    scores.append(self.update_price * decision)
                    parameters = {name: torch.lerp(old, moved[name], decision) for name, old in parameters.items()}
                    state = replace(after if z.item() > 0 else state, gate=notes.gates[position])
        return torch.stack(scores).sum()

    def _pick_steps(self) -> None:
        """Choose the steps that tell of the objective's weights and of the rates."""
        count = min(self.config.term_steps or self.steps, self.steps)
        if self.policy.objective is not None and any(w.requires_grad for w in self.policy.objective.weights().values()):
            self.term_steps = frozenset(torch.randperm(self.steps, generator=self.generator)[:count].tolist())
        if self.rates is not None and isinstance(self.policy.pruning, LearnedPrecision):
            self.rate_step = int(torch.randint(self.steps, (), generator=self.generator))

    def _adapt(
        self, parameters: Parameters, state: PolicyState | None, notes: _Notes
    ) -> tuple[Parameters, PolicyState]:
        """First pass: note the gradients along the way; return parameters and state after the last step."""
        starts = {start for start, _ in self.segments()}
        with torch.no_grad():
            if state is None:
                parameters = self.policy.start(parameters)
                state = self.policy.init(parameters)
        for position in range(self.steps + 1):
            if position in starts:
                notes.starts[position] = (detached(parameters), detached_state(state))
            batch = self.batches[position]
            notes.sensed.append(sense(self.policy, self.model, parameters, state, batch.images))
            with torch.no_grad():
                now, here = respond(self.policy, self.model, parameters, state, notes.sensed[position])
            leaves = detached(now)
            inner = self._note(leaves, position, batch, notes, here)
            if inner is not None:
                notes.inner.append(inner)
                parameters, state = self._decided(leaves, inner, here, notes)
        return detached(parameters), detached_state(state)

    def _decided(
        self, leaves: Parameters, inner: list[tuple[Tensor, Parameters]], state: PolicyState, notes: _Notes
    ) -> tuple[Parameters, PolicyState]:
        """The update, unless the gate is closed: then everything stays but what the gate remembers."""
        with torch.no_grad():
            z = opening(self.policy, state, notes.sensed[-1])
        if z is None:
            return self._update(leaves, inner, state)
        opens = z.item() > 0
        self.opened.append(opens)
        parameters, after = self._update(leaves, inner, state) if opens else (leaves, state)
        notes.gates.append(stepped(state.gate, notes.logits[-1], opens))
        return parameters, replace(after, gate=notes.gates[-1])

    def _note(
        self, leaves: Parameters, position: int, batch: MetaBatch, notes: _Notes, state: PolicyState
    ) -> list[tuple[Tensor, Parameters]] | None:
        """One forward pass and its backward passes. The network's graph ends with this call."""
        probe = RateProbe(self.model, learning_layers(leaves)) if position == self.rate_step else None
        with torch.enable_grad(), nullcontext() if probe is None else probe.watching():
            output = self.policy.evaluate(self.model, leaves, batch.images, position, state.teacher)
            notes.logits = [output.logits.detach()]
            errors = None
            if probe is not None and self.rates is not None and output.loss is not None:
                errors = probe.errors(output.loss, self.rates.table, leaves)
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
                inner = [*inner, self._spoil(inner, errors, leaves, state)]
        return inner

    def _scored(self, score: Tensor, leaves: Parameters) -> Parameters:
        """Gradient of the meta-loss in the adapted tensors; that in `direct` is taken down at once."""
        gradients = gradients_of(score, leaves | self.direct)
        for name in self.direct:
            self.gradients[name] = self.gradients[name] + gradients[name] / self.steps
        return {name: gradients[name] for name in leaves}

    def _spoil(
        self, inner: list[tuple[Tensor, Parameters]], errors: dict[str, Tensor], leaves: Parameters, state: PolicyState
    ) -> tuple[Tensor, Parameters]:
        """What learned rates change of this step's gradient; it stands for all steps."""
        assert isinstance(self.policy.pruning, LearnedPrecision) and self.rates is not None
        choices = soft_choices(self.policy.pruning, self.rates, leaves, state.pruning, float(self.steps))
        with torch.no_grad():
            exact = _weighed(inner)
        self.spoiled = Spoiled.by(choices, self.rates.table, errors, learning_layers(leaves), exact)
        return inner[0][0].new_ones(()), self.spoiled.correction

    def _inner_gradients(
        self, output: StepOutput, leaves: Parameters, position: int, keep: bool
    ) -> list[tuple[Tensor, Parameters]]:
        """Weights and gradients whose sum of products is the inner loss's gradient.

        At most steps the sum is one gradient of weight 1. At the chosen ones each term has its own, and its weight
        carries a graph: scaled, so that the sum over the chosen steps estimates the sum over all of them.
        """
        assert output.loss is not None and self.policy.objective is not None
        if position not in self.term_steps:
            return [(output.loss.new_ones(()), gradients_of(output.loss, leaves, retain_graph=keep))]
        scale = self.steps / len(self.term_steps)
        pairs = []
        for name, weight in self.policy.objective.weights().items():
            gradient = gradients_of(output.terms[name], leaves, retain_graph=True)
            fixed = weight.detach()
            pairs.append((fixed + scale * (weight - fixed), gradient))
        if self.policy.pulls:
            assert self.policy.teacher is not None
            weight = output.loss.new_tensor(self.policy.teacher.proximal)
            pairs.append((weight, gradients_of(output.terms["proximal"], leaves, retain_graph=True)))
        return pairs

    def _update(
        self, leaves: Parameters, inner: list[tuple[Tensor, Parameters]], state: PolicyState
    ) -> tuple[Parameters, PolicyState]:
        """The rule's update on the noted gradients, without a graph."""
        assert self.policy.rule is not None
        with torch.no_grad():
            gradients = _weighed(inner)
            updates, rule_state = self.policy.rule.update(gradients, state.rule)
            pruning = state.pruning
            if self.policy.pruning is not None:
                pruning = self.policy.pruning.observe(gradient_importance(gradients, learning_layers(leaves)), pruning)
            moved = {name: leaf - updates[name] for name, leaf in leaves.items()}
            moved, teacher = settle(self.policy, self.model, moved, state.teacher)
            return moved, replace(state, rule=rule_state, pruning=pruning, teacher=teacher)


def _weighed(pairs: list[tuple[Tensor, Parameters]]) -> Parameters:
    """The sum of weighted gradients."""
    return {name: torch.stack([weight * each[name] for weight, each in pairs]).sum(dim=0) for name in pairs[0][1]}
