"""How small an adaptation step can get: for each way of keeping activations, bytes held, the gradient, and time.

One step is a forward pass, the loss and the backward pass to the adapted tensors; the update itself keeps nothing.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from metaopt.activation_memory import ActivationMemory, Allocation, MemoryConfig, Precision, SavedActivations
from metaopt.evaluation import MemoryMeter
from metaopt.evaluation.timing import synchronize
from metaopt.models import SourceModel
from metaopt.optimizers.update import gradients_of
from metaopt.parameters import detached, flatten, own_values
from metaopt.policy import AdaptationPolicy
from metaopt.policy.step import loss_of
from metaopt.policy.without_step import evaluate_on
from metaopt.types import Parameters


@dataclass(frozen=True)
class Case:
    """One way of keeping activations."""

    memory: str
    bits: int | None = None  # of every layer, with ``compact``; None: its default
    budget_mib: float | None = None  # with ``pruned``: an allocation chooses

    @property
    def name(self) -> str:
        """How a table calls it."""
        bits = "" if self.bits is None else f", {self.bits} bits"
        return f"{self.memory}{bits}" + ("" if self.budget_mib is None else f", budget {self.budget_mib:g} MiB")


@dataclass(frozen=True)
class FootprintRow:
    """What a case costs."""

    case: Case
    held_mib: float  # most bytes held at once, over the whole step
    cosine: float  # of the whole gradient with the dense one's
    time_ratio: float  # to the dense step: median of pairs in turn


def measure_footprint(
    model: SourceModel,
    policy: AdaptationPolicy,
    images: Tensor,
    cases: Sequence[Case],
    *,
    repeats: int = 5,
    on_row: Callable[[FootprintRow], None] | None = None,
) -> list[FootprintRow]:
    """Measure each case against the dense step on the same batch.

    Args:
        model: source model.
        policy: gives the loss, and the pruning rule of cases with a budget.
        images: one batch, (B, 3, H, W) in [0, 1].
        cases: what to measure.
        repeats: pairs of a dense step and the case's, in turn, after one that warms up.
        on_row: called after each row.

    Raises:
        ConfigError: a budget is below the smallest possible one.
    """
    model = policy.attach(model)
    model.requires_grad_(False)
    leaves = detached(own_values(model, policy.layout(model).names))
    dense = _Step(model, policy, leaves, Case("dense"))
    truth = flatten(dense(images)).double()
    rows = []
    for case in cases:
        step = _Step(model, policy, leaves, case)
        step(images)  # a rule learns from it what the layers' gradients are
        with MemoryMeter([*leaves.values(), images], model=model) as meter:
            gradient = flatten(step(images)).double()
        cosine = torch.nn.functional.cosine_similarity(gradient, truth, dim=0).item()
        pairs = [(_timed(step, images), _timed(dense, images)) for _ in range(repeats)]
        ratio = median(own / plain for own, plain in pairs)
        rows.append(FootprintRow(case, meter.peak_mib, cosine, ratio))
        if on_row is not None:
            on_row(rows[-1])
    return rows


class _Step:
    """The gradient of one step in one case; remembers what its pruning rule does."""

    def __init__(self, model: SourceModel, policy: AdaptationPolicy, leaves: Parameters, case: Case) -> None:
        self.model, self.policy, self.leaves, self.case = model, policy, leaves, case
        pruning = policy.part("pruning")
        allocation: Allocation | None = None if pruning is None else pruning.allocation
        self.memory = ActivationMemory(MemoryConfig(case.memory, case.budget_mib), allocation)
        self.state = None if self.memory.allocation is None else self.memory.allocation.init(leaves)

    def __call__(self, images: Tensor) -> Parameters:
        with self._kept(images):
            return gradients_of(self._loss(images), self.leaves)

    def _loss(self, images: Tensor) -> Tensor:
        with torch.enable_grad():
            return loss_of(evaluate_on(self.policy, self.model, self.leaves, images))

    @contextmanager
    def _kept(self, images: Tensor) -> Iterator[None]:
        if self.case.bits is not None:
            with SavedActivations(self.model, memory=self.case.memory, default=Precision(bits=self.case.bits)):
                yield
            return
        with self.memory.step(self.model, self._loss, self.leaves, self.state, images) as kept:
            yield
        self.state = kept.state


def _timed(step: _Step, images: Tensor) -> float:
    """Seconds of one step."""
    synchronize(images.device)
    start = time.perf_counter()
    step(images)
    synchronize(images.device)
    return time.perf_counter() - start
