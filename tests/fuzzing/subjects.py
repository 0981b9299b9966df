"""Every kind of file that a user hands over: how a good one is written, and what is asked of a damaged one.

Reading it raises a `MetaoptError` of one line, or gives valid values, which `read` asserts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from random import Random

import torch
from safetensors.torch import save_file
from torch import Tensor

from metaopt.data import READERS
from metaopt.meta import MetaTrainer
from metaopt.meta.resume import load_run, save_run
from metaopt.models.weights import load_weights, read_weights
from metaopt.online import OnlineAdapter
from metaopt.policy import AdaptationPolicy, MethodConfig, build_method
from metaopt.policy.untrained import DEFAULT_PARTS

from ..contracts.small_readers import FILES, reader_settings, write_files
from ..tiny import CLASSES, random_images, tiny_config, tiny_model, tiny_net, tiny_policy
from .damage import damaged, resealed, rewritten

Damage = Callable[[bytes, Random], bytes]


@dataclass(frozen=True)
class Subject:
    """One file of a kind."""

    write: Callable[[Path], None]  # good files into a folder
    file: str  # the one that is damaged
    read: Callable[[Path], None]  # the folder; fails where what was read is not valid
    damages: tuple[Damage, ...] = (damaged,)


def read_stream(name: str, folder: Path) -> None:
    """All domains of a reader: images and labels, as many as it said."""
    for domain in READERS[name](**reader_settings(folder)[name]).stream():
        data = domain.images
        assert len(data) == domain.size > 0
        assert data.images.dtype == torch.uint8 and data.images.shape[1] == 3 and data.images.numel() > 0
        assert data.labels is not None and data.labels.shape == (len(data),) and int(data.labels.min()) >= 0


def finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def write_weights(folder: Path) -> None:
    weights = tiny_net(seed=1).state_dict()
    torch.save({"state_dict": weights, "epoch": 3}, folder / "weights.pt")
    torch.save(weights, folder / "old.pt", _use_new_zipfile_serialization=False)
    save_file(weights, folder / "weights.safetensors")


def read_network(file: str, folder: Path) -> None:
    """A network with the weights."""
    net = tiny_net()
    load_weights(net, read_weights(folder / file, net, CLASSES).tensors)
    assert all(map(finite, net.state_dict().values()))


def policy() -> AdaptationPolicy:
    found = tiny_policy(tiny_model(), parts={**DEFAULT_PARTS, "update_gate": True, "pruning": "learned"})
    found.training = {"config": {"selection_shifts": ("gamma",)}, "shifts": ["fog"], "epochs": 3, "selection": [0.5]}
    return found


def write_policy(folder: Path) -> None:
    policy().save(folder / "ckpt.pt")


def read_policy(folder: Path) -> None:
    """A policy that runs on its model."""
    found = AdaptationPolicy.load(folder / "ckpt.pt")
    assert all(map(finite, found.state_dict().values()))
    assert all(isinstance(name, str) for name in found.known_shifts)
    OnlineAdapter(tiny_model(), found)(random_images(4))


def adapter() -> OnlineAdapter:
    parts = {"batch_statistics": 16, "restoration": True, "sample_filter": 1.0, "recovery": 0.0, "teacher": True}
    method = build_method(MethodConfig("mine", update="adam", lr=1e-2, objective={"slr": 1.0}, parts=parts))
    return OnlineAdapter(tiny_model(), method)


def write_adaptation(folder: Path) -> None:
    writing = adapter()
    for seed in range(2):
        writing(random_images(4, seed))
    writing.save(folder / "stream.pt")


def read_adaptation(folder: Path) -> None:
    """An adapter that goes on."""
    reading = adapter()
    reading.load(folder / "stream.pt")
    assert reading.steps >= 0 and all(type(count) is int and count >= 0 for count in reading.events.values())
    assert all(map(finite, reading.parameters.values()))
    reading(random_images(4))  # finite numbers may still be too large to compute with: the guard's matter


@cache
def trainer() -> MetaTrainer:
    return MetaTrainer(tiny_model(), random_images(32), config=tiny_config())


def write_run(folder: Path) -> None:
    save_run(trainer(), trainer().state_dict(), folder / "last.pt")


def read_run(folder: Path) -> None:
    """A meta-training that goes on, from finite weights."""
    load_run(trainer(), folder / "last.pt")
    assert all(map(finite, trainer().policy.state_dict().values())) and trainer().progress.epoch >= 0


SAVED = (damaged, resealed, rewritten)
SUBJECTS: dict[str, Subject] = {
    **{
        f"{name}: {file}": Subject(write_files, file, partial(read_stream, name))
        for name, files in FILES.items()
        for file in files
    },
    "weights": Subject(write_weights, "weights.pt", partial(read_network, "weights.pt"), SAVED),
    "weights of an old torch": Subject(write_weights, "old.pt", partial(read_network, "old.pt")),
    "safetensors": Subject(write_weights, "weights.safetensors", partial(read_network, "weights.safetensors")),
    "policy": Subject(write_policy, "ckpt.pt", read_policy, SAVED),
    "run to resume": Subject(write_run, "last.pt", read_run, SAVED),
    "adaptation": Subject(write_adaptation, "stream.pt", read_adaptation, SAVED),
}
