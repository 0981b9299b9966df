"""The update gate in the unroll: closed steps, its meta-gradient, and the price of updates."""

import pytest
import torch

from metaopt.errors import ConfigError
from metaopt.meta.unroll import MetaBatch
from metaopt.models import SourceModel
from metaopt.optimizers.update import gradients_of
from metaopt.parameters import detached
from metaopt.policy import AdaptationPolicy
from metaopt.policy.parts.update_gate import UpdateGate, next_state
from metaopt.policy.state import detached_state
from metaopt.policy.step import StepContext, decision, meet
from metaopt.policy.without_step import evaluate_on

from .cases import ALL_TERMS, TeacherLoss, mean_loss, policy_for, start, take, task, tiny_resnet

STEPS = 4


def gated_policy(network: SourceModel) -> AdaptationPolicy:
    """A policy whose gate opens at some steps of the task and at others not."""
    gate = UpdateGate()
    policy = policy_for(network, "step_sizes", parts=[gate])
    gate.weights.data = torch.tensor([0.1, -1.0, 1.6, 0.4], dtype=torch.float64)
    gate.bias.data.fill_(0.2)
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
    price = 0.3
    found = (
        take(policy, network, task(STEPS), lagrange_multiplier=price, **ALL_TERMS)
        .gradients["parts.update_gate.bias"]
        .item()
    )
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
        context = StepContext(policy, network, parameters, state, batch.images)
        meet(context)
        leaves, state = context.parameters, context.state
        output = evaluate_on(policy, network, leaves, batch.images)
        assert output.loss is not None and policy.rule is not None
        inner = gradients_of(output.loss, leaves, retain_graph=True)
        if position > 0:
            slopes.append(gradients_of(TeacherLoss()(output, batch), leaves))
        z = decision(context)
        assert z is not None
        updates, rule = policy.rule.update(inner, state["rule"])
        opens = z.item() > 0
        moves.append({name: -update.detach() for name, update in updates.items()})
        decisions.append(z.detach())
        state = detached_state({**state, "rule": rule if opens else state["rule"]})
        state["update_gate"] = next_state(state["update_gate"], output.logits, opens)
        if opens:
            parameters = detached({name: leaf - updates[name] for name, leaf in leaves.items()})
    return moves, slopes, decisions


def test_a_price_alone_pushes_the_gate_shut() -> None:
    network = tiny_resnet()
    policy = gated_policy(network)
    free = take(policy, network, task(STEPS)).gradients["parts.update_gate.bias"].item()
    priced = take(policy, network, task(STEPS), lagrange_multiplier=1.0).gradients["parts.update_gate.bias"].item()
    assert priced > free + 0.1


def test_full_refuses_a_gate() -> None:
    network = tiny_resnet()
    with pytest.raises(ConfigError, match=r"meta.gradient is full and the policy has an update gate"):
        take(gated_policy(network), network, task(2), gradient="full")
