"""What predictions say of the classes in a batch."""

import math
from functools import cache

import torch
from torch import Tensor
from torch.distributions import Binomial

ROUNDS = 50  # of the iteration for the class prior


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
    probabilities = logits.softmax(dim=1)
    probabilities = probabilities[torch.isfinite(probabilities).all(dim=1)]
    if len(probabilities) == 0:
        return 1.0
    entropy = float(torch.special.entr(probabilities.mean(dim=0)).sum())
    return math.exp(entropy - expected_entropy(len(probabilities), logits.shape[1]))


def with_own_prior(logits: Tensor) -> Tensor:
    r"""z + log pi, (B, C), with the class prior pi that is likeliest for the batch, by expectation maximisation.

    Args:
        logits: z, (B, C), of a model whose own prior is even; pi is constant in them, and images with NaN count for
            nothing in it.
    """
    with torch.no_grad():
        probabilities = logits.detach().softmax(dim=1)
        probabilities = probabilities[torch.isfinite(probabilities).all(dim=1)]
        images, classes = probabilities.shape
        prior = logits.new_full((classes,), 1 / classes)
        for _ in range(ROUNDS):
            corrected = probabilities * prior
            corrected = corrected / corrected.sum(dim=1, keepdim=True)
            prior = (corrected.sum(dim=0) + 1 / classes) / (images + 1)
    return logits + prior.log()


def mean_entropy(logits: Tensor) -> float:
    """Of the predictions of a batch, (B, C), in nats; images with NaN count for nothing."""
    return float(torch.special.entr(logits.softmax(dim=1)).sum(dim=1).nanmean())


@cache
def expected_entropy(images: int, classes: int) -> float:
    """E[H_n]: of the shares of n images whose classes are drawn evenly from C, in nats; exact, by the binomial."""
    count = torch.arange(1, images + 1, dtype=torch.float64)
    log_chance = Binomial(images, torch.tensor(1 / classes, dtype=torch.float64)).log_prob(count)
    return float(-(classes * log_chance.exp() * (count / images) * (count / images).log()).sum())
