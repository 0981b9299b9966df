"""What a run over a stream gives: scores of its domains, memory, times and counts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from metaopt.data import Domain
from metaopt.evaluation import DomainScore
from metaopt.online.layers import LayerMemory


@dataclass
class DomainReport:
    """One domain's score; errors in percent, None without labels."""

    name: str
    severity: float
    images: int
    error: float | None
    ece: float | None
    cumulative_error: list[float] = field(default_factory=list)  # after each batch
    number: int = 1  # of the pass through the stream, or of the visit to the domain
    verdict: dict[str, float] | None = None  # fields of the `Verdict` at its end; None: the method gives none


@dataclass
class RunReport:
    """What a run over a stream gives; times in milliseconds, memory in MiB, errors in percent."""

    domains: list[DomainReport]
    held_mib: float
    state_mib: float
    cuda_peak_mib: float | None
    step_ms_p50: float | None
    step_ms_p99: float | None
    forward_ms_p50: float | None
    ratio_to_forward: float | None  # of the medians
    mean_ratio_to_forward: float | None  # of the means, where some steps update and others do not
    mean_forwards: float | None  # counted: what the compute dial bounds; None before any image
    updates: int
    guard_events: dict[str, int]
    layers: list[LayerMemory] = field(default_factory=list)  # of the metered step
    warnings: list[str] = field(default_factory=list)  # what the stream does not seem to be, a line each

    @property
    def images(self) -> int:
        """Number of images met."""
        return sum(domain.images for domain in self.domains)

    @property
    def mean_error(self) -> float | None:
        """Mean over the domains."""
        return _mean([domain.error for domain in self.domains])

    @property
    def mean_ece(self) -> float | None:
        """Mean over the domains."""
        return _mean([domain.ece for domain in self.domains])

    @property
    def estimates(self) -> dict[str, Any]:
        """Estimated errors with their 95 % intervals, means over the domains; empty where the method gives none."""
        found = [domain.verdict for domain in self.domains if domain.verdict is not None]
        if not found:
            return {}
        mean = {name: sum(each[name] for each in found) / len(found) for name in found[0]}
        return _estimates(mean)

    @property
    def pass_errors(self) -> list[float | None]:
        """Mean over the domains of each pass through the stream."""
        last = max((domain.number for domain in self.domains), default=0)
        return [_mean([d.error for d in self.domains if d.number == number]) for number in range(1, last + 1)]

    def summary(self) -> dict[str, Any]:
        """The fields of ``summary.json`` that a run knows."""
        return {
            "images": self.images,
            "mean_error": self.mean_error,
            "mean_ece": self.mean_ece,
            **self.estimates,
            "pass_errors": self.pass_errors,
            "held_mib": self.held_mib,
            "state_mib": self.state_mib,
            "cuda_peak_mib": self.cuda_peak_mib,
            "step_ms_p50": self.step_ms_p50,
            "step_ms_p99": self.step_ms_p99,
            "forward_ms_p50": self.forward_ms_p50,
            "ratio_to_forward": self.ratio_to_forward,
            "mean_ratio_to_forward": self.mean_ratio_to_forward,
            "mean_forwards": self.mean_forwards,
            "updates": self.updates,
            "guard_events": self.guard_events,
            "warnings": self.warnings,
            "domains": [
                {"name": d.name, "severity": d.severity, "images": d.images, "error": d.error, "ece": d.ece}
                | ({} if d.verdict is None else _estimates(d.verdict))
                for d in self.domains
            ],
        }


def domain_reports(
    domain: Domain, score: DomainScore, shares: Sequence[DomainScore], passes_before: int
) -> list[DomainReport]:
    """The report of a domain that has been met, or, where it is made of several, of each of these.

    Args:
        domain: the one that was met.
        score: of all its images.
        shares: of the images of each of its sources; empty where there is one.
        passes_before: passes that were behind when the stream began anew; visits count from there.
    """
    scored = [*zip(domain.sources, shares, strict=True)] if shares else [(domain, score)]
    found = []
    for each, own in scored:
        result, curve = own.result(), list(own.cumulative_error)
        if result.images or each is domain:  # of few images, chance may leave a source none
            about = each.name, each.severity, result.images, result.error, result.ece, curve
            found.append(DomainReport(*about, passes_before + each.visit))
    return found


def domains_to_dict(domains: Sequence[DomainReport]) -> dict[str, Any]:
    """Reports as tensors and primitives; the errors after each batch, which are many, as one tensor."""
    rows = [{**vars(domain), "cumulative_error": len(domain.cumulative_error)} for domain in domains]
    curves = [value for domain in domains for value in domain.cumulative_error]
    return {"rows": rows, "curves": torch.tensor(curves, dtype=torch.float64)}


def domains_from_dict(values: Mapping[str, Any]) -> list[DomainReport]:
    """Inverse of :func:`domains_to_dict`."""
    curves = values["curves"].split([row["cumulative_error"] for row in values["rows"]])
    return [
        DomainReport(**{**row, "cumulative_error": curve.tolist()})
        for row, curve in zip(values["rows"], curves, strict=True)
    ]


def _estimates(verdict: Mapping[str, float]) -> dict[str, Any]:
    """The fields of a verdict as ``summary.json`` calls them."""
    return {
        "estimated_error": verdict["estimated_error"],
        "estimated_interval": [verdict["low"], verdict["high"]],
        "source_estimated_error": verdict["source_estimated_error"],
        "source_estimated_interval": [verdict["source_low"], verdict["source_high"]],
    }


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
