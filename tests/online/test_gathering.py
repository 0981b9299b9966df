"""Batches much smaller than those of meta-training: answered at once, and learned from together."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from metaopt.errors import ConfigError
from metaopt.online import OnlineAdapter
from metaopt.online.gathering import Gathering

from ..tiny import tiny_model
from .methods import BATCHES, DEFAULT, METHODS, default_policy, run, same

STREAM = torch.cat(BATCHES)


def gathering(method: str, least: int = 8) -> OnlineAdapter:
    return OnlineAdapter(tiny_model(), METHODS[method](), gather=least)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "two views"])  # whose views count batches
@pytest.mark.parametrize("size", [1, 2, 4])
def test_what_is_learned_is_that_of_batches_of_the_gathered_size(method: str, size: int) -> None:
    small, whole = gathering(method), gathering(method)
    outputs = [small.step(images) for images in STREAM.split(size)]
    run(whole)
    assert same(list(small.parameters.values()), list(whole.parameters.values()))
    assert (small.updates, small.steps) == (whole.updates, len(STREAM) // size)
    assert small.events == whole.events | {"waiting": len(STREAM) // size - 8}
    assert all(output.logits.shape[0] == size for output in outputs)


@pytest.mark.parametrize("method", DEFAULT)
def test_waiting_batches_are_answered_by_what_was_learned_so_far(method: str) -> None:
    adapter = gathering(method)
    run(adapter, BATCHES[:2])
    before = [tensor.clone() for tensor in adapter.parameters.values()]
    images = BATCHES[2][:3]
    with adapter.frozen():
        expected = adapter(images)
    output = adapter.step(images)
    torch.testing.assert_close(output.logits, expected)
    assert output.events == ("waiting",) and not output.updated
    assert same(list(adapter.parameters.values()), before)


def test_a_few_images_go_by_the_statistics_of_source_and_stream() -> None:
    """One image of a stream is normalised as the network exported there would, nearly: it counts for one in 25."""
    policy = default_policy()
    adapter = OnlineAdapter(tiny_model(), policy, gather=8)
    run(adapter, BATCHES[:1])
    image = BATCHES[1][:1]
    with adapter.frozen() as frozen, adapter.frozen(as_exported=True) as exported:
        near, running = frozen(image), exported(image)
    alone = OnlineAdapter(tiny_model(), adapter.policy)
    alone.parameters = adapter.parameters
    with alone.frozen():
        unaided = alone(image)
    assert float((near - running).norm()) < 0.5 * float((unaided - running).norm())


@pytest.mark.parametrize("method", DEFAULT)
@pytest.mark.parametrize("cut", [3, 8, 13])
def test_images_that_wait_are_saved_too(method: str, cut: int, tmp_path: Path) -> None:
    pieces = [*STREAM.split(3)]
    whole, first, second = (gathering(method) for _ in range(3))
    expected = run(whole, pieces)
    logits = run(first, pieces[:cut])
    first.save(tmp_path / "stream.pt")
    run(second, pieces[:2])
    second.load(tmp_path / "stream.pt")
    assert same(logits + run(second, pieces[cut:]), expected)
    second.reset()
    assert second.gathering.waiting is None and same(run(second, pieces), expected)


def test_the_callers_memory_may_be_used_again() -> None:
    adapter, other = gathering("default"), gathering("default")
    buffer = torch.empty_like(BATCHES[0][:4])
    for images in STREAM.split(4):
        adapter(buffer.copy_(images))
        other(images)
    assert same(list(adapter.parameters.values()), list(other.parameters.values()))


def test_images_of_another_size_take_the_place_of_those_that_wait() -> None:
    gathered = Gathering(8)
    assert gathered.add(BATCHES[0][:6]) is None
    assert gathered.add(BATCHES[1][:4, :, :12, :12]) is None
    assert gathered.waiting is not None and gathered.waiting.shape == (4, 3, 12, 12)


@pytest.mark.parametrize(
    ("trained", "least"),
    [
        ({}, 1),
        ({"batch_size": 1}, 1),
        ({"batch_size": 15, "sizes": None}, 8),
        ({"batch_size": 64}, 32),
        ({"batch_size": 64, "sizes": (8, 200)}, 4),
    ],
)
def test_half_a_batch_of_meta_training_is_enough(trained: dict[str, Any], least: int) -> None:
    policy = default_policy()
    policy.training = {"config": trained} if trained else {}
    assert OnlineAdapter(tiny_model(), policy).gathering.least == least
    assert OnlineAdapter(tiny_model(), policy, gather=3).gathering.least == 3


def test_fewer_than_one_image_is_refused() -> None:
    with pytest.raises(ConfigError, match="gather"):
        gathering("default", 0)


def test_broken_images_do_not_wait() -> None:
    adapter = gathering("default")
    images = BATCHES[0][:4].clone()
    images[1] = torch.nan
    adapter(images)
    waiting: Tensor | None = adapter.gathering.waiting
    assert waiting is not None and torch.equal(waiting, BATCHES[0][[0, 2, 3]])


def test_what_a_budget_has_made_of_it_is_saved_too(tmp_path: Path) -> None:
    first, second = gathering("default"), gathering("default")
    first(BATCHES[0][:4])
    first.gathering.fewer(BATCHES[0], 2)
    first.save(tmp_path / "stream.pt")
    second.load(tmp_path / "stream.pt")
    assert second.gathering.least == first.gathering.least == 4


def test_a_watch_sees_each_image_once() -> None:
    adapter = gathering("default")
    for images in STREAM.split(2):
        adapter(images)
    assert int(adapter.watch._counts.sum()) == len(STREAM)
