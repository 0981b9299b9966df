"""The one adaptation step, of every method, in meta-training and in deployment."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from metaopt.activation_memory import ActivationMemory
from metaopt.data.seeding import generator_for
from metaopt.objectives.weighted import weighted_sum
from metaopt.optimizers.update import NONFINITE
from metaopt.parameters import detached, own_values
from metaopt.policy.part import Part
from metaopt.policy.policy import AdaptationPolicy
from metaopt.policy.precision import Autocast, network_alone_autocasts, run_network
from metaopt.policy.state import State
from metaopt.types import ApplyUpdate, ForwardOutput, Parameters, StepOutput

REFUSED = "refused"  # event: nothing to learn from
DIFFERENTIATED = 2.0
"""Forward passes that one with its backward pass counts as: frozen layers need the gradient of their inputs alone,
as many products again. By the clock it is 2.2 to 2.5, for normalisation moves more than it multiplies."""


@dataclass
class StepContext:
    """One batch on its way through the step: what the parts of a policy see, and what they change."""

    policy: AdaptationPolicy
    model: nn.Module  # called through `metaopt.policy.precision.run_network` alone
    parameters: Parameters  # adapted tensors, float32 at least
    state: State  # of the rule and the parts
    images: Tensor  # (B, 3, H, W) in [0, 1]
    position: int = 0  # batches before this one, which augmented views are drawn from
    own_start: Parameters | None = None  # where adaptation starts, if it is known already
    signals: dict[str, Tensor] = field(default_factory=dict)  # what was told of the batch, by name
    tensors: Parameters = field(default_factory=dict)  # stand in for the model's own, beside the adapted ones
    statistics: dict[str, Any] = field(default_factory=dict)  # how layers normalise: arguments of the source model
    notes: dict[str, Any] = field(default_factory=dict)  # what parts keep of the batch until it is done, by their names
    events: list[str] = field(default_factory=list)  # what parts did out of the ordinary
    losses: list[Tensor] = field(default_factory=list)  # at each look that the rule took, detached scalars
    few: bool = False  # whether the images are too few to tell what their domain is like
    moments: dict[int, tuple[Tensor, Tensor]] | None = None  # of the batch at BatchNorm layers; None: nobody asked
    opened: bool = True  # whether the update gate let it through, where there is one
    refused: bool = False  # whether a part found nothing in the batch to learn from
    begun: bool = False  # whether rule and parts have forgotten what was before: another domain
    left: tuple[Parameters, State] | None = None  # parameters and state as the batch before left them
    frugal: bool = False  # whether passes are to be saved: looks go by some of the images
    passes: list[float] = field(default_factory=list)  # of the network so far, counted for each image
    autocast: Autocast = nullcontext  # what the network runs within

    def acting(self, act: str) -> list[Any]:
        """The parts that take part in an act (`metaopt.policy.part.ACTS`), in the policy's order."""
        return [part for part in self.policy.parts.values() if isinstance(part, Part) and act in part.acts]

    @property
    def start(self) -> Parameters:
        """Where adaptation starts: the source's values, or learned ones; differentiable in what was learned."""
        if self.own_start is None:
            self.own_start = self.policy.start(own_values(self.model, self.parameters))
        return self.own_start

    def remember(self, name: str, state: Any) -> None:
        """Another state of one part."""
        self.state = {**self.state, name: state}

    def begin_anew(self, event: str) -> None:
        """Forget what rule and parts remember of a domain, as before the first batch, and report it."""
        lasting = {name: self.state[name] for name in self.policy.lasting}
        self.state, self.begun = self.policy.init(self.parameters) | lasting, True
        self.events.append(event)

    def count(self, images: Tensor, tensors: Parameters) -> None:
        """Count a pass of the network over images, (B, 3, H, W), with these tensors."""
        differentiated = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors.values())
        self.passes.append(len(images) * (DIFFERENTIATED if differentiated else 1.0))

    def forward(
        self, images: Tensor | None = None, parameters: Parameters | None = None, **wanted: Any
    ) -> ForwardOutput:
        """The model's output on the batch, or on other images, at the adapted tensors, or at others; in float32."""
        tensors = self.tensors | (self.parameters if parameters is None else parameters)
        images = self.images if images is None else images
        self.count(images, tensors)
        return run_network(self.model, tensors, images, self.statistics | wanted, self.autocast)


def adaptation_step(
    policy: AdaptationPolicy,
    model: nn.Module,
    parameters: Parameters,
    state: State,
    images: Tensor,
    apply: ApplyUpdate | None,
    position: int = 0,
    memory: ActivationMemory | None = None,
    start: Parameters | None = None,
    allow: Callable[[StepContext], bool] | None = None,
    answered: int = 0,
    frugal: bool = False,
) -> tuple[Parameters, State, StepOutput]:
    """Predict on a batch, then update on it.

    Meta-training unrolls it with a differentiable ``apply``; deployment runs it with an in-place one.

    Args:
        policy: the method.
        model: the model that the method adapts (`AdaptationPolicy.attach`).
        parameters: adapted tensors before this batch, float32 at least, whatever the model's type.
        state: state before this batch.
        images: (B, 3, H, W) in [0, 1].
        apply: how a loss becomes new parameters; None only for a method that never updates.
        position: number of batches before this one, updated on or not: augmented views of the images are drawn from it.
        memory: how activations are kept for backward; None: as torch keeps them.
        start: where adaptation starts, if it is known already.
        allow: asked last whether the batch may be updated on, once it is known what it is like; None: it may.
        answered: images of the batch, its first, that need no answer where it is not updated on.
        frugal: whether looks at the batch go by some of its images.

    Returns:
        Parameters and state after this batch, and the predictions made *before* the update.
    """
    with network_alone_autocasts(images.device.type) as autocast:
        context = StepContext(
            policy, model, parameters, state, images, position, start, frugal=frugal, autocast=autocast
        )
        parameters, state, output = _stepped(context, apply, memory, allow, answered)
        return parameters, state, replace(output, passes=sum(context.passes))


def _stepped(
    context: StepContext,
    apply: ApplyUpdate | None,
    memory: ActivationMemory | None,
    allow: Callable[[StepContext], bool] | None,
    answered: int,
) -> tuple[Parameters, State, StepOutput]:
    """One batch on its way."""
    if apply is None:
        output = evaluate(context)
        if bool(torch.isfinite(output.logits).all()):
            settle(context)
        return context.parameters, context.state, replace(output, updated=False)
    before = context.parameters, context.state
    meet(context)
    context.opened = should_update(context) and (allow is None or allow(context))
    if context.opened:
        output = update(context, apply, memory)
    else:
        context.parameters = detached(context.parameters)
        own = replace(context, images=context.images[answered:], few=True) if answered else context
        output = predict(own)
        rest(own)
        context.state = own.state
    if not output.updated and (NONFINITE in context.events or not bool(torch.isfinite(output.logits).all())):
        # What such a batch has touched would stay NaN: it leaves nothing behind, and counts for no part.
        return *before, replace(output, signals={}, events=(NONFINITE,))
    done = sum(context.passes)
    for part in context.acting("judge"):
        part.judge(context, output)
    output = replace(output, looked=sum(context.passes) - done)
    told = {name: signal for name, signal in context.signals.items() if signal.ndim == 0}
    output = replace(output, signals=told, events=tuple(context.events))
    return context.parameters, context.state, output


def meet(context: StepContext, signals: dict[str, Tensor] | None = None) -> None:
    """What happens before the model runs: see what the batch is like, and bring back some of the start.

    Args:
        context: of the batch; parameters and state change.
        signals: what is known of it already, so that nobody looks again.
    """
    context.left = context.parameters, context.state
    if signals is None:
        for part in context.acting("observe"):
            part.observe(context)
    else:
        context.signals = signals
    for part in context.acting("restore"):
        part.restore(context)


def decision(context: StepContext) -> Tensor | None:
    """z, above 0 where the batch is worth an update: the least of all who decide; None where nobody does, and it is."""
    decided = [part.decide(context) for part in context.acting("decide")]
    return torch.stack(decided).min() if len(decided) > 1 else decided[0] if decided else None


def should_update(context: StepContext) -> bool:
    """Whether the batch is updated on."""
    with torch.no_grad():
        z = decision(context)
    return z is None or z.item() > 0


def update(context: StepContext, apply: ApplyUpdate, memory: ActivationMemory | None) -> StepOutput:
    """Predict and update; what the rule refuses leaves everything as it was."""

    def loss_on(images: Tensor) -> Tensor:
        return loss_of(evaluate(replace(context, images=images, signals={}, notes={}, passes=[])))

    before, here, pruning = context.state, context.parameters, context.state.get("pruning")
    kept = nullcontext() if memory is None else memory.step(context.model, loss_on, here, pruning, context.images)
    if memory is not None:  # dry runs, once for a shape of batches, are no part of the step's cost
        context.passes.append(DIFFERENTIATED * min(memory.extra_samples, len(context.images)))
    with kept as observed:
        output, rule_state = evaluate(context), before["rule"]

        def loss_at(parameters: Parameters) -> Tensor:
            loss = loss_of(output if parameters is here else evaluate(replace(context, parameters=parameters)))
            context.losses.append(loss.detach())
            return loss

        if not context.refused:
            context.parameters, rule_state = apply(loss_at, here, before["rule"])
    if rule_state is before["rule"] and rule_state is not None:  # by a part, or for what is not finite
        context.events.append(REFUSED if context.refused else NONFINITE)
        context.parameters, context.state = detached(context.parameters), before
        return replace(output, updated=False)
    context.remember("rule", rule_state)
    if observed is not None and pruning is not None:
        context.remember("pruning", observed.state)
    settle(context)
    return replace(output, updated=True)


def settle(context: StepContext) -> None:
    """What follows an update."""
    for part in context.acting("settle"):
        part.settle(context)


def rest(context: StepContext) -> None:
    """What follows a prediction without an update."""
    for part in context.acting("rest"):
        part.rest(context)


def evaluate(context: StepContext) -> StepOutput:
    """Predict and weigh the loss, with a graph where the parameters have one."""
    objective = context.policy.objective
    condition(context)
    needs = frozenset[str]() if objective is None else objective.needs
    taught = teach(context) if "teacher" in needs else None
    output = context.forward(features="features" in needs, **recorded(context))
    if "view" in needs:
        output = output._replace(view_logits=context.forward(augmented(context)).logits)
    logits = answer(context, output.logits)
    if objective is None:
        return StepOutput(logits)
    terms = objective.values(output._replace(teacher_logits=taught), weigh(context, output.logits))
    weights = objective.weights()
    loss = weighted_sum(terms, weights)
    for part in context.acting("terms"):
        for name, (weight, value) in part.terms(context, output).items():
            terms[name], weights[name] = value, loss.new_tensor(weight)
            loss = loss + weight * value
    return StepOutput(logits, loss, terms, weights)


def recorded(context: StepContext) -> dict[str, Any]:
    """What tells a forward pass to note the batch's moments, where somebody asked for them."""
    return {} if context.moments is None else {"record": context.moments}


def condition(context: StepContext) -> None:
    """Settle what the forward pass takes."""
    for part in context.acting("condition"):
        part.condition(context)


def weigh(context: StepContext, logits: Tensor) -> Tensor | None:
    """How much each sample counts in the loss, (B,), constant; None where all count alike."""
    weights = None
    for part in context.acting("weigh"):
        with torch.no_grad():
            own = part.weigh(context, logits.detach())
        weights = own if weights is None else weights * own
    return weights


def augmented(context: StepContext) -> Tensor:
    """Another view of the batch's images, the same whenever it is asked for."""
    return augmented_by(context.images, generator_for("view", context.policy.seed, context.position))


def augmented_by(images: Tensor, randomness: torch.Generator) -> Tensor:
    """A view of images, drawn from a generator; loads torchvision."""
    from metaopt.objectives.views import augmented_view

    return augmented_view(images, randomness)


def predict(context: StepContext) -> StepOutput:
    """Predict alone, by one forward pass without a graph or a loss."""
    with torch.no_grad():
        condition(context)
        return StepOutput(answer(context, None))


def teach(context: StepContext) -> Tensor | None:
    """The teacher's logits, (B, C); None without one."""
    for part in context.acting("teach"):
        return part.teach(context)
    return None


def answer(context: StepContext, logits: Tensor | None) -> Tensor:
    """The prediction, (B, C): of a part that predicts in the model's place, else the model's, corrected by others.

    Args:
        context: of the batch.
        logits: of the model; None where it has not run.
    """
    for part in context.acting("predict"):
        predicted = part.predict(context)
        logits = logits if predicted is None else predicted
    answered = context.forward(**recorded(context)).logits if logits is None else logits
    for part in context.acting("answer"):
        answered = part.answer(context, answered)
    return answered


def loss_of(output: StepOutput) -> Tensor:
    """The loss of a method that updates, which has one."""
    assert output.loss is not None
    return output.loss
