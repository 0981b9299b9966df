"""A policy on a long stream of small batches, a fault among every hundred: ``python -m tests.soak --batches 100000``.

The same stream is run with and without the faults, in turn, by a ResNet-20 on digits of 8 x 8 pixels; what either
gets wrong is counted on the batches between faults.
"""

import argparse
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from metaopt import MetaTrainConfig, OnlineAdapter, SourceModel, load_source_model, meta_train
from metaopt.data import ImageSet, load_digits, to_bytes, to_float
from metaopt.data.shifts import get_shift, shift_names
from metaopt.data.stream import corrupt
from metaopt.errors import DataError
from metaopt.source_training.training import RECIPES, train_classifier

FAULT_EVERY = 100  # batches, in the mean
STAY = (50, 400)  # batches that a domain lasts
SIZES = (8, 64)  # images a batch


class Fault(NamedTuple):
    """What is handed over in place of a good batch."""

    make: Callable[[Tensor, Tensor], Any]  # of images and labels
    refused: bool = False  # whether it must raise


def _with(value: float, images: Tensor) -> Tensor:
    images = images.clone()
    images[0, 0, 3, 3] = value
    return images


FAULTS: dict[str, Fault] = {
    "NaN pixel": Fault(lambda x, y: _with(float("nan"), x)),
    "infinite pixel": Fault(lambda x, y: _with(float("inf"), x)),
    "pixel of 1e30": Fault(lambda x, y: _with(1e30, x)),
    "NaN images": Fault(lambda x, y: torch.full_like(x, float("nan"))),
    "black images": Fault(lambda x, y: torch.zeros_like(x)),
    "white images": Fault(lambda x, y: torch.ones_like(x)),
    "noise": Fault(lambda x, y: torch.rand_like(x)),
    "one class": Fault(lambda x, y: x[y == y.mode().values]),
    "one image": Fault(lambda x, y: x[:1]),
    "the same image": Fault(lambda x, y: x[:1].expand_as(x)),
    "another size": Fault(lambda x, y: x[..., :7, :7]),
    "bytes": Fault(lambda x, y: to_bytes(x)),
    "doubles": Fault(lambda x, y: x.double()),
    "bytes as floats": Fault(lambda x, y: x * 255, refused=True),
    "normalised": Fault(lambda x, y: (x - 0.45) / 0.2, refused=True),
    "with labels": Fault(lambda x, y: (x, y), refused=True),
    "empty": Fault(lambda x, y: x[:0], refused=True),
    "channels last": Fault(lambda x, y: x.permute(0, 2, 3, 1), refused=True),
}


def small(images: Tensor) -> Tensor:
    """Bytes of a quarter of the size, which is that of the digits before they were drawn larger."""
    return to_bytes(avg_pool2d(to_float(images), 4))


def source_model(epochs: int) -> SourceModel:
    """ResNet-20 for digits of 8 x 8 pixels."""
    torch.manual_seed(0)
    model = load_source_model("cifar_resnet20", num_classes=10)
    source = load_digits().source
    data = ImageSet(small(source.images), source.labels)
    recipe = RECIPES["cifar_resnet20"]
    recipe = recipe if epochs == 0 else type(recipe)(**{**vars(recipe), "epochs": epochs})
    options = {"mean": model.mean, "std": model.std, "generator": torch.Generator().manual_seed(0), "progress": False}
    train_classifier(model.module, data, recipe, channels_last=model.channels_last, **options)
    return model


class Met(NamedTuple):
    """A batch of the stream."""

    images: Tensor
    labels: Tensor
    fault: str | None  # what stands in its place where there are faults


def stream(batches: int, seed: int, fault_every: int) -> Iterator[Met]:
    """Domains in random order, each for a while; batches of random size."""
    draw, clean = random.Random(seed), load_digits().stream
    names = ["clean", *shift_names("test")]
    assert clean.labels is not None
    domains = {
        name: to_float(small(clean.images if name == "clean" else corrupt(clean, get_shift(name), 4.0).images))
        for name in names
    }
    left, name = 0, ""
    for _ in range(batches):
        if left == 0:
            left, name = draw.randint(*STAY), draw.choice(names)
        left -= 1
        chosen = torch.tensor([draw.randrange(len(clean)) for _ in range(draw.randint(*SIZES))])
        fault = draw.choice([*FAULTS]) if draw.random() < 1 / fault_every else None
        yield Met(domains[name][chosen], clean.labels[chosen], fault)


def resident_mib() -> float:
    """Memory of this process that is resident, MiB."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


class Tally:
    """What one adapter got wrong of the batches that both met."""

    def __init__(self) -> None:
        self.wrong = self.images = 0

    def add(self, logits: Tensor, labels: Tensor) -> None:
        self.wrong += int((logits.argmax(dim=1) != labels).sum())
        self.images += len(labels)

    @property
    def error(self) -> float:
        return 100 * self.wrong / max(1, self.images)


class Outcome(NamedTuple):
    """What a soak found."""

    with_faults: list[float]  # error of each tenth, percent
    without: list[float]
    source: list[float]
    resident: list[float]  # MiB after each tenth
    faults: Counter[str]
    events: dict[str, int]


def soak(
    batches: int,
    epochs: int = 0,
    unrolls: int = 20,
    seed: int = 0,
    fault_every: int = FAULT_EVERY,
    report: bool = True,
) -> Outcome:
    """Run it; ``epochs`` of the source's training and ``unrolls`` an epoch of the policy's, 0: the defaults."""
    model = source_model(epochs)
    config = MetaTrainConfig(epochs=5, unrolls=unrolls)
    policy = meta_train(model, to_float(small(load_digits().unlabeled.images)), config=config, quiet=True)
    faulty, calm = OnlineAdapter(model, policy), OnlineAdapter(model, policy)
    outcome = Outcome([], [], [], [], Counter(), {})
    tallies, began = [Tally() for _ in range(3)], time.time()
    for count, met in enumerate(stream(batches, seed, fault_every), start=1):
        if met.fault is None:
            tallies[0].add(faulty(met.images), met.labels)
            tallies[1].add(calm(met.images), met.labels)
            if count % 10 == 0:
                with torch.no_grad():
                    tallies[2].add(model(met.images).logits, met.labels)
        else:
            outcome.faults[met.fault] += 1
            hand_over(faulty, met)
        if count % max(1, batches // 10) == 0:
            for errors, tally in zip(outcome[:3], tallies, strict=True):
                errors.append(tally.error)
            outcome.resident.append(resident_mib())
            tallies = [Tally() for _ in range(3)]
            if report:
                found = f"with faults {outcome[0][-1]:.2f}, without {outcome[1][-1]:.2f}, source {outcome[2][-1]:.2f}"
                print(f"{count} batches, {time.time() - began:.0f} s: {found} %, {resident_mib():.0f} MiB", flush=True)
    outcome.events.update(faulty.events)
    return outcome


def hand_over(adapter: OnlineAdapter, met: Met) -> None:
    """One fault: refused where it must be, answered elsewhere."""
    assert met.fault is not None
    fault = FAULTS[met.fault]
    given = fault.make(met.images, met.labels)
    if not fault.refused:
        assert adapter(given).shape == (len(given), 10), met.fault
        return
    with suppress(DataError):
        adapter(given)
        raise AssertionError(f"{met.fault} was not refused")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    found = soak(arguments.batches, seed=arguments.seed)
    difference = sum(found.with_faults) / 10 - sum(found.without) / 10
    print(f"faults: {sum(found.faults.values())} ({dict(found.faults)})\nevents: {found.events}")
    print(f"with faults {difference:+.2f} points; {found.resident[0]:.0f} MiB, at the end {found.resident[-1]:.0f}")


if __name__ == "__main__":
    main()
