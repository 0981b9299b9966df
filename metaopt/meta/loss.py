"""Meta-losses: how good an adapted model is, told without labels.

``clean_teacher`` (default)
    The shift was made by us, so the source model's prediction on the clean view of an image is a free target for the
    adapted model's prediction on the shifted view: cross-entropy between the two.
``unsupervised``
    The next batch's own inner objective, as published (MGG, arXiv 2412.16901).
"""

from torch import Tensor
from torch.nn import functional

from metaopt.errors import ConfigError
from metaopt.inner_loop.unroll import MetaBatch, MetaLoss
from metaopt.types import StepOutput


class CleanTeacher:
    """Cross-entropy of the predictions with the teacher's class probabilities."""

    own_objective = False

    def __call__(self, output: StepOutput, batch: MetaBatch) -> Tensor:
        """Mean over the batch, scalar."""
        assert batch.targets is not None
        return functional.cross_entropy(output.logits, batch.targets)


class Unsupervised:
    """The policy's own objective on the batch."""

    own_objective = True

    def __call__(self, output: StepOutput, batch: MetaBatch) -> Tensor:
        """The inner loss itself, scalar."""
        assert output.loss is not None
        return output.loss


META_LOSSES: dict[str, type[CleanTeacher] | type[Unsupervised]] = {
    "clean_teacher": CleanTeacher,
    "unsupervised": Unsupervised,
}


def build_meta_loss(name: str) -> MetaLoss:
    """The meta-loss of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in META_LOSSES:
        raise ConfigError(f"meta.loss is {name!r}; allowed are {', '.join(META_LOSSES)}: choose one")
    return META_LOSSES[name]()
