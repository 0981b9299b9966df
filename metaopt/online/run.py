"""Run a method over a stream: adapt, score, time, measure."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial

import torch
from torch import Tensor

from metaopt.data import Batch, Domain, Stream, batch_count, batches
from metaopt.errors import CheckpointError, DataError, check_one_of
from metaopt.evaluation import DomainScore, Monitor, state_mib
from metaopt.online.adapter import OnlineAdapter
from metaopt.online.decisions import Decisions
from metaopt.online.gauges import Gauges
from metaopt.online.progress import Progress, RunState, check_same, fingerprint, last_seen
from metaopt.online.report import DomainReport, RunReport, domain_reports, domains_from_dict, domains_to_dict

SETTINGS = ("reset", "continual")

BatchCallback = Callable[[str, float, Batch, Tensor], None]
"""Called after each batch with the domain's name and severity, the batch, and its logits (B, C).

Where a domain has images of several others, they are those of the one that the batch is of, or else its own; the batch
says which one each image is of (`Batch.source`).
"""


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
    progress: Progress | None = None,
) -> RunReport:
    """Adapt over a stream, batch by batch.

    Args:
        adapter: the model with its method.
        stream: domains, in the order in which they are met; where the first comes again, another pass begins. One that
            `metaopt.data.arrange` made is met as it was arranged.
        setting: ``reset`` starts each domain from the source; ``continual`` never resets.
        batch_size: images a batch; the short last one is used too.
        seed: of the order of images.
        device: of model and images.
        monitor: where curves go.
        on_batch: see ``BatchCallback``.
        progress: saves the state of the run as it goes, and has the one that it goes on from, bit for bit: batches that
            were answered before are skipped.

    Raises:
        ConfigError: an unknown setting.
        DataError: the stream is empty, or the batch size is below 1.
        CheckpointError: the state to go on from is damaged, or of another model, method, stream or setting.
        Stopped: ``progress`` was asked to stop.
    """
    check_one_of("setting", setting, SETTINGS)
    if not stream:
        raise DataError("the stream has 0 domains; at least one is needed: name data.corruptions")
    if batch_size < 1:
        raise DataError(f"batch_size is {batch_size}: at least 1 image a batch is needed; raise it")
    met = partial(batches, batch_size=batch_size, device=device, seed=seed)
    adapter.reset()
    adapter.watch.clear()
    run = _Run(adapter, monitor or Monitor(None), torch.device(device), batch_count(stream, batch_size))
    if progress is not None:
        run.keep_by(progress, stream, met, {"setting": setting, "batch size": batch_size, "seed": seed})
    number, visits = 0, max(source.visit for domain in stream for source in (domain, *domain.sources))
    for place, domain in enumerate(stream):
        number += domain is stream[0]
        if place < run.domain:  # met before the run was stopped
            continue
        if run.batch == 0:
            run.begin_domain(domain, reset=setting == "reset")
        for batch in met(domain, skip=run.batch):
            home = batch.home(domain)
            logits = run.answer(batch, home.name)
            if on_batch is not None:
                on_batch(home.name, home.severity, batch, logits)
            run.end_batch(batch)
        run.end_domain(domain, place, (number - 1) * visits)
    run.collect_counts()
    run.decisions.show(run.steps)
    return run.report()


class _Run:
    """Place in the stream, clock, meter and counters of one run."""

    def __init__(self, adapter: OnlineAdapter, monitor: Monitor, device: torch.device, batch_count: int) -> None:
        self.adapter, self.monitor = adapter, monitor
        self.domain = self.batch = 0  # domains that are behind, and batches of the one in hand
        self.score = DomainScore(adapter.model.num_classes)  # of that one
        self.shares: list[DomainScore] = []  # of each of its sources, where it has several
        self.gauges = Gauges(adapter, device, batch_count)
        self.domains: list[DomainReport] = []
        self.guard_events: Counter[str] = Counter({name: 0 for name in adapter.events})
        self.updates = 0
        self.passes, self.images = 0.0, 0  # of the network, counted for each image, and these
        self.batch_count = batch_count
        self.warned = 0  # warnings that the curves' folder has
        self.loss: Tensor | None = None
        self.decisions = Decisions(adapter, monitor)
        self.progress: Progress | None = None
        self.made_of: RunState = {}

    @property
    def steps(self) -> int:
        """Batches met."""
        return self.gauges.steps

    def keep_by(
        self, progress: Progress, stream: Stream, met: Callable[..., Iterator[Batch]], made_of: RunState
    ) -> None:
        """Let ``progress`` keep this run, and go on with the state that it has.

        Args:
            progress: keeps it.
            stream: its domains.
            met: gives the batches of a domain; ``skip`` leaves some out.
            made_of: settings of the run by name, in which a state must agree.

        Raises:
            CheckpointError: the state is damaged or of another run.
        """
        self.progress = progress
        self.made_of = {
            "model": self.adapter.model.weights_sha256(),
            "method": self.adapter.policy.method,
            "memory": asdict(self.adapter.memory.config),
            "compute": None if self.adapter.dial is None else self.adapter.dial.compute,
            "stream": fingerprint(stream),
            **made_of,
        }
        if progress.resume is None:
            return
        try:
            check_same(self.made_of, progress.resume["made_of"])
            self.load_state_dict(progress.resume)
            if len(self.shares) != _share_count(stream[self.domain]):
                raise ValueError("scores of the domain's sources are missing")
            there = last_seen(next(met(stream[self.domain], skip=self.batch - 1)))
            then = progress.resume["last"]
        except (KeyError, TypeError, AttributeError, RuntimeError, ValueError, IndexError, StopIteration) as error:
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise CheckpointError(f"the run to resume is damaged ({reason}); start a new run") from error
        if there != then:
            raise CheckpointError(
                "the stream has other images than the run to resume met; allowed are the same ones: put them back, or "
                "start a new run"
            )

    def begin_domain(self, domain: Domain, reset: bool) -> None:
        """New scores and, where asked, an adapter that is back at the source."""
        if reset:
            self.collect_counts()
            self.adapter.reset()
        self.score = self._new_score()
        self.shares = [self._new_score() for _ in range(_share_count(domain))]

    def end_batch(self, batch: Batch) -> None:
        """The batch is answered: save the run where it is time to."""
        self.batch += 1
        if self.progress is not None:
            self.progress.after_batch(
                self.steps, self.batch_count, lambda: {**self.state_dict(), "last": last_seen(batch)}
            )

    def state_dict(self) -> RunState:
        """All that another run of the same stream needs to go on bit for bit, between two batches."""
        return {
            "made_of": self.made_of,
            "domain": self.domain,
            "batch": self.batch,
            "steps": self.steps,
            "updates": self.updates,
            "passes": self.passes,
            "images": self.images,
            "events": dict(self.guard_events),
            "adapter": self.adapter.state_dict(),
            "score": self.score.state_dict(),
            "shares": [score.state_dict() for score in self.shares],
            "domains": domains_to_dict(self.domains),
            "decisions": self.decisions.state_dict(),
            "gauges": self.gauges.state_dict(),
            "watch": self.adapter.watch.state_dict(),
        }

    def load_state_dict(self, values: RunState) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self.adapter.load_state_dict(values["adapter"])
        self.score.load_state_dict(values["score"])
        if not isinstance(values["shares"], list):
            raise TypeError("scores of the domain's sources are missing")
        self.shares = [self._new_score() for _ in values["shares"]]
        for score, own in zip(self.shares, values["shares"], strict=True):
            score.load_state_dict(own)
        self.decisions.load_state_dict(values["decisions"])
        self.domains = domains_from_dict(values["domains"])
        self.domain, self.batch, self.updates = (int(values[name]) for name in ("domain", "batch", "updates"))
        self.passes, self.images = float(values["passes"]), int(values["images"])
        if not set(self.guard_events) <= set(values["events"]):
            raise ValueError("counts of events are missing")
        self.guard_events = Counter({str(name): int(count) for name, count in values["events"].items()})
        self.gauges.load_state_dict(values["gauges"])
        if int(values["steps"]) != self.steps:
            raise ValueError(f"it has {values['steps']} batches and measured {self.steps}")
        self.adapter.watch.load_state_dict(values["watch"])
        self.warned = len(self.adapter.warnings)

    def answer(self, batch: Batch, domain: str) -> Tensor:
        """Predict, adapt, score and draw curves; logits (B, C)."""
        with self.decisions.watching(domain):
            logits = self.step(batch)
        self.score.update(logits, batch.labels)
        if self.shares and batch.source is not None:
            for place in batch.source.unique().tolist():
                own = (batch.source == place).to(logits.device)
                self.shares[place].update(logits[own], None if batch.labels is None else batch.labels[own])
        self.log(domain)
        return logits

    def step(self, batch: Batch) -> Tensor:
        """Predict and adapt; logits (B, C)."""
        output = self.gauges.step(batch.images)
        self.loss = output.loss
        self.monitor.scalar("online/entropy", _entropy(output.logits), self.steps)
        for name, signal in output.signals.items():
            self.monitor.scalar(f"online/{name}", signal, self.steps)
        return output.logits

    def log(self, domain: str) -> None:
        """Curves of the latest step."""
        if self.score.cumulative_error:
            self.monitor.scalar("online/error", self.score.cumulative_error[-1], self.steps)
        self.monitor.scalar("online/activation_mib", self.gauges.held_mib, self.steps)
        if self.gauges.watch.step_ms:
            self.monitor.scalar("online/step_ms", self.gauges.watch.step_ms[-1], self.steps)
        self.decisions.log(domain, self.steps)
        for text in self.adapter.warnings[self.warned :]:
            self.monitor.text("online/warnings", text, self.steps)
        self.warned = len(self.adapter.warnings)
        if (verdict := self.adapter.verdict()) is not None:
            for name in ("estimated_error", "source_estimated_error"):
                self.monitor.scalar(f"online/{name}", getattr(verdict, name), self.steps)
        if self.loss is not None:
            self.monitor.scalar("online/loss", self.loss, self.steps)
        for name, count in self.adapter.events.items():
            self.monitor.scalar(f"online/guard/{name}", self.guard_events[name] + count, self.steps)

    def _new_score(self) -> DomainScore:
        return DomainScore(self.adapter.model.num_classes)

    def end_domain(self, domain: Domain, place: int, passes_before: int) -> None:
        """What is reported of a domain, the ``place``-th of the stream, once all its batches are answered."""
        verdict = self.adapter.verdict()
        told = None if verdict is None else asdict(verdict)
        found = domain_reports(domain, self.score, self.shares, passes_before)
        self.domains += [replace(each, verdict=told) for each in found]
        self.domain, self.batch = place + 1, 0

    def collect_counts(self) -> None:
        """Take over the adapter's counters before it is reset."""
        self.updates += self.adapter.updates
        self.passes, self.images = self.passes + self.adapter.passes, self.images + self.adapter.images
        self.guard_events.update(self.adapter.events)

    def report(self) -> RunReport:
        """The figures of the run."""
        gauges, watch = self.gauges, self.gauges.watch
        return RunReport(
            domains=self.domains,
            held_mib=gauges.held_mib,
            state_mib=state_mib(self.adapter.state),
            cuda_peak_mib=gauges.cuda_peak_mib,
            step_ms_p50=watch.step_ms_p50,
            step_ms_p99=watch.step_ms_p99,
            forward_ms_p50=watch.forward_ms_p50,
            ratio_to_forward=watch.ratio_to_forward,
            mean_ratio_to_forward=watch.mean_ratio_to_forward,
            mean_forwards=self.passes / self.images if self.images else None,
            updates=self.updates,
            guard_events=dict(self.guard_events),
            layers=gauges.layers,
            warnings=self.adapter.warnings,
        )


def _share_count(domain: Domain) -> int:
    """Scores beside that of the whole domain: one for each source, where there are several or it is another's name."""
    return 0 if len(domain.sources) == 1 and domain.sources[0].name == domain.name else len(domain.sources)


def _entropy(logits: Tensor) -> Tensor:
    """Mean softmax entropy of a batch, nats."""
    return torch.special.entr(logits.softmax(dim=1)).sum(dim=1).mean()
