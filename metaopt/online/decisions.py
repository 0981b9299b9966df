"""What a method's parts decide along a stream, by domain: bits of each layer's activations, and use of the experts."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy

from metaopt.activation_memory import LayerRecord, Precision
from metaopt.activation_memory.importance import learning_layers
from metaopt.evaluation import Monitor
from metaopt.experts import ExpertUsage
from metaopt.experts.adapter import get_experts
from metaopt.online.adapter import OnlineAdapter

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Decisions:
    """Watches an adapter along a stream; curves after each step, pictures at the end."""

    def __init__(self, adapter: OnlineAdapter, monitor: Monitor) -> None:
        self.adapter, self.monitor = adapter, monitor
        self.usage = None if adapter.policy.part("experts") is None else ExpertUsage()
        self._totals: defaultdict[str, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
        self._counts: defaultdict[str, Counter[str]] = defaultdict(Counter)  # domain -> layer -> how many were summed
        self._seen = adapter.memory.layers  # at the latest log: each update makes new ones

    def watching(self, domain: str) -> AbstractContextManager[None]:
        """Inside it, what the gates of experts decide counts for this domain."""
        return nullcontext() if self.usage is None else self.usage.recording(self.adapter.model, domain)

    def log(self, domain: str, step: int) -> None:
        """Curves of the latest step; precisions count where that step updated."""
        adapter, monitor = self.adapter, self.monitor
        if adapter.memory.config.chooses:
            updated, self._seen = adapter.memory.layers is not self._seen, adapter.memory.layers
            for record in adapter.memory.layers:
                monitor.scalar(f"policy/keep_ratio/{record.name}", record.precision.keep, step)
                monitor.scalar(f"policy/bits/{record.name}", record.precision.bits, step)
            if updated:
                self._count(domain)
        if self.usage is not None:
            for name, weight in self.usage.by_expert(adapter.model, domain).items():
                monitor.scalar(f"policy/expert_usage/{name}", weight, step)

    def state_dict(self) -> dict[str, Any]:
        """What was decided so far, the latest step's layers included: tensors and primitives."""
        return {
            "totals": {domain: dict(own) for domain, own in self._totals.items()},
            "counts": {domain: dict(own) for domain, own in self._counts.items()},
            "layers": [asdict(record) for record in self.adapter.memory.layers],
            "usage": None if self.usage is None else self.usage.state_dict(),
        }

    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        for domain, own in values["totals"].items():
            self._totals[domain].update(own)
            self._counts[domain].update(values["counts"][domain])
        self.adapter.memory.layers = self._seen = [
            LayerRecord(**{**record, "precision": Precision(**record["precision"])}) for record in values["layers"]
        ]
        if self.usage is not None:
            self.usage.load_state_dict(values["usage"])

    def _count(self, domain: str) -> None:
        learning = learning_layers(self.adapter.parameters)
        for record in self.adapter.memory.layers:
            if record.name in learning and record.numel:
                self._totals[domain][record.name] += stored_bits(record.precision)
                self._counts[domain][record.name] += 1

    @property
    def bits(self) -> dict[str, dict[str, float]]:
        """Mean bits that are stored of an entry, by domain and adapted layer; empty where nothing chooses them."""
        return {
            domain: {name: total / self._counts[domain][name] for name, total in totals.items()}
            for domain, totals in self._totals.items()
        }

    def show(self, step: int) -> None:
        """Pictures of what was decided: ``policy/bits_by_domain`` and ``policy/expert_usage_by_domain``."""
        if self._totals:
            self.monitor.figure("policy/bits_by_domain", bits_figure(self.bits), step)
        if self.usage is not None and self.usage.domains:
            figure = self.usage.figure(get_experts(self.adapter.model))
            self.monitor.figure("policy/expert_usage_by_domain", figure, step)


def stored_bits(precision: Precision) -> float:
    """Bits stored of an entry on average, the mask of a pruned layer included."""
    return float(precision.bits) if precision.keep == 1.0 else precision.bits * precision.keep + 1.0


def bits_figure(bits: Mapping[str, Mapping[str, float]]) -> "Figure":
    """Domains against layers in forward order, the bits that are stored of an entry as colour."""
    from matplotlib.figure import Figure

    layers: Sequence[str] = list(dict.fromkeys(name for row in bits.values() for name in row))
    values = numpy.array([[row.get(name, numpy.nan) for name in layers] for row in bits.values()])
    figure = Figure(figsize=(2.5 + 0.22 * len(layers), 1.8 + 0.25 * len(values)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(values, aspect="auto", cmap="viridis")
    axes.set_xticks(range(len(layers)), layers, rotation=90, fontsize=7)
    axes.set_yticks(range(len(values)), list(bits), fontsize=8)
    axes.set_title("Bits stored of an entry, by layer")
    figure.colorbar(image)
    return figure
