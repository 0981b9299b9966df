"""What a run shows of the decisions of its parts: bits by domain and layer, and the experts' use."""

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from metaopt.activation_memory import Precision
from metaopt.activation_memory.importance import learning_layers
from metaopt.data import Domain, ImageSet, Stream, to_bytes
from metaopt.evaluation import Monitor
from metaopt.online import OnlineAdapter, run_stream
from metaopt.online import run as module
from metaopt.online.decisions import Decisions, stored_bits
from metaopt.policy.parts.update_gate import UpdateGate, UpdateGateConfig

from ..tiny import random_images
from .test_memory import new_adapter


def stream(sizes: dict[str, int]) -> Stream:
    images = {name: to_bytes(random_images(size, seed)) for seed, (name, size) in enumerate(sizes.items())}
    return tuple(Domain(n, 5.0, len(i), lambda i=i: ImageSet(i, None)) for n, i in images.items())


def run(adapter: OnlineAdapter, monkeypatch: pytest.MonkeyPatch, folder: Path | None = None, setting: str = "reset"):
    """A run over domains of two batches and of one; gives its decisions."""
    made: list[Decisions] = []
    monkeypatch.setattr(module, "Decisions", lambda *given: made.append(Decisions(*given)) or made[-1])
    with Monitor(folder) as monitor:
        run_stream(adapter, stream({"fog": 48, "snow": 24}), batch_size=24, monitor=monitor, setting=setting)
    return made[0]


@pytest.mark.parametrize(
    ("rate", "bits"), [(Precision(4), 4.0), (Precision(32), 32.0), (Precision(3, 0.5), 2.5), (Precision(32, 0), 1.0)]
)
def test_the_mask_of_a_pruned_layer_counts(rate: Precision, bits: float) -> None:
    assert stored_bits(rate) == bits


@pytest.mark.parametrize("setting", ["reset", "continual"])
def test_bits_are_the_mean_over_the_steps_of_a_domain(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, seen = new_adapter(pruning="single_pass", budget=2.0), dict[str, list[dict[str, float]]]()
    log = Decisions.log

    def watched(self: Decisions, domain: str, step: int) -> None:
        seen.setdefault(domain, []).append({r.name: stored_bits(r.precision) for r in self.adapter.memory.layers})
        log(self, domain, step)

    monkeypatch.setattr(Decisions, "log", watched)
    bits = run(adapter, monkeypatch, setting=setting).bits
    assert list(bits) == ["fog", "snow"]
    for domain, steps in seen.items():
        assert set(bits[domain]) == set(learning_layers(adapter.parameters))
        for name, value in bits[domain].items():
            assert value == pytest.approx(sum(step[name] for step in steps) / len(steps))
    assert len({value for row in bits.values() for value in row.values()}) > 1


def test_steps_without_an_update_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = new_adapter()
    adapter.policy.parts["update_gate"] = UpdateGate(UpdateGateConfig(every=2))
    decisions = run(adapter, monkeypatch, setting="continual")
    assert {name: set(row.values()) for name, row in decisions._counts.items()} == {"fog": {1}, "snow": {1}}


def test_nothing_is_shown_where_nothing_is_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    dense = run(new_adapter("dense", None), monkeypatch, tmp_path / "dense")
    assert dense.bits == {} and "policy/bits_by_domain" not in images(tmp_path / "dense")
    run(new_adapter(), monkeypatch, tmp_path / "pruned")
    assert images(tmp_path / "pruned") == ["policy/bits_by_domain"]


def images(folder: Path) -> list[str]:
    return EventAccumulator(str(folder)).Reload().Tags()["images"]
