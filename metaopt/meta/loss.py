"""Meta-losses: how good an adapted model is, told without labels.

``clean_teacher`` (default)
    The shift was made by us, so the source model's prediction on the clean view of an image is a free target for the
    adapted model's prediction on the shifted view: cross-entropy between the two. Where it is *tempered*, the adapted
    logits are first divided by the temperature that fits them best: objectives that raise confidence would otherwise
    pay for every larger step, although it is the ranking of the classes that decides the error. Temperature scaling is
    that of Guo et al. (ICML 2017); at the best temperature its own derivative is zero, so it counts as a constant.
``unsupervised``
    The next batch's own inner objective, as published (MGG, arXiv 2412.16901).
"""

import torch
from torch import Tensor
from torch.nn import functional

from metaopt.errors import check_one_of
from metaopt.meta.unroll import MetaBatch, MetaLoss
from metaopt.policy.parts.class_balance import class_shares
from metaopt.types import StepOutput

TEMPERATURES = tuple(10 ** (exponent / 20) for exponent in range(-20, 21))  # 0.1 to 10


class CleanTeacher:
    """Cross-entropy of the predictions with the teacher's class probabilities.

    Args:
        tempered: whether the predictions are taken at the temperature that fits the batch best.
        balance: strength with which the policy corrects its predictions towards evenly frequent classes, if it does.
    """

    own_objective = False

    def __init__(self, tempered: bool = False, balance: float | None = None) -> None:
        self.tempered, self.balance = tempered, balance

    def __call__(self, output: StepOutput, batch: MetaBatch) -> Tensor:
        """Mean over the batch, scalar."""
        assert batch.targets is not None
        logits = output.logits
        if self.balance is not None:  # a few images are not balanced: corrected for their own classes instead
            logits = logits + self.balance * class_shares(batch.targets).log()
        if self.tempered:
            logits = logits / best_temperature(logits, batch.targets)
        return functional.cross_entropy(logits, batch.targets)


def best_temperature(logits: Tensor, targets: Tensor) -> Tensor:
    """The temperature among ``TEMPERATURES`` at which the predictions fit best, a constant scalar.

    Args:
        logits: (B, C).
        targets: class probabilities, (B, C).
    """
    temperatures = logits.new_tensor(TEMPERATURES)
    with torch.no_grad():
        scaled = logits / temperatures.view(-1, 1, 1)  # (T, B, C)
        losses = scaled.logsumexp(dim=2).mean(dim=1) - (targets * scaled).sum(dim=2).mean(dim=1)
    return temperatures[losses.argmin()]


class Unsupervised:
    """The policy's own objective on the batch."""

    own_objective = True

    def __call__(self, output: StepOutput, batch: MetaBatch) -> Tensor:
        """The inner loss itself, scalar."""
        assert output.loss is not None
        return output.loss


META_LOSSES = ("clean_teacher", "unsupervised")


def build_meta_loss(name: str, tempered: bool = False, balance: float | None = None) -> MetaLoss:
    """The meta-loss of that name; ``tempered`` and ``balance`` are for ``clean_teacher`` alone.

    Raises:
        ConfigError: there is none.
    """
    check_one_of("meta.loss", name, META_LOSSES)
    return CleanTeacher(tempered, balance) if name == "clean_teacher" else Unsupervised()
