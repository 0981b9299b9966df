"""The arms of a benchmark: which methods run, at which rates and with which policies, and what they scored."""

import csv
import io
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from metaopt.configs.schema import BenchmarkSettings
from metaopt.configs.sections import MethodSection
from metaopt.files import atomic_write_text
from metaopt.measure import closing_table
from metaopt.online import RunReport

EARLY = 5  # batches after which the early error is taken
RIVALS = ("adam", "sgd")  # update rules whose learning rate ``rates`` replaces


@dataclass(frozen=True)
class Arm:
    """A method at a learning rate, with a policy where it uses one, in a setting."""

    method: MethodSection
    policy: str | None  # path
    setting: str

    @property
    def key(self) -> tuple[str, str, float | None, str | None]:
        """Setting, method, rate and policy."""
        return self.setting, self.method.name, self.method.lr, self.policy


def arms(settings: BenchmarkSettings) -> Iterator[Arm]:
    """Every combination of setting, method, rate and policy that makes a difference."""
    for setting in settings.settings:
        for name in settings.methods:
            section = settings.method[name]
            rates = settings.rates if section.update in RIVALS and settings.rates else [section.lr]
            uses_policy = section.needs_policy or (section.update != "none" and section.objective_from_policy)
            policies = [*settings.policy_path] if uses_policy else []
            yield from (
                Arm(replace(section, lr=rate), policy, setting) for rate in rates for policy in policies or [None]
            )


class Results:
    """What the runs scored, on disk after each of them.

    Args:
        path: of the file, with a row for each domain of each run.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows: list[dict[str, Any]] = []
        self._runs: dict[tuple[str, str, float | None, str | None], list[RunReport]] = {}

    def add(self, arm: Arm, seed: int, report: RunReport) -> None:
        """Take in a run and write all rows so far, atomically: a benchmark that is stopped keeps what was complete."""
        self._runs.setdefault(arm.key, []).append(report)
        self._rows.extend(_rows(arm, seed, report))
        file = io.StringIO()
        writer = csv.DictWriter(file, fieldnames=list(self._rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self._rows)
        atomic_write_text(file.getvalue(), self.path)

    def show(self) -> None:
        """A table of mean ± standard deviation over the runs of each arm, and of a method's policies together."""
        groups: dict[tuple[str, str, float | None, str | None], list[RunReport]] = {}
        for setting, method, rate, policy in self._runs:
            same = [key for key in self._runs if key[:3] == (setting, method, rate)]
            groups[setting, method, rate, policy] = self._runs[setting, method, rate, policy]
            if len(same) > 1 and policy == same[-1][3]:
                groups[setting, method, rate, f"all {len(same)}"] = [run for key in same for run in self._runs[key]]
        columns = ["setting", "method", "lr", "policy", "runs", "error %", "ECE %", "held MiB", "step / forward"]
        rows = [
            (setting, method, "-" if rate is None else f"{rate:g}", policy or "-", len(runs), *_figures(runs))
            for (setting, method, rate, policy), runs in groups.items()
        ]
        closing_table("Mean over the corruptions, ± standard deviation over the runs", columns, rows)


def _rows(arm: Arm, seed: int, report: RunReport) -> Iterator[dict[str, Any]]:
    """A row of the file for each domain of a run."""
    setting, method, rate, policy = arm.key
    for domain in report.domains:
        early = domain.cumulative_error
        yield {
            "method": method,
            "policy": policy,
            "lr": rate,
            "setting": setting,
            "seed": seed,
            "corruption": domain.name,
            "severity": domain.severity,
            "images": domain.images,
            "error": domain.error,
            f"error_after_batch_{EARLY}": early[EARLY - 1] if len(early) >= EARLY else None,
            "ece": domain.ece,
            "held_mib": report.held_mib,
            "state_mib": report.state_mib,
            "step_ms_p50": report.step_ms_p50,
            "forward_ms_p50": report.forward_ms_p50,
            "ratio_to_forward": report.ratio_to_forward,
            "nonfinite": report.guard_events.get("nonfinite", 0),
        }


def _figures(runs: Sequence[RunReport]) -> tuple[str, str, str, str]:
    """Error, ECE, held MiB and ratio to forward as the table shows them."""
    return (
        _spread([run.mean_error for run in runs]),
        _spread([run.mean_ece for run in runs]),
        f"{max(run.held_mib for run in runs):.1f}",
        _spread([run.ratio_to_forward for run in runs]),
    )


def _spread(values: Sequence[float | None]) -> str:
    """Mean ± sample standard deviation of what is known."""
    known = [value for value in values if value is not None]
    if len(known) < 2:
        return f"{known[0]:.2f}" if known else "-"
    return f"{statistics.mean(known):.2f} ± {statistics.stdev(known):.2f}"
