"""Meta-training as one call on one's own module and images."""

from collections.abc import Sequence

from torch import Tensor, nn

from metaopt.data.images import validate_images
from metaopt.data.shifts import Shift
from metaopt.evaluation import progress
from metaopt.meta.config import MetaTrainConfig
from metaopt.meta.trainer import MetaTrainer
from metaopt.meta.verdict import fit_verdict
from metaopt.models import SourceModel
from metaopt.policy import AdaptationPolicy


def meta_train(
    model: nn.Module,
    images: Tensor,
    shifts: Sequence[str | Shift] | None = None,
    config: MetaTrainConfig | None = None,
    *,
    start: AdaptationPolicy | None = None,
    quiet: bool = False,
) -> AdaptationPolicy:
    """Meta-train an adaptation policy for a pre-trained model.

    Args:
        model: classifier with normalisation layers: a ``SourceModel``, or any module that takes images in [0, 1] (one
            of timm's gets its own normalisation; wrap others in ``SourceModel(module, mean=..., std=...)``). It
            stays as it is.
        images: clean unlabeled images of the source domain, (n, 3, H, W) in [0, 1]; 128 are enough.
        shifts: what deployment may bring: names from ``metaopt.shift_names()``, or shifts of one's own from
            ``metaopt.register_shift``; None: speckle noise, gaussian blur, spatter, saturate, random
            convolution and coloured noise.
        config: settings; None: the defaults.
        start: policy of this model whose learned parts this one begins with; None: as published.
        quiet: show no progress bar.

    Returns:
        The policy, to be saved by ``policy.save("ckpt.pt")`` or deployed by ``OnlineAdapter(model, policy)``.

    Raises:
        ModelError: the model has no normalisation layer that can adapt.
        CheckpointError: ``start`` belongs to another model, or has other settings.
        DataError: the images have the wrong shape, type or range.
    """
    config = config or MetaTrainConfig()
    source = model if isinstance(model, SourceModel) else SourceModel(model)
    trainer = MetaTrainer(
        source, validate_images(images, source.spec.channels).to(source.mean.device), shifts, config, start=start
    )
    with progress(config.total_unrolls, "Meta-training", quiet=quiet) as bar:
        trainer.run(on_unroll=lambda loss: bar.update(loss=loss))
    return finished_policy(trainer, shifts, quiet=quiet)


def finished_policy(
    trainer: MetaTrainer, shifts: Sequence[str | Shift] | None = None, *, quiet: bool = False
) -> AdaptationPolicy:
    """The policy that meta-training gives, with what can only be learned once it is there: the part ``verdict``.

    Args:
        trainer: it has run.
        shifts: what a verdict learns from; None: the configuration's, or its own.
        quiet: show no progress bar.
    """
    policy, config = trainer.best_policy(), trainer.config
    if policy.part("verdict") is not None:
        fit_verdict(
            trainer.model, policy, trainer.images, shifts=shifts or config.shifts, seed=config.seed, quiet=quiet
        )
    return policy
