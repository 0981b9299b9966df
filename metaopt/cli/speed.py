"""Measure what meta-training costs: ``metaopt speed --help``."""

import sys
from collections.abc import Sequence

from metaopt.allocator import keep_freed_memory
from metaopt.cli.assemble import load_model, meta_train_config, unlabeled_images
from metaopt.cli.command import resolve_device, run_command
from metaopt.cli.settings import SpeedSettings
from metaopt.evaluation import closing_table
from metaopt.meta import MetaTrainer
from metaopt.meta.speed import SpeedRow, measure_memory, measure_speed, update_share

LENGTHS = (2, 16)  # unrolls whose memory is compared


def run(settings: SpeedSettings) -> None:
    """Time every backend, then compare the memory of a long unroll with that of a short one."""
    device = resolve_device(settings.device)
    images = unlabeled_images(settings, device)
    model = load_model(settings.model, settings.source, device)
    trainer = MetaTrainer(model, images, config=meta_train_config(settings))
    rows = measure_speed(trainer, steps=settings.meta.steps, on_row=show)
    cells = [(row.gradient, row.loss, row.backend, f"{row.seconds_per_step:.3f}", f"{row.ratio:.2f}") for row in rows]
    title = f"An unrolled step of {settings.model.name}, batch {settings.meta.batch_size}, K = {settings.meta.steps}"
    closing_table(title, ["gradient", "meta-loss", "backend", "seconds", "to forward-backward"], cells)
    short, long = (measure_memory(trainer, steps) for steps in LENGTHS)
    print(f"held in first order: {short:.1f} MiB at K = {LENGTHS[0]}, {long:.1f} at K = {LENGTHS[1]}", end=": ")
    print(f"{long / short:.3f} times")
    print(f"the generator's update takes {100 * update_share(trainer):.2f} % of an adaptation step")


def show(row: SpeedRow) -> None:
    """Progress, as it is measured."""
    print(f"{row.gradient} {row.loss} {row.backend}: {row.ratio:.2f}", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code of the command with these arguments; None: those of this process."""
    keep_freed_memory()  # as meta-training does
    return run_command(run, SpeedSettings, "speed", argv)


if __name__ == "__main__":
    sys.exit(main())
