"""The commands as functions, and a workspace in which each takes a second."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch

from metaopt.data import load_digits
from metaopt.models import load_source_model
from metaopt.source_training.training import Recipe, train_classifier

ROOT = Path(__file__).resolve().parents[2]

Command = Callable[[list[str]], int]

TINY = ["model.checkpoint=model.pt", "batch_size=8"]
TINY_META = [
    *TINY,
    "n_unlabeled=16",
    "meta.epochs=2",
    "meta.unrolls=2",
    "meta.steps=2",
    "meta.first_steps=1",
    "meta.selection_tasks=1",
    "meta.report_tasks=2",
]
TINY_STREAM = [*TINY, "data.limit=20", "data.corruptions=[fog,contrast]"]


def command(path: str) -> Command:
    """``main`` of a script, as ``python path`` runs it."""
    spec = importlib.util.spec_from_file_location(path.replace("/", "_").removesuffix(".py"), ROOT / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return cast(Command, module.main)


def write_model(path: Path, seed: int = 0) -> None:
    """A ResNet-20 that has seen the digits' training images once: better than chance, in a second."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = load_source_model("cifar_resnet20")
    recipe = Recipe(optimizer="sgd", lr=0.05, epochs=1, max_rotation=0.0)
    data = load_digits().source.take(300)
    generator = torch.Generator().manual_seed(0)
    train_classifier(model.module, data, recipe, mean=model.mean, std=model.std, generator=generator, progress=False)
    torch.save(model.module.state_dict(), path)
