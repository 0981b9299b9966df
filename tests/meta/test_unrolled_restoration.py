"""Meta-gradients of a policy with restoration: against finite differences, and against its own replay."""

import pytest

from metaopt.meta.unroll import MetaBatch
from metaopt.models import SourceModel
from metaopt.optimizers.update import gradients_of
from metaopt.parameters import detached
from metaopt.policy import AdaptationPolicy
from metaopt.policy.parts.restoration import Restoration, RestorationConfig
from metaopt.policy.state import detached_state
from metaopt.policy.step import StepContext, meet
from metaopt.policy.without_step import evaluate_on

from .cases import ALL_TERMS, MODELS, TeacherLoss, policy_for, start, take, task
from .test_meta_gradient import check_against_differences


def gradual() -> Restoration:
    """One whose strength depends on the distance of every batch."""
    return Restoration(RestorationConfig(base=0.1, peak=0.7, threshold=30.0, width=2.0))


def moving_task(steps: int = 3) -> list[MetaBatch]:
    """Batches of which each is darker than the one before."""
    return [MetaBatch(batch.images * 0.9**place, batch.targets) for place, batch in enumerate(task(steps))]


@pytest.mark.parametrize("model", MODELS)
def test_full_with_restoration_agrees_with_finite_differences(model: str) -> None:
    network = MODELS[model]()
    check_against_differences(policy_for(network, parts=[gradual()]), network, moving_task())


@pytest.mark.parametrize("truncation", [None, 2])
@pytest.mark.parametrize("anew", [False, True])
def test_first_order_of_restoration_is_the_product_of_slopes_and_moves(anew: bool, truncation: int | None) -> None:
    """⟨∇L_t(θ_t), ∂θ_t/∂φ⟩ for the restoration's numbers, by differences of the replay on fixed gradients."""
    network = MODELS["resnet"]()
    restoration = gradual()
    policy, batches = policy_for(network, "step_sizes", parts=[restoration]), moving_task(4)
    if anew:  # every batch begins a domain
        restoration.log_threshold.data.fill_(-20.0)
    found = take(policy, network, batches, truncation=truncation, **ALL_TERMS).gradients
    noted = noted_slopes(policy, network, batches)
    for name, tensor in restoration.named_parameters():
        value, totals = tensor.item(), []
        for sign in (1, -1):
            tensor.data.fill_(value + sign * 1e-6)
            totals.append(linear_loss(policy, network, batches, noted, truncation))
        tensor.data.fill_(value)
        numeric = (totals[0] - totals[1]) / 2e-6
        assert float(found[f"parts.restoration.{name}"]) == pytest.approx(numeric, rel=1e-5, abs=1e-9), name


def noted_slopes(policy: AdaptationPolicy, network: SourceModel, batches: list[MetaBatch]) -> list[tuple]:
    """Per position: parameters and state before it, gradient of the inner loss, gradient of the meta-loss."""
    parameters, notes = detached(start(network)), []
    state = policy.init(parameters)
    for batch in batches:
        context = StepContext(policy, network, parameters, state, batch.images)
        meet(context)
        leaves = detached(context.parameters)
        output = evaluate_on(policy, network, leaves, batch.images)
        assert output.loss is not None and policy.rule is not None
        inner = gradients_of(output.loss, leaves, retain_graph=True)
        meta = gradients_of(TeacherLoss()(output, batch), leaves)
        notes.append((parameters, detached_state(state), context.signals, inner, meta))
        updates, rule = policy.rule.update(inner, context.state["rule"])
        state = detached_state({**context.state, "rule": rule})
        parameters = detached({name: leaf - updates[name] for name, leaf in leaves.items()})
    return notes


def linear_loss(
    policy: AdaptationPolicy, network: SourceModel, batches: list[MetaBatch], notes: list[tuple], truncation: int | None
) -> float:
    """Mean over positions of ⟨∇L_t, θ_t⟩ where θ_t follows the noted gradients, from each cut on anew."""
    steps, total = len(batches) - 1, 0.0
    assert policy.rule is not None
    for begin in range(0, steps, truncation or steps):
        parameters, state = notes[begin][:2]
        end = min(begin + (truncation or steps), steps)
        for position in range(begin, end + 1):
            _, _, signals, inner, meta = notes[position]
            context = StepContext(policy, network, parameters, state, batches[position].images)
            meet(context, signals)
            parameters, state = context.parameters, context.state
            if position > begin:
                total += sum(float((meta[name] * tensor).sum().detach()) for name, tensor in parameters.items()) / steps
            updates, rule = policy.rule.update(inner, state["rule"])
            state = {**state, "rule": rule}
            parameters = {name: tensor - updates[name] for name, tensor in parameters.items()}
    return total
