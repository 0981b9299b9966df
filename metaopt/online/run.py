"""Run a method over a stream: adapt, score, time, measure."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from metaopt.data import Batch, Domain, Stream, batches
from metaopt.errors import DataError, check_one_of
from metaopt.evaluation import DomainScore, MemoryMeter, Monitor, Stopwatch, state_mib
from metaopt.online.adapter import OnlineAdapter
from metaopt.online.decisions import Decisions
from metaopt.online.layers import LayerMemory, layer_memory

SETTINGS = ("reset", "continual")
FORWARDS_TIMED = 10  # plain forward passes that a run times beside its steps
METER_EVERY = 20  # batches: a metered step takes up to 1.4 times as long as another, so that this costs 2 % at most


@dataclass
class DomainReport:
    """One domain's score; errors in percent, None without labels."""

    name: str
    severity: float
    images: int
    error: float | None
    ece: float | None
    cumulative_error: list[float] = field(default_factory=list)  # after each batch
    number: int = 1  # of the pass through the stream


@dataclass
class RunReport:
    """What a run over a stream gives; times in milliseconds, memory in MiB, errors in percent."""

    domains: list[DomainReport]
    held_mib: float
    state_mib: float
    cuda_peak_mib: float | None
    step_ms_p50: float | None
    step_ms_p99: float | None
    forward_ms_p50: float | None
    ratio_to_forward: float | None  # of the medians
    mean_ratio_to_forward: float | None  # of the means, where some steps update and others do not
    updates: int
    guard_events: dict[str, int]
    layers: list[LayerMemory] = field(default_factory=list)  # of the metered step
    warnings: list[str] = field(default_factory=list)  # what the stream does not seem to be, a line each

    @property
    def images(self) -> int:
        """Number of images met."""
        return sum(domain.images for domain in self.domains)

    @property
    def mean_error(self) -> float | None:
        """Mean over the domains."""
        return _mean([domain.error for domain in self.domains])

    @property
    def mean_ece(self) -> float | None:
        """Mean over the domains."""
        return _mean([domain.ece for domain in self.domains])

    @property
    def pass_errors(self) -> list[float | None]:
        """Mean over the domains of each pass through the stream."""
        last = max((domain.number for domain in self.domains), default=0)
        return [_mean([d.error for d in self.domains if d.number == number]) for number in range(1, last + 1)]

    def summary(self) -> dict[str, Any]:
        """The fields of ``summary.json`` that a run knows."""
        return {
            "images": self.images,
            "mean_error": self.mean_error,
            "mean_ece": self.mean_ece,
            "pass_errors": self.pass_errors,
            "held_mib": self.held_mib,
            "state_mib": self.state_mib,
            "cuda_peak_mib": self.cuda_peak_mib,
            "step_ms_p50": self.step_ms_p50,
            "step_ms_p99": self.step_ms_p99,
            "forward_ms_p50": self.forward_ms_p50,
            "ratio_to_forward": self.ratio_to_forward,
            "mean_ratio_to_forward": self.mean_ratio_to_forward,
            "updates": self.updates,
            "guard_events": self.guard_events,
            "warnings": self.warnings,
            "domains": [
                {"name": d.name, "severity": d.severity, "images": d.images, "error": d.error, "ece": d.ece}
                for d in self.domains
            ],
        }


BatchCallback = Callable[[str, float, Batch, Tensor], None]
"""Called after each batch with the domain's name and severity, the batch, and its logits (B, C)."""


def run_stream(
    adapter: OnlineAdapter,
    stream: Stream,
    *,
    setting: str = "reset",
    batch_size: int = 64,
    seed: int = 0,
    device: torch.device | str = "cpu",
    monitor: Monitor | None = None,
    on_batch: BatchCallback | None = None,
) -> RunReport:
    """Adapt over a stream, batch by batch.

    Args:
        adapter: the model with its method.
        stream: domains, in the order in which they are met; where the first comes again, another pass begins.
        setting: ``reset`` starts each domain from the source; ``continual`` never resets.
        batch_size: images a batch; the short last one is used too.
        seed: of the order of images.
        device: of model and images.
        monitor: where curves go.
        on_batch: see ``BatchCallback``.

    Raises:
        ConfigError: an unknown setting.
        DataError: the stream is empty, or the batch size is below 1.
    """
    check_one_of("setting", setting, SETTINGS)
    if not stream:
        raise DataError("the stream has 0 domains; at least one is needed: name data.corruptions")
    if batch_size < 1:
        raise DataError(f"batch_size is {batch_size}: at least 1 image a batch is needed; raise it")
    run = _Run(adapter, monitor or Monitor(None), torch.device(device), _batch_count(stream, batch_size))
    adapter.reset()
    number = 0
    for domain in stream:
        number += domain is stream[0]
        if setting == "reset":
            run.collect_counts()
            adapter.reset()
        score = DomainScore(adapter.model.num_classes)
        for batch in batches(domain, batch_size, device, seed):
            with run.decisions.watching(domain.name):
                logits = run.step(batch)
            score.update(logits, batch.labels)
            run.log(score, domain.name)
            if on_batch is not None:
                on_batch(domain.name, domain.severity, batch, logits)
        run.domains.append(_domain_report(domain, score, number))
    run.collect_counts()
    run.decisions.show(run.steps)
    return run.report()


class _Run:
    """Clock, meter and counters of one run."""

    def __init__(self, adapter: OnlineAdapter, monitor: Monitor, device: torch.device, batch_count: int) -> None:
        self.adapter, self.monitor = adapter, monitor
        self.watch = Stopwatch(device)
        self.domains: list[DomainReport] = []
        self.guard_events: Counter[str] = Counter({name: 0 for name in adapter.guard.events})
        self.updates = self.steps = 0
        self.warned = 0  # warnings that the curves' folder has
        self.held_mib = 0.0
        self.cuda_peak_mib: float | None = None
        self.layers: list[LayerMemory] = []
        self.metered_shape: tuple[int, ...] | None = None
        self.metered_at = 0  # step
        self.metered_update = False  # whether one of the metered steps updated
        self.forward_every = max(1, batch_count // FORWARDS_TIMED)
        self.loss: Tensor | None = None
        self.decisions = Decisions(adapter, monitor)

    def step(self, batch: Batch) -> Tensor:
        """Predict and adapt; steps are metered or timed, and short batches are neither.

        Metered are the first batch of a new largest size, one in ``METER_EVERY``, for what grows along the stream, and,
        where a gate closed at all of those, the first that was updated on, by a look at its loss and gradient.
        """
        shape, adapter = tuple(batch.images.shape), self.adapter
        largest = self.metered_shape is None or shape[0] > self.metered_shape[0]
        if largest:
            self.metered_shape, self.metered_update = shape, False
            adapter.prepare(batch.images)  # its dry runs are neither timed nor metered
        if largest or self.steps - self.metered_at >= METER_EVERY:
            with self.metered(batch.images):
                output = adapter.step(batch.images)
            self.metered_at, self.metered_update = self.steps, self.metered_update or output.updated
        elif shape != self.metered_shape:
            output = adapter.step(batch.images)
        else:
            with self.watch.step():
                output = adapter.step(batch.images)
        if shape == self.metered_shape and not largest:
            if output.updated and not self.metered_update:
                with self.metered(batch.images):
                    adapter.look(batch.images)
                self.metered_update = True
            if self.steps % self.forward_every == 0:
                with self.watch.forward():
                    adapter.source(batch.images)
        self.steps += 1
        self.loss = output.loss
        self.monitor.scalar("online/entropy", _entropy(output.logits), self.steps)
        for name, signal in output.signals.items():
            self.monitor.scalar(f"online/{name}", signal, self.steps)
        return output.logits

    @contextmanager
    def metered(self, images: Tensor) -> Iterator[None]:
        """Take in what is held inside."""
        with MemoryMeter([*self.adapter.parameters.values(), images], model=self.adapter.model) as meter:
            yield
        if meter.peak_mib >= self.held_mib:
            self.layers = layer_memory(self.adapter.memory.layers, meter.layers_mib)
        self.held_mib = max(self.held_mib, meter.peak_mib)
        if meter.cuda_peak_mib is not None:
            self.cuda_peak_mib = max(meter.cuda_peak_mib, self.cuda_peak_mib or 0.0)

    def log(self, score: DomainScore, domain: str) -> None:
        """Curves of the latest step."""
        if score.cumulative_error:
            self.monitor.scalar("online/error", score.cumulative_error[-1], self.steps)
        self.monitor.scalar("online/activation_mib", self.held_mib, self.steps)
        if self.watch.step_ms:
            self.monitor.scalar("online/step_ms", self.watch.step_ms[-1], self.steps)
        self.decisions.log(domain, self.steps)
        for text in self.adapter.warnings[self.warned :]:
            self.monitor.text("online/warnings", text, self.steps)
        self.warned = len(self.adapter.warnings)
        if self.loss is not None:
            self.monitor.scalar("online/loss", self.loss, self.steps)
        for name, count in self.adapter.guard.events.items():
            self.monitor.scalar(f"online/guard/{name}", self.guard_events[name] + count, self.steps)

    def collect_counts(self) -> None:
        """Take over the adapter's counters before it is reset."""
        self.updates += self.adapter.updates
        self.guard_events.update(self.adapter.guard.events)

    def report(self) -> RunReport:
        """The figures of the run."""
        watch = self.watch
        return RunReport(
            domains=self.domains,
            held_mib=self.held_mib,
            state_mib=state_mib(self.adapter.state),
            cuda_peak_mib=self.cuda_peak_mib,
            step_ms_p50=watch.step_ms_p50,
            step_ms_p99=watch.step_ms_p99,
            forward_ms_p50=watch.forward_ms_p50,
            ratio_to_forward=watch.ratio_to_forward,
            mean_ratio_to_forward=watch.mean_ratio_to_forward,
            updates=self.updates,
            guard_events=dict(self.guard_events),
            layers=self.layers,
            warnings=self.adapter.warnings,
        )


def _domain_report(domain: Domain, score: DomainScore, number: int) -> DomainReport:
    result, curve = score.result(), list(score.cumulative_error)
    return DomainReport(domain.name, domain.severity, result.images, result.error, result.ece, curve, number)


def _batch_count(stream: Stream, batch_size: int) -> int:
    return sum(-(-domain.size // batch_size) for domain in stream)


def _entropy(logits: Tensor) -> Tensor:
    """Mean softmax entropy of a batch, nats."""
    return torch.special.entr(logits.softmax(dim=1)).sum(dim=1).mean()


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
