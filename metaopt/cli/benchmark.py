"""Run methods side by side on the same stream: ``metaopt benchmark --help``."""

import logging
import sys
from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from metaopt.activation_memory import Profiles
from metaopt.cli.assemble import (
    assemble_method,
    check_stream,
    fairness_note,
    load_model,
    take_policy,
    unlabeled_images,
)
from metaopt.cli.command import resolve_device, run_command
from metaopt.cli.settings import BenchmarkSettings
from metaopt.data import arrange
from metaopt.errors import BudgetError
from metaopt.evaluation import Monitor, progress
from metaopt.files import ensure_writable_folder
from metaopt.online import OnlineAdapter, run_stream
from metaopt.online.benchmark import Arm, Key, Results, arms
from metaopt.policy import AdaptationPolicy

_LOG = logging.getLogger(__name__)


def run(settings: BenchmarkSettings) -> None:
    """Run every arm on every seed's stream."""
    device = resolve_device(settings.device)
    policies = {path: AdaptationPolicy.load(path) for path in settings.policy_path}
    streams = {
        seed: arrange(settings.data.stream(seed), settings.stream, seed=seed, batch_size=settings.batch_size)
        for seed in settings.seeds
    }
    out = ensure_writable_folder(settings.out)
    model = load_model(settings.model, settings.source, device)
    images = cache(lambda: unlabeled_images(settings, device))
    policies = {path: take_policy(policy, settings.transfer, model) for path, policy in policies.items()}
    for policy in policies.values():
        policy.check_source(model)
    check_stream(streams[settings.seeds[0]], model, device)
    listed = arms_of(settings)
    mirrored = settings.data.keeps_class_mirrored
    methods = [
        assemble_method(
            arm.method, None if arm.policy is None else policies[arm.policy], model, images, mirrored=mirrored
        )
        for arm in listed
    ]
    profiles: defaultdict[tuple[str, str | None], Profiles] = defaultdict(Profiles)  # by method and policy
    results, left_out = Results(out / "benchmark.csv", settings.stream["name"]), dict[Key, str]()
    with progress(len(listed) * len(streams), "Runs") as bar:
        for seed, stream in streams.items():
            for arm, method in zip(listed, methods, strict=True):
                method.seed = seed  # of what it draws online
                try:
                    report = run_stream(
                        OnlineAdapter(
                            model,
                            method,
                            memory=arm.memory,
                            budget_mib=arm.budget,
                            compute=arm.compute,
                            profiles=profiles[arm.method.name, arm.policy],
                        ),
                        stream,
                        setting=arm.setting,
                        batch_size=settings.batch_size,
                        seed=seed,
                        device=device,
                    )
                except BudgetError as error:  # too little for this rule may be enough for the next
                    left_out[arm.key] = str(error)
                else:
                    results.add(arm, seed, report)
                bar.update()
    results.show()
    for key, reason in left_out.items():
        print(f"left out: {key.method}, {key.memory}: {reason}")
    draw(results, f"{settings.model.name}, {settings.data.name}, batch size {settings.batch_size}", out)
    print(f"each corruption of each run: {results.path}")
    for path, policy in policies.items():
        if note := fairness_note(policy, streams[settings.seeds[0]]):
            print(f"{path}: {note}")


def arms_of(settings: BenchmarkSettings) -> list[Arm]:
    """Every combination of setting, method, rate, policy, allocation and budget that makes a difference."""
    assert settings.memory is not None
    return list(
        arms(
            {name: settings.method[name] for name in settings.methods},
            settings.settings,
            rates=settings.rates,
            policies=settings.policy_path,
            memory=settings.memory,
            budgets=settings.budgets,
            compute=settings.compute,
            allocations=settings.pruning,
        )
    )


def draw(results: Results, title: str, out: Path) -> None:
    """Error against MiB held, where budgets were given: a PNG file, and an image in TensorBoard."""
    picture = results.picture(title)
    if picture is None:
        return
    with Monitor(out) as monitor:
        monitor.figure("benchmark/error_against_held", picture, 0)
    path = out / "error_against_held.png"
    try:
        picture.savefig(path, dpi=150)
    except OSError as error:  # the rows are what counts, and they are written
        _LOG.warning("cannot write '%s' (%s); the benchmark goes on without it", path, error.strerror or error)
    else:
        print(f"error against MiB held: {path}")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code of the command with these arguments; None: those of this process."""
    return run_command(run, BenchmarkSettings, "benchmark", argv)


if __name__ == "__main__":
    sys.exit(main())
