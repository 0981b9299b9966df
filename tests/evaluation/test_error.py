import numpy
import pytest
import torch

from metaopt.errors import DataError
from metaopt.evaluation import DomainResult, DomainScore


def ece_by_hand(probabilities: numpy.ndarray, labels: numpy.ndarray, bins: int = 15) -> float:
    """Percent; bins closed below and open above, the last one closed, in plain loops."""
    confidence, prediction = probabilities.max(axis=1), probabilities.argmax(axis=1)
    total = 0.0
    for index in range(bins):
        low, high = index / bins, (index + 1) / bins
        inside = (confidence >= low) & ((confidence < high) | (index == bins - 1))
        if inside.any():
            gap = abs((prediction[inside] == labels[inside]).mean() - confidence[inside].mean())
            total += gap * inside.mean()
    return 100.0 * total


def random_batch(images: int = 500, classes: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    logits = 4.0 * torch.randn(images, classes, generator=generator, dtype=torch.float64)
    labels = torch.where(
        torch.rand(images, generator=generator) < 0.6,
        logits.argmax(dim=1),
        torch.randint(classes, (images,), generator=generator),
    )
    return logits, labels


def test_error_and_ece_over_uneven_batches_are_those_of_the_whole():
    logits, labels = random_batch()
    score = DomainScore(10)
    for batch in torch.arange(500).split(64):  # the last batch is short
        score.update(logits[batch], labels[batch])
    result = score.result()
    assert result.images == 500
    assert result.error == pytest.approx(100.0 * (logits.argmax(1) != labels).double().mean().item(), abs=1e-4)
    assert result.ece == pytest.approx(ece_by_hand(logits.softmax(1).numpy(), labels.numpy()), abs=1e-6)


def test_cumulative_error_is_over_all_images_so_far():
    score = DomainScore(2)
    right, wrong = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    score.update(right.repeat(3, 1), torch.zeros(3, dtype=torch.long))
    score.update(wrong, torch.zeros(1, dtype=torch.long))
    assert score.cumulative_error == [0.0, 25.0]
    assert score.result().error == 25.0


def test_without_labels_the_errors_are_none_and_images_are_counted():
    score = DomainScore(3)
    score.update(torch.zeros(7, 3))
    assert score.result() == DomainResult(error=None, ece=None, images=7)
    assert DomainScore(3).result() == DomainResult(error=None, ece=None, images=0)


def test_logits_between_0_and_1_are_still_logits():
    logits = torch.tensor([[0.9, 0.1]] * 4)
    score = DomainScore(2)
    score.update(logits, torch.zeros(4, dtype=torch.long))
    confidence = torch.softmax(logits.double(), dim=1)[0, 0].item()
    assert score.result().ece == pytest.approx(100.0 * (1.0 - confidence), abs=1e-6)


def test_certainty_shares_the_highest_bin():
    """Confidences 1 (wrong) and 0.95 (right) lie in one bin: |0.5 - 0.975|, not 0.5 * 1 + 0.5 * 0.05."""
    logits = torch.tensor([[1000.0, 0.0], [0.95, 0.05]], dtype=torch.float64)
    logits[1] = logits[1].log()
    score = DomainScore(2)
    score.update(logits, torch.tensor([1, 0]))
    assert score.result().ece == pytest.approx(47.5, abs=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rows_without_a_softmax_count_as_wrong(bad: float):
    logits = torch.tensor([[bad, 0.0], [5.0, 0.0]])
    score = DomainScore(2)
    score.update(logits, torch.tensor([0, 0]))
    assert score.result().error == 50.0
    assert score.result().ece is not None


def test_minus_infinity_is_a_class_ruled_out():
    score = DomainScore(3)
    score.update(torch.tensor([[1.0, -float("inf"), 0.0]]), torch.tensor([0]))
    assert score.result().error == 0.0


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (torch.zeros(4, 3), torch.zeros(4, dtype=torch.long), r"logits of shape \(4, 3\)"),
        (torch.zeros(4, 2), torch.zeros(3, dtype=torch.long), r"labels of shape \(3,\) for 4 images"),
        (torch.zeros(4, 2), torch.zeros(4), "labels of type torch.float32"),
        (torch.zeros(2, 2), torch.tensor([0, 2]), "labels from 0 to 2: allowed is 0 to 1"),
        (torch.zeros(2, 2), torch.tensor([-1, 0]), "labels from -1 to 0: allowed is 0 to 1"),
    ],
)
def test_what_does_not_fit_is_refused(logits: torch.Tensor, labels: torch.Tensor, message: str):
    with pytest.raises(DataError, match=message):
        DomainScore(2).update(logits, labels)
