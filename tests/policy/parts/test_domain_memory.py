"""The memory of domains: what comes back, which domain it is, which one goes, and that nothing else changes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metaopt.errors import ConfigError
from metaopt.meta.unroll import MetaBatch
from metaopt.objectives import WeightedObjective
from metaopt.online import OnlineAdapter
from metaopt.optimizers.adam import Adam
from metaopt.policy import AdaptationPolicy, MethodConfig, build_method
from metaopt.policy.part import Part
from metaopt.policy.parts.batch_statistics import BatchStatistics
from metaopt.policy.parts.domain_memory import DomainMemory, DomainMemoryConfig
from metaopt.policy.parts.restoration import Restoration, RestorationConfig
from metaopt.policy.parts.shift_distance import distance
from metaopt.policy.parts.teacher import Teacher, TeacherConfig
from metaopt.policy.parts.weight_ensembling import WeightEnsembling, WeightEnsemblingConfig
from metaopt.policy.step import StepContext, meet

from ...meta.cases import ALL_TERMS, policy_for, take, task, tiny_resnet
from ...meta.test_meta_gradient import check_against_differences
from ...tiny import BARE, assert_goes_on, random_images, tiny_model, tiny_policy, with_parts

TINTS = {
    "a": (1.0, 1.0, 1.0),
    "b": (0.3, 0.3, 0.3),
    "c": (1.0, 0.2, 0.2),
    "d": (0.2, 1.0, 0.2),
    "e": (0.2, 0.2, 1.0),
    "f": (1.0, 1.0, 0.1),
}


def domain(name: str, seed: int, count: int = 32) -> Tensor:
    """Images of one colour."""
    return random_images(count, seed) * torch.tensor(TINTS[name]).view(1, 3, 1, 1)


def stream(names: str) -> list[Tensor]:
    """A batch of each domain in turn, with other images each time."""
    return [domain(name, seed) for seed, name in enumerate(names)]


def memory(domains: int = 8) -> DomainMemory:
    return DomainMemory(DomainMemoryConfig(domains))


def adam(*parts: Part) -> AdaptationPolicy:
    """A method many of whose parts remember, and of which a shift brings nearly the whole source back."""
    restoration = Restoration(RestorationConfig(base=1e-30, peak=1 - 1e-7, threshold=8.0, width=0.05))
    teacher = Teacher(TeacherConfig(momentum=0.5, restore=0.0, proximal=0.0))
    ensembling = WeightEnsembling(WeightEnsemblingConfig(momentum=0.9, after=2, forget=3))
    named = {p.name: p for p in (BatchStatistics(), restoration, teacher, ensembling, *parts)}
    ordered = AdaptationPolicy("adam", WeightedObjective({"slr": 1}), Adam(lr=0.01), [])
    return with_parts(ordered, *named.values())


def adapter(*parts: Part) -> OnlineAdapter:
    return OnlineAdapter(tiny_model(), adam(*parts))


def run(adapter: OnlineAdapter, batches: Sequence[Tensor]) -> list[Tensor]:
    return [adapter(batch) for batch in batches]


def same(first: Any, second: Any) -> bool:
    leaves, others = (pytree.tree_leaves(tree) for tree in (first, second))
    assert pytree.tree_structure(first) == pytree.tree_structure(second)
    return all(torch.equal(a, b) for a, b in zip(leaves, others, strict=True))


def without_memory(state: dict[str, Any]) -> dict[str, Any]:
    return {name: own for name, own in state.items() if name != DomainMemory.name}


def numel(tree: Any) -> int:
    return sum(leaf.numel() for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor))


@pytest.mark.parametrize("names", ["aaaa", "aabbccddeeff"])
def test_where_no_domain_comes_back_it_is_the_method_without(names: str) -> None:
    having, lacking = adapter(memory()), adapter()
    assert same(run(having, stream(names)), run(lacking, stream(names)))
    assert same(having.parameters, lacking.parameters) and same(without_memory(having.state), lacking.state)
    assert having.events["restored"] == lacking.events["restored"] == len(set(names)) - 1
    assert having.events["recalled"] == 0


def test_a_domain_that_comes_back_goes_on_as_if_it_had_never_been_left() -> None:
    """Bit for bit: restoration's own pull is none here, so that nothing but the memory tells the two apart."""
    visiting, staying, forgetting = adapter(memory()), adapter(memory()), adapter()
    first, then = [domain("a", seed) for seed in range(4)], [domain("a", seed) for seed in range(10, 14)]
    for each in (visiting, staying, forgetting):
        run(each, first)
    for each in (visiting, forgetting):
        run(each, [domain("b", seed) for seed in range(20, 23)])
    expected = run(staying, then)
    assert same(run(visiting, then), expected) and not same(run(forgetting, then), expected)
    assert same(visiting.parameters, staying.parameters)
    assert same(without_memory(visiting.state), without_memory(staying.state))
    assert (visiting.events["restored"], visiting.events["recalled"]) == (2, 1)
    assert staying.events["restored"] == staying.events["recalled"] == 0


def test_what_comes_back_is_what_was_left_before_the_batch_is_met() -> None:
    adapting = adapter(memory())
    run(adapting, stream("aaa"))
    left = {name: tensor.detach().clone() for name, tensor in adapting.parameters.items()}
    states = pytree.tree_map(torch.clone, without_memory(adapting.state))
    run(adapting, stream("bbbb"))
    assert not same(adapting.parameters, left)
    context = StepContext(adapting.policy, adapting.model, adapting.parameters, adapting.state, domain("a", 50))
    meet(context)
    assert context.events == ["restored", "recalled"] and same(context.parameters, left)
    reference, batch = context.state.pop("shift_distance"), domain("a", 50)
    assert float(reference.count) == float(states.pop("shift_distance").count) + len(batch)  # it has joined those
    assert same(without_memory(context.state), states)


def test_domains_in_turn_have_each_what_they_would_have_alone() -> None:
    alternating, names = adapter(memory()), "abcd"
    alone = {name: adapter(memory()) for name in names}
    for seed in range(6):
        for name in names:
            batch = domain(name, 100 * seed + ord(name))
            found, expected = alternating(batch), alone[name](batch)
            # The first time a ten-millionth of the domain before is left.
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert alternating.events["recalled"] == 5 * len(names)
    assert alternating.events["restored"] == 6 * len(names) - 1


@pytest.mark.parametrize(
    ("domains", "names", "recalled"),
    [
        (1, "aba", 1),  # the one that was left last
        (1, "abca", 0),
        (2, "abca", 1),
        (2, "abaca", 2),  # the one that came back is the latest
        (2, "abacb", 2),
        (2, "abacdb", 1),  # so that the other goes first
        (2, "abacda", 2),
        (8, "abcdefabcdef", 6),
    ],
)
def test_domains_that_were_left_longest_ago_go_first(domains: int, names: str, recalled: int) -> None:
    adapting = adapter(memory(domains))
    run(adapting, stream(names))
    assert adapting.events["recalled"] == recalled and adapting.events["restored"] == len(names) - 1


def test_the_domain_is_the_nearest_one_by_the_shift_distance_and_the_design_effect_counts() -> None:
    adapting = adapter(memory())
    run(adapting, stream("aabbccdd"))
    known, images = adapting.state["domain_memory"], 0.5 * domain("a", 70) + 0.5 * domain("c", 70)
    statistics_seen = StepContext(adapting.policy, adapting.model, adapting.parameters, adapting.state, images)
    meet(statistics_seen)
    assert statistics_seen.events == ["restored"]  # near to none
    signals = statistics_seen.signals
    distances = [float(distance(each.reference, signals["image_statistics"])) for each in known[:3]]
    nearest, now = min(range(3), key=distances.__getitem__), float(signals["shift_distance"])
    assert 8.0 < distances[nearest] < 0.9 * now
    for effect, events in ((0.99 * distances[nearest] / 8, 1), (1.01 * distances[nearest] / 8, 2)):
        context = StepContext(adapting.policy, adapting.model, adapting.parameters, adapting.state, images)
        meet(context, {**signals, "design_effect": torch.tensor(effect)})
        assert len(context.events) == events
    found = torch.cat([tensor.reshape(-1) for tensor in context.parameters.values()])
    assert torch.equal(found, known[nearest].parameters)


def test_it_does_not_grow_with_the_stream() -> None:
    adapting = adapter(memory(3))
    empty = numel(adapting.state)
    run(adapting, stream("abcde"))
    full = numel(adapting.state)
    run(adapting, stream("fabcdefabacabdefa"))
    assert numel(adapting.state) == full and len(adapting.state["domain_memory"]) == 3
    tensors = numel(adapting.parameters)
    assert full >= empty and all(each.parameters.numel() == tensors for each in adapting.state["domain_memory"])


def test_a_reset_forgets_the_domains() -> None:
    adapting = adapter(memory())
    first = run(adapting, stream("abab"))
    adapting.reset()
    assert all(float(each.reference.count) == 0 for each in adapting.state["domain_memory"])
    assert same(run(adapting, stream("abab")), first) and adapting.events["recalled"] == 2


@pytest.mark.parametrize("cut", [3, 4, 5])
def test_save_and_load_go_on_bit_for_bit_with_what_is_remembered(cut: int, tmp_path: Path) -> None:
    found = assert_goes_on(lambda: adapter(memory(2)), stream("aabbabcacb"), cut, tmp_path / "state.pt")
    assert found.events["recalled"] == 5


def test_states_that_no_stream_leads_to_are_refused() -> None:
    adapting = adapter(memory(3))
    run(adapting, stream("aab"))
    state, part = adapting.state["domain_memory"], memory(3)
    part.check_state(state, 10)
    with pytest.raises(ValueError, match="a free place before one that is taken"):
        part.check_state((state[1], state[0], state[2]), 10)
    values = adapting.state_dict()
    sizes = [tensor.numel() for tensor in values["state"]["domain_memory"]]
    place = sizes.index(numel(adapting.parameters))
    values["state"]["domain_memory"][place] = values["state"]["domain_memory"][place][:-1]
    with pytest.raises(ValueError, match="belongs to another rule or another model"):
        adapting.load_state_dict(values)


@pytest.mark.parametrize("domains", [0, -1])
def test_a_memory_of_nothing_is_refused(domains: int) -> None:
    with pytest.raises(ConfigError, match=f"domain_memory.domains is {domains}; allowed are"):
        DomainMemoryConfig(domains)


def test_methods_have_restoration_with_it_the_policys_where_one_is_given() -> None:
    tent = MethodConfig("tent", update="adam", objective={"entropy": 1.0}, parts={**BARE, "domain_memory": 4})
    order = ["batch_statistics", "restoration", "domain_memory", "shift_distance"]
    assert list(build_method(tent).parts) == order
    assert list(AdaptationPolicy("bn", parts=[BatchStatistics(), memory()]).parts) == order
    learned = with_parts(tiny_policy(tiny_model()), Restoration(RestorationConfig(peak=0.5)))
    assert build_method(tent, policy=learned).part("restoration") is learned.part("restoration")
    for off in (False, None):
        with pytest.raises(ConfigError, match=r"parts\.domain_memory does not act without"):
            MethodConfig("tent", update="adam", objective={"entropy": 1.0}, parts={**tent.parts, "restoration": off})
    with pytest.raises(ConfigError, match="does not go with adapts=all"):
        MethodConfig("tent", update="adam", objective={"entropy": 1.0}, adapts="all", parts=tent.parts)


def test_a_policy_that_has_it_runs_without_restoration_by_leaving_it_out() -> None:
    learned = with_parts(tiny_policy(tiny_model()), Restoration(), memory())
    inheriting = {"update": "generator", "objective_from_policy": True, "inherit": True}
    assert build_method(MethodConfig("policy", **inheriting), policy=learned).part("domain_memory") is not None
    plain = build_method(MethodConfig("policy", **inheriting, parts={"restoration": False}), policy=learned)
    assert list(plain.parts) == ["batch_statistics"]


def turning_task(steps: int) -> list[MetaBatch]:
    """Two domains in turn."""
    dark = [1.0, 0.3]
    return [MetaBatch(batch.images * dark[place % 2], batch.targets) for place, batch in enumerate(task(steps, 12))]


def remembering() -> tuple[AdaptationPolicy, Any]:
    restoration = Restoration(RestorationConfig(base=0.1, peak=0.7, threshold=30.0, width=2.0))
    network = tiny_resnet()
    return policy_for(network, parts=[restoration, memory(2)]), network


def test_full_meta_gradient_through_domains_that_come_back_agrees_with_finite_differences() -> None:
    policy, network = remembering()
    online = OnlineAdapter(network, policy)
    run(online, [batch.images for batch in turning_task(4)])
    assert online.events["recalled"] == 3
    check_against_differences(policy, network, turning_task(4))


@pytest.mark.parametrize("truncation", [None, 2])
def test_first_order_unrolls_run_with_it_and_agree_with_the_adapter(truncation: int | None) -> None:
    policy, network = remembering()
    batches = turning_task(4)
    found = take(policy, network, batches, truncation=truncation, **ALL_TERMS)
    assert all(bool(torch.isfinite(gradient).all()) for gradient in found.gradients.values())
    online = OnlineAdapter(network, policy)
    run(online, [batch.images for batch in batches[:-1]])
    torch.testing.assert_close(found.parameters, online.parameters, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.state["domain_memory"], online.state["domain_memory"], rtol=1e-9, atol=1e-12)
