"""What predictions say of the classes in a batch."""

import math
from functools import cache

import torch
from torch import Tensor
from torch.distributions import Binomial

ROUNDS = 20  # of the iteration for the class prior: more change no answer


def concentration(shares: Tensor, weight: Tensor) -> Tensor:
    r"""g in [0, 1], (): 1 where all images are of one class, 0 where the classes are even.

    Args:
        shares: of each class in the images before, (C,); empty without any.
        weight: their share of all images, (); the others are taken for one class, the most frequent one.
    """
    if shares.numel() == 0:
        return weight.new_ones(())
    pooled = weight * shares
    pooled[shares.argmax()] += 1 - weight
    even = 1 / len(shares)
    return ((pooled.square().sum() - even) / (1 - even)).clamp(0, 1)


def evenness(logits: Tensor) -> float:
    """Effective classes of a batch's mean prediction, over what as many images of even classes would show.

    Args:
        logits: (B, C); images with NaN count for nothing.
    """
    probabilities = _whole(logits)
    if len(probabilities) == 0:
        return 1.0
    entropy = float(torch.special.entr(probabilities.mean(dim=0)).sum())
    return math.exp(entropy - expected_entropy(len(probabilities), logits.shape[1]))


def with_own_prior(logits: Tensor) -> Tensor:
    r"""z + log pi, (B, C), with the class prior pi that is likeliest for the batch (:func:`own_prior`).

    Args:
        logits: z, (B, C), of a model whose own prior is even; pi is constant in them.
    """
    return logits + own_prior(logits.detach()).log()


def own_prior(logits: Tensor) -> Tensor:
    """The likeliest class prior of a batch, (C,), by expectation maximisation, beside an even one of one image.

    Args:
        logits: (B, C); images with NaN count for nothing.
    """
    probabilities = _whole(logits)
    images, classes = probabilities.shape
    even = 1 / classes
    prior = logits.new_full((classes,), even)
    for _ in range(ROUNDS):
        counts = prior * ((probabilities @ prior).reciprocal() @ probabilities)
        prior = (counts + even) / (images + 1)
    return prior


def uneven(logits: Tensor, certainty: float, dispersion: float = 1.0) -> bool:
    r"""Whether classes are drawn unevenly, by a likelihood ratio test of the likeliest prior against an even one.

    Of even classes, twice the logarithm of the ratio is distributed as :math:`\chi^2` with C - 1 degrees of freedom
    (Wilks, 1938), where there are more images than classes; of fewer images it is smaller, and the test careful.

    Args:
        logits: (B, C); images with NaN count for nothing.
        certainty: the share of batches of even classes that pass for even.
        dispersion: by how much larger than by chance the statistic is of even classes, for the model errs in some.
    """
    classes = logits.shape[1]
    ratio = float((_whole(logits) @ (own_prior(logits) * classes)).log().sum().clamp_min(0)) / dispersion
    # Half of the degrees of freedom and half of the statistic: the arguments of the distribution's incomplete gamma.
    freedom, statistic = torch.tensor([(classes - 1) / 2, ratio], dtype=torch.float64)
    return bool(torch.special.gammainc(freedom, statistic) > certainty)


def leaning(shares: Tensor, logits: Tensor, step: Tensor) -> Tensor:
    """What a model leans to after a batch, (C,): predictions that are divided by it are even in the mean.

    Args:
        shares: before it, (C,); empty: it leaned to nothing.
        logits: (B, C); images with NaN count for nothing.
        step: how far to go to what makes the batch alone even, in [0, 1], ().
    """
    classes = logits.shape[1]
    known = (logits.new_full((classes,), 1 / classes) if shares.numel() == 0 else shares).log()
    left = (logits - known).softmax(dim=1).nanmean(dim=0)
    return (known + step * left.log()).softmax(dim=0)


def _whole(logits: Tensor) -> Tensor:
    """Probabilities of the images without NaN."""
    probabilities = logits.softmax(dim=1)
    return probabilities[torch.isfinite(probabilities).all(dim=1)]


def mean_entropy(logits: Tensor) -> float:
    """Of the predictions of a batch, (B, C), in nats; images with NaN count for nothing."""
    return float(torch.special.entr(logits.softmax(dim=1)).sum(dim=1).nanmean())


@cache
def expected_entropy(images: int, classes: int) -> float:
    """E[H_n]: of the shares of n images whose classes are drawn evenly from C, in nats; exact, by the binomial."""
    count = torch.arange(1, images + 1, dtype=torch.float64)
    log_chance = Binomial(images, torch.tensor(1 / classes, dtype=torch.float64)).log_prob(count)
    return float(-(classes * log_chance.exp() * (count / images) * (count / images).log()).sum())
