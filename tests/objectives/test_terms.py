"""Each term against a float64 numpy oracle, at its known values, and its derivatives."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from metaopt.errors import ConfigError
from metaopt.objectives.consistency import view_consistency
from metaopt.objectives.discrepancy import biased_std, feature_discrepancy
from metaopt.objectives.diversity import negative_mean_entropy
from metaopt.objectives.entropy import softmax_entropy
from metaopt.objectives.filtered import filtered_entropy
from metaopt.objectives.slr import soft_likelihood_ratio
from metaopt.objectives.teacher import teacher_cross_entropy
from metaopt.types import SourceStatistics

LOGIT_TERMS = [softmax_entropy, filtered_entropy, soft_likelihood_ratio, negative_mean_entropy]


def random_logits(samples: int = 7, classes: int = 5, scale: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return scale * torch.randn(samples, classes, generator=generator, dtype=torch.float64)


def numpy_softmax(logits: Tensor) -> np.ndarray:
    exponentials = np.exp(logits.numpy() - logits.numpy().max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def logits_of(*probabilities: float) -> Tensor:
    return torch.tensor([probabilities], dtype=torch.float64).log()


def random_features(samples: int = 6, widths: tuple[int, ...] = (4, 3)) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(samples, width, generator=generator, dtype=torch.float64) for width in widths)


def random_statistics(widths: tuple[int, ...] = (4, 3)) -> SourceStatistics:
    generator = torch.Generator().manual_seed(2)
    mean = tuple(torch.randn(width, generator=generator, dtype=torch.float64) for width in widths)
    std = tuple(torch.rand(width, generator=generator, dtype=torch.float64) + 0.5 for width in widths)
    return SourceStatistics(mean, std)


def test_entropy_matches_numpy() -> None:
    logits = random_logits()
    p = numpy_softmax(logits)
    np.testing.assert_allclose(softmax_entropy(logits), -(p * np.log(p)).sum(axis=1), rtol=1e-12)


def test_entropy_gradient_matches_its_closed_form() -> None:
    logits = random_logits().requires_grad_()
    entropy = softmax_entropy(logits)
    (gradient,) = torch.autograd.grad(entropy.sum(), logits)
    p = torch.softmax(logits.detach(), dim=1)
    expected = -p * (p.log() + entropy.detach()[:, None])
    torch.testing.assert_close(gradient, expected, rtol=1e-11, atol=1e-13)


def test_slr_matches_numpy_with_both_arguments_clamped() -> None:
    logits = random_logits(samples=40, scale=8.0)
    p = numpy_softmax(logits)
    assert ((p < 1e-5) | (p > 1 - 1e-5)).any(), "the case must reach the clamp"
    odds = np.log(np.clip(p, 1e-5, 1 - 1e-5)) - np.log(np.clip(1 - p, 1e-5, 1 - 1e-5))
    np.testing.assert_allclose(soft_likelihood_ratio(logits), -(p * odds).sum(axis=1), rtol=1e-9)


def test_slr_is_the_ratio_of_each_class_to_all_others() -> None:
    # ROID writes it as −Σ p_c log(p_c / Σ_{j≠c} p_j).
    p = (0.7, 0.2, 0.1)
    by_hand = -(0.7 * math.log(0.7 / 0.3) + 0.2 * math.log(0.2 / 0.8) + 0.1 * math.log(0.1 / 0.9))
    assert soft_likelihood_ratio(logits_of(*p)).item() == pytest.approx(by_hand, rel=1e-12)


@pytest.mark.parametrize(
    ("probabilities", "expected"),
    [
        ((0.5, 0.5), 0.0),
        ((0.8, 0.2), -0.6 * math.log(4.0)),
        ((0.25, 0.25, 0.25, 0.25), math.log(3.0)),
        ((1.0, 0.0), -math.log(99999.0)),  # both logarithms at their clamp: (1 − 1e-5) / 1e-5
    ],
)
def test_slr_at_known_values(probabilities: tuple[float, ...], expected: float) -> None:
    assert soft_likelihood_ratio(logits_of(*probabilities)).item() == pytest.approx(expected, abs=1e-12)


def test_slr_still_pulls_where_the_entropy_has_let_go() -> None:
    gradients = {}
    for term in (softmax_entropy, soft_likelihood_ratio):
        logits = torch.tensor([[0.0, 8.0]], dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(term(logits).sum(), logits)
        gradients[term] = gradient.norm()
    # With two classes SLR is −z·tanh(z/2) in the gap z, of slope about −1.
    assert gradients[soft_likelihood_ratio] > 1.0
    assert gradients[softmax_entropy] < 0.01


def test_diversity_matches_numpy() -> None:
    logits = random_logits()
    mean = numpy_softmax(logits).mean(axis=0)
    np.testing.assert_allclose(negative_mean_entropy(logits), (mean * np.log(mean)).sum(), rtol=1e-12)


def test_diversity_at_known_values() -> None:
    spread = 60.0 * torch.eye(4, dtype=torch.float64)
    assert negative_mean_entropy(spread).item() == pytest.approx(-math.log(4.0), abs=1e-12)
    collapsed = spread[:1].expand(4, 4)
    assert negative_mean_entropy(collapsed).item() == pytest.approx(0.0, abs=1e-12)


def test_descending_diversity_raises_the_entropy_of_the_mean_prediction() -> None:
    logits = random_logits().requires_grad_()

    def mean_entropy(at: Tensor) -> float:
        p = torch.softmax(at.detach(), dim=1).mean(dim=0)
        return -(p * p.log()).sum().item()

    (gradient,) = torch.autograd.grad(negative_mean_entropy(logits), logits)
    assert mean_entropy(logits - 0.1 * gradient) > mean_entropy(logits)


def test_discrepancy_matches_numpy() -> None:
    features, statistics = random_features(), random_statistics()
    total = 0.0
    for block, mean, std in zip(features, statistics.mean, statistics.std, strict=True):
        total += ((block.numpy().mean(axis=0) - mean.numpy()) ** 2).sum()
        total += ((block.numpy().std(axis=0, ddof=0) - std.numpy()) ** 2).sum()
    assert feature_discrepancy(features, statistics).item() == pytest.approx(total * 12 / 2, rel=1e-12)


def test_discrepancy_of_the_source_with_itself_is_zero() -> None:
    features = random_features()
    statistics = SourceStatistics(
        tuple(block.mean(dim=0) for block in features), tuple(block.std(dim=0, correction=0) for block in features)
    )
    assert feature_discrepancy(features, statistics).item() == pytest.approx(0.0, abs=1e-28)


def test_discrepancy_does_not_grow_with_depth() -> None:
    features, statistics = random_features(), random_statistics()
    doubled = SourceStatistics(statistics.mean * 2, statistics.std * 2)
    shallow = feature_discrepancy(features, statistics)
    torch.testing.assert_close(feature_discrepancy(features * 2, doubled), shallow, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("term", LOGIT_TERMS)
def test_logit_terms_have_right_first_and_second_derivatives(term) -> None:
    logits = random_logits(samples=3, classes=4, scale=1.0).requires_grad_()
    assert gradcheck(term, (logits,))
    assert gradgradcheck(term, (logits,))


def test_slr_has_right_derivatives_beyond_the_clamp() -> None:
    logits = torch.tensor([[0.0, 14.0, 1.0]], dtype=torch.float64, requires_grad=True)  # p < 1e-5 in two classes
    assert gradcheck(soft_likelihood_ratio, (logits,), atol=1e-8, eps=1e-4)
    assert gradgradcheck(soft_likelihood_ratio, (logits,), atol=1e-8, eps=1e-4)


def test_discrepancy_has_right_first_and_second_derivatives() -> None:
    statistics = random_statistics()
    features = tuple(block.requires_grad_() for block in random_features(samples=3))

    def term(*blocks: Tensor) -> Tensor:
        return feature_discrepancy(blocks, statistics)

    assert gradcheck(term, features)
    assert gradgradcheck(term, features)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("constant", [0.0, 0.1, 13.7, -123.456, 1e-25])
@pytest.mark.parametrize("samples", [1, 6, 7, 33, 64, 200])
def test_std_of_a_constant_feature_is_zero_and_so_are_its_derivatives(
    dtype: torch.dtype, constant: float, samples: int
) -> None:
    features = torch.full((samples, 1), constant, dtype=dtype, requires_grad=True)
    std = biased_std(features)
    (first,) = torch.autograd.grad((std - 1.0).square().sum(), features, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum() + first.sum(), features)
    assert std.item() == 0.0
    assert not first.any()
    assert not second.any()


def test_a_feature_that_varies_by_rounding_alone_counts_as_constant() -> None:
    features = torch.full((6, 1), 13.7)
    features[::2] = torch.nextafter(features[::2], torch.tensor(torch.inf))
    features.requires_grad_()
    assert features.detach().unique().numel() == 2
    (gradient,) = torch.autograd.grad((biased_std(features) - 1.0).square().sum(), features)
    assert not gradient.any()


@pytest.mark.parametrize("spread", [1e-22, 1e-20, 1e-15, 1e-9, 1e-4])
def test_std_of_an_almost_constant_feature_has_finite_derivatives(spread: float) -> None:
    features = (spread * torch.tensor([[1.0], [-1.0], [0.5]])).requires_grad_()
    (first,) = torch.autograd.grad((biased_std(features) - 1.0).square().sum(), features, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum() + first[0].sum(), features)
    assert torch.isfinite(first).all()
    assert torch.isfinite(second).all()


def test_one_constant_feature_leaves_the_others_gradient_alone() -> None:
    block = random_features(widths=(3,))[0]
    statistics = random_statistics(widths=(3,))
    dead = block.clone()
    dead[:, 1] = 0.25
    gradients = []
    for features in (block, dead):
        features = features.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(feature_discrepancy((features,), statistics), features)
        gradients.append(gradient[:, [0, 2]])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0.0, atol=0.0)


@pytest.mark.parametrize(
    ("features", "statistics", "message"),
    [
        (random_features(), None, r"no source statistics.*source\.images="),
        ((), random_statistics(), r"0 feature blocks.*features=True"),
        (random_features(), random_statistics(widths=(4,)), r"widths \[4, 3\] .* \[4\].*another model"),
        (random_features(), random_statistics(widths=(4, 2)), r"widths \[4, 3\] .* \[4, 2\].*another model"),
    ],
)
def test_discrepancy_refuses_what_it_cannot_compare(features, statistics, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        feature_discrepancy(features, statistics)


def test_filtered_entropy_matches_numpy_over_the_samples_that_pass() -> None:
    logits = random_logits(samples=40, scale=4.0)
    p = numpy_softmax(logits)
    entropy, margin = -(p * np.log(p)).sum(axis=1), 0.4 * math.log(5)
    certain = entropy[entropy < margin]
    assert 0 < len(certain) < 40
    expected = (np.exp(margin - certain) * certain).mean()
    assert filtered_entropy(logits).mean().item() == pytest.approx(expected, rel=1e-12)
    assert ((filtered_entropy(logits) > 0).numpy() == (entropy < margin)).all()


def test_the_gradient_of_filtered_entropy_takes_its_weights_for_constants() -> None:
    logits = random_logits(samples=40, scale=4.0).requires_grad_()
    (gradient,) = torch.autograd.grad(filtered_entropy(logits).mean(), logits)
    entropy = softmax_entropy(logits)
    passes = entropy.detach() < 0.4 * math.log(5)
    weight = (0.4 * math.log(5) - entropy.detach()).exp() * passes / passes.sum()
    (expected,) = torch.autograd.grad((weight * entropy).sum(), logits)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=0.0)


def test_filtered_entropy_of_nothing_but_uncertain_samples_is_zero() -> None:
    logits = torch.zeros(3, 5, requires_grad=True)
    (gradient,) = torch.autograd.grad(filtered_entropy(logits).mean(), logits)
    assert torch.equal(filtered_entropy(logits), torch.zeros(3)) and torch.equal(gradient, torch.zeros(3, 5))


def test_consistency_matches_numpy_and_both_views_learn() -> None:
    logits, view = random_logits().requires_grad_(), random_logits().flip(0).requires_grad_()
    p, q = numpy_softmax(logits.detach()), numpy_softmax(view.detach())
    values = view_consistency(logits, view)
    np.testing.assert_allclose(values.detach(), -0.05 * (p * np.log(q)).sum(axis=1), rtol=1e-12)
    assert gradcheck(view_consistency, (logits, view)) and gradgradcheck(view_consistency, (logits, view))
    (slope,) = torch.autograd.grad(values.sum(), view)
    np.testing.assert_allclose(slope, 0.05 * (q - p), rtol=1e-10, atol=1e-16)


def test_consistency_without_a_view_is_answered_with_how_to_give_it() -> None:
    with pytest.raises(ConfigError, match=r"'consistency' got no logits of an augmented view.*view_logits"):
        view_consistency(random_logits(), None)


def test_teacher_cross_entropy_is_torchs_and_the_teacher_is_a_constant() -> None:
    logits, target = random_logits().requires_grad_(), random_logits().flip(0).requires_grad_()
    values = teacher_cross_entropy(logits, target)
    torch.testing.assert_close(values, torch.nn.functional.cross_entropy(logits, target.softmax(1), reduction="none"))
    assert torch.autograd.grad(values.sum(), target, allow_unused=True)[0] is None
    with pytest.raises(ConfigError, match=r"'teacher' got no logits of a teacher.*parts.teacher"):
        teacher_cross_entropy(logits, None)
