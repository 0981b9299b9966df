"""Runs over streams: what is scored, counted and measured, by independent recomputation."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from metaopt.data import Batch, Domain, ImageSet, Stream, batches, to_bytes
from metaopt.errors import ConfigError, DataError
from metaopt.evaluation import Monitor, read_scalars
from metaopt.models import SourceModel
from metaopt.online import OnlineAdapter, RunReport, gauges, run_stream
from metaopt.online import run as module
from metaopt.policy import AdaptationPolicy, MethodConfig, build_method
from metaopt.policy.parts.restoration import Restoration
from metaopt.policy.parts.update_gate import UpdateGate, UpdateGateConfig

from ..tiny import BARE, TinyNet, random_images, tiny_model, tiny_net, tiny_policy, with_parts

TENT = MethodConfig("tent", update="adam", lr=3e-2, objective={"entropy": 1.0}, parts=dict(BARE))

METHODS: dict[str, Callable[[], AdaptationPolicy]] = {
    "source": lambda: build_method(MethodConfig("source")),
    "bn": lambda: build_method(MethodConfig("bn", parts=dict(BARE))),
    "tent": lambda: build_method(TENT),
    "policy": lambda: tiny_policy(tiny_model()),
}
UPDATING = ("tent", "policy")
SIZES = (40, 27)


def domain(name: str, size: int, seed: int, labelled: bool = True) -> Domain:
    images = to_bytes(random_images(size, seed))
    labels = tiny_model(seed=9)(images / 255).logits.argmax(dim=1) if labelled else None
    return Domain(name, 5.0, size, lambda: ImageSet(images, labels))


def two_domains(labelled: bool = True) -> Stream:
    return tuple(domain(name, size, seed, labelled) for seed, (name, size) in enumerate(zip("ab", SIZES, strict=True)))


def new_adapter(method: str) -> OnlineAdapter:
    return OnlineAdapter(tiny_model(), METHODS[method]())


def scored(report: RunReport) -> dict[str, Any]:
    """What does not depend on the clock."""
    return {key: value for key, value in report.summary().items() if "_ms" not in key and "ratio" not in key}


def by_hand(method: str, setting: str, seed: int = 0) -> tuple[list[float], list[list[float]], Tensor]:
    """Errors of each domain, the same after each batch, and all logits: a loop of its own."""
    adapter, errors, curves, logits = new_adapter(method), [], [], []
    for part in two_domains():
        if setting == "reset":
            adapter = new_adapter(method)
        wrong = seen = 0
        curves.append([])
        for batch in batches(part, 16, seed=seed):
            logits.append(adapter(batch.images))
            assert batch.labels is not None
            wrong += int((logits[-1].argmax(dim=1) != batch.labels).sum())
            seen += len(batch.labels)
            curves[-1].append(100 * wrong / seen)
        errors.append(100 * wrong / seen)
    return errors, curves, torch.cat(logits)


@pytest.mark.parametrize("setting", ["reset", "continual"])
@pytest.mark.parametrize("method", METHODS)
def test_errors_are_those_of_a_loop_by_hand(method: str, setting: str) -> None:
    logits: list[Tensor] = []
    report = run_stream(
        new_adapter(method),
        two_domains(),
        setting=setting,
        batch_size=16,
        on_batch=lambda name, severity, batch, output: logits.append(output),
    )
    errors, curves, expected = by_hand(method, setting)
    assert torch.equal(torch.cat(logits), expected)
    assert [row.error for row in report.domains] == pytest.approx(errors, abs=1e-4)
    assert [row.cumulative_error for row in report.domains] == [pytest.approx(curve, abs=1e-4) for curve in curves]
    assert report.mean_error == pytest.approx(sum(errors) / 2, abs=1e-4)
    assert report.updates == (5 if method in UPDATING else 0)  # 3 + 2 batches, counted across resets
    assert report.guard_events == {"nonfinite": 0}


@pytest.mark.parametrize("method", UPDATING)
def test_settings_differ_from_the_second_domain_on(method: str) -> None:
    reset, continual = (by_hand(method, setting)[2] for setting in ("reset", "continual"))
    assert torch.equal(reset[:40], continual[:40])
    assert not torch.equal(reset[40:], continual[40:])


@pytest.mark.parametrize("setting", ["reset", "continual"])
def test_another_pass_goes_on_where_the_setting_says_so(setting: str) -> None:
    once = run_stream(new_adapter("tent"), two_domains(), setting=setting, batch_size=16)
    assert once.pass_errors == [once.mean_error]
    stream = two_domains()
    report = run_stream(new_adapter("tent"), (*stream, *stream, *stream), setting=setting, batch_size=16)
    assert [part.number for part in report.domains] == [1, 1, 2, 2, 3, 3]
    errors = [part.error for part in report.domains]
    assert report.pass_errors == [pytest.approx(sum(errors[i : i + 2]) / 2) for i in (0, 2, 4)]  # type: ignore[arg-type]
    assert errors[:2] == [part.error for part in once.domains]
    assert (errors[2:4] == errors[:2] == errors[4:]) == (setting == "reset")


def test_the_summary_has_the_promised_fields() -> None:
    report = run_stream(new_adapter("tent"), two_domains(), batch_size=16)
    summary = report.summary()
    promised = (
        "images mean_error mean_ece held_mib step_ms_p50 step_ms_p99 forward_ms_p50 ratio_to_forward "
        "mean_ratio_to_forward updates guard_events domains pass_errors"
    )
    assert set(promised.split()) <= set(summary)
    assert summary["images"] == sum(SIZES)
    assert [set(row) for row in summary["domains"]] == [{"name", "severity", "images", "error", "ece"}] * 2
    assert [(row["name"], row["severity"], row["images"]) for row in summary["domains"]] == [
        ("a", 5.0, 40),
        ("b", 5.0, 27),
    ]
    assert summary["mean_ece"] == pytest.approx(sum(row["ece"] for row in summary["domains"]) / 2)
    assert 0 <= summary["mean_ece"] <= 100


def test_every_method_meets_the_images_in_the_same_order_and_all_of_them() -> None:
    orders = {}
    for method in METHODS:
        met: list[tuple[str, list[int]]] = []

        def note(name: str, severity: float, batch: Batch, logits: Tensor, met: Any = met) -> None:
            met.append((name, batch.index.tolist()))
            assert len(logits) == len(batch.index)

        run_stream(new_adapter(method), two_domains(), batch_size=16, on_batch=note)
        orders[method] = met
    assert all(order == orders["source"] for order in orders.values())
    assert [len(index) for _, index in orders["source"]] == [16, 16, 8, 16, 11]  # the short last batches too
    for name, size in zip("ab", SIZES, strict=True):
        seen = [position for row, index in orders["source"] if row == name for position in index]
        assert sorted(seen) == list(range(size)) and seen != list(range(size))


def test_another_seed_is_another_order() -> None:
    met: list[list[int]] = []
    for seed in (0, 1, 0):
        first: list[list[int]] = []
        run_stream(
            new_adapter("bn"),
            two_domains(),
            seed=seed,
            on_batch=lambda name, severity, batch, logits, first=first: first.append(batch.index.tolist()),
        )
        met.append(first[0])
    assert met[0] == met[2] != met[1]


def test_without_labels_nothing_is_scored_and_all_else_is() -> None:
    unlabeled = run_stream(new_adapter("tent"), two_domains(labelled=False), batch_size=16)
    assert [row.error for row in unlabeled.domains] == [row.ece for row in unlabeled.domains] == [None, None]
    assert unlabeled.mean_error is None and unlabeled.mean_ece is None
    assert unlabeled.images == sum(SIZES) and unlabeled.updates == 5
    assert unlabeled.held_mib > 0


def test_labels_play_no_part_in_adapting() -> None:
    outputs: list[Tensor] = []
    for labelled in (True, False):
        logits: list[Tensor] = []
        run_stream(
            new_adapter("policy"),
            two_domains(labelled),
            on_batch=lambda name, severity, batch, output, logits=logits: logits.append(output),
        )
        outputs.append(torch.cat(logits))
    assert torch.equal(*outputs)


def test_held_memory_is_that_of_the_largest_step() -> None:
    held = {method: run_stream(new_adapter(method), two_domains(), batch_size=16).held_mib for method in METHODS}
    assert held["source"] == held["bn"] == 0
    assert held["tent"] > 0 and held["policy"] > 0
    small, large = (run_stream(new_adapter("tent"), two_domains(), batch_size=size).held_mib for size in (8, 16))
    assert large == pytest.approx(2 * small, rel=0.05)
    parts = two_domains()
    assert run_stream(new_adapter("tent"), parts[::-1], batch_size=40).held_mib == pytest.approx(
        run_stream(new_adapter("tent"), parts, batch_size=40).held_mib, rel=0.01
    )  # the larger batch may come second


def test_held_memory_is_the_most_of_any_step_also_where_a_larger_batch_is_not_updated_on() -> None:
    gated = build_method(replace(TENT, parts={**BARE, "update_gate": {"every": 2}}))
    report = run_stream(OnlineAdapter(tiny_model(), gated), two_domains()[::-1], setting="continual", batch_size=40)
    assert report.updates == 1 and report.held_mib > 0


@pytest.mark.parametrize("memory", ["dense", "pruned"])
def test_held_memory_is_that_of_an_update_also_where_the_first_comes_late_and_alone(memory: str) -> None:
    gate = UpdateGate()
    gate.weights.data, gate.bias.data = torch.tensor([0.0, 0.0, 1.0, 0.0]), torch.tensor(-1.5)  # opens after 4 at rest
    policy = with_parts(build_method(TENT), gate)
    report = run_stream(OnlineAdapter(tiny_model(), policy, memory=memory), [domain("a", 48, 0)], batch_size=8)
    always = run_stream(
        OnlineAdapter(tiny_model(), build_method(TENT), memory=memory), [domain("a", 48, 0)], batch_size=8
    )
    assert report.updates == 1 and report.guard_events["skipped"] == 5
    assert report.held_mib == pytest.approx(always.held_mib, rel=0.01) and report.held_mib > 0
    assert [row.layer for row in report.layers] == [row.layer for row in always.layers] != []


SCALED = [False]


class Growing(TinyNet):
    """Keeps a second map of its input's size for backward once it is told to."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.bn1(self.conv1(x))
        hidden = hidden.sigmoid() if SCALED[0] else hidden
        return self.linear(functional.max_pool2d(self.bn2(self.conv2(hidden.relu())).relu(), 2).flatten(1))


def test_held_memory_that_grows_along_the_stream_is_seen() -> None:
    def grow(*_: Any) -> None:
        SCALED[0] = True

    held = []
    for on_batch in (None, grow):
        SCALED[0] = False
        adapter = OnlineAdapter(SourceModel(Growing()), build_method(TENT))
        report = run_stream(adapter, [domain("a", 8 * (gauges.METER_EVERY + 1), 0)], batch_size=8, on_batch=on_batch)
        held.append(report.held_mib)
    assert held[1] > 1.1 * held[0] > 0


def test_state_memory_is_measured() -> None:
    floats = tiny_net().bn1.num_features * 2 * 3  # bn2 is twice as wide
    stream = 4 * floats + 8  # mean and variance of what enters each channel, and two counters
    state = {method: run_stream(new_adapter(method), two_domains()).state_mib for method in METHODS}
    assert state["source"] == 0 and state["bn"] * 2**20 == stream
    assert state["tent"] * 2**20 == 2 * 4 * floats + 8 + stream
    assert state["policy"] * 2**20 == 74 * 4 * floats + 8 + stream


def test_times_are_of_steps_and_of_plain_forward_passes() -> None:
    report = run_stream(new_adapter("tent"), two_domains(), batch_size=8)
    assert report.step_ms_p50 and report.step_ms_p99 and report.forward_ms_p50 and report.ratio_to_forward
    assert report.step_ms_p99 >= report.step_ms_p50 > 0
    assert report.ratio_to_forward == pytest.approx(report.step_ms_p50 / report.forward_ms_p50)


def test_short_batches_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are compared with forward passes of the same size."""
    adapter = new_adapter("bn")
    sizes: list[int] = []
    step = adapter.step

    class Watch(gauges.Stopwatch):
        def step(self):
            sizes.append(0)
            return super().step()

    adapter.step = lambda images: (sizes.append(len(images)), step(images))[1]  # type: ignore[method-assign]
    monkeypatch.setattr(gauges, "Stopwatch", Watch)
    run_stream(adapter, two_domains(), batch_size=16)
    assert sizes == [16, 0, 16, 8, 0, 16, 11]


def test_two_runs_in_one_process_are_fresh_ones() -> None:
    for method in METHODS:
        adapter = new_adapter(method)
        first = run_stream(adapter, two_domains(), setting="continual", batch_size=16)
        second = run_stream(adapter, two_domains(), setting="continual", batch_size=16)
        fresh = run_stream(new_adapter(method), two_domains(), setting="continual", batch_size=16)
        assert scored(first) == scored(second) == scored(fresh)


@pytest.mark.parametrize("setting", ["reset", "continual"])
def test_guard_events_are_counted_across_domains(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoiling(part: Domain, *args: Any, **kwargs: Any) -> Any:
        for position, batch in enumerate(batches(part, *args, **kwargs)):
            images = batch.images * float("nan") if position == 1 else batch.images
            yield Batch(images, batch.labels, batch.index)

    monkeypatch.setattr(module, "batches", spoiling)
    report = run_stream(new_adapter("policy"), two_domains(), setting=setting, batch_size=16)
    assert report.guard_events == {"nonfinite": 0, "broken_images": 2}
    assert report.updates == 3


def test_double_precision_end_to_end() -> None:
    def adapter() -> OnlineAdapter:
        model = tiny_model(dtype=torch.float64)
        return OnlineAdapter(model, tiny_policy(model))

    outputs: list[Tensor] = []
    report = run_stream(adapter(), two_domains(), on_batch=lambda name, severity, batch, out: outputs.append(out))
    assert {output.dtype for output in outputs} == {torch.float64}
    assert report.mean_error is not None
    single = run_stream(new_adapter("policy"), two_domains())
    assert abs(report.mean_error - (single.mean_error or 0)) < 5


def test_curves_are_written_and_read_back(tmp_path: Path) -> None:
    with Monitor(tmp_path) as monitor:
        report = run_stream(new_adapter("tent"), two_domains(), batch_size=16, monitor=monitor)
    error = read_scalars(tmp_path, "online/error")
    assert [step for step, _ in error] == [1, 2, 3, 4, 5]
    expected = [value for row in report.domains for value in row.cumulative_error]
    assert [value for _, value in error] == pytest.approx(expected, rel=1e-5)
    for tag in ("entropy", "activation_mib", "loss", "guard/nonfinite"):
        assert len(read_scalars(tmp_path, f"online/{tag}")) == 5
    assert read_scalars(tmp_path, "online/activation_mib")[-1][1] == pytest.approx(report.held_mib, rel=1e-5)
    assert read_scalars(tmp_path, "online/step_ms")


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="setting is 'forever'; allowed are reset, continual"):
        run_stream(new_adapter("bn"), two_domains(), setting="forever")
    with pytest.raises(DataError, match="the stream has 0 domains"):
        run_stream(new_adapter("bn"), ())
    for size in (0, -1):
        with pytest.raises(DataError, match=f"batch_size is {size}"):
            run_stream(new_adapter("bn"), two_domains(), batch_size=size)


def test_a_stream_that_shifts_is_told_by_distance_and_count(tmp_path: Path) -> None:
    clean = domain("clean", 64, 1)
    dark = Domain("dark", 5.0, 64, lambda: ImageSet(clean.images.images // 4, clean.images.labels))
    gate = UpdateGate(UpdateGateConfig(every=2))
    policy = with_parts(tiny_policy(tiny_model()), Restoration(), gate)
    with Monitor(tmp_path) as monitor:
        stream = [clean, dark]
        adapter = OnlineAdapter(tiny_model(), policy)
        report = run_stream(adapter, stream, setting="continual", batch_size=16, monitor=monitor)
    distances = [value for _, value in read_scalars(tmp_path, "online/shift_distance")]
    assert len(distances) == 8 and max(range(8), key=distances.__getitem__) == 4 and distances[4] > 6
    assert report.guard_events == {"nonfinite": 0, "restored": 1, "skipped": 4}
    assert report.updates == 4
    assert [value for _, value in read_scalars(tmp_path, "online/guard/restored")] == [0, 0, 0, 0, 1, 1, 1, 1]


def test_a_second_run_of_an_adapter_reports_what_a_fresh_one_does() -> None:
    adapter = new_adapter("policy")
    adapter(torch.full_like(random_images(8), torch.nan))
    for _ in range(4):
        adapter.watch._warn("order", "sorted")
    again, fresh = (run_stream(each, two_domains(), batch_size=16) for each in (adapter, new_adapter("policy")))
    assert (again.guard_events, again.warnings, again.mean_error, again.updates) == (
        fresh.guard_events,
        fresh.warnings,
        fresh.mean_error,
        fresh.updates,
    )
