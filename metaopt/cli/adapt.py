"""Adapt a model online, batch by batch, on a stream of shifted images: ``metaopt adapt --help``."""

import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
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
from metaopt.cli.go_on import with_those_of_the_run
from metaopt.cli.run_folder import MEMORY, SUMMARY, RunFolder, saved_run
from metaopt.cli.settings import OnlineSettings
from metaopt.cli.stop_signals import StoppedBySignal, stop_signals
from metaopt.data import Batch, Stream, arrange, batch_count
from metaopt.evaluation import Monitor, closing_table, progress
from metaopt.files import atomic_write_text, ensure_writable_folder
from metaopt.online import OnlineAdapter, Progress, RunReport, Stopped, run_stream
from metaopt.online.layers import COLUMNS, memory_rows, to_csv
from metaopt.policy import AdaptationPolicy


def run(settings: OnlineSettings, arguments: Sequence[str]) -> None:
    """Run one method over the stream, and write what it predicted and what that cost."""
    saved, device = saved_run(settings), resolve_device(settings.device)
    policy = None if settings.policy_path is None else AdaptationPolicy.load(settings.policy_path)
    stream = settings.data.stream(settings.seed)
    stream = arrange(stream, settings.stream, seed=settings.seed, batch_size=settings.batch_size)
    out = ensure_writable_folder(settings.out)
    with RunFolder(settings, arguments, saved) as folder:
        model = load_model(settings.model, settings.source, device)
        check_stream(stream, model, device)
        if policy is not None:
            policy = take_policy(policy, settings.transfer, model)
        images = partial(unlabeled_images, settings, device)
        mirrored = settings.data.keeps_class_mirrored
        method = assemble_method(settings.method, policy, model, images, settings.seed, mirrored)
        assert settings.memory is not None
        adapter = OnlineAdapter(
            model,
            method,
            memory=settings.memory,
            budget_mib=settings.budget_mib,
            compute=settings.compute,
            compile=settings.compile,
            gather=settings.gather,
        )
        report = adapt(adapter, stream, settings, device, folder)
    atomic_write_text(to_csv(report.layers), out / MEMORY)
    atomic_write_text(json.dumps(summary(settings, report), indent=2) + "\n", out / SUMMARY)
    show(settings, report, out)
    if note := fairness_note(method, stream):
        print(note)


def adapt(
    adapter: OnlineAdapter, stream: Stream, settings: OnlineSettings, device: torch.device, folder: RunFolder
) -> RunReport:
    """Answer the stream, or what is left of it.

    Raises:
        StoppedBySignal: after the batch in hand, with the state saved.
    """
    batches = batch_count(stream, settings.batch_size)
    keeper = Progress(folder.save, settings.snapshot_every, folder.state)
    with (
        Monitor(folder.path, resume_step=folder.done + 1 if folder.state else 0) as monitor,
        progress(batches, f"Adapting ({settings.method.name})", completed=folder.done) as bar,
        stop_signals(keeper.stop) as signals,
    ):

        def on_batch(domain: str, severity: float, batch: Batch, logits: Tensor) -> None:
            folder.answer(domain, severity, batch, logits)
            bar.update()

        try:
            return run_stream(
                adapter,
                stream,
                setting=settings.setting,
                batch_size=settings.batch_size,
                seed=settings.seed,
                device=device,
                monitor=monitor,
                on_batch=on_batch,
                progress=keeper,
            )
        except Stopped:
            raise StoppedBySignal(signals[0], folder.how_to_go_on(bar.completed, batches)) from None


def summary(settings: OnlineSettings, report: RunReport) -> dict[str, Any]:
    """Content of ``summary.json``."""
    return {
        "method": settings.method.name,
        "setting": settings.setting,
        "stream": settings.stream,
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
    title += "" if settings.stream["name"] == "shuffled" else f", stream {settings.stream['name']}"
    closing_table(title, ["corruption", "severity", "images", "error %", "ECE %"], rows)
    if settings.memory != "dense" and report.layers:
        closing_table(f"memory={settings.memory}: what a step holds for backward", COLUMNS, memory_rows(report.layers))
    ratio = "-" if report.ratio_to_forward is None else f"{report.ratio_to_forward:.2f}"
    within = "" if settings.budget_mib is None else f" of a budget of {settings.budget_mib:g}"
    print(f"held for backward: {report.held_mib:.1f} MiB{within}, state: {report.state_mib:.1f} MiB")
    mean = "" if report.mean_ratio_to_forward is None else f" (median; {report.mean_ratio_to_forward:.2f} in the mean)"
    print(f"time of a step: {ratio} plain forward passes{mean}")
    if report.mean_forwards is not None:
        of = "" if settings.compute is None else f" of compute={settings.compute:g}"
        print(f"forward passes a batch, counted: {report.mean_forwards:.2f}{of}")
    events = "".join(f", {name} {count}" for name, count in report.guard_events.items() if count)
    print(f"updates: {report.updates}{events}")
    if found := report.estimates:
        adapted, source = (_told(found, name) for name in ("estimated", "source_estimated"))
        print(f"estimated without labels: {adapted}; of the source: {source}")
    if len(report.pass_errors) > 1:
        print("error of each pass: " + ", ".join("-" if e is None else f"{e:.2f} %" for e in report.pass_errors))
    for text in report.warnings:
        print(f"warning: {text}")
    print(f"predictions.csv, memory.csv, summary.json and curves in {out}")


def _told(found: dict[str, Any], name: str) -> str:
    low, high = found[f"{name}_interval"]
    return f"error {found[f'{name}_error']:.1f} % (95 %: {low:.1f} to {high:.1f})"


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code of the command with these arguments; None: those of this process."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return run_command(
        lambda settings: run(settings, arguments), OnlineSettings, "online", arguments, with_those_of_the_run
    )


if __name__ == "__main__":
    sys.exit(main())
