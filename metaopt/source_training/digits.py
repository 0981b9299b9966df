"""The digits' source models: trained once, then read from a cache."""

import hashlib
import json
import logging
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from metaopt.data.images import ImageSet
from metaopt.data.readers.digits import load_digits
from metaopt.errors import CheckpointError, ModelError
from metaopt.files import atomic_save, ensure_writable_folder, safe_load, weights_sha256
from metaopt.models.registry import load_source_model
from metaopt.models.source_model import SourceModel
from metaopt.source_training.training import RECIPES, train_classifier

_LOG = logging.getLogger(__name__)


def default_cache_dir() -> Path:
    """``$XDG_CACHE_HOME/metaopt``, by default ``~/.cache/metaopt``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "metaopt"


def train_digits_source(
    model_name: str,
    *,
    seed: int = 0,
    cache_dir: str | os.PathLike[str] | None = None,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> SourceModel:
    """The named model, trained on the digits' 1,000 source images, or read from the cache of an earlier call.

    The cache file is named by a hash of all that decides the outcome: model, recipe, seed, images. One that cannot be
    used is trained anew, with a warning in the log. Global random state is left alone.

    Args:
        model_name: one of `metaopt.source_training.training.RECIPES`.
        seed: of the initial weights, the order of images and the augmentation.
        cache_dir: by default `default_cache_dir`.
        device: where to train, and where the model goes.
        progress: show a progress bar while training.

    Raises:
        ModelError: there is no recipe for this model.
        OutputError: the cache folder cannot be written.
    """
    if model_name not in RECIPES:
        raise ModelError(
            f"no training recipe for '{model_name}' on digits; allowed are {', '.join(RECIPES)}: "
            "use one of these or give a checkpoint"
        )
    data = load_digits().source
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # layers draw their initial weights from the global generator
        model = load_source_model(model_name, num_classes=10)
    config = _config(model_name, seed, data, model)
    key = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
    path = Path(cache_dir or default_cache_dir()) / f"digits-{model_name}-{key[:16]}.pt"
    if not _read(path, config, model):
        ensure_writable_folder(path.parent)
        model.to(device)
        train_classifier(
            model.module,
            data,
            RECIPES[model_name],
            mean=model.mean,
            std=model.std,
            generator=torch.Generator().manual_seed(seed),
            channels_last=model.channels_last,
            title=f"training {model_name} on digits",
            progress=progress,
        )
        weights = {name: tensor.cpu() for name, tensor in model.module.state_dict().items()}
        atomic_save({"config": config, "sha256": weights_sha256(weights), "state_dict": weights}, path)
    return model.to(device)


def _config(model_name: str, seed: int, data: ImageSet, model: SourceModel) -> dict[str, Any]:
    """All that decides the outcome of a training, in primitives; the initial weights stand for the architecture."""
    return {
        "model": model_name,
        "recipe": asdict(RECIPES[model_name]),
        "seed": seed,
        "images": weights_sha256({"images": data.images, "labels": data.labels}),
        "initial_weights": model.weights_sha256(),
        "mean": list(model.spec.mean),
        "std": list(model.spec.std),
    }


def _read(path: Path, config: dict[str, Any], model: SourceModel) -> bool:
    """Load the cached weights into ``model``; False, with a warning for a bad file, where there are none of use."""
    if not os.path.exists(path):  # False for a path that cannot be looked at, where Path.exists raises
        return False
    try:
        stored = safe_load(path)
        if not isinstance(stored, dict) or stored.get("config") != config:
            raise CheckpointError(f"'{path}' does not hold what its name says")
        weights = stored.get("state_dict")
        if not isinstance(weights, dict) or weights_sha256(weights) != stored.get("sha256"):
            raise CheckpointError(f"'{path}' holds damaged weights")
        model.module.load_state_dict(weights)
    except Exception as error:  # values of any type can raise nearly anything
        _LOG.warning("training %s again, since its cached weights cannot be used: %s", config["model"], error)
        return False
    return True
