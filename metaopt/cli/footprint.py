"""Measure how small an adaptation step can get: ``metaopt footprint --help``."""

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from metaopt.cli.assemble import assemble_method, check_images
from metaopt.cli.command import resolve_device, run_command
from metaopt.cli.settings import FootprintSettings
from metaopt.data import generator_for, load_arrays, to_float
from metaopt.errors import DataError
from metaopt.evaluation import closing_table
from metaopt.models import SourceModel, load_source_model
from metaopt.online.footprint import Case, FootprintRow, measure_footprint


def run(settings: FootprintSettings) -> None:
    """Measure every case on one batch of one model."""
    device, section = resolve_device(settings.device), settings.model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)  # of random weights, where there is no checkpoint
        model = load_source_model(
            section.name,
            checkpoint=section.checkpoint,
            num_classes=section.num_classes,
            classes=section.classes,
            device=device,
        )
    images = one_batch(settings, model).to(device)
    check_images(model, images)
    policy = assemble_method(settings.method, None, model, lambda: images)
    cases = [
        *(Case(memory) for memory in ("dense", "exact", "compact")),
        *(Case("compact", bits=bits) for bits in settings.bits),
        *(Case("pruned", budget_mib=budget) for budget in settings.budgets),
    ]
    rows = measure_footprint(model, policy, images, cases, repeats=settings.repeats, on_row=show)
    dense = rows[0].held_mib
    cells = [
        (row.case.name, row.held_mib, f"{dense / row.held_mib:.1f}", f"{row.cosine:.5f}", row.time_ratio)
        for row in rows
    ]
    size = f"{images.shape[2]}x{images.shape[3]}"
    title = f"A step of {settings.method.name} on {section.name}, {len(images)} images of {size}"
    closing_table(title, ["memory", "held MiB", "times less", "cosine to dense", "time to dense"], cells)


def one_batch(settings: FootprintSettings, model: SourceModel) -> Tensor:
    """The first images of the file, or noise of the size that the model takes; (B, 3, H, W) in [0, 1].

    Raises:
        DataError: the file is of no use, or has too few images.
    """
    count = settings.batch_size
    if settings.images is None:
        _, height, width = model.spec.input_size or (3, 224, 224)
        return torch.rand(count, 3, height, width, generator=generator_for("footprint", settings.seed))
    images = load_arrays(settings.images).images
    if len(images) < count:
        raise DataError(
            f"{settings.images} has {len(images)} images and batch_size={count}; at least as many are needed: set "
            f"batch_size={len(images)}"
        )
    return to_float(images[:count], torch.device("cpu"))


def show(row: FootprintRow) -> None:
    """Progress, as it is measured."""
    print(f"{row.case.name}: {row.held_mib:.1f} MiB", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code of the command with these arguments; None: those of this process."""
    return run_command(run, FootprintSettings, "footprint", argv)


if __name__ == "__main__":
    sys.exit(main())
