"""The arms of a benchmark: which methods run, at which rates and with which policies, and what they scored."""

import csv
import io
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from metaopt.activation_memory import DEFAULT_ALLOCATION
from metaopt.evaluation import closing_table, curves_figure
from metaopt.files import atomic_write_text
from metaopt.online import RunReport
from metaopt.policy import MethodConfig
from metaopt.registry import RULES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EARLY = 5  # batches after which the early error is taken


@dataclass(frozen=True)
class Arm:
    """A method at a learning rate, with a policy where it uses one, in a setting, and how activations are kept."""

    method: MethodConfig
    policy: str | None  # path
    setting: str
    memory: str = "dense"
    budget: float | None = None  # MiB
    compute: float | None = None  # forward passes a batch

    @property
    def allocation(self) -> str | None:
        """What chooses what is kept; None where nothing does."""
        pruning = self.method.parts.get("pruning")
        name = pruning.get("allocation") if isinstance(pruning, Mapping) else pruning
        default = "policy" if self.method.inherit else DEFAULT_ALLOCATION
        return None if self.memory != "pruned" else name if isinstance(name, str) else default

    @property
    def key(self) -> "Key":
        """What tells this arm from the others."""
        kept = self.memory if self.allocation is None else f"{self.memory} ({self.allocation})"
        return Key(self.setting, self.method.name, self.method.lr, self.policy, kept, self.budget, self.compute)


class Key(NamedTuple):
    """What tells an arm from the others, and its runs' place in the table."""

    setting: str
    method: str
    rate: float | None
    policy: str | None
    memory: str  # with the rule, where one chooses
    budget: float | None
    compute: float | None


def arms(
    methods: Mapping[str, MethodConfig],
    settings: Sequence[str],
    *,
    rates: Sequence[float] = (),
    policies: Sequence[str] = (),
    memory: str = "dense",
    budgets: Sequence[float] = (),
    compute: Sequence[float] = (),
    allocations: Sequence[str] = (),
) -> Iterator[Arm]:
    """Every combination that makes a difference.

    Args:
        methods: by name.
        settings: "reset", "continual".
        rates: learning rates of every method with a hand-made rule; none: its own.
        policies: paths, for every method that uses one.
        memory: of every method that updates.
        budgets: MiB, of every method that updates.
        compute: forward passes a batch, of every method that updates.
        allocations: what chooses what is kept, where memory is pruned; none: the method's own.
    """
    for setting in settings:
        for method in methods.values():
            own_rates = rates if method.update in RULES and rates else [method.lr]
            own_policies = policies if method.needs_policy or method.takes_objective else []
            own_memory = "dense" if method.update == "none" else memory
            chosen = allocations if own_memory == "pruned" and allocations else [method.parts.get("pruning")]
            updates = method.update != "none"
            own_budgets = budgets if updates and (own_memory != "dense" or not any(budgets)) and budgets else [None]
            own_compute = compute if updates and compute else [None]
            yield from (
                Arm(_changed(method, rate, allocation), policy, setting, own_memory, budget, forwards)
                for rate in own_rates
                for policy in own_policies or [None]
                for allocation in chosen
                for budget in own_budgets
                for forwards in own_compute
            )


def _changed(method: MethodConfig, rate: float | None, allocation: Any) -> MethodConfig:
    parts = dict(method.parts) if allocation is None else {**method.parts, "pruning": allocation}
    return replace(method, lr=rate, parts=parts)


class Results:
    """What the runs scored, on disk after each of them.

    Args:
        path: of the file, with a row for each domain of each run.
        stream: name of the arrangement that all runs met.
    """

    def __init__(self, path: Path, stream: str = "shuffled") -> None:
        self.path, self.stream = path, stream
        self._rows: list[dict[str, Any]] = []
        self._runs: dict[Key, list[RunReport]] = {}

    def add(self, arm: Arm, seed: int, report: RunReport) -> None:
        """Take in a run and write all rows so far, atomically: a benchmark that is stopped keeps what was complete."""
        self._runs.setdefault(arm.key, []).append(report)
        self._rows.extend(_rows(arm, self.stream, seed, report))
        file = io.StringIO()
        writer = csv.DictWriter(file, fieldnames=list(self._rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self._rows)
        atomic_write_text(file.getvalue(), self.path)

    def show(self) -> None:
        """A table of mean ± standard deviation over the runs of each arm, and of a method's policies together."""
        groups: dict[Key, list[RunReport]] = {}
        for key, runs in self._runs.items():
            same = [other for other in self._runs if other._replace(policy=None) == key._replace(policy=None)]
            groups[key] = runs
            if len(same) > 1 and key == same[-1]:
                groups[key._replace(policy=f"all {len(same)}")] = [run for other in same for run in self._runs[other]]
        columns = ["setting", "method", "lr", "policy", "memory", "budget", "compute", "runs"]
        rows = [
            (
                key.setting,
                key.method,
                "-" if key.rate is None else f"{key.rate:g}",
                key.policy or "-",
                key.memory,
                "-" if key.budget is None else f"{key.budget:g}",
                "-" if key.compute is None else f"{key.compute:g}",
                len(runs),
                *_figures(runs),
            )
            for key, runs in groups.items()
        ]
        columns += ["error %", "ECE %", "held MiB", "step / forward", "in the mean", "forwards"]
        if any(len(run.pass_errors) > 1 for runs in groups.values() for run in runs):
            columns.append("error by pass")
            rows = [(*row, _by_pass(runs)) for row, runs in zip(rows, groups.values(), strict=True)]
        met = "" if self.stream == "shuffled" else f", stream {self.stream}"
        closing_table(f"Mean over the corruptions{met}, ± standard deviation over the runs", columns, rows)

    def curves(self) -> dict[str, list[tuple[float, float]]]:
        """Points (held MiB, error in percent) of each way of choosing what is kept, over its budgets."""
        several = len({key[:4] for key in self._runs if key.budget is not None}) > 1
        curves: dict[str, list[tuple[float, float]]] = {}
        for key, runs in self._runs.items():
            errors = [run.mean_error for run in runs if run.mean_error is not None]
            if key.budget is not None and errors:
                parts = [part for part in key[:4] if part is not None] if several else []
                name = " ".join([*map(str, parts), key.memory])
                held = max(run.held_mib for run in runs)
                curves.setdefault(name, []).append((held, statistics.mean(errors)))
        return curves

    def picture(self, title: str) -> "Figure | None":
        """Error against MiB held, a curve for each way of choosing; None where no budget was given."""
        curves = self.curves()
        return curves_figure(curves, title, "held for backward, MiB", "error, %") if curves else None


def _rows(arm: Arm, stream: str, seed: int, report: RunReport) -> Iterator[dict[str, Any]]:
    """A row of the file for each domain of a run."""
    key = arm.key
    for domain in report.domains:
        early = domain.cumulative_error
        yield {
            "method": key.method,
            "policy": key.policy,
            "lr": key.rate,
            "setting": key.setting,
            "stream": stream,
            "memory": arm.memory,
            "pruning": arm.allocation,
            "budget_mib": arm.budget,
            "compute": arm.compute,
            "seed": seed,
            "pass": domain.number,
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
            "mean_ratio_to_forward": report.mean_ratio_to_forward,
            "mean_forwards": report.mean_forwards,
            "updates": report.updates,
            "nonfinite": report.guard_events.get("nonfinite", 0),
        }


def _figures(runs: Sequence[RunReport]) -> tuple[str, str, str, str, str, str]:
    """Error, ECE, held MiB, both ratios to forward and forward passes counted, as the table shows them."""
    return (
        _spread([run.mean_error for run in runs]),
        _spread([run.mean_ece for run in runs]),
        f"{max(run.held_mib for run in runs):.1f}",
        _spread([run.ratio_to_forward for run in runs]),
        _spread([run.mean_ratio_to_forward for run in runs]),
        _spread([run.mean_forwards for run in runs]),
    )


def _by_pass(runs: Sequence[RunReport]) -> str:
    """Mean error of each pass through the stream."""
    return ", ".join(_spread(errors) for errors in zip(*(run.pass_errors for run in runs), strict=True))


def _spread(values: Sequence[float | None]) -> str:
    """Mean ± sample standard deviation of what is known."""
    known = [value for value in values if value is not None]
    if len(known) < 2:
        return f"{known[0]:.2f}" if known else "-"
    return f"{statistics.mean(known):.2f} ± {statistics.stdev(known):.2f}"
