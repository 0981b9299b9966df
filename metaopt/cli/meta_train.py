"""Meta-train an adaptation policy on a few unlabeled images: ``metaopt meta-train --help``."""

import copy
import json
import os
import shlex
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from metaopt.allocator import keep_freed_memory
from metaopt.cli.assemble import check_images, load_model, meta_train_config, unlabeled_images
from metaopt.cli.command import invoked, resolve_device, run_command
from metaopt.cli.settings import MetaTrainSettings
from metaopt.errors import ConfigError
from metaopt.evaluation import Monitor, closing_table, progress
from metaopt.files import atomic_write_text, ensure_writable_folder, new_folder
from metaopt.meta import MetaTrainer
from metaopt.meta.report import MetaReport, report_on_unseen_tasks
from metaopt.meta.resume import load_run, save_run
from metaopt.meta.train import finished_policy
from metaopt.policy import AdaptationPolicy

CHECKPOINT = Path("ckpt.pt")  # in the current folder: that of the last run; each run's own folder has one too
RUNS = Path("runs/meta_train")


def run(settings: MetaTrainSettings, overrides: Sequence[str]) -> None:
    """Meta-train, save the policy, and report on unseen tasks."""
    device, config = resolve_device(settings.device), meta_train_config(settings)
    images = unlabeled_images(settings, device)
    ensure_writable_folder(CHECKPOINT.parent)
    out = run_folder(settings.out)
    model = load_model(settings.model, settings.source, device)
    check_images(model, images)
    start = None if settings.start is None else policy_to_start_with(settings.start, settings.out)
    trainer = MetaTrainer(model, images, config=config, start=start)
    untrained = copy.deepcopy(trainer.policy)
    if settings.resume is not None:
        load_run(trainer, settings.resume)
    started = time.monotonic()
    with Monitor(out, resume_step=trainer.progress.updates + 1 if settings.resume else 0) as trainer.monitor:
        train(trainer, out / "last.pt", settings.stop_after, overrides)
        policy = finished_policy(trainer)
        for path in (out / CHECKPOINT.name, CHECKPOINT):
            policy.save(path)
        summary: dict[str, Any] = {"model": settings.model.name, "seed": config.seed, **policy.training}
        summary["seconds"] = time.monotonic() - started
        if config.report_tasks:
            report = report_on_unseen_tasks(
                trainer, untrained, policy, tasks=config.report_tasks, adam_lr=config.report_adam_lr
            )
            report.log(trainer.monitor, trainer.progress.updates)
            summary["report"] = report.to_dict()
            show(report)
    atomic_write_text(json.dumps(summary, indent=2) + "\n", out / "summary.json")
    say_what_next(trainer, policy, out, overrides)


def run_folder(out: str | None) -> Path:
    """The folder that was asked for, or a new one, named by the date, that no other run has or gets.

    Raises:
        OutputError: it cannot be made or written.
    """
    return new_folder(RUNS, f"{datetime.now():%Y-%m-%d_%H-%M-%S}") if out is None else ensure_writable_folder(out)


def policy_to_start_with(path: str, out: str | None) -> AdaptationPolicy:
    """Read it.

    Args:
        path: the file.
        out: folder that this command will write in; None: a new one.

    Raises:
        ConfigError: this command would overwrite it, and a resumed run would start with something else.
        CheckpointError: it cannot be read.
    """
    written = [CHECKPOINT] if out is None else [CHECKPOINT, Path(out) / CHECKPOINT.name]
    if os.path.realpath(path) in map(os.path.realpath, written):
        raise ConfigError(
            f"start={path} is a file that this command writes; allowed is any other: mv {path} start.pt, and "
            "set start=start.pt"
        )
    return AdaptationPolicy.load(path)


def train(trainer: MetaTrainer, last: Path, stop_after: int | None, overrides: Sequence[str]) -> None:
    """Run the trainer with a progress bar; ``last`` holds every whole epoch, and after Ctrl-C every whole unroll."""
    config, done = trainer.config, trainer.progress
    epochs = config.epochs if stop_after is None else min(config.epochs, done.epoch + stop_after)
    completed = done.epoch * config.unrolls + done.unroll
    snapshot = copy.deepcopy(trainer.state_dict())  # an interrupt may come in the middle of an unroll
    with progress(epochs * config.unrolls, "Meta-training", completed=completed) as bar:

        def on_unroll(loss: float) -> None:
            nonlocal snapshot
            snapshot = copy.deepcopy(trainer.state_dict())
            bar.update(loss=loss)

        try:
            trainer.run(stop_after, on_unroll, lambda: save_run(trainer, trainer.state_dict(), last))
        except KeyboardInterrupt:
            save_run(trainer, snapshot, last)
            print(f"\nsaved {last}; go on with: {resume_command(last, overrides)}", file=sys.stderr)
            raise


def show(report: MetaReport) -> None:
    """The closing table."""
    tasks = len(next(iter(report.losses.values())))
    title = f"Meta-loss on {tasks} unseen tasks, {report.steps} steps (95 % interval of the paired difference)"
    closing_table(title, ["", "meta-loss", "to before"], report.rows())


def say_what_next(trainer: MetaTrainer, policy: AdaptationPolicy, out: Path, overrides: Sequence[str]) -> None:
    """Where the results are, and the command that comes after this one."""
    done, best = trainer.progress, policy.training["best_epoch"]
    print(f"{out / CHECKPOINT.name} holds epoch {best} of {done.epoch}, and so does {CHECKPOINT} until the next run")
    print(f"curves and summary.json in {out}")
    if done.epoch < trainer.config.epochs:
        print(f"{trainer.config.epochs - done.epoch} epochs are left: {resume_command(out / 'last.pt', overrides)}")
    kept = [item for item in overrides if item.startswith(("model", "data", "source.", "device="))]
    print("Next:", shlex.join([*invoked("adapt", "adapt/online.py"), "--policy", str(CHECKPOINT), *kept]))


def resume_command(last: Path, overrides: Sequence[str]) -> str:
    """The command line that goes on from ``last``."""
    kept = [item for item in overrides if not item.startswith(("resume=", "stop_after="))]
    return shlex.join([*invoked("meta-train", "pretrain/meta_train.py"), *kept, f"resume={last}"])


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code of the command with these arguments; None: those of this process."""
    overrides = list(sys.argv[1:] if argv is None else argv)
    keep_freed_memory()
    return run_command(lambda settings: run(settings, overrides), MetaTrainSettings, "meta_train", overrides)


if __name__ == "__main__":
    sys.exit(main())
