"""The verdict: its signals and estimates against float64 by hand, its cost, and that no prediction changes by it."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from metaopt.errors import ConfigError
from metaopt.online import OnlineAdapter, Progress, run_stream
from metaopt.policy import AdaptationPolicy
from metaopt.policy.parts.verdict import (
    CELL,
    EDGE,
    EVEN,
    SIGNALS,
    VerdictConfig,
    VerdictPart,
    VerdictState,
    after,
    nothing_seen,
    signals,
)

from ...online.test_progress import scored, stream_for
from ...tiny import BARE, assert_goes_on, random_images, tiny_model, tiny_policy

STREAM = [random_images(8, seed) for seed in range(8)]


def fitted(**config: int) -> VerdictPart:
    """A part that knows something, drawn at random."""
    part, randomness = VerdictPart(VerdictConfig(**config)), torch.Generator().manual_seed(0)
    part.weights = torch.randn(part.weights.shape, generator=randomness)
    part.spread = torch.tensor([0.2, 0.3, 0.25])
    part.temperatures = torch.tensor([2.0, 3.0])
    root = 0.1 * torch.randn(part.leverage.shape, generator=randomness)
    part.leverage = root @ root.mT
    part.between = 0.1 * torch.randn(part.between.shape, generator=randomness)
    return part


WHOLE = math.inf, math.inf
COLD = torch.ones(2)


def seen(adapted: Tensor, source: Tensor | None = None, temperatures: Tensor = COLD) -> VerdictState:
    """The state after one batch, in the type of its logits."""
    return after(nothing_seen(adapted.new_zeros(())), adapted, source, temperatures, WHOLE)


def policy_with(part: VerdictPart | None) -> AdaptationPolicy:
    policy = tiny_policy(tiny_model(), parts=BARE)
    if part is not None:
        policy.parts[part.name] = part
    return policy


def adapter(part: VerdictPart | None = None) -> OnlineAdapter:
    return OnlineAdapter(tiny_model(), policy_with(fitted(every=3, window=20) if part is None else part))


def logits(count: int, seed: int) -> Tensor:
    return 2 * torch.randn(count, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def shares(values: Tensor) -> np.ndarray:
    return np.exp(values.numpy()) / np.exp(values.numpy()).sum(1, keepdims=True)


def test_signals_are_their_equations() -> None:
    state, adapted, source = nothing_seen(torch.zeros((), dtype=torch.float64)), logits(24, 0), logits(24, 1)
    for part in range(3):
        index = slice(8 * part, 8 * part + 8)
        state = after(state, adapted[index], source[index], torch.tensor([2.0, 3.0]).double(), WHOLE)
    p, q = shares(source), shares(adapted)

    def logit(share: float) -> float:
        return math.log(share / (1 - share))

    def uneven(values: np.ndarray) -> float:
        mean = values.mean(0)
        entropy = -(mean * np.log(mean)).sum() / math.log(5)
        chance = (values.var(0) / mean).sum() / (2 * 24 * math.log(5))
        return math.log(max(1 - entropy - chance, 0) + EVEN)

    expected = [logit(1 - shares(source / 3).max(1).mean()), uneven(p), logit(1 - (p * q).sum(1).mean())]
    expected += [logit(1 - shares(adapted / 2).max(1).mean()), uneven(q)]
    assert signals(state).tolist() == pytest.approx(expected, rel=1e-10)


def test_what_lies_behind_the_window_is_forgotten() -> None:
    state = nothing_seen(torch.zeros((), dtype=torch.float64))
    for seed in range(60):
        state = after(state, logits(8, seed) * 0, None, COLD, (32, 32))
    assert float(state.adapted.doubt) == pytest.approx(0.8) and float(state.adapted.images) == 32
    for seed in range(60):
        state = after(state, logits(8, seed) * 100, None, COLD, (32, 32))
    assert float(state.adapted.doubt) < 0.02


def test_even_classes_look_even_whatever_the_number_of_images() -> None:
    source = logits(4000, 3)
    few, many = (
        torch.stack([signals(seen(source[i : i + n], source[i : i + n]))[1].exp() for i in range(0, 4000, n)]).mean()
        for n in (20, 2000)
    )
    assert float(few) == pytest.approx(float(many), abs=0.02)  # uncorrected, 20 images look less even by 0.05


@pytest.mark.parametrize("strange", [1.0, 30.0])
def test_estimates_are_those_of_the_weights(strange: float) -> None:
    part = fitted(every=1)
    part.leverage = strange * part.leverage
    state = nothing_seen(torch.zeros((), dtype=torch.float64))
    for seed in range(40):
        state = after(state, logits(10, seed), logits(10, 100 + seed), part.temperatures, WHOLE)
    found, x = part.verdict(state), np.concatenate([[1.0], signals(state).numpy()])
    assert found is not None and found.images == 400
    z = part.weights.double().numpy() @ x
    h = np.array([x @ form @ x for form in part.leverage.double().numpy()])
    between = part.between.double().numpy() @ x
    reach = 1.96 * np.sqrt(part.spread.double().numpy() ** 2 * (1 + h) + between**2)

    def percent(value: float) -> float:
        return 100 / (1 + math.exp(-value))

    expected = [percent(z[0, 0]), percent(z[0].min() - reach[0]), percent(z[0, 0] + reach[0])]
    expected += [percent(z[1, 0]), percent(z[1].min() - reach[1]), percent(z[1, 0] + reach[1])]
    told = [found.estimated_error, found.low, found.high]
    told += [found.source_estimated_error, found.source_low, found.source_high]
    assert told == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("ahead", "told"), [(0.5, True), (0.4, False), (-0.5, False)])
def test_harm_is_told_beyond_doubt_alone(ahead: float, told: bool) -> None:
    part = fitted()
    for name in ("weights", "leverage", "between"):
        part.get_buffer(name).zero_()
    part.weights[2, 0, 0] = ahead  # against 1.96 * 0.25
    found = part.verdict(seen(logits(400, 0), logits(400, 1)))
    assert found is not None and found.harmful is told
    part.leverage[2, 0, 0] = 1.0
    again = part.verdict(seen(logits(400, 0), logits(400, 1)))
    assert again is not None and not again.harmful


def test_few_images_tell_less() -> None:
    part, widths = fitted(), []
    for name in ("weights", "leverage", "between"):
        part.get_buffer(name).zero_()
    for count in (16, 64, CELL, 4 * CELL):
        found = part.verdict(seen(logits(count, 0).float(), logits(count, 1).float()))
        assert found is not None
        widths.append(found.high - found.low)
    assert widths[0] > widths[1] > widths[2] == widths[3]


def test_no_prediction_and_no_parameter_changes_by_it() -> None:
    judged, plain = adapter(), OnlineAdapter(tiny_model(), policy_with(None))
    for images in STREAM:
        assert torch.equal(judged(images), plain(images))
    assert all(torch.equal(judged.parameters[name], tensor) for name, tensor in plain.parameters.items())
    assert judged.verdict() is not None and plain.verdict() is None


@pytest.mark.parametrize("every", [1, 3, 5])
def test_it_costs_one_forward_pass_in_every_few_batches(every: int) -> None:
    passes: dict[str, int] = {"judged": 0, "plain": 0}
    counted: dict[str, float] = {}
    for name, part in (("judged", fitted(every=every)), ("plain", None)):
        found = OnlineAdapter(tiny_model(), policy_with(part))

        def count(*_: object, name: str = name) -> None:
            passes[name] += 1

        found.model.module.get_submodule("conv1").register_forward_hook(count)
        for images in STREAM:
            found(images)
        counted[name] = found.passes
    assert passes["judged"] - passes["plain"] == math.ceil(len(STREAM) / every)
    assert counted["judged"] - counted["plain"] == 8 * math.ceil(len(STREAM) / every)


def test_a_dial_pays_for_it_and_takes_no_update_for_dearer() -> None:
    updates, prices = [], []
    for part in (fitted(every=2), None):
        found = OnlineAdapter(tiny_model(), policy_with(part), compute=1.5)
        assert found.dial is not None
        prices.append({found.dial.price for images in STREAM if found.step(images).updated})
        updates.append(found.updates)
    assert prices[0] == prices[1] and len(prices[0]) == 1
    assert 0 < updates[0] < updates[1]


def test_a_stopped_run_goes_on_with_it() -> None:
    def made() -> OnlineAdapter:
        return adapter(fitted(every=2, window=20))

    kept: list[dict[str, Any]] = []
    progress = Progress(kept.append, every=1)
    whole = run_stream(made(), stream_for(made()), batch_size=8, progress=progress)
    assert whole.estimates
    for state in kept[:-1]:
        found = made()
        progress = Progress(lambda _: None, resume=state)
        assert scored(run_stream(found, stream_for(found), batch_size=8, progress=progress)) == scored(whole)
    again = made()
    run_stream(again, stream_for(again), batch_size=8)
    assert scored(run_stream(again, stream_for(again), batch_size=8)) == scored(whole)


def test_it_sees_the_source_itself() -> None:
    part, source = fitted(every=1, window=10_000), tiny_model()
    found, p = adapter(part), []
    for images in STREAM:
        found(images)
        with torch.no_grad():
            p.append(source(images).logits.softmax(dim=1))
    state = found.state["verdict"]
    assert torch.allclose(state.source.shares, torch.cat(p).mean(dim=0), atol=1e-6)
    assert float(state.adapted.images) == float(state.source.images) == 64


def test_it_goes_on_from_a_file_and_starts_anew_at_a_reset(tmp_path: Path) -> None:
    whole = adapter()
    for images in STREAM:
        whole(images)
    loaded = assert_goes_on(adapter, STREAM, 5, tmp_path / "adaptation.pt")
    assert loaded.verdict() == whole.verdict()
    loaded.reset()
    assert loaded.verdict() is None
    for images in STREAM:
        loaded(images)
    assert loaded.verdict() == whole.verdict()


def test_policy_file_keeps_what_was_fitted(tmp_path: Path) -> None:
    policy = policy_with(fitted(every=2))
    policy.save(tmp_path / "ckpt.pt")
    found = AdaptationPolicy.load(tmp_path / "ckpt.pt").part("verdict")
    assert found.fitted and found.config == VerdictConfig(every=2)
    assert all(torch.equal(value, found.get_buffer(name)) for name, value in policy.part("verdict").named_buffers())


def test_batch_that_is_not_finite_counts_for_nothing() -> None:
    judged, plain = adapter(), adapter()
    broken = STREAM[1].clone()
    broken[:] = torch.nan
    for images in STREAM[:4]:
        judged(images)
        plain(images)
    judged(broken)
    assert judged.verdict() == plain.verdict()


def test_unfitted_it_says_how_to_fit_it() -> None:
    found = OnlineAdapter(tiny_model(), policy_with(VerdictPart()))
    found(STREAM[0])
    with pytest.raises(ConfigError, match=r"the part verdict has not learned .*; .* metaopt.fit_verdict"):
        found.verdict()


@pytest.mark.parametrize(
    ("values", "message"),
    [({"every": 0}, "verdict.every is 0"), ({"window": 0}, "window is 0"), ({"cells": 4}, "cells is 4")],
)
def test_settings_out_of_range(values: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        VerdictConfig(**values)


def test_state_of_other_classes_is_refused() -> None:
    state = seen(logits(8, 0), logits(8, 1))
    VerdictPart().check_state(state, 5)
    with pytest.raises(ValueError, match="no probabilities of 4 classes"):
        VerdictPart().check_state(state, 4)
    with pytest.raises(ValueError, match="outside of 0 to 1"):
        VerdictPart().check_state(state._replace(disagreement=torch.tensor(7.0)), 5)


def test_sure_predictions_give_finite_estimates() -> None:
    state = seen(logits(8, 0) * 1e4, logits(8, 0) * 1e4)
    assert len(signals(state)) == SIGNALS
    assert signals(state)[[0, 2, 3]].tolist() == pytest.approx([math.log(EDGE / (1 - EDGE))] * 3, rel=1e-4)
    found = fitted().verdict(state)
    assert found is not None and 0 <= found.low <= found.estimated_error <= found.high <= 100
