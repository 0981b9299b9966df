"""Deployment within a budget: bytes measured, and what a run remembers of its layers."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from metaopt.activation_memory import ALLOCATIONS
from metaopt.data import Domain, ImageSet, to_bytes
from metaopt.errors import BudgetError, ConfigError
from metaopt.evaluation import MemoryMeter
from metaopt.models import SourceModel
from metaopt.models.cifar_resnet import CifarResNet
from metaopt.online import LayerMemory, OnlineAdapter, run_stream
from metaopt.online.layers import memory_rows
from metaopt.policy import AdaptationPolicy, MethodConfig, build_method

from ..tiny import BARE, random_images

BATCHES = [random_images(24, seed) for seed in range(5)]
BUDGET = 0.8  # MiB; dense holds about 5
TENT = MethodConfig("tent", update="adam", lr=3e-2, objective={"entropy": 1.0}, parts=dict(BARE))


def small_resnet() -> SourceModel:
    """Eight layers, with batch normalisation."""
    torch.manual_seed(0)
    return SourceModel(CifarResNet(1))


def tent(pruning: str = "rate_distortion") -> AdaptationPolicy:
    return build_method(replace(TENT, parts={**BARE, "pruning": pruning}))


def new_adapter(memory: str = "pruned", budget: float | None = BUDGET, pruning: str = "rate_distortion"):
    return OnlineAdapter(small_resnet(), tent(pruning), memory=memory, budget_mib=budget)


def run(adapter: OnlineAdapter, batches: list[Tensor] = BATCHES) -> list[Tensor]:
    return [adapter(images) for images in batches]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def metered(adapter: OnlineAdapter, images: Tensor) -> float:
    adapter.prepare(images)
    with MemoryMeter([*adapter.parameters.values(), images], model=adapter.model) as meter:
        adapter(images)
    return meter.peak_mib


CHOOSING: dict[str, Callable[[], OnlineAdapter]] = {
    name: lambda name=name: new_adapter(pruning=name, budget=8.0 if name in ("published", "single_pass") else BUDGET)
    for name in ALLOCATIONS
}


@pytest.mark.parametrize("budget", [0.65, 1.0, 2.0])
@pytest.mark.parametrize("pruning", ["rate_distortion", "uniform", "random"])
def test_what_is_held_stays_within_the_budget_from_the_first_step_on(pruning: str, budget: float) -> None:
    adapter = new_adapter(pruning=pruning, budget=budget)
    held = [metered(adapter, images) for images in (*BATCHES[:2], BATCHES[0][:7])]
    assert max(held) <= budget
    assert adapter.updates == 3


def test_a_budget_that_is_too_small_names_the_smallest_that_is_enough() -> None:
    adapter = new_adapter(budget=0.01)
    with pytest.raises(BudgetError, match=r"^budget_mib=0.01 is too small .* set budget_mib=") as caught:
        adapter(BATCHES[0])
    least = float(str(caught.value).rpartition("budget_mib=")[2].split()[0])
    assert metered(new_adapter(budget=least), BATCHES[0]) <= least


@pytest.mark.parametrize("pruning", ["rate_distortion", "published", "uniform"])
def test_a_budget_is_told_as_it_was_given(pruning: str) -> None:
    with pytest.raises(BudgetError, match=r"^budget_mib=0.0001 is too small"):
        new_adapter(pruning=pruning, budget=0.0001)(BATCHES[0])


@pytest.mark.parametrize("budget", ["x", True, [4], -1.0, float("nan")])
def test_a_budget_is_a_positive_number(budget: object) -> None:
    with pytest.raises(ConfigError, match=r"^budget_mib is .*; it must be positive and finite: set for example 64"):
        new_adapter(budget=budget)  # type: ignore[arg-type]


def test_exact_is_dense_up_to_rounding_and_holds_less() -> None:
    dense, exact = new_adapter("dense", None), new_adapter("exact", None)
    for left, right in zip(run(dense), run(exact), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)
    assert metered(exact, BATCHES[0]) < metered(dense, BATCHES[0])


def test_compact_with_a_budget_drops_nothing() -> None:
    adapter = new_adapter("compact", BUDGET)
    assert metered(adapter, BATCHES[0]) <= BUDGET
    assert {record.precision.keep for record in adapter.memory.layers} == {1.0}


@pytest.mark.parametrize("memory", ["dense", "exact"])
def test_a_budget_needs_something_to_choose(memory: str) -> None:
    with pytest.raises(ConfigError, match="leaves no choice"):
        new_adapter(memory, 1.0)


@pytest.mark.parametrize("budget", [None, 8.0])
@pytest.mark.parametrize("pruning", [name for name in ALLOCATIONS if name != "published"])
def test_a_step_takes_one_forward_pass(pruning: str, budget: float | None) -> None:
    assert passes(pruning, budget) == [24, 24]


@pytest.mark.parametrize("budget", [None, 8.0])
def test_the_published_step_has_another_pass_on_ten_images(budget: float | None) -> None:
    assert passes("published", budget) == [10, 24, 10, 24]


def passes(pruning: str, budget: float | None) -> list[int]:
    """Images in each forward pass of two steps."""
    adapter = new_adapter(budget=budget, pruning=pruning)
    adapter.prepare(BATCHES[0])
    seen: list[int] = []
    adapter.model.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    run(adapter, BATCHES[:2])
    return seen


@pytest.mark.parametrize("name", CHOOSING)
def test_saved_and_loaded_in_mid_stream_is_unbroken(name: str, tmp_path: Path) -> None:
    whole, first, second = (CHOOSING[name]() for _ in range(3))
    expected = run(whole)
    logits = run(first, BATCHES[:2])
    first.save(tmp_path / "stream.pt")
    run(second, BATCHES[3:])
    second.load(tmp_path / "stream.pt")
    assert same(logits + run(second, BATCHES[2:]), expected)
    second.reset()
    assert same(run(second), expected)


@pytest.mark.parametrize("name", CHOOSING)
def test_a_refused_batch_teaches_nothing(name: str) -> None:
    adapter, undisturbed = CHOOSING[name](), CHOOSING[name]()
    run(adapter, [*BATCHES[:2], BATCHES[2] * float("nan")])
    run(undisturbed, BATCHES[:2])
    assert adapter.events == {"nonfinite": 0, "broken_images": 1}
    assert same(run(adapter, BATCHES[3:]), run(undisturbed, BATCHES[3:]))


def test_a_run_remembers_the_gradients_of_its_layers() -> None:
    adapter = new_adapter()
    assert torch.equal(adapter.state["pruning"].importance, torch.zeros(7))
    adapter(BATCHES[0])
    first = adapter.state["pruning"].importance
    adapter(BATCHES[1])
    assert int(adapter.state["pruning"].steps) == 2
    assert bool((first > 0).all()) and not torch.equal(first, adapter.state["pruning"].importance)


def unlabelled(name: str, size: int) -> Domain:
    images = to_bytes(random_images(size))
    return Domain(name, 1.0, size, lambda: ImageSet(images, None))


def test_a_run_held_as_much_as_its_fullest_step_though_a_larger_batch_held_less() -> None:
    """Of every two batches the second is only predicted on, which holds nothing; here it is the larger one."""
    method = replace(TENT, parts={**BARE, "update_gate": {"every": 2}})
    adapter = OnlineAdapter(small_resnet(), build_method(method))
    few, many = unlabelled("few", 8), unlabelled("many", 24)
    alone, both = (run_stream(adapter, stream, setting="continual", batch_size=24) for stream in ((few,), (few, many)))
    assert (both.updates, both.guard_events["skipped"]) == (1, 1)
    assert both.held_mib == alone.held_mib > 0.1
    assert both.layers == alone.layers != []


def test_the_closing_table_leaves_out_what_shows_as_nothing_and_sums_all() -> None:
    rows = [
        LayerMemory("conv", "convolution", 3.0, 0.0, 1.0, "as is"),
        LayerMemory("n", "product", 0.004, 0.004, 0.5, ""),
    ]
    conv, total = memory_rows(rows)
    assert conv == rows[0].cells
    assert total == ("all", "", pytest.approx(3.004), pytest.approx(0.004), pytest.approx(3.002 / 3.004), "")


def test_small_batches_are_gathered_as_far_as_a_budget_goes() -> None:
    """What four images need is enough for streams of fours, whatever the policy would gather."""
    with pytest.raises(BudgetError) as caught:
        new_adapter(budget=0.01)(BATCHES[0][:4])
    least = caught.value.smallest / 2**20
    small, gathering = (
        new_adapter(budget=least),
        OnlineAdapter(small_resnet(), tent("rate_distortion"), memory="pruned", budget_mib=least, gather=24),
    )
    pieces = BATCHES[0].split(4)
    run(small, [*pieces])
    outputs = [gathering.step(images) for images in pieces]
    assert gathering.gathering.least == 4 and outputs[-1].updated and outputs[-1].logits.shape[0] == 4
    assert gathering.updates == 1 and small.updates == len(pieces)
    assert gathering.step(pieces[0]).updated
    gathering.reset()
    assert gathering.gathering.least == 24
