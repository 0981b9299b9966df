"""An unroll of meta-training is what the adapter does, batch by batch."""

from collections.abc import Sequence

import pytest
import torch

from metaopt.meta.meta_gradient import meta_gradient
from metaopt.meta.unroll import MetaBatch, MetaGradient, UnrollConfig
from metaopt.models import SourceModel
from metaopt.online import OnlineAdapter
from metaopt.policy import AdaptationPolicy
from metaopt.policy.parts.sample_filter import SampleFilter, SampleFilterConfig
from metaopt.policy.parts.update_gate import UpdateGate, UpdateGateConfig

from .cases import TeacherLoss, policy_for, start, task, tiny_resnet

STEPS = 6
TWO_VIEWS = {"entropy": 0.7, "consistency": 1.3}


def gated(model: SourceModel, every: int | None) -> AdaptationPolicy:
    """Predictions on two views are compared, and the gate stays closed at some batches: at every second, or learned."""
    gate = UpdateGate(UpdateGateConfig(every=every)).double()
    if every is None:
        gate.weights.data = torch.tensor([0.0, 0.0, 1.0, 0.0], dtype=torch.float64)  # of batches since an update
        gate.bias.data.fill_(-0.8)
    return policy_for(model, terms=TWO_VIEWS, parts=[gate])


def unrolled(
    policy: AdaptationPolicy, model: SourceModel, batches: Sequence[MetaBatch], first: MetaGradient | None = None
) -> MetaGradient:
    parameters, state, met = (start(model), None, 0) if first is None else (first.parameters, first.state, STEPS // 2)
    config = UnrollConfig(gradient="first_order")
    return meta_gradient(policy, model, parameters, state, batches, TeacherLoss(), config=config, position=met)


def assert_deployed(policy: AdaptationPolicy, model: SourceModel, found: MetaGradient, losses: list[float]) -> None:
    """The adapter, batch by batch, has the unroll's meta-losses and ends where it does, to 1e-9 in float64."""
    adapter, score, batches = OnlineAdapter(model, policy), TeacherLoss(), task(STEPS)
    expected = []
    for position, batch in enumerate(batches[:STEPS]):
        output = adapter.step(batch.images)
        expected += [float(score(output, batch))] if position > 0 else []
        with adapter.frozen():  # a look draws nothing
            adapter(batch.images)
    assert 1 < adapter.updates < STEPS  # else nothing is told apart
    with adapter.frozen():
        expected.append(float(score(adapter.step(batches[STEPS].images), batches[STEPS])))
    assert losses == pytest.approx(expected, abs=1e-9)
    for name, tensor in adapter.parameters.items():
        torch.testing.assert_close(found.parameters[name], tensor, rtol=0, atol=1e-9)


@pytest.mark.parametrize("every", [None, 2])
def test_a_gate_and_drawn_views_unroll_as_deployed(every: int | None) -> None:
    model = tiny_resnet()
    policy = gated(model, every)
    found = unrolled(policy, model, task(STEPS))
    assert_deployed(policy, model, found, [float(loss) for loss in found.losses])


@pytest.mark.parametrize("every", [None, 2])
def test_batches_that_a_part_refuses_unroll_as_deployed(every: int | None) -> None:
    model = tiny_resnet()
    reliable = SampleFilter(SampleFilterConfig(margin=0.79, similarity=None)).double()
    gate = [] if every is None else [UpdateGate(UpdateGateConfig(every=every)).double()]
    policy = policy_for(model, terms=TWO_VIEWS, parts=[*gate, reliable])
    found = unrolled(policy, model, task(STEPS))
    assert_deployed(policy, model, found, [float(loss) for loss in found.losses])
    assert all(torch.isfinite(gradient).all() for gradient in found.gradients.values())


def test_an_unroll_in_two_pieces_is_the_whole_one() -> None:
    model = tiny_resnet()
    policy = gated(model, 2)
    half, batches = STEPS // 2, task(STEPS)
    first = unrolled(policy, model, batches[: half + 1])
    second = unrolled(policy, model, batches[half:], first)
    assert_deployed(policy, model, second, [float(loss) for loss in (*first.losses, *second.losses)])
