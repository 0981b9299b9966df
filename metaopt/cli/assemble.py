"""From settings to what they name: source model, images, stream, method. Knows the settings, not Hydra."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from metaopt.cli.settings import Common, ModelSettings, SourceSettings, SpeedSettings
from metaopt.data import Stream, generator_for, load_arrays
from metaopt.data.images import to_float
from metaopt.errors import ConfigError, DataError
from metaopt.meta import MetaTrainConfig, fit_verdict
from metaopt.models import SourceModel, load_source_model
from metaopt.policy import AdaptationPolicy, MethodConfig, SourceRecord, build_method, transferred

DIGITS_CLASSES = 10


def load_model(model: ModelSettings, source: SourceSettings, device: torch.device) -> SourceModel:
    """The source model: from its checkpoint, or, without one, trained on the digits (once, then from the cache).

    Raises:
        ConfigError: another class count than the digits have was asked of a model to be trained on them.
        ModelError: the name is unknown, there is no recipe to train it on the digits, or it has no such classes.
        CheckpointError: the checkpoint is of no use for this model.
    """
    if model.checkpoint is not None:
        return load_source_model(
            model.name,
            checkpoint=model.checkpoint,
            num_classes=model.num_classes,
            classes=model.classes,
            device=device,
        )
    if model.num_classes not in (None, DIGITS_CLASSES):
        raise ConfigError(
            f"model.num_classes={model.num_classes} does not go with the digits; allowed is {DIGITS_CLASSES}: leave it "
            "out, or give model.checkpoint"
        )
    from metaopt.source_training import train_digits_source

    found = train_digits_source(model.name, cache_dir=source.cache, device=device)
    if model.classes is None:
        return found
    return SourceModel(found.module, spec=found.spec, classes=model.classes, channels_last=found.channels_last)


def unlabeled_images(settings: Common, device: torch.device) -> Tensor:
    """``n_unlabeled`` clean images of the source domain, (n, 3, H, W) in [0, 1].

    Where the file holds more, a fixed random choice of them, for files are often sorted by class.

    Raises:
        ConfigError: there are no such images.
        DataError: there are fewer, or the file is of no use.
    """
    path, count = settings.source.images, settings.n_unlabeled
    images = (settings.data.clean_images() if path is None else load_arrays(path)).images
    if len(images) < count:
        raise DataError(
            f"{path or settings.data.name} has {len(images)} unlabeled images and n_unlabeled={count}; at least as "
            f"many are needed: set n_unlabeled={len(images)} or give more images"
        )
    if len(images) > count:
        images = images[torch.randperm(len(images), generator=generator_for("unlabeled images"))[:count]]
    return to_float(images, device)


def check_images(model: SourceModel, images: Tensor) -> None:
    """Run the model on one image, before anything is written.

    Args:
        model: source model.
        images: (B, 3, H, W) in [0, 1].

    Raises:
        DataError: images of this size do not go through it.
    """
    try:
        with torch.no_grad():
            model(images[:1])
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"images of {images.shape[2]}x{images.shape[3]} pixels do not go through {model.spec.name} ({reason}); "
            "allowed are sizes that it was built for: resize them"
        ) from error


def check_stream(stream: Stream, model: SourceModel, device: torch.device) -> None:
    """Read the first domain and refuse images or labels that do not go with the model, before anything is written.

    Raises:
        DataError: the labels go beyond the model's classes, or the images cannot be read or are of another size.
    """
    data = stream[0].sources[0].images
    data.check_classes(model.num_classes, kept=model.spec.classes is not None)
    check_images(model, to_float(data.images[:1], device))


def fairness_note(policy: AdaptationPolicy, stream: Stream) -> str:
    """One line that names the stream's corruptions which the policy knows from meta-training; empty where none is."""
    known = sorted({source.name for domain in stream for source in domain.sources} & policy.known_shifts)
    return f"not a fair test of the policy: it was meta-trained or selected on {', '.join(known)}" if known else ""


def meta_train_config(settings: SpeedSettings) -> MetaTrainConfig:
    """Settings of meta-training, with what the data say of mirrored images."""
    if settings.meta.flip is not None:
        return settings.meta
    return replace(settings.meta, flip=settings.data.keeps_class_mirrored)


def assemble_method(
    config: MethodConfig,
    policy: AdaptationPolicy | None,
    model: SourceModel,
    images: Callable[[], Tensor],
    seed: int = 0,
    mirrored: bool | None = None,
) -> AdaptationPolicy:
    """The method that a configuration describes, with what it needs of clean source images.

    Args:
        config: the method.
        policy: meta-trained policy, where one was given.
        model: the one to adapt.
        images: gives clean unlabeled images; called only where the method needs them and no policy brings what it took.
        seed: of what the method draws online.
        mirrored: whether an image's class stays where it is mirrored; None: as in the policy's meta-training.

    Raises:
        ConfigError: the parts do not go together.
    """
    method = build_method(config, policy=policy, seed=seed)
    method.prepare(model, images)
    verdict = method.part("verdict")
    if verdict is not None and not verdict.fitted:
        fit_verdict(model, method, images(), mirrored=mirrored)
    return method


def take_policy(policy: AdaptationPolicy, transfer: str | None, model: SourceModel) -> AdaptationPolicy:
    """The policy as it is, or, where it is transferred, for this model: then a line on each part is printed.

    Args:
        policy: meta-trained.
        transfer: ``generator``, or None.
        model: the one to adapt.
    """
    if transfer is None or policy.source == SourceRecord.of(model):
        return policy
    found, notes = transferred(policy, model)
    assert policy.source is not None
    print(f"transferred from {policy.source.spec.name} to {model.spec.name}:", *notes, sep="\n  ")
    return found
