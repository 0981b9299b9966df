"""From settings to the parts they name: source model, images, stream, method. Knows the settings, not Hydra."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from metaopt.configs.schema import MetaTrainSettings
from metaopt.configs.sections import DataSection, MethodSection, ModelSection, SourceSection
from metaopt.data import Arrays, CifarC, Digits, Stream, generator_for, load_arrays, load_digits
from metaopt.data.images import to_float
from metaopt.errors import ConfigError, DataError
from metaopt.experts import LearnedExpertsConfig, TeacherConfig
from metaopt.generator import GeneratorConfig
from metaopt.inner_loop.unroll import UnrollConfig
from metaopt.meta import MetaTrainConfig, TaskConfig
from metaopt.models import SourceModel, load_source_model
from metaopt.objectives import source_statistics
from metaopt.objectives.registry import get_term
from metaopt.policy import AdaptationPolicy, RestorationConfig, SourceRecord, build_method, transferred
from metaopt.source_training import train_digits_source
from metaopt.types import SourceStatistics

DIGITS_CLASSES = 10


class UsesSourceImages(Protocol):
    """Settings that say where clean unlabeled images come from."""

    data: DataSection
    source: SourceSection
    n_unlabeled: int
    batch_size: int


def load_model(model: ModelSection, source: SourceSection, device: torch.device) -> SourceModel:
    """The source model: from its checkpoint, or, without one, trained on the digits (once, then from the cache).

    Raises:
        ConfigError: another class count than the digits have was asked of a model to be trained on them.
        ModelError: the name is unknown, or there is no recipe to train it on the digits.
        CheckpointError: the checkpoint is of no use for this model.
    """
    if model.checkpoint is not None:
        return load_source_model(model.name, checkpoint=model.checkpoint, num_classes=model.num_classes, device=device)
    if model.num_classes not in (None, DIGITS_CLASSES):
        raise ConfigError(
            f"model.num_classes={model.num_classes} does not go with the digits; allowed is {DIGITS_CLASSES}: leave it "
            "out, or give model.checkpoint"
        )
    return train_digits_source(model.name, cache_dir=source.cache, device=device)


def unlabeled_images(settings: UsesSourceImages, device: torch.device) -> Tensor:
    """``n_unlabeled`` clean images of the source domain, (n, 3, H, W) in [0, 1].

    Where the file holds more, a fixed random choice of them, for files are often sorted by class.

    Raises:
        DataError: there are fewer, or the file is of no use.
    """
    path, count = settings.source.images, settings.n_unlabeled
    images = (load_digits().unlabeled if path is None else load_arrays(path)).images
    if len(images) < count:
        raise DataError(
            f"{path or 'digits'} has {len(images)} unlabeled images and n_unlabeled={count}; at least as many are "
            f"needed: set n_unlabeled={len(images)} or give more images"
        )
    if len(images) > count:
        images = images[torch.randperm(len(images), generator=generator_for("unlabeled images"))[:count]]
    return to_float(images, device)


def build_stream(data: DataSection, seed: int) -> Stream:
    """The stream of shifted images, over again where it is met more than once.

    Raises:
        DataError: a file or a corruption is missing or of no use.
    """
    return [*_one_pass(data, seed)] * data.passes


def _one_pass(data: DataSection, seed: int) -> Stream:
    if data.name == "digits":
        return Digits(data.corruptions, data.severities, data.limit, part=data.part).stream(seed)
    if data.name == "cifar_c":
        assert data.root is not None
        return CifarC(data.corruptions, data.severities, data.limit, root=data.root).stream(seed)
    assert data.images is not None
    paths = {"images": data.images, "labels": data.labels}
    return Arrays(data.corruptions, data.severities, data.limit, **paths).stream(seed)


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
    data = stream[0].images
    data.check_classes(model.num_classes)
    check_images(model, to_float(data.images[:1], device))


def fairness_note(policy: AdaptationPolicy, stream: Stream) -> str:
    """One line that names the stream's corruptions which the policy knows from meta-training; empty where none is."""
    known = sorted({domain.name for domain in stream} & policy.known_shifts)
    return f"not a fair test of the policy: it was meta-trained or selected on {', '.join(known)}" if known else ""


def meta_train_config(settings: MetaTrainSettings) -> MetaTrainConfig:
    """Settings of meta-training in the library's own terms.

    Raises:
        ConfigError: a value is out of range.
    """
    meta, generator = settings.meta, settings.generator
    low, high = meta.strength
    return MetaTrainConfig(
        generator=GeneratorConfig(generator.variant, generator.lr, generator.hidden, generator.clamp),
        objective={name: weight for name, weight in settings.objective.items() if weight != 0},
        tasks=TaskConfig(
            batch_size=settings.batch_size,
            strength=(low, high),
            composed=meta.composed,
            occlusion=meta.occlusion,
            flip=settings.data.name != "digits" if meta.flip is None else meta.flip,
            translate=meta.translate,
            clean_view=meta.clean_view,
        ),
        unroll=UnrollConfig(meta.gradient, meta.truncation, meta.term_steps, meta.noise_price),
        restoration=RestorationConfig() if meta.restoration else None,
        carry=meta.carry if meta.restoration else 0.0,
        prior=meta.prior,
        balance=meta.balance,
        initialization=meta.initialization,
        initialization_lr=meta.initialization_lr,
        experts_lr=meta.experts_lr,
        experts_decay=meta.experts_decay,
        initialization_decay=meta.initialization_decay,
        update_rate=meta.update_rate,
        experts=None if settings.experts is None else LearnedExpertsConfig.from_dict(settings.experts),
        teacher=None if settings.teacher is None else TeacherConfig.from_dict(settings.teacher),
        rates=meta.rates,
        loss=meta.loss,
        tempered=meta.tempered,
        backend=meta.backend,
        steps=meta.steps,
        first_steps=meta.first_steps,
        curriculum=meta.curriculum,
        update_every=meta.update_every,
        epochs=meta.epochs,
        unrolls=meta.unrolls,
        lr=meta.lr,
        schedule=meta.schedule,
        clip_norm=meta.clip_norm,
        shrinkage=meta.shrinkage,
        stride=meta.stride,
        frozen=tuple(meta.frozen),
        only=None if meta.only is None else tuple(meta.only),
        selection_shifts=tuple(meta.selection_shifts),
        selection_tasks=meta.selection_tasks,
        select_best=meta.select_best,
        seed=settings.seed,
    )


def assemble_method(
    section: MethodSection, policy: AdaptationPolicy | None, statistics: Callable[[], SourceStatistics]
) -> AdaptationPolicy:
    """The method that a section describes.

    Args:
        section: the method's settings.
        policy: meta-trained policy, where one was given.
        statistics: computes the source statistics; called only where the method needs them and no policy brings them.

    Raises:
        ConfigError: the parts do not go together.
    """
    needed = _needs_statistics(section, policy)
    return build_method(section.config(), policy=policy, statistics=statistics() if needed else None)


def _needs_statistics(section: MethodSection, policy: AdaptationPolicy | None) -> bool:
    own = policy is None or not (section.objective_from_policy or not any(section.objective.values()))
    if section.update == "none" or not own or (policy is not None and policy.statistics is not None):
        return False
    return any(get_term(name).needs_features for name, weight in section.objective.items() if weight != 0)


def take_policy(
    policy: AdaptationPolicy, transfer: str | None, model: SourceModel, statistics: Callable[[], SourceStatistics]
) -> AdaptationPolicy:
    """The policy as it is, or, where it is transferred, for this model: then a line on each part is printed.

    Args:
        policy: meta-trained.
        transfer: ``generator``, or None.
        model: the one to adapt.
        statistics: as in :func:`assemble_method`.
    """
    if transfer is None or policy.source == SourceRecord.of(model):
        return policy
    found, notes = transferred(policy, model, statistics)
    assert policy.source is not None
    print(f"transferred from {policy.source.spec.name} to {model.spec.name}:", *notes, sep="\n  ")
    return found


def statistics_of(settings: UsesSourceImages, model: SourceModel, device: torch.device) -> SourceStatistics:
    """Source statistics of the model's features over the clean unlabeled images.

    Raises:
        ConfigError: there are no such images.
        DataError: they are of no use.
    """
    if settings.data.name != "digits" and settings.source.images is None:
        raise ConfigError(
            "source.images is not set; the discrepancy compares with features of clean images: set source.images=PATH "
            "to a .npy file of (N, H, W, 3) uint8 images"
        )
    return source_statistics(model, unlabeled_images(settings, device), settings.batch_size)
