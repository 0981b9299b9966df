import time

import pytest
import torch

from metaopt.evaluation import Stopwatch
from metaopt.evaluation.timing import percentile, synchronize


def test_blocks_are_timed_in_milliseconds():
    watch = Stopwatch()
    with watch.step():
        time.sleep(0.03)
    with watch.forward():
        time.sleep(0.01)
    assert 30 <= watch.step_ms[0] < 300
    assert 10 <= watch.forward_ms[0] < 100
    assert watch.ratio_to_forward == watch.step_ms[0] / watch.forward_ms[0]


def test_forward_runs_without_gradients():
    x = torch.ones(2, requires_grad=True)
    watch = Stopwatch()
    with watch.forward():
        assert not (x * 2).requires_grad
    with watch.step():
        assert (x * 2).requires_grad


def test_percentiles_of_known_times():
    watch = Stopwatch()
    watch.step_ms.extend(float(value) for value in range(101))
    watch.forward_ms.extend([10.0, 20.0, 90.0])
    assert watch.step_ms_p50 == 50.0
    assert watch.step_ms_p99 == 99.0
    assert watch.forward_ms_p50 == 20.0
    assert watch.ratio_to_forward == 2.5
    watch.step_ms, watch.forward_ms = [10.0, 10.0, 40.0], [10.0, 10.0]
    assert watch.ratio_to_forward == 1.0 and watch.mean_ratio_to_forward == 2.0
    assert percentile([1.0, 2.0], 50) == 1.5


def test_nothing_timed_gives_none():
    watch = Stopwatch()
    assert watch.step_ms_p50 is None and watch.step_ms_p99 is None and watch.ratio_to_forward is None
    assert watch.mean_ratio_to_forward is None
    with watch.step():
        pass
    assert watch.ratio_to_forward is None


def test_a_block_that_raises_leaves_no_time():
    watch = Stopwatch()
    with pytest.raises(ValueError, match="broken"), watch.step():
        raise ValueError("broken")
    assert watch.step_ms == []


def test_an_accelerator_is_synchronised_and_the_cpu_is_not(monkeypatch: pytest.MonkeyPatch):
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    synchronize(torch.device("cpu"))
    assert waited == []
    with Stopwatch("cuda:1").step():
        pass
    assert waited == [torch.device("cuda:1")] * 2
