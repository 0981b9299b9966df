"""The update gate in the unroll: closed steps, its meta-gradient, and the price of updates."""

from dataclasses import replace

import pytest
import torch

from metaopt.errors import ConfigError
from metaopt.inner_loop import MetaBatch, gradients_of
from metaopt.models import SourceModel
from metaopt.parameters import detached
from metaopt.policy import AdaptationPolicy
from metaopt.policy.gate import LearnedGate, stepped
from metaopt.policy.response import opening, respond, sense
from metaopt.policy.state import detached_state

from .cases import ALL_TERMS, TeacherLoss, mean_loss, policy_for, start, take, task, tiny_resnet

STEPS = 4


def gated_policy(network: SourceModel) -> AdaptationPolicy:
    """A policy whose gate opens at some steps of the task and at others not."""
    policy = policy_for(network, "step_sizes")
    policy.gate = LearnedGate().double()
    policy.gate.weights.data = torch.tensor([0.1, -1.0, 1.6, 0.4], dtype=torch.float64)
    policy.gate.bias.data.fill_(0.2)
    return policy


def test_unroll_decides_as_deployment_does() -> None:
    network = tiny_resnet()
    policy = gated_policy(network)
    found = take(policy, network, task(STEPS))
    assert any(found.opened) and not all(found.opened)
    assert found.loss.item() == pytest.approx(mean_loss(policy, network, task(STEPS)), rel=1e-12)


def test_gradient_is_what_each_decision_moves_times_the_slope_of_its_sigmoid() -> None:
    """∂/∂z_t of Σ_s ⟨∇L_s, θ_s⟩ / K is σ'(z_t) · ⟨Σ_{s>t} ∇L_s, Δ_t⟩ / K with the move Δ_t that an update makes."""
    network = tiny_resnet()
    policy = gated_policy(network)
    assert isinstance(policy.gate, LearnedGate) and policy.rule is not None
    price = 0.3
    found = take(policy, network, task(STEPS), update_price=price, **ALL_TERMS).gradients["gate.bias"].item()
    expected = 0.0
    moves, slopes, decisions = replayed(policy, network, task(STEPS))
    for t in range(STEPS):
        share = torch.sigmoid(decisions[t]).item()
        later = sum((slopes[s][name] * moves[t][name]).sum().item() for s in range(t, STEPS) for name in moves[t])
        expected += share * (1 - share) * (later + price) / STEPS
    assert found == pytest.approx(expected, rel=1e-9)


def replayed(policy: AdaptationPolicy, network: SourceModel, batches: list[MetaBatch]) -> tuple[list, list, list]:
    """Per step: what an update would move, the meta-loss's gradient after it, and z."""
    parameters, moves, slopes, decisions = detached(start(network)), [], [], []
    state = policy.init(parameters)
    for position, batch in enumerate(batches):
        sensed = sense(policy, network, parameters, state, batch.images)
        leaves, state = respond(policy, network, parameters, state, sensed)
        output = policy.evaluate(network, leaves, batch.images)
        assert output.loss is not None and policy.rule is not None
        inner = gradients_of(output.loss, leaves, retain_graph=True)
        if position > 0:
            slopes.append(gradients_of(TeacherLoss()(output, batch), leaves))
        z = opening(policy, state, sensed)
        assert z is not None
        updates, rule = policy.rule.update(inner, state.rule)
        opens = z.item() > 0
        moves.append({name: -update.detach() for name, update in updates.items()})
        decisions.append(z.detach())
        state = detached_state(replace(state, rule=rule if opens else state.rule))
        state = replace(state, gate=stepped(state.gate, output.logits, opens))
        if opens:
            parameters = detached({name: leaf - updates[name] for name, leaf in leaves.items()})
    return moves, slopes, decisions


def test_a_price_alone_pushes_the_gate_shut() -> None:
    network = tiny_resnet()
    policy = gated_policy(network)
    free = take(policy, network, task(STEPS)).gradients["gate.bias"].item()
    priced = take(policy, network, task(STEPS), update_price=1.0).gradients["gate.bias"].item()
    assert priced > free + 0.1


def test_full_refuses_a_gate() -> None:
    network = tiny_resnet()
    with pytest.raises(ConfigError, match=r"meta.gradient is full and the policy has an update gate"):
        take(gated_policy(network), network, task(2), gradient="full")
