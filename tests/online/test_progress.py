"""A run over a stream that is stopped anywhere goes on bit for bit: answers, scores, counters and the adapter."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from metaopt.catalogue import load_method
from metaopt.data import Domain, ImageSet, Stream, to_bytes
from metaopt.errors import CheckpointError
from metaopt.evaluation import Monitor, read_scalars
from metaopt.files import atomic_save, safe_load
from metaopt.online import OnlineAdapter, Progress, RunReport, Stopped, run_stream
from metaopt.policy import build_method

from ..experts.families import build
from ..tiny import random_images, tiny_model
from . import test_memory, test_moase
from .methods import new_adapter

SIZE = 8  # images a batch


def published(name: str, **changes: Any) -> Callable[[], OnlineAdapter]:
    def make() -> OnlineAdapter:
        policy = build_method(load_method(name, **changes))
        policy.prepare(tiny_model(), lambda: random_images(32, seed=5))
        return OnlineAdapter(tiny_model(), policy)

    return make


def with_experts() -> OnlineAdapter:
    model, _ = test_moase.network("vit")
    policy = test_moase.method()
    return OnlineAdapter(model, policy)


ADAPTERS: dict[str, Callable[[], OnlineAdapter]] = {
    **{
        name: lambda name=name: new_adapter(name) for name in ("source", "bn", "tent", "two views", "default with gate")
    },
    **{name: published(name, lr=1e-2) for name in ("sar", "eata", "roid")},
    "cotta": published("cotta", lr=1e-2, parts={"teacher": {"views": 2, "predicts": True, "proximal": 0.0}}),
    "pruned": lambda: test_memory.new_adapter(pruning="single_pass", budget=2.0),
    "moase": with_experts,
}


def stream_for(adapter: OnlineAdapter, seed: int = 0) -> Stream:
    """Two domains of three batches and of two, the last ones short, met twice; the second has no labels."""
    side = 16 if not adapter.policy.part("experts") else build("vit", torch.float32)[1].shape[-1]
    images = [to_bytes(random_images(count, seed + i)) for i, count in enumerate((20, 13))]
    scaled = [torch.nn.functional.interpolate(some.float(), side).round().byte() for some in images]
    labels = torch.arange(20) % adapter.model.num_classes
    first = Domain("a", 5.0, 20, lambda: ImageSet(scaled[0], labels))
    return (first, Domain("b", 3.0, 13, lambda: ImageSet(scaled[1], None))) * 2


def scored(report: RunReport) -> dict[str, Any]:
    """What does not depend on the clock."""
    values = {key: value for key, value in report.summary().items() if "_ms" not in key and "ratio" not in key}
    return {**values, "layers": report.layers, "curves": [domain.cumulative_error for domain in report.domains]}


def run(
    adapter: OnlineAdapter, progress: Progress | None, stop_after: int | None = None, **given: Any
) -> tuple[list[Tensor], RunReport | None]:
    """Logits of each batch that was answered, and the report of a run that came to its end."""
    answers: list[Tensor] = []

    def note(name: str, severity: float, batch: Any, logits: Tensor) -> None:
        answers.append(logits)
        if progress is not None and len(answers) == stop_after:
            progress.stop()

    try:
        given = {"stream": stream_for(adapter), "batch_size": SIZE, "on_batch": note, "progress": progress, **given}
        return answers, run_stream(adapter, **given)
    except Stopped:
        return answers, None


@pytest.mark.parametrize("setting", ["reset", "continual"])
@pytest.mark.parametrize("method", ADAPTERS)
def test_stopped_anywhere_it_goes_on_bit_for_bit(method: str, setting: str, tmp_path: Path) -> None:
    whole = ADAPTERS[method]()
    expected, report = run(whole, None, setting=setting)
    assert report is not None and len(expected) == 10
    # The first batch, one in a domain, its last, that of a pass, and in the second one; few where they take long.
    for cut in (2, 6) if method in ("pruned", "moase", "cotta") else (1, 2, 3, 5, 6, 9):
        found, _ = run(
            ADAPTERS[method](), Progress(lambda state: atomic_save(state, tmp_path / "s.pt")), cut, setting=setting
        )
        assert len(found) == cut
        second = ADAPTERS[method]()
        state = safe_load(tmp_path / "s.pt")
        rest, resumed = run(second, Progress(lambda _: None, resume=state), setting=setting)
        assert resumed is not None and scored(resumed) == scored(report)
        assert len(found + rest) == 10 and all(map(torch.equal, found + rest, expected))
        assert repr(second.state_dict()) == repr(whole.state_dict())
        assert all(torch.equal(second.parameters[name], tensor) for name, tensor in whole.parameters.items())


def test_a_run_may_be_stopped_again_and_again(tmp_path: Path) -> None:
    expected, report = run(new_adapter("default with gate"), None)
    answers: list[Tensor] = []
    state, resumed = None, None
    for _ in expected:
        kept: list[Any] = []
        more, resumed = run(new_adapter("default with gate"), Progress(kept.append, resume=state), 1)
        answers, state = answers + more, kept[-1]
    assert report is not None and resumed is not None and scored(resumed) == scored(report)
    assert len(answers) == 10 and all(map(torch.equal, answers, expected))


@pytest.mark.parametrize(("every", "saved"), [(0, []), (1, [*range(1, 11)]), (4, [1, 4, 8, 10]), (50, [1, 10])])
def test_it_is_saved_every_so_many_batches(every: int, saved: list[int]) -> None:
    steps: list[int] = []
    run(new_adapter("tent"), Progress(lambda state: steps.append(state["steps"]), every))
    assert steps == saved


def test_a_state_that_was_saved_changes_no_more() -> None:
    states: list[Any] = []
    run(
        new_adapter("tent"),
        Progress(lambda state: states.append((state, copy.deepcopy(state))), 1),
        setting="continual",
    )
    assert all(repr(state) == repr(then) for state, then in states)


def test_a_stop_at_the_last_batch_is_the_end() -> None:
    states: list[Any] = []
    answers, report = run(new_adapter("tent"), Progress(states.append), 10)
    assert report is not None and len(answers) == 10
    answers, again = run(new_adapter("tent"), Progress(states.append, resume=states[-1]))
    assert again is not None and scored(again) == scored(report) and answers == []


def test_no_image_of_batches_that_are_behind_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []
    run(new_adapter("tent"), Progress(kept.append), 7)  # in the first domain of the second pass
    adapter = new_adapter("tent")
    step, seen = adapter.step, list[int]()
    monkeypatch.setattr(adapter, "step", lambda images: (seen.append(len(images)), step(images))[1])
    run(adapter, Progress(kept.append, resume=kept[-1]))
    assert seen == [4, 8, 5]
    loads: list[str] = []

    def domain(name: str) -> Domain:
        images = stream_for(adapter)[0].images
        return Domain(name, 5.0, 20, lambda: (loads.append(name), images)[1])

    stream = [domain(name) for name in "abc"]
    run(new_adapter("tent"), Progress(kept.append), 5, stream=stream)
    loads.clear()
    run(new_adapter("tent"), Progress(kept.append, resume=kept[-1]), stream=stream)
    assert set(loads) == {"b", "c"}


def test_times_go_on_and_dry_runs_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []
    run(ADAPTERS["pruned"](), Progress(kept.append), 5)
    adapter = ADAPTERS["pruned"]()
    order: list[str] = []
    for name in ("prepare", "step"):
        call = getattr(adapter, name)
        monkeypatch.setattr(adapter, name, lambda images, name=name, call=call: (order.append(name), call(images))[1])
    run(adapter, Progress(kept.append, 1, kept[-1]))
    assert order[:2] == ["prepare", "step"] and order.count("prepare") == 1
    before, after = (kept[i]["gauges"]["step_ms"] for i in (0, -1))
    assert len(before) == 2 and len(after) == 5 and torch.equal(after[:2], before)


def test_curves_go_on(tmp_path: Path) -> None:
    kept: list[Any] = []
    with Monitor(tmp_path / "whole") as monitor:
        run(new_adapter("tent"), None, monitor=monitor)
    with Monitor(tmp_path / "parts") as monitor:
        run(new_adapter("tent"), Progress(kept.append), 4, monitor=monitor)
    with Monitor(tmp_path / "parts", resume_step=5) as monitor:
        run(new_adapter("tent"), Progress(kept.append, resume=kept[-1]), monitor=monitor)
    for tag in ("error", "entropy", "loss", "activation_mib", "guard/nonfinite"):
        assert read_scalars(tmp_path / "parts", f"online/{tag}") == read_scalars(tmp_path / "whole", f"online/{tag}")


OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "method": ("tent", {}),
    "setting": ("default", {"setting": "continual"}),
    "batch size": ("default", {"batch_size": 7}),
    "seed": ("default", {"seed": 1}),
    "stream": ("default", {"stream": stream_for(new_adapter("source"))[:3]}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_state_of_another_run_is_refused(name: str) -> None:
    kept: list[Any] = []
    run(new_adapter("default"), Progress(kept.append), 2)
    method, given = OTHERS[name]
    with pytest.raises(CheckpointError, match=f"the run to resume had another {name}; allowed is the same one"):
        run(new_adapter(method), Progress(kept.append, resume=kept[-1]), **given)


def test_other_images_or_another_model_are_refused() -> None:
    kept: list[Any] = []
    run(new_adapter("tent"), Progress(kept.append), 4)
    with pytest.raises(CheckpointError, match="the stream has other images than the run to resume met"):
        adapter = new_adapter("tent")
        run(adapter, Progress(kept.append, resume=kept[-1]), stream=stream_for(adapter, seed=7))
    with pytest.raises(CheckpointError, match="had another model"):
        policy = new_adapter("tent").policy
        run(OnlineAdapter(tiny_model(seed=3), policy), Progress(kept.append, resume=kept[-1]))


def test_a_damaged_state_is_refused_in_one_line() -> None:
    kept: list[Any] = []
    run(new_adapter("default"), Progress(kept.append), 4)
    for key in kept[0]:
        for value in (None, {}, "x"):
            if (key, value) in (("cuda_peak_mib", None), ("layers", {})):  # no accelerator, no layers
                continue
            with pytest.raises(CheckpointError) as error:
                run(new_adapter("default"), Progress(kept.append, resume={**kept[0], key: value}))
            assert "\n" not in str(error.value)
        with pytest.raises(CheckpointError):
            missing = {name: value for name, value in kept[0].items() if name != key}
            run(new_adapter("default"), Progress(kept.append, resume=missing))
