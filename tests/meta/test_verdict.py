"""What the verdict learns from: its regression by hand, intervals that hold, and a fit that is the same for a seed."""

import copy
from functools import cache

import numpy as np
import pytest
import torch

import metaopt
from metaopt.errors import ConfigError
from metaopt.meta import MetaTrainConfig, fit_verdict
from metaopt.meta.verdict_regression import (
    RIDGE,
    Cell,
    calibrated,
    leverage,
    regression,
    ridge,
    sharpened,
    temperature_of,
)
from metaopt.online import OnlineAdapter
from metaopt.policy import AdaptationPolicy, MethodConfig, build_method

from ..tiny import BARE, random_images, tiny_model

IMAGES = random_images(24)


def tent(verdict: bool = True) -> AdaptationPolicy:
    parts = {**BARE, "verdict": {"cells": 20} if verdict else False}
    return build_method(MethodConfig("tent", update="adam", lr=1e-3, objective={"entropy": 1.0}, parts=parts))


@cache
def fitted(seed: int = 0) -> AdaptationPolicy:
    policy = tent()
    fit_verdict(tiny_model(), policy, IMAGES, seed=seed, quiet=True)
    return policy


def synthetic(count: int, images: int, shifts: int, generator: torch.Generator, clean: bool = False) -> list[Cell]:
    """Cells of a world in which models are as unsure as they are wrong, but for what each cell has of its own."""
    found = []
    for index in range(count):
        truth = torch.randint(5, (images,), generator=generator)
        logits = torch.randn(2, images, 5, generator=generator, dtype=torch.float64)
        strength = 6.0 if clean else float(torch.rand((), generator=generator)) * 3
        for model in range(2):
            own = strength * (1 + 0.3 * float(torch.rand((), generator=generator)))
            logits[model, torch.arange(images), truth] += own
        sure = torch.full((images, 5), 1e-5, dtype=torch.float64)
        sure[torch.arange(images), truth] = 1 - 4e-5
        logits *= 3 * torch.randn(2, 1, 1, generator=generator, dtype=torch.float64).mul(0.15).exp()
        found.append(Cell(logits, sure, frozenset({f"shift {index % shifts}"})))
    return found


def test_ridge_is_the_closed_form() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(30, 4, generator=generator).double() * 3 + 1, torch.randn(30, generator=generator).double()
    z = ((x - x.mean(0)) / x.std(0, correction=0)).numpy()
    rows = np.concatenate([z, np.sqrt(RIDGE) * np.eye(4)])
    slope = np.linalg.lstsq(rows, np.concatenate([y.numpy() - y.numpy().mean(), np.zeros(4)]), rcond=None)[0]
    told = ridge(x, y)
    assert torch.allclose(told[0] + x @ told[1:], torch.from_numpy(y.numpy().mean() + z @ slope))


def test_leverage_is_what_a_row_adds_to_the_variance_of_ridge() -> None:
    generator = torch.Generator().manual_seed(1)
    x, rows = (torch.randn(n, 5, generator=generator).double() * torch.arange(1, 6) + 2 for n in (30, 8))
    z, own = (((each - x.mean(0)) / x.std(0, correction=0)).numpy() for each in (x, rows))
    inverse = np.linalg.inv(z.T @ z + RIDGE * np.eye(5))
    ones = torch.cat([torch.ones(8, 1).double(), rows], dim=1)
    told = torch.einsum("ni,ij,nj->n", ones, leverage(x), ones)
    assert told.tolist() == pytest.approx([1 / 30 + row @ inverse @ row for row in own], rel=1e-9)


def test_temperature_is_that_of_the_least_cross_entropy() -> None:
    cells = synthetic(20, 64, 3, torch.Generator().manual_seed(2))
    logits, truth = torch.cat([cell.logits[1] for cell in cells]), torch.cat([cell.truth for cell in cells]).argmax(1)
    best = float(calibrated(cells, 1))
    loss = [float(torch.nn.functional.cross_entropy(logits / t, truth)) for t in (best, best / 1.01, best * 1.01)]
    assert 1 < best < 10 and loss[0] < min(loss[1:])


def test_temperature_brings_the_confidence_asked_for() -> None:
    p = (3 * torch.randn(200, 10, generator=torch.Generator().manual_seed(0))).double().softmax(dim=1)
    for error in (0.05, 0.2, 0.5):
        unsure = 1 - sharpened(p, temperature_of(p, error)).amax(dim=1).mean()
        assert float(unsure) == pytest.approx(error, abs=1e-6)
    assert torch.equal(sharpened(p, 0.0), torch.nn.functional.one_hot(p.argmax(1), 10).double())


def test_intervals_cover_cells_that_nobody_saw() -> None:
    generator = torch.Generator().manual_seed(0)
    told = regression(
        synthetic(80, 256, 9, generator), synthetic(12, 256, 9, generator), synthetic(4, 256, 1, generator, clean=True)
    )
    unseen = synthetic(400, 256, 1, generator)
    x = torch.stack([torch.cat([torch.ones(1), cell.signals(told.temperatures)]) for cell in unseen])
    error = torch.stack([cell.error() for cell in unseen])
    z = torch.einsum("mfk,nk->nmf", told.weights, x)[:, :2]
    widened = told.spread[:2].square() * (1 + torch.einsum("nj,mjk,nk->nm", x, told.leverage[:2], x))
    widened = (widened + (x @ told.between[:2].t()).square()).sqrt()
    low, high = (z.amin(dim=2) - 1.96 * widened).sigmoid(), (z[..., 0] + 1.96 * widened).sigmoid()
    wrong = (error >= 0.25).all(dim=1)  # what the fit learns from
    covered = ((low <= error) & (error <= high))[wrong].double().mean(dim=0)
    assert bool((covered > 0.9).all()), covered
    assert float((z[..., 0].sigmoid() - error).abs().mean()) < 0.05


def test_own_mistakes_of_the_source_count() -> None:
    """Where the source is unsure of its clean images, a prediction that agrees with them is not right for certain."""
    truth = torch.tensor([[0.6, 0.4], [0.99, 0.01]]).double()
    logits = torch.tensor([[[1.0, 0.0], [1.0, 0.0]], [[0.0, 1.0], [0.0, 1.0]]]).double()
    cell = Cell(logits, truth, frozenset())
    assert cell.error().tolist() == [0.0, 1.0]
    assert cell.error(1.0).tolist() == pytest.approx([0.205, 0.795])


def test_fit_is_the_same_for_a_seed_and_changes_nothing_else() -> None:
    model, policy, before = tiny_model(), tent(), tiny_model().state_dict()
    kept = copy.deepcopy(policy.state_dict())
    fit_verdict(model, policy, IMAGES, quiet=True)
    part = policy.part("verdict")
    assert torch.equal(part.weights, fitted().part("verdict").weights)
    assert not torch.equal(part.weights, fitted(1).part("verdict").weights)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert {n for n, t in policy.state_dict().items() if not torch.equal(t, kept[n])} == {
        f"parts.verdict.{name}" for name in ("temperatures", "weights", "between", "spread", "leverage")
    }
    assert "speckle_noise" in policy.known_shifts and not policy.known_shifts & {"fog", "gaussian_noise", "hue"}


def test_fitted_it_gives_a_verdict_at_each_batch() -> None:
    adapter = OnlineAdapter(tiny_model(), fitted())
    for seed in range(3):
        adapter(random_images(8, seed))
        found = adapter.verdict()
        assert found is not None and found.images == 8 * (seed + 1)
        assert 0 < found.low < found.estimated_error < found.high < 100
        assert 0 < found.source_low < found.source_estimated_error < found.source_high < 100


def test_meta_training_fits_it() -> None:
    config = MetaTrainConfig(
        epochs=1,
        unrolls=1,
        steps=2,
        batch_size=8,
        selection_tasks=1,
        report_tasks=0,
        parts={**BARE, "verdict": {"cells": 8}},
    )
    policy = metaopt.meta_train(tiny_model(), IMAGES, ["gaussian_blur", "gamma"], config, quiet=True)
    assert policy.part("verdict").fitted and {"gaussian_blur", "gamma"} == set(policy.training["verdict_shifts"])


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (lambda: tent(verdict=False), "has no part verdict"),
        (lambda: build_method(MethodConfig("bn", parts={**BARE, "verdict": True})), "'bn' never updates"),
    ],
)
def test_methods_without_anything_to_judge_are_refused(policy, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fit_verdict(tiny_model(), policy(), IMAGES, quiet=True)
