r"""Unrolled adaptation and its meta-gradient.

An unroll runs K steps of ``policy.step`` on K + 1 batches. Position t (1 to K) is scored by the meta-loss L_t of the
parameters :math:`\theta_t`, which have adapted to the batches before t, on batch t. The meta-loss is the mean over
positions; its gradient in the learned tensors :math:`\varphi` is taken in one of two ways.

``full``
    differentiates through everything, second derivatives of the network included.
``first_order``
    :math:`\sum_t \langle \nabla L_t(\theta_t), \partial\theta_t / \partial\varphi \rangle`, where the network's
    gradients along the way count as constants. It is computed as the *full gradient of the linearised unroll*: a first
    pass adapts as deployment does and notes, at each position, the gradients of the inner loss and of the meta-loss; a
    second pass replays the rule alone on losses :math:`\langle g_t, \theta \rangle`, whose gradients are the noted
    ones. The network's graph never outlives its own step, so memory does not grow with K.

Truncation cuts the graph every T steps: within ``full`` and ``first_order`` alike, position t then only answers for the
steps since the last cut.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from metaopt.errors import ConfigError
from metaopt.inner_loop.func import FuncApply, gradients_of
from metaopt.inner_loop.rates import RateProbe, RateTask, soft_choices
from metaopt.parameters import detached, flatten
from metaopt.policy.policy import AdaptationPolicy
from metaopt.policy.state import PolicyState, detached_state
from metaopt.sparsity.head import LearnedRates
from metaopt.sparsity.importance import gradient_importance, learning_layers
from metaopt.types import ApplyUpdate, Parameters, StepOutput

GRADIENTS = ("first_order", "full")


@dataclass(frozen=True)
class MetaBatch:
    """One batch of a task: what the policy sees, and what the meta-loss compares its predictions with."""

    images: Tensor  # shifted view, (B, 3, H, W) in [0, 1]
    targets: Tensor | None = None  # class probabilities, (B, C); None where the meta-loss needs none


class MetaLoss(Protocol):
    """Scores the predictions at one position of the unroll, without labels."""

    own_objective: bool
    """Whether the score is the policy's own inner loss, so that one backward pass serves both."""

    def __call__(self, output: StepOutput, batch: MetaBatch) -> Tensor:
        """Scalar score of one batch."""
        ...


@dataclass(frozen=True)
class UnrollConfig:
    """How the meta-gradient is taken."""

    gradient: str = "first_order"
    truncation: int | None = None  # steps between cuts of the graph; None: no cut
    term_steps: int | None = 1  # steps of an unroll at which learned objective weights see each term's own gradient

    def __post_init__(self) -> None:
        """Check every value against its range."""
        if self.gradient not in GRADIENTS:
            raise ConfigError(f"meta.gradient is {self.gradient!r}; allowed are {', '.join(GRADIENTS)}: choose one")
        for name, value in (("truncation", self.truncation), ("term_steps", self.term_steps)):
            if value is not None and value < 1:
                raise ConfigError(f"meta.{name} is {value}; it must be null or at least 1: set for example 8")


@dataclass
class MetaGradient:
    """What one unroll gives."""

    losses: list[Tensor]  # meta-loss at positions 1..K, detached scalars
    gradients: dict[str, Tensor]  # mean meta-loss differentiated in each learned tensor of the policy
    parameters: Parameters  # adapted parameters after the last step, detached
    state: PolicyState  # state after the last step, detached

    @property
    def loss(self) -> Tensor:
        """Mean meta-loss over the positions, scalar."""
        return torch.stack(self.losses).mean()


def learned_tensors(policy: nn.Module) -> dict[str, Tensor]:
    """The policy's tensors that meta-training changes."""
    return {name: tensor for name, tensor in policy.named_parameters() if tensor.requires_grad}


def meta_gradient(
    policy: AdaptationPolicy,
    model: nn.Module,
    parameters: Parameters,
    state: PolicyState | None,
    batches: Sequence[MetaBatch],
    meta_loss: MetaLoss,
    *,
    apply: ApplyUpdate | None = None,
    config: UnrollConfig | None = None,
    generator: torch.Generator | None = None,
    rates: RateTask | None = None,
) -> MetaGradient:
    """Unroll the policy over K + 1 batches and differentiate the mean meta-loss in its learned tensors.

    Args:
        policy: policy with an update rule.
        model: source model.
        parameters: adapted tensors to start from; they are not changed.
        state: state to start from; None for a fresh one, whose learned start then takes part in the gradient.
        batches: K + 1 batches; the last is scored only.
        meta_loss: label-free score of a position.
        apply: differentiable update of a backend; default: ``func``.
        config: way of differentiation.
        generator: source of the steps at which each term's own gradient is taken, and that of the rates.
        rates: what is asked of learned rates; None: they do not take part.

    Raises:
        ConfigError: fewer than two batches, or a policy that never updates.
    """
    config = config or UnrollConfig()
    if len(batches) < 2:
        raise ConfigError(f"an unroll got {len(batches)} batches; it needs K + 1 >= 2: give at least two")
    if policy.rule is None:
        raise ConfigError(f"method {policy.method!r} never updates, so it has no meta-gradient: choose one with a rule")
    run = _Unroll(policy, model, batches, meta_loss, apply or FuncApply(policy.rule), config, rates)
    if config.gradient == "full":
        parameters, state = run.full(parameters, state)
    else:
        parameters, state = run.first_order(parameters, state, generator)
    return MetaGradient(run.losses, run.gradients, parameters, state)


@dataclass
class _Notes:
    """What the first pass of a first-order unroll leaves behind."""

    inner: list[list[tuple[Tensor, Parameters]]] = field(default_factory=list)  # per step: (weight, gradient) pairs
    meta: list[Parameters] = field(default_factory=list)  # per position: gradient of the meta-loss
    starts: dict[int, tuple[Parameters, PolicyState]] = field(default_factory=dict)  # at each cut


class _Unroll:
    """One unroll in progress: sums the meta-gradient segment by segment."""

    def __init__(
        self,
        policy: AdaptationPolicy,
        model: nn.Module,
        batches: Sequence[MetaBatch],
        meta_loss: MetaLoss,
        apply: ApplyUpdate,
        config: UnrollConfig,
        rates: RateTask | None = None,
    ) -> None:
        self.policy, self.model, self.batches = policy, model, batches
        self.meta_loss, self.apply, self.config = meta_loss, apply, config
        self.learned = learned_tensors(policy)
        self.gradients = {name: torch.zeros_like(tensor) for name, tensor in self.learned.items()}
        self.losses: list[Tensor] = []
        self.term_steps: set[int] = set()
        self.rates, self.rate_step = rates, -1

    @property
    def steps(self) -> int:
        return len(self.batches) - 1

    def full(self, parameters: Parameters, state: PolicyState | None) -> tuple[Parameters, PolicyState]:
        """Differentiate through every step, network included, segment by segment."""
        # The fused attention kernels have no second derivative.
        with sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
            for start, stop in self._segments():
                parameters = detached(parameters)
                state = self.policy.init(parameters) if state is None else detached_state(state)
                scores = []
                for position in range(start, stop + 1):
                    batch, now = self.batches[position], parameters
                    if position < stop:
                        parameters, state, output = self.policy.step(
                            self.model, now, state, batch.images, self.apply, position
                        )
                    else:
                        output = self.policy.evaluate(self.model, now, batch.images, position)
                    if position > start:
                        scores.append(self.meta_loss(output, batch))
                self.losses.extend(score.detach() for score in scores)
                self._accumulate(torch.stack(scores).sum())
        assert state is not None
        return detached(parameters), detached_state(state)

    def first_order(
        self, parameters: Parameters, state: PolicyState | None, generator: torch.Generator | None
    ) -> tuple[Parameters, PolicyState]:
        """Adapt as deployment does, then differentiate the linearised steps."""
        self._pick_term_steps(generator)
        fresh = state is None
        notes = _Notes()
        last = self._adapt(parameters, state, notes)
        with torch.enable_grad():
            for start, stop in self._segments():
                parameters, state = notes.starts[start]
                parameters = detached(parameters)
                rule_state = self.policy.init(parameters).rule if fresh and start == 0 else state.rule
                scores, flat = [], flatten(parameters)
                for step in range(start, stop):
                    products = [weight * torch.dot(flatten(each), flat) for weight, each in notes.inner[step]]
                    parameters, rule_state = self.apply(torch.stack(products).sum(), parameters, rule_state)
                    flat = flatten(parameters)
                    scores.append(torch.dot(flatten(notes.meta[step]), flat))
                self._accumulate(torch.stack(scores).sum())
        return last

    def _segments(self) -> list[tuple[int, int]]:
        """First and last position of each stretch between two cuts."""
        length = self.config.truncation or self.steps
        return [(start, min(start + length, self.steps)) for start in range(0, self.steps, length)]

    def _pick_term_steps(self, generator: torch.Generator | None) -> None:
        """Choose the steps at which each term of the objective gets its own backward pass."""
        count = min(self.config.term_steps or self.steps, self.steps)
        if self.policy.objective is not None and any(w.requires_grad for w in self.policy.objective.weights().values()):
            self.term_steps = set(torch.randperm(self.steps, generator=generator)[:count].tolist())
        if self.rates is not None and isinstance(self.policy.pruning, LearnedRates):
            self.rate_step = int(torch.randint(self.steps, (), generator=generator))

    def _adapt(
        self, parameters: Parameters, state: PolicyState | None, notes: _Notes
    ) -> tuple[Parameters, PolicyState]:
        """First pass: note the gradients along the way; return parameters and state after the last step."""
        starts = {start for start, _ in self._segments()}
        with torch.no_grad():
            state = self.policy.init(parameters) if state is None else state
        for position in range(self.steps + 1):
            leaves = detached(parameters)
            if position in starts:
                notes.starts[position] = (leaves, detached_state(state))
            inner = self._note(leaves, position, notes, state)
            if inner is not None:
                notes.inner.append(inner)
                parameters, state = self._update(leaves, inner, state)
        return detached(parameters), detached_state(state)

    def _note(
        self, leaves: Parameters, position: int, notes: _Notes, state: PolicyState
    ) -> list[tuple[Tensor, Parameters]] | None:
        """One forward pass and its backward passes. The network's graph ends with this call."""
        batch = self.batches[position]
        probe = RateProbe(self.model, learning_layers(leaves)) if position == self.rate_step else None
        with torch.enable_grad(), nullcontext() if probe is None else probe.watching():
            output = self.policy.evaluate(self.model, leaves, batch.images, position)
            spoiled = None if probe is None else self._spoiled(probe, output, leaves, state)
            score = self.meta_loss(output, batch) if position > 0 else None
            shared = score is not None and self.meta_loss.own_objective and position not in self.term_steps
            inner = None
            if position < self.steps:
                inner = self._inner_gradients(output, leaves, position, keep=score is not None and not shared)
            if score is not None:
                notes.meta.append(inner[0][1] if shared and inner is not None else gradients_of(score, leaves))
                self.losses.append(score.detach())
        return inner if inner is None or spoiled is None else [*inner, spoiled]

    def _spoiled(
        self, probe: RateProbe, output: StepOutput, leaves: Parameters, state: PolicyState
    ) -> tuple[Tensor, Parameters]:
        """What learned rates change of this step's gradient; it stands for all steps."""
        assert isinstance(self.policy.pruning, LearnedRates) and self.rates is not None and output.loss is not None
        choices = soft_choices(self.policy.pruning, self.rates, leaves, state.pruning, float(self.steps))
        return output.loss.new_ones(()), probe.correction(output.loss, choices, self.rates.table, leaves)

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
        return pairs

    def _update(
        self, leaves: Parameters, inner: list[tuple[Tensor, Parameters]], state: PolicyState
    ) -> tuple[Parameters, PolicyState]:
        """The rule's update on the noted gradients, without a graph."""
        assert self.policy.rule is not None
        with torch.no_grad():
            gradients = {name: torch.stack([w * each[name] for w, each in inner]).sum(dim=0) for name in leaves}
            updates, rule_state = self.policy.rule.update(gradients, state.rule)
            pruning = state.pruning
            if self.policy.pruning is not None:
                pruning = self.policy.pruning.observe(gradient_importance(gradients, learning_layers(leaves)), pruning)
            state = replace(state, rule=rule_state, pruning=pruning)
            return {name: leaf - updates[name] for name, leaf in leaves.items()}, state

    def _accumulate(self, total: Tensor) -> None:
        """Add the gradient of one segment's share of the mean meta-loss."""
        tensors = list(self.learned.values())
        if not tensors or not total.requires_grad:
            return
        gradients = torch.autograd.grad(total / self.steps, tensors, allow_unused=True, materialize_grads=True)
        for name, gradient in zip(self.learned, gradients, strict=True):
            self.gradients[name] = self.gradients[name] + gradient
