"""Train a source model on the embedded digits: ``metaopt source --help``."""

import sys
from collections.abc import Sequence

from metaopt.allocator import keep_freed_memory
from metaopt.cli.command import resolve_device, run_command
from metaopt.cli.settings import DigitsModelSettings
from metaopt.data import Digits
from metaopt.errors import ConfigError
from metaopt.evaluation import closing_table
from metaopt.files import ensure_writable_folder
from metaopt.online import OnlineAdapter, run_stream
from metaopt.policy import MethodConfig, build_method
from metaopt.source_training import train_digits_source


def run(settings: DigitsModelSettings) -> None:
    """Train, or read from the cache, and score on the held-out digits."""
    if settings.model.checkpoint is not None:
        raise ConfigError("model.checkpoint has no use here; this command trains the model: leave it out")
    device = resolve_device(settings.device)
    cache = ensure_writable_folder(settings.cache)
    model = train_digits_source(settings.model.name, seed=settings.seed, cache_dir=cache, device=device)
    method = build_method(MethodConfig("source"))
    report = run_stream(OnlineAdapter(model, method), Digits(corruptions=[]).stream(), device=device)
    rows = [(settings.model.name, report.images, report.mean_error, report.mean_ece)]
    closing_table(f"Held-out digits, weights in {cache}", ["model", "images", "error %", "ECE %"], rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code of the command with these arguments; None: those of this process."""
    keep_freed_memory()
    return run_command(run, DigitsModelSettings, "source", argv)


if __name__ == "__main__":
    sys.exit(main())
