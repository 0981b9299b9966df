"""Wall-clock time of steps and of plain forward passes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import fmean

import numpy
import torch


def synchronize(device: torch.device) -> None:
    """Wait until the device has done everything that was asked of it; the CPU has nothing to wait for."""
    if device.type not in ("cpu", "meta"):
        torch.accelerator.synchronize(device)


def percentile(values: list[float], percent: float) -> float | None:
    """Percentile with linear interpolation, None of nothing."""
    return float(numpy.percentile(values, percent)) if values else None


class Stopwatch:
    """Milliseconds of each adaptation step, beside those of plain ``no_grad`` forward passes of the same batches.

    The device is synchronised before the clock starts and before it stops, so that queued work is counted where it was
    asked for. A block that raises leaves no time behind.

    Args:
        device: where the timed work runs.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.step_ms: list[float] = []
        self.forward_ms: list[float] = []

    @contextmanager
    def step(self) -> Iterator[None]:
        """Time the block as one step."""
        with self._timed(self.step_ms):
            yield

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Time the block as one plain forward pass, gradients off inside it."""
        with self._timed(self.forward_ms), torch.no_grad():
            yield

    @property
    def step_ms_p50(self) -> float | None:
        """Median step, milliseconds."""
        return percentile(self.step_ms, 50)

    @property
    def step_ms_p99(self) -> float | None:
        """99th percentile of the steps, milliseconds."""
        return percentile(self.step_ms, 99)

    @property
    def forward_ms_p50(self) -> float | None:
        """Median plain forward pass, milliseconds."""
        return percentile(self.forward_ms, 50)

    @property
    def ratio_to_forward(self) -> float | None:
        """Median step over median forward pass; None while either was not timed."""
        step, forward = self.step_ms_p50, self.forward_ms_p50
        return step / forward if step is not None and forward else None

    @property
    def mean_ratio_to_forward(self) -> float | None:
        """Mean step over mean forward pass: what a stream costs where steps are unlike; None as above."""
        if not self.step_ms or not self.forward_ms:
            return None
        return fmean(self.step_ms) / fmean(self.forward_ms)

    @contextmanager
    def _timed(self, record: list[float]) -> Iterator[None]:
        synchronize(self.device)
        start = time.perf_counter()
        yield
        synchronize(self.device)
        record.append((time.perf_counter() - start) * 1e3)
