"""Restoration: its equation, what it does to a stream that shifts, and its gradient."""

import math
from dataclasses import replace

import pytest
import torch

from metaopt.errors import ConfigError
from metaopt.objectives import WeightedObjective
from metaopt.online import OnlineAdapter
from metaopt.optimizers.adam import Adam
from metaopt.policy import AdaptationPolicy, MethodConfig, build_method
from metaopt.policy.part import Part
from metaopt.policy.parts.batch_statistics import BatchStatistics
from metaopt.policy.parts.pruning import Pruning
from metaopt.policy.parts.restoration import Restoration, RestorationConfig
from metaopt.policy.parts.teacher import Teacher, TeacherConfig
from metaopt.policy.parts.update_gate import UpdateGate
from metaopt.policy.step import StepContext

from ..tiny import BARE, assert_goes_on, random_images, tiny_model, tiny_policy, with_parts


def adam(*parts: Part) -> AdaptationPolicy:
    return AdaptationPolicy("adam", WeightedObjective({"slr": 1}), Adam(lr=0.01), [BatchStatistics(), *parts])


def test_strength_follows_its_equation() -> None:
    restoration = Restoration(RestorationConfig(base=0.01, peak=0.9, threshold=5.0, width=0.5))
    for distance in (0.2, 1.0, 5.0, 40.0):
        share = 1 / (1 + math.exp(-math.log(distance / 5.0) / 0.5))
        found = float(restoration.strength(torch.tensor(distance)).detach())
        assert found == pytest.approx(0.01 + 0.89 * share, rel=1e-5)
        assert restoration.begins_anew(torch.tensor(distance)) == (distance > 5.0)


@pytest.mark.parametrize("distance", [0.0, math.inf])
def test_no_distance_makes_a_gradient_that_is_not_finite(distance: float) -> None:
    restoration = Restoration()
    restoration.strength(torch.tensor(distance)).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad) for p in restoration.parameters())


def test_gradient_of_what_is_restored() -> None:
    restoration = Restoration().double()
    policy, source = adam(restoration), torch.randn(5, dtype=torch.float64)

    def function(theta: torch.Tensor, distance: torch.Tensor) -> torch.Tensor:
        context = StepContext(policy, torch.nn.Identity(), {"a": theta}, {}, torch.zeros(1, 3, 2, 2))
        context.own_start, context.signals["shift_distance"] = {"a": source}, distance
        restoration.restore(context)
        return context.parameters["a"]

    theta = torch.randn(5, dtype=torch.float64, requires_grad=True)
    distance = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (theta, distance))
    assert torch.autograd.gradgradcheck(function, (theta, distance))


@pytest.mark.parametrize("field", ["base", "peak"])
def test_a_share_out_of_range_is_refused(field: str) -> None:
    with pytest.raises(ConfigError, match=f"restoration.{field} is 1.5; allowed is 0 < {field} < 1"):
        RestorationConfig(**{field: 1.5})


def test_where_nothing_comes_back_it_is_the_method_without() -> None:
    model = tiny_model()
    nothing = Restoration(RestorationConfig(base=1e-30, peak=1e-30, threshold=1e6))
    with_it, without = OnlineAdapter(model, adam(nothing)), OnlineAdapter(model, adam())
    for seed in range(4):
        assert torch.equal(with_it(random_images(16, seed)), without(random_images(16, seed)))


def test_a_shift_brings_the_source_back_and_forgets_what_the_rule_remembered() -> None:
    model = tiny_model()
    config = RestorationConfig(base=1e-30, peak=1 - 1e-7, threshold=8.0, width=0.05)
    adapter, fresh = OnlineAdapter(model, adam(Restoration(config))), OnlineAdapter(model, adam())
    for seed in range(4):
        adapter(random_images(32, seed))
    assert adapter.events["restored"] == 0 and adapter.updates == 4
    darker = 0.3 * random_images(32, 9)
    torch.testing.assert_close(adapter(darker), fresh(darker))
    torch.testing.assert_close(adapter.parameters, fresh.parameters, rtol=1e-5, atol=1e-5)
    assert adapter.events["restored"] == 1 and adapter.updates == 5
    adapter(0.3 * random_images(32, 10))  # the new domain is the one to compare with from here on
    assert adapter.events["restored"] == 1


def that_remembers() -> AdaptationPolicy:
    """A method all of whose parts remember, and of which a shift brings the whole source back."""
    config = RestorationConfig(base=1e-30, peak=1 - 1e-7, threshold=8.0, width=0.05)
    teacher = TeacherConfig(momentum=0.5, restore=0.0, proximal=0.0)
    return adam(Restoration(config), UpdateGate(), Teacher(teacher), Pruning())


@pytest.mark.parametrize("part", ["rule", "pruning", "teacher", "update_gate", "shift_distance"])
def test_in_a_new_domain_every_part_remembers_what_it_would_if_the_stream_began_there(part: str) -> None:
    model = tiny_model(dtype=torch.float64)
    adapter, fresh = (OnlineAdapter(model, that_remembers(), memory="pruned") for _ in range(2))
    for seed in range(4):
        adapter(random_images(32, seed, torch.float64))
    darker = 0.3 * random_images(32, 9, torch.float64)
    outputs = [each.step(darker) for each in (adapter, fresh)]
    assert adapter.events["restored"] == 1 and all(output.updated for output in outputs)
    found, expected = (each.state[part] for each in (adapter, fresh))
    assert expected is not None
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_steady_pull_bounds_how_far_parameters_go() -> None:
    model, images = tiny_model(), random_images(32)
    gone = {}
    for base in (1e-30, 0.3):
        adapter = OnlineAdapter(model, adam(Restoration(RestorationConfig(base=base, threshold=1e6))))
        for _ in range(40):
            adapter(images)
        source = adapter.layout.take(adapter.model)
        gone[base] = max(float((adapter.parameters[name] - source[name]).detach().abs().max()) for name in source)
    assert gone[0.3] < 0.04 < gone[1e-30]  # 0.01 a step over 0.3 a step of pull


def test_save_and_load_go_on_bit_for_bit_across_a_shift(tmp_path) -> None:
    model, policy = tiny_model(), with_parts(tiny_policy(tiny_model()), Restoration())
    stream = [random_images(16, seed) * (1.0 if seed < 3 else 0.4) for seed in range(6)]
    adapter = assert_goes_on(lambda: OnlineAdapter(model, policy), stream, 2, tmp_path / "state.pt")
    assert adapter.events["restored"] == 1


def test_methods_take_the_policys_restoration_or_the_default_one() -> None:
    policy = tiny_policy(tiny_model())
    plain = MethodConfig("tent", update="adam", objective={"entropy": 1.0}, parts=dict(BARE))
    assert build_method(plain).part("restoration") is None
    tent = replace(plain, parts={**BARE, "restoration": True})
    assert build_method(tent).part("restoration").config == RestorationConfig()
    learned = MethodConfig("policy", update="generator", objective_from_policy=True, inherit=True)
    assert build_method(learned, policy=policy).part("restoration") is None
    policy = with_parts(policy, Restoration(RestorationConfig(peak=0.5)))
    for config in (learned, tent):
        assert build_method(config, policy=policy).part("restoration") is policy.part("restoration")
