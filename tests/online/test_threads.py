"""Adapters in threads over one network give the answers that they give alone, and leave the network as it was."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from metaopt import AdaptationPolicy, MethodConfig, OnlineAdapter, SourceModel, build_method, new_policy
from metaopt.errors import ModelError
from metaopt.types import StepOutput

from ..tiny import random_images, tiny_net

STREAMS = [[random_images(8, 10 * stream + k) for k in range(8)] for stream in range(4)]
BATCH_STATISTICS = {"batch_statistics": {}}


def tent(**settings) -> AdaptationPolicy:
    config = {"update": "adam", "lr": 1e-2, "objective": {"entropy": 1.0}, "parts": BATCH_STATISTICS}
    return build_method(MethodConfig("tent", **config | settings))


def default() -> AdaptationPolicy:
    return new_policy(
        SourceModel(tiny_net()), parts={"batch_statistics": 16, "restoration": True, "class_balance": True}
    )


METHODS: dict[str, Callable[[], AdaptationPolicy]] = {
    "source": lambda: build_method(MethodConfig("source")),
    "bn": lambda: build_method(MethodConfig("bn", parts={"batch_statistics": 16})),
    "tent": tent,
    "two views": lambda: tent(objective={"filtered": 1.0, "consistency": 1.0}),
    "discrepancy": lambda: tent(objective={"entropy": 1.0, "discrepancy": 0.1}),
    "teacher": lambda: tent(
        adapts="all", objective={"teacher": 1.0}, parts={**BATCH_STATISTICS, "teacher": {"predicts": True, "views": 2}}
    ),
    "default": default,
}


def adapters(net: nn.Module, method: str, memory: str) -> list[OnlineAdapter]:
    """Four over one network; half of them by the source's statistics, which a shared module would lose."""
    source, found = SourceModel(net), []
    for each in (method, "source", method, "bn"):
        policy = METHODS[each]()
        policy.prepare(source, lambda: random_images(16, 99))
        found.append(OnlineAdapter(source, policy, memory=memory if policy.updates else "dense"))
    return found


def run(adapter: OnlineAdapter, stream: list[Tensor]) -> list[Tensor]:
    return [adapter(images) for images in stream]


@pytest.mark.parametrize("memory", ["dense", "exact", "compact"])
@pytest.mark.parametrize("method", METHODS)
def test_threads_give_the_answers_that_each_gives_alone(method: str, memory: str) -> None:
    net = tiny_net()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    alone = [run(adapter, stream) for adapter, stream in zip(adapters(net, method, memory), STREAMS, strict=True)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(run, adapters(net, method, memory), STREAMS))
    for expected, found in zip(alone, together, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    norms = [layer for layer in net.modules() if isinstance(layer, _BatchNorm)]
    assert all(layer.running_mean is not None for layer in norms)
    assert all(isinstance(layer.weight, nn.Parameter) and not layer._forward_pre_hooks for layer in norms)


def test_a_forward_pass_of_the_network_itself_is_not_disturbed() -> None:
    net = tiny_net()
    adapter, images = OnlineAdapter(net, default()), STREAMS[0][0]
    expected = net(images)
    with ThreadPoolExecutor(2) as pool:
        adapting = pool.submit(run, adapter, [batch for stream in STREAMS for batch in stream])
        while not adapting.done():
            assert torch.equal(net(images), expected)
        adapting.result()


def test_a_network_that_cannot_be_copied_is_refused_in_one_line() -> None:
    net = tiny_net()
    net.lock = __import__("threading").Lock()  # type: ignore[assignment]
    with pytest.raises(ModelError, match=r"TinyNet cannot be copied \(cannot pickle '_thread.lock' object\)"):
        OnlineAdapter(net, tent())


@pytest.mark.parametrize("method", METHODS)
def test_calls_of_one_adapter_are_whole_in_any_thread(method: str) -> None:
    """In whatever order they come, each is counted, and what they leave is what they leave in that order alone."""
    adapter, order = adapters(tiny_net(), method, "dense")[0], []
    step = adapter._answered

    def noted(images: Tensor, frozen: object) -> StepOutput:
        order.append(images)
        return step(images, frozen)  # pyright: ignore[reportArgumentType]

    adapter._answered = noted  # inside the lock: the order in which calls were let in
    with ThreadPoolExecutor(4) as pool:
        outputs = list(pool.map(run, [adapter] * 4, STREAMS))
    alone = adapters(tiny_net(), method, "dense")[0]
    expected = {images.data_ptr(): alone(images) for images in order}
    assert adapter.steps == alone.steps == 32 and adapter.updates == alone.updates
    for stream, answers in zip(STREAMS, outputs, strict=True):
        assert all(
            torch.equal(answer, expected[images.data_ptr()]) for images, answer in zip(stream, answers, strict=True)
        )
    assert all(torch.equal(adapter.parameters[name], tensor) for name, tensor in alone.parameters.items())


def test_what_one_thread_freezes_goes_on_in_another() -> None:
    adapter = OnlineAdapter(tiny_net(), default())
    with ThreadPoolExecutor(1) as pool, adapter.frozen() as view:
        expected = view(STREAMS[0][0])
        pool.submit(adapter, STREAMS[1][0]).result()
        assert (adapter.steps, adapter.updates) == (1, 1)
        adapter(STREAMS[1][0])
        assert adapter.steps == 1
        assert not torch.equal(pool.submit(view, STREAMS[0][0]).result(), expected)  # it has learned since
        assert adapter.steps == 1  # what the context gave is frozen in any thread


def test_a_view_frozen_inside_another_is_the_one_that_counts() -> None:
    adapter = OnlineAdapter(tiny_net(), default())
    run(adapter, STREAMS[0][:2])
    with adapter.frozen():
        by_batch = adapter(STREAMS[1][0])
        with adapter.frozen(as_exported=True):
            assert not torch.equal(adapter(STREAMS[1][0]), by_batch)
        assert torch.equal(adapter(STREAMS[1][0]), by_batch)


@pytest.mark.slow
def test_eight_threads_of_a_thousand_calls_each() -> None:
    net, names = tiny_net(), ["default", "tent", "bn", "teacher"] * 2
    streams = [[random_images(4, 1000 * place + k % 50) for k in range(1000)] for place in range(8)]

    def built() -> list[OnlineAdapter]:
        return [OnlineAdapter(net, METHODS[name]()) for name in names]

    alone = [run(adapter, stream) for adapter, stream in zip(built(), streams, strict=True)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(run, built(), streams))
    same = [torch.equal(a, b) for pair in zip(alone, together, strict=True) for a, b in zip(*pair, strict=True)]
    assert len(same) == 8000 and all(same)
