"""The compute dial: what a stream costs is counted, bounded, and the same however the stream is run."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from metaopt.catalogue import load_method
from metaopt.errors import BudgetError, ConfigError
from metaopt.evaluation import MemoryMeter
from metaopt.online import OnlineAdapter, Progress, run_stream
from metaopt.online.compute_dial import AHEAD
from metaopt.optimizers.sgd import SGD
from metaopt.optimizers.update import InPlaceApply
from metaopt.policy import AdaptationPolicy, build_method
from metaopt.policy.step import DIFFERENTIATED
from metaopt.types import StepOutput

from ..tiny import assert_goes_on, random_images, tiny_model, tiny_policy
from . import test_memory
from .methods import BATCHES, METHODS, PARTS, UPDATING, bits, run, same
from .test_progress import scored, stream_for

STREAM = [(random_images(8, seed) * (0.3 if seed // 12 % 2 else 1.0)) for seed in range(36)]  # three domains


def published(name: str) -> AdaptationPolicy:
    views = {"teacher": {"views": 2, "predicts": True, "proximal": 0.0}} if name == "cotta" else {}
    policy = build_method(load_method(name, parts=views))
    policy.prepare(tiny_model(), lambda: random_images(32, seed=5))
    return policy


ALL = {**UPDATING, **{name: lambda name=name: published(name) for name in ("sar", "eata", "roid", "cotta")}}
"""Of every kind of cost: one pass, two looks, views, a teacher, looks of `class_skew`."""


def dialled(name: str, compute: float | None, **given: Any) -> OnlineAdapter:
    return OnlineAdapter(tiny_model(), ALL[name](), compute=compute, **given)


@contextmanager
def watched(adapter: OnlineAdapter) -> Iterator[list[float]]:
    """Passes that end at the network's last layer, for each image; with a graph they count as differentiated."""
    seen: list[float] = []

    def note(_layer: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        seen.append(len(inputs[0]) * (DIFFERENTIATED if output.requires_grad else 1.0))

    handle = adapter.model.get_submodule("module.linear").register_forward_hook(note)
    yield seen
    handle.remove()


@pytest.mark.parametrize("compute", [None, 1, 1.3, 2])
@pytest.mark.parametrize("name", [*METHODS, *(name for name in ALL if name not in METHODS)])
def test_the_cost_is_what_the_network_has_run(name: str, compute: float | None) -> None:
    adapter = OnlineAdapter(tiny_model(), (METHODS | ALL)[name](), compute=compute if name in ALL else None, gather=1)
    with watched(adapter) as seen:
        run(adapter)
    assert adapter.images == 64 and adapter.passes == sum(seen) > 0
    assert adapter.mean_forwards == sum(seen) / 64


def test_tent_and_the_default_policy_cost_what_they_should() -> None:
    tent, policy = dialled("tent", None), dialled("default", None)
    outputs = [tent.step(images) for images in BATCHES]
    assert {output.passes for output in outputs} == {16.0} and tent.mean_forwards == 2
    # The first batch of a domain is looked at, twice where its classes are few, and every second one after it.
    extra = [policy.step(images).passes / 8 - 2 for images in BATCHES[:2]]
    assert extra[0] in (1.0, 2.0) and extra[1] in (0.0, 1.0, 2.0)


@pytest.mark.parametrize("compute", [1.3, 2.0])
@pytest.mark.parametrize("name", ALL)
def test_a_stream_costs_no_more_than_asked_but_for_the_first_loan(name: str, compute: float) -> None:
    if name == "default, skewed":  # it looks at each batch, and nothing is left to save
        pytest.skip("looks alone cost more")
    adapter, floor = dialled(name, compute, gather=1), dialled(name, 1, gather=1)
    run(adapter, STREAM)
    run(floor, STREAM)
    assert floor.updates == 0 and floor.passes <= adapter.passes
    asked = max(compute * adapter.images, floor.passes)
    first = AHEAD * (compute - 1) * 8
    # What an update of this method costs is known after the first.
    assert adapter.passes <= asked + first + (adapter.dial.price if adapter.dial else 0) * 8
    if "default" not in name:  # no looks, and no update before it is paid for
        assert adapter.passes <= asked + first + max(0.0, (adapter.dial.price if adapter.dial else 0) - 2) * 8


def test_updates_come_where_a_domain_begins_and_then_at_a_distance() -> None:
    adapter = dialled("tent", 1.5)
    updated = [adapter.step(images).updated for images in STREAM]
    # b + 1.5 - 2 >= -0.5 (10 - a), by hand: five at once, and, once that is paid back, one in two.
    assert [place for place, did in enumerate(updated) if did][:8] == [0, 1, 2, 3, 4, 11, 13, 15]
    assert adapter.events["rested"] == 36 - sum(updated) == 36 - adapter.updates


def test_a_new_domain_begins_with_a_loan_again() -> None:
    parts = {"batch_statistics": True, "restoration": {"threshold": 20.0}}
    method = build_method(load_method("tent", parts=parts))
    adapter = OnlineAdapter(tiny_model(), method, compute=1.25)
    outputs = [adapter.step(images) for images in STREAM]
    assert [place for place, output in enumerate(outputs) if "restored" in output.events] == [12, 24]
    updated = [place for place, output in enumerate(outputs) if output.updated]
    # b + 1.25 - 2 >= -0.25 (10 - a), by hand: twice where a domain begins, and once when the loan is paid back.
    assert updated[:8] == [0, 1, 11, 12, 13, 23, 24, 25]


@pytest.mark.parametrize("name", ALL)
def test_turned_up_it_is_as_without(name: str) -> None:
    plain, turned = dialled(name, None), dialled(name, 99)
    assert same(run(plain), run(turned))
    assert all(torch.equal(turned.parameters[key], tensor) for key, tensor in plain.parameters.items())
    assert turned.events == plain.events + type(plain.events)({"rested": 0}) and turned.passes == plain.passes


@pytest.mark.parametrize("name", ALL)
def test_turned_down_nothing_is_learned_and_what_needs_no_update_goes_on(name: str) -> None:
    adapter, none_held = dialled(name, 1), dialled(name, None, budget_mib=0)
    answers = run(adapter)
    assert same(answers, run(none_held)) and adapter.updates == 0
    assert all(torch.equal(tensor, adapter.start[key]) for key, tensor in adapter.parameters.items())
    if adapter.policy.part("batch_statistics"):
        state = adapter.state["batch_statistics"]
        assert int(state.batches) > 0 and float(state.moments.count) > 0
        exported, source = adapter.export(), bits(adapter.source.module)
        assert not torch.equal(exported["bn1.running_mean"], source["bn1.running_mean"])
    if name == "default":
        assert adapter.events["restored"] > 0  # what it remembers of the stream begins anew
        assert int(adapter.state["class_skew"].batches) > 0 and adapter.state["class_skew"].shares.numel() > 0


@pytest.mark.parametrize("memory", ["dense", "exact", "compact", "pruned"])
@pytest.mark.parametrize("given", [{"compute": 1}, {"budget_mib": 0}, {"budget_mib": 0.0, "compute": 1.5}])
def test_turned_down_nothing_is_held(memory: str, given: dict[str, Any]) -> None:
    policy = tiny_policy(tiny_model(), parts=PARTS)
    for adapter in (
        OnlineAdapter(test_memory.small_resnet(), test_memory.tent(), memory=memory, **given),
        OnlineAdapter(tiny_model(), policy, memory=memory, gather=1, **given),
    ):
        for images in BATCHES[:3]:
            assert test_memory.metered(adapter, images) == 0.0


def test_a_batch_that_rests_holds_nothing_of_the_network() -> None:
    adapter = OnlineAdapter(test_memory.small_resnet(), test_memory.tent(), compute=1.2)
    held = []
    for images in test_memory.BATCHES:
        updates = adapter.updates
        with MemoryMeter([*adapter.parameters.values(), images], model=adapter.model) as meter:
            adapter(images)
        held.append((adapter.updates > updates, meter.peak_mib))
    assert {updated for updated, _ in held} == {True, False}
    assert all((mib > 1) == updated and (updated or mib == 0) for updated, mib in held)


def test_a_budget_too_small_for_any_update_is_still_an_error() -> None:
    with pytest.raises(BudgetError, match=r"^budget_mib=0.0001 is too small"):
        test_memory.new_adapter(budget=0.0001)(test_memory.BATCHES[0])


@pytest.mark.parametrize("cut", [1, 4])
@pytest.mark.parametrize("name", ALL)
def test_saved_anywhere_a_stream_goes_on(name: str, cut: int, tmp_path: Path) -> None:
    second = assert_goes_on(lambda: dialled(name, 1.5), STREAM[:8], cut, tmp_path / "a.pt")
    whole = dialled(name, 1.5)
    run(whole, STREAM[:8])
    assert (second.passes, second.images, second.updates) == (whole.passes, whole.images, whole.updates)
    assert second.dial is not None and whole.dial is not None
    assert second.dial.state_dict() == whole.dial.state_dict()


def test_a_saved_stream_goes_on_at_another_turn(tmp_path: Path) -> None:
    adapter, slower = dialled("tent", 2), dialled("tent", 1)
    run(adapter)
    adapter.save(tmp_path / "a.pt")
    slower.load(tmp_path / "a.pt")
    run(slower)
    assert slower.updates == adapter.updates and slower.images == 2 * adapter.images


@pytest.mark.parametrize("setting", ["reset", "continual"])
def test_a_stopped_run_goes_on_bit_for_bit(setting: str) -> None:
    kept: list[dict[str, Any]] = []
    whole = run_stream(
        dialled("tent", 1.1),  # which saves up for one update a domain
        stream_for(dialled("tent", 1.1)),
        setting=setting,
        batch_size=8,
        progress=Progress(kept.append, every=1),
    )
    for state in kept[1:-1:2]:
        adapter = dialled("tent", 1.1)
        found = run_stream(
            adapter, stream_for(adapter), setting=setting, batch_size=8, progress=Progress(lambda _: None, resume=state)
        )
        assert scored(found) == scored(whole)
    assert whole.mean_forwards is not None and 1 < whole.mean_forwards < 2.5
    assert whole.guard_events["rested"] > 0


def test_reset_gives_the_bucket_back() -> None:
    adapter = dialled("tent", 1.3)
    first = run(adapter)
    adapter.reset()
    assert adapter.passes == adapter.images == 0 and adapter.mean_forwards is None
    assert same(run(adapter), first)


@pytest.mark.parametrize(("compute", "most"), [(1, 1.0), (1.3, 1.4), (2, 2.1)])
@pytest.mark.parametrize("size", [1, 3])
def test_small_batches_cost_no_more(size: int, compute: float, most: float) -> None:
    adapter = dialled("tent", compute, gather=8)
    images = torch.cat(STREAM)
    with watched(adapter) as seen:
        answers = [adapter.step(batch) for batch in images.split(size)]
    assert adapter.passes == sum(seen) and adapter.mean_forwards is not None and adapter.mean_forwards <= most
    assert all(isinstance(each, StepOutput) and each.logits.shape == (size, 10) for each in answers)
    assert (adapter.updates > 0) == (compute > 1)
    # Every batch tells of the stream, those that wait too.
    assert float(adapter.state["batch_statistics"].moments.count) > 0


def test_broken_batches_are_paid_for() -> None:
    adapter = dialled("tent", 1.3)
    poisoned = [torch.full_like(images, 0.5) for images in BATCHES]
    with torch.no_grad():
        adapter.model.get_parameter("module.linear.weight").fill_(torch.nan)
    run(adapter, poisoned * 6)
    assert adapter.updates == 0 and adapter.mean_forwards is not None
    assert adapter.mean_forwards <= 1.3 + AHEAD * 0.3 / 48


def test_a_longer_step_is_a_multiple_of_the_rules_own() -> None:
    parameters = [{"w": torch.tensor([1.0, 2.0], requires_grad=True)} for _ in range(2)]
    moved = []
    for own, length in zip(parameters, (None, lambda: 2.0), strict=True):
        before = own["w"].detach().clone()
        apply = InPlaceApply(SGD(lr=0.1), length=length)
        after, _ = apply(lambda tensors: tensors["w"].square().sum(), own, apply.rule.init(own))
        moved.append(after["w"].detach() - before)
    torch.testing.assert_close(moved[1], 2 * moved[0])
    assert dialled("tent", 1.5).dial.length == pytest.approx(2**0.5)  # type: ignore[union-attr]
    assert dialled("tent", 1.001).dial.length == 2.5 and dialled("tent", 2.5).dial.length == 1.0  # type: ignore[union-attr]


@pytest.mark.parametrize("compute", [0.99, 0, -1, float("nan"), float("inf"), True, "x", [2]])
def test_what_is_no_cost_is_refused_in_a_line(compute: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"^compute is .*; allowed are finite values of at least 1: set for example 1.3"
    ):
        dialled("tent", compute)


@pytest.mark.parametrize("name", ["source", "bn"])
def test_a_method_that_never_updates_says_so(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^compute=1.5 does not go with method '{name}', which never updates.*set"):
        OnlineAdapter(tiny_model(), METHODS[name](), compute=1.5)
    OnlineAdapter(tiny_model(), METHODS[name](), budget_mib=0)(BATCHES[0])  # it holds nothing anyway


def test_a_look_goes_by_some_of_a_large_batch_where_passes_are_saved() -> None:
    images = random_images(200, seed=3)
    costs = [
        OnlineAdapter(tiny_model(), tiny_policy(tiny_model(), parts=PARTS), compute=compute, gather=1).step(images)
        for compute in (99, 2)
    ]
    full, saving = (output.passes / 200 - DIFFERENTIATED for output in costs)
    assert full in (1.0, 2.0) and saving == full / 4
