"""The update gate: its equation, what a closed one leaves alone, and what it saves."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from timm.models import VisionTransformer
from torch import Tensor

from metaopt.errors import ConfigError
from metaopt.evaluation import MemoryMeter
from metaopt.online import OnlineAdapter
from metaopt.policy import AdaptationPolicy, MethodConfig, build_method
from metaopt.policy.part import Part
from metaopt.policy.parts.restoration import Restoration, RestorationConfig
from metaopt.policy.parts.update_gate import OLDEST, GateState, UpdateGate, straight_through

from ..tiny import BARE, assert_goes_on, random_images, tiny_model, tiny_policy, with_parts

TENT = MethodConfig("tent", update="adam", lr=0.01, objective={"entropy": 1.0}, parts=dict(BARE))


def every(batches: int) -> dict[str, Any]:
    """A method's parts with a periodic gate."""
    return {**BARE, "update_gate": {"every": batches}}


def gated(bias: float, *parts: Part, weights: Sequence[float] = (0.0, 0.0, 0.0, 0.0)) -> AdaptationPolicy:
    gate = UpdateGate()
    gate.weights.data = torch.tensor(weights)
    gate.bias.data.fill_(bias)
    return with_parts(tiny_policy(tiny_model()), gate, *parts)


def state(age: float, rest: float, entropy: float) -> GateState:
    return GateState(*(torch.tensor(value) for value in (age, rest, entropy)))


def test_weighs_its_signals_as_the_equation_says() -> None:
    gate = UpdateGate()
    gate.weights.data = torch.tensor([0.3, -0.7, 0.2, 1.5])
    gate.bias.data.fill_(-0.4)
    found = gate.z(state(3.0, 1.0, 0.6), torch.tensor(7.0)).item()
    expected = 0.3 * math.log(7) - 0.7 * math.log(4) + 0.2 * math.log(2) + 1.5 * 0.6 - 0.4
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_domain_that_goes_on_grows_no_older_than_the_tasks_and_is_updated_on_again() -> None:
    gate = UpdateGate()  # weights and bias with which meta-training starts
    eighth, twentieth = (gate.z(state(age, 3.0, 0.5), torch.tensor(1.0)).item() for age in (OLDEST, 20.0))
    assert twentieth == eighth < gate.z(state(OLDEST - 1, 3.0, 0.5), torch.tensor(1.0)).item()
    rested = [gate.z(state(50.0, rest, 0.5), torch.tensor(1.0)).item() > 0 for rest in (0.0, 20.0)]
    assert rested == [False, True]


@pytest.mark.parametrize("z", [-1.5, 0.7])
def test_straight_through_is_hard_with_the_slope_of_the_sigmoid(z: float) -> None:
    logit = torch.tensor(z, dtype=torch.float64, requires_grad=True)
    decision = straight_through(logit)
    (slope,) = torch.autograd.grad(decision, logit)
    share = 1 / (1 + math.exp(-z))
    assert decision.item() == float(z > 0) and slope.item() == pytest.approx(share * (1 - share), rel=1e-9)


def test_an_open_gate_is_the_policy_without_one() -> None:
    model, plain = tiny_model(), tiny_policy(tiny_model())
    with_gate, without = OnlineAdapter(model, gated(9.0)), OnlineAdapter(model, plain)
    for seed in range(4):
        assert torch.equal(with_gate(random_images(16, seed)), without(random_images(16, seed)))


def test_a_closed_gate_predicts_alone_holds_nothing_and_changes_nothing() -> None:
    adapter = OnlineAdapter(tiny_model(), gated(-9.0))
    frozen = OnlineAdapter(tiny_model(), tiny_policy(tiny_model()))
    images = random_images(16)
    with MemoryMeter([*adapter.parameters.values(), images], model=adapter.model) as meter:
        found = adapter.step(images)
    with frozen.frozen():
        torch.testing.assert_close(found.logits, frozen(images), rtol=0, atol=0)
    assert meter.peak_mib == 0.0 and found.loss is None and not found.updated
    assert adapter.updates == 0 and adapter.events["skipped"] == 1
    for name, tensor in adapter.layout.take(adapter.model).items():
        assert torch.equal(adapter.parameters[name], tensor)
    assert not any(moment.any() for moment in adapter.state["rule"].moments if isinstance(moment, Tensor))


def test_closed_steps_do_not_chain_their_graphs() -> None:
    adapter = OnlineAdapter(tiny_model(), gated(-9.0, Restoration()))
    for seed in range(3):
        adapter(random_images(16, seed))
    assert all(tensor.is_leaf for tensor in adapter.parameters.values())


def test_it_remembers_age_rest_and_entropy() -> None:
    policy = gated(1.0, weights=(0.0, -10.0, 0.0, 0.0))  # open at the first batch of a domain alone
    adapter = OnlineAdapter(tiny_model(), policy)
    outputs = [adapter.step(random_images(16, seed)) for seed in range(3)]
    assert [output.updated for output in outputs] == [True, False, False]
    age, rest, entropy = (value.item() for value in adapter.state["update_gate"])
    probabilities = outputs[-1].logits.softmax(dim=1)
    expected = -(probabilities * probabilities.log()).sum(dim=1).mean().item() / math.log(probabilities.shape[1])
    assert (age, rest) == (3.0, 2.0) and entropy == pytest.approx(expected, rel=1e-5)
    assert adapter.updates == 1


def test_a_periodic_gate_updates_on_every_nth_batch_from_the_first() -> None:
    adapter = OnlineAdapter(tiny_model(), build_method(replace(TENT, parts=every(3))))
    found = [adapter.step(random_images(16, seed)).updated for seed in range(7)]
    assert found == [True, False, False, True, False, False, True]


def test_a_period_begins_anew_where_a_new_domain_does() -> None:
    policy = with_parts(build_method(replace(TENT, parts=every(4))), Restoration(RestorationConfig(threshold=8.0)))
    adapter = OnlineAdapter(tiny_model(), policy)
    stream = [random_images(32, seed) * (1.0 if seed < 6 else 0.3) for seed in range(11)]
    updated = [position for position, images in enumerate(stream) if adapter.step(images).updated]
    assert adapter.events["restored"] == 1 and updated == [0, 4, 6, 10]


def test_a_periodic_gate_of_one_is_the_method_without() -> None:
    model = tiny_model()
    configs = replace(TENT, parts=every(1)), TENT
    gate, plain = (OnlineAdapter(model, build_method(config)) for config in configs)
    for seed in range(3):
        assert torch.equal(gate(random_images(16, seed)), plain(random_images(16, seed)))


def test_a_period_replaces_the_learned_gate_and_only_the_policy_has_that() -> None:
    policy = gated(0.0)
    config = MethodConfig("policy", update="generator", objective_from_policy=True, inherit=True)
    assert build_method(config, policy=policy).part("update_gate") is policy.part("update_gate") is not None
    assert build_method(TENT, policy=policy).part("update_gate") is None
    periodic = build_method(replace(config, parts={"update_gate": {"every": 2}}), policy=policy).part("update_gate")
    assert periodic.config.every == 2 and not list(periodic.parameters())
    with pytest.raises(ConfigError, match=r"update_gate.every is 0; it must be at least 1"):
        build_method(replace(config, parts={"update_gate": {"every": 0}}), policy=policy)


def test_save_and_load_go_on_bit_for_bit(tmp_path) -> None:
    policy = gated(0.5, weights=(0.0, 0.0, 1.0, -1.0))
    stream = [random_images(16, seed) for seed in range(6)]
    assert_goes_on(lambda: OnlineAdapter(tiny_model(), policy), stream, 3, tmp_path / "state.pt")


def test_a_periodic_gate_runs_where_no_shift_can_be_watched() -> None:
    config = replace(TENT, adapts="all", parts=every(2))
    torch.manual_seed(0)
    vit = VisionTransformer(img_size=16, patch_size=8, embed_dim=8, depth=1, num_heads=2, num_classes=4)
    adapter = OnlineAdapter(vit.eval(), build_method(config))
    assert [adapter.step(random_images(8, seed)).updated for seed in range(4)] == [True, False, True, False]
    with pytest.raises(ConfigError, match=r"method.parts.restoration does not go with adapts=all"):
        replace(config, parts={**every(2), "restoration": True})
