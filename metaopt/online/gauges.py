"""What a run over a stream measures of its steps: their time, and what they hold for backward."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from metaopt.evaluation import MemoryMeter, Stopwatch
from metaopt.online.adapter import OnlineAdapter
from metaopt.online.layers import LayerMemory, layer_memory
from metaopt.types import StepOutput

FORWARDS_TIMED = 10  # plain forward passes that a run times beside its steps
METER_EVERY = 20  # batches: a metered step takes up to 1.4 times as long as another, so that this costs 2 % at most


class Gauges:
    """Runs an adapter's steps, each timed or metered.

    Args:
        adapter: whose steps.
        device: of model and images.
        batch_count: batches of the whole stream.
    """

    def __init__(self, adapter: OnlineAdapter, device: torch.device, batch_count: int) -> None:
        self.adapter = adapter
        self.watch = Stopwatch(device)
        self.forward_every = max(1, batch_count // FORWARDS_TIMED)
        self.steps = 0
        self.held_mib = 0.0
        self.cuda_peak_mib: float | None = None
        self.layers: list[LayerMemory] = []  # of the metered step that held most
        self._shape: tuple[int, ...] | None = None  # of the largest batch, which alone is metered and timed
        self._prepared: tuple[int, ...] | None = None  # in this process
        self._metered_at = 0  # step
        self._metered_update = False  # whether one of the metered steps updated

    def step(self, images: Tensor) -> StepOutput:
        """Predict and adapt; steps are metered or timed, and short batches are neither.

        Metered are the first batch of a new largest size, the first update on gathered batches, one in ``METER_EVERY``,
        for what grows along the stream, and, where a gate closed at all of those, the first that was updated on, by a
        look at its loss and gradient.
        """
        shape, adapter = tuple(images.shape), self.adapter
        largest = self._shape is None or shape[0] > self._shape[0]
        if largest:
            self._shape, self._metered_update = shape, False
        if self._shape == shape != self._prepared:
            adapter.prepare(images)  # its dry runs are neither timed nor metered
            self._prepared = shape
        gathered = not self._metered_update and adapter.gathering.completed_by(images)
        if largest or gathered or self.steps - self._metered_at >= METER_EVERY:
            with self._metering(images):
                output = adapter.step(images)
            self._metered_at, self._metered_update = self.steps, self._metered_update or output.updated
        elif shape != self._shape:
            output = adapter.step(images)
        else:
            with self.watch.step():
                output = adapter.step(images)
        if shape == self._shape and not largest:
            self._look_aside(images, output)
        self.steps += 1
        return output

    def _look_aside(self, images: Tensor, output: StepOutput) -> None:
        """What is measured beside the step: an update that no metered step has seen, and the plain forward pass."""
        if output.updated and not self._metered_update:
            with self._metering(images):
                self.adapter.look(images)
            self._metered_update = True
        if self.steps % self.forward_every == 0:
            with self.watch.forward():
                self.adapter.source(images)

    @contextmanager
    def _metering(self, images: Tensor) -> Iterator[None]:
        """Take in what is held inside."""
        with MemoryMeter([*self.adapter.parameters.values(), images], model=self.adapter.model) as meter:
            yield
        if meter.peak_mib >= self.held_mib:
            self.layers = layer_memory(self.adapter.memory.layers, meter.layers_mib)
        self.held_mib = max(self.held_mib, meter.peak_mib)
        if meter.cuda_peak_mib is not None:
            self.cuda_peak_mib = max(meter.cuda_peak_mib, self.cuda_peak_mib or 0.0)

    def state_dict(self) -> dict[str, Any]:
        """All that was measured, as tensors and primitives."""
        return {
            "steps": self.steps,
            "held_mib": self.held_mib,
            "cuda_peak_mib": self.cuda_peak_mib,
            "layers": [asdict(layer) for layer in self.layers],
            "shape": self._shape,
            "metered_at": self._metered_at,
            "metered_update": self._metered_update,
            "step_ms": torch.tensor(self.watch.step_ms, dtype=torch.float64),
            "forward_ms": torch.tensor(self.watch.forward_ms, dtype=torch.float64),
        }

    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        peak = values["cuda_peak_mib"]
        self.steps, self._metered_at = int(values["steps"]), int(values["metered_at"])
        self._metered_update = bool(values["metered_update"])
        self.held_mib, self.cuda_peak_mib = float(values["held_mib"]), None if peak is None else float(peak)
        self.layers = [LayerMemory(**layer) for layer in values["layers"]]
        self._shape = tuple(int(values["shape"][axis]) for axis in range(4))
        self.watch.step_ms, self.watch.forward_ms = values["step_ms"].tolist(), values["forward_ms"].tolist()
