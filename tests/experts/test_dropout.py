"""Spatial differentiable dropout against sorting in plain Python, its limits and its gradients."""

import math

import pytest
import torch
from torch import Tensor

from metaopt.experts.dropout import hard_mask, kept_count, soft_mask, spatial_dropout


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def share(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def kept_by_sorting(row: list[float], count: int, *, largest: bool) -> set[int]:
    """Indices kept, ties going to the lower index."""
    ranked = sorted(range(len(row)), key=lambda index: (-row[index] if largest else row[index], index))
    return set(ranked[:count])


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("kept", [0.01, 0.25, 0.5, 0.77, 1.0])
def test_hard_keeps_exactly_what_sorting_keeps(kept: float, largest: bool) -> None:
    activations = rows(3, 5, 24)
    activations[0] = activations[0].round()  # many ties
    activations[1] = activations[1].relu()
    activations[2, 0] = 1.0
    out = spatial_dropout(activations + 10, share(kept), 1.0 if largest else -1.0)  # + 10: what is kept is not zero
    assert torch.equal(out, spatial_dropout(activations + 10, kept, 1.0 if largest else -1.0))
    count = max(1, math.floor(24 * kept + 1e-9))
    for given, result in zip(activations.flatten(0, 1).tolist(), out.flatten(0, 1), strict=True):
        assert set(result.nonzero().flatten().tolist()) == kept_by_sorting(given, count, largest=largest)
    assert torch.equal(out[out != 0], (activations + 10)[out != 0])


def test_each_row_may_keep_its_own_share_and_end() -> None:
    activations = rows(2, 7, 3, 16) + 10
    shares, signs = torch.tensor([0.25, 0.5, 0.125]), torch.tensor([-1.0, 1.0, -1.0])
    out = spatial_dropout(activations, shares.expand(2, 7, 3), signs)
    for expert, (kept, sign) in enumerate(zip(shares, signs, strict=True)):
        assert torch.equal(out[:, :, expert], spatial_dropout(activations[:, :, expert], kept, float(sign)))
    assert torch.equal((out != 0).sum(-1), torch.tensor([4, 8, 2]).expand(2, 7, 3))


def test_counts_are_whole_also_where_a_share_is_rounded() -> None:
    shares = torch.tensor([1 / 3, 0.29, 1e-6, 1.0, 0.7])
    assert torch.equal(torch.as_tensor(kept_count(300, shares)), torch.tensor([100, 87, 1, 300, 210]))
    assert [kept_count(300, float(share)) for share in shares] == [100, 87, 1, 300, 210]


def test_magnitude_ranks_without_sign() -> None:
    row = torch.tensor([-3.0, 0.1, 2.0, -0.2])
    assert spatial_dropout(row, share(0.5), rank_by="magnitude").tolist() == [-3.0, 0.0, 2.0, 0.0]
    assert torch.allclose(spatial_dropout(row, share(0.5), -1.0, rank_by="magnitude"), row * torch.tensor([0, 1, 0, 1]))


@pytest.mark.parametrize("kept", [0.125, 0.5, 1.0])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_soft_becomes_hard_as_temperature_falls(kept: float, sign: float) -> None:
    activations = rows(6, 16)
    soft = spatial_dropout(activations, share(kept), sign, mode="soft", temperature=1e-4)
    torch.testing.assert_close(soft, spatial_dropout(activations, share(kept), sign), rtol=0, atol=1e-6)


def test_soft_mask_keeps_the_share_in_the_mean() -> None:
    mask = soft_mask(rows(500, 64), share(0.25), 0.02)
    assert float(mask.mean()) == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize("rank_by", ["value", "magnitude"])
@pytest.mark.parametrize("kept", [0.3, 0.5, 0.97])
def test_soft_gradients(kept: float, rank_by: str) -> None:
    activations = rows(3, 8).requires_grad_()
    shares = torch.full((3,), kept, dtype=torch.float64, requires_grad=True)
    signs = torch.tensor([1.0, -1.0, 1.0])

    def function(a: Tensor, q: Tensor) -> Tensor:
        return spatial_dropout(a, q, signs, mode="soft", temperature=0.3, rank_by=rank_by)

    assert torch.autograd.gradcheck(function, (activations, shares))
    assert torch.autograd.gradgradcheck(function, (activations, shares))
    assert torch.autograd.gradcheck(lambda a: function(a, shares.detach()), (activations,))
    assert torch.autograd.gradcheck(lambda q: function(activations.detach(), q), (shares,))


def test_hard_passes_gradients_of_what_is_kept_alone() -> None:
    activations, shares = rows(4, 8).requires_grad_(), share(0.25).requires_grad_()
    out = spatial_dropout(activations, shares)
    (gradient,) = torch.autograd.grad(out.sum(), activations)
    assert torch.equal(gradient, hard_mask(activations, torch.tensor(2)).double())
    assert torch.autograd.grad(out.sum(), shares, allow_unused=True)[0] is None


def test_straight_through_has_the_hard_value_and_the_documented_gradient() -> None:
    activations, shares = rows(4, 8).requires_grad_(), share(0.25).requires_grad_()
    out = spatial_dropout(activations, shares, mode="straight_through", temperature=0.3)
    assert torch.equal(out, spatial_dropout(activations, shares))
    weight = rows(4, 8, seed=1)
    given = torch.autograd.grad((out * weight).sum(), (activations, shares))
    mask = hard_mask(activations, torch.tensor(2))
    soft = soft_mask(activations, shares, 0.3)
    through = torch.autograd.grad((soft * activations.detach() * weight).sum(), (activations, shares))
    torch.testing.assert_close(given[0], mask * weight + through[0])
    torch.testing.assert_close(given[1], through[1])
    assert float(through[1]) != 0


def test_second_order_goes_through_ties_and_zeros() -> None:
    activations = rows(4, 8).relu().requires_grad_()
    shares = share(0.5).requires_grad_()
    out = spatial_dropout(activations, shares, -1.0, mode="straight_through")
    first = torch.autograd.grad(out.square().sum(), (activations, shares), create_graph=True)
    second = torch.autograd.grad(first[0].square().sum() + first[1], activations)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in (*first, *second))


@pytest.mark.parametrize("mode", ["hard", "soft", "straight_through"])
def test_images_that_hold_nan_come_out_as_nan(mode: str) -> None:
    shares = torch.tensor([[0.25, float("nan")]])
    activations = torch.full((3, 2, 8), float("nan"))
    kept = spatial_dropout(activations, shares, mode=mode)
    assert kept.isnan().all()
