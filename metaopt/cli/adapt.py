"""Adapt a model online, batch by batch, on a stream of shifted images: ``metaopt adapt --help``."""

import csv
import io
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from metaopt.cli.assemble import (
    assemble_method,
    check_stream,
    fairness_note,
    load_model,
    take_policy,
    unlabeled_images,
)
from metaopt.cli.command import resolve_device, run_command
from metaopt.cli.settings import OnlineSettings
from metaopt.data import Batch
from metaopt.evaluation import Monitor, closing_table, progress
from metaopt.evaluation.error import confidences
from metaopt.files import atomic_write_text, ensure_writable_folder
from metaopt.online import OnlineAdapter, RunReport, run_stream
from metaopt.online.layers import COLUMNS, memory_rows, to_csv
from metaopt.policy import AdaptationPolicy


def run(settings: OnlineSettings) -> None:
    """Run one method over the stream, and write what it predicted and what that cost."""
    device = resolve_device(settings.device)
    policy = None if settings.policy_path is None else AdaptationPolicy.load(settings.policy_path)
    stream = settings.data.stream(settings.seed)
    out = ensure_writable_folder(settings.out)
    model = load_model(settings.model, settings.source, device)
    check_stream(stream, model, device)
    if policy is not None:
        policy = take_policy(policy, settings.transfer, model)
    images = partial(unlabeled_images, settings, device)
    method = assemble_method(settings.method, policy, model, images, settings.seed)
    assert settings.memory is not None
    adapter = OnlineAdapter(model, method, memory=settings.memory, budget_mib=settings.budget_mib)
    predictions = Predictions()
    batches = sum(-(-domain.size // settings.batch_size) for domain in stream)
    with Monitor(out) as monitor, progress(batches, f"Adapting ({settings.method.name})") as bar:

        def on_batch(domain: str, severity: float, batch: Batch, logits: Tensor) -> None:
            predictions.add(domain, severity, batch, logits)
            bar.update()

        report = run_stream(
            adapter,
            stream,
            setting=settings.setting,
            batch_size=settings.batch_size,
            seed=settings.seed,
            device=device,
            monitor=monitor,
            on_batch=on_batch,
        )
    atomic_write_text(predictions.text(), out / "predictions.csv")
    atomic_write_text(to_csv(report.layers), out / "memory.csv")
    atomic_write_text(json.dumps(summary(settings, report), indent=2) + "\n", out / "summary.json")
    show(settings, report, out)
    if note := fairness_note(method, stream):
        print(note)


class Predictions:
    """Rows of ``predictions.csv``, in the order in which the images were met."""

    def __init__(self) -> None:
        self._file = io.StringIO()
        self._rows = csv.writer(self._file, lineterminator="\n")
        self._rows.writerow(["index", "domain", "severity", "prediction", "confidence", "label"])

    def add(self, domain: str, severity: float, batch: Batch, logits: Tensor) -> None:
        """Take in one batch; a row of logits without a softmax has confidence 0."""
        labels = [""] * len(batch.index) if batch.labels is None else batch.labels.tolist()
        confidence = [f"{value:.6f}" for value in confidences(logits).tolist()]
        columns = batch.index.tolist(), logits.argmax(dim=1).tolist(), confidence, labels
        for index, prediction, sure, label in zip(*columns, strict=True):
            self._rows.writerow([index, domain, f"{severity:g}", prediction, sure, label])

    def text(self) -> str:
        """The file's content."""
        return self._file.getvalue()


def summary(settings: OnlineSettings, report: RunReport) -> dict[str, Any]:
    """Content of ``summary.json``."""
    return {
        "method": settings.method.name,
        "setting": settings.setting,
        "model": settings.model.name,
        "seed": settings.seed,
        "batch_size": settings.batch_size,
        **report.summary(),
    }


def show(settings: OnlineSettings, report: RunReport, out: Path) -> None:
    """The closing table."""
    rows: list[tuple[str, float | str, int, float | None, float | None]] = [
        (domain.name, f"{domain.severity:g}", domain.images, domain.error, domain.ece) for domain in report.domains
    ]
    rows.append(("mean", "", report.images, report.mean_error, report.mean_ece))
    title = f"{settings.method.name} on {settings.model.name}, setting {settings.setting}"
    closing_table(title, ["corruption", "severity", "images", "error %", "ECE %"], rows)
    if settings.memory != "dense" and report.layers:
        closing_table(f"memory={settings.memory}: what a step holds for backward", COLUMNS, memory_rows(report.layers))
    ratio = "-" if report.ratio_to_forward is None else f"{report.ratio_to_forward:.2f}"
    within = "" if settings.budget_mib is None else f" of a budget of {settings.budget_mib:g}"
    print(f"held for backward: {report.held_mib:.1f} MiB{within}, state: {report.state_mib:.1f} MiB")
    mean = "" if report.mean_ratio_to_forward is None else f" (median; {report.mean_ratio_to_forward:.2f} in the mean)"
    print(f"time of a step: {ratio} plain forward passes{mean}")
    events = "".join(f", {name} {count}" for name, count in report.guard_events.items() if count)
    print(f"updates: {report.updates}{events}")
    if len(report.pass_errors) > 1:
        print("error of each pass: " + ", ".join("-" if e is None else f"{e:.2f} %" for e in report.pass_errors))
    for text in report.warnings:
        print(f"warning: {text}")
    print(f"predictions.csv, memory.csv, summary.json and curves in {out}")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code of the command with these arguments; None: those of this process."""
    return run_command(run, OnlineSettings, "online", argv)


if __name__ == "__main__":
    sys.exit(main())
