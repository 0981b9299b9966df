"""How the steps of one deployment keep their activations: the mode, the allocation and the budget, around each step.

``dense``   torch as it is.
``exact``   what backward does not need is not kept; gradients are equal up to rounding.
``compact`` everything that is kept is coded; with a budget, at the bits that it allows.
``pruned``  bits and keep ratio of each layer by the allocation, under the budget.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from metaopt.activation_memory.allocation import Allocation, AllocationState, build_allocation
from metaopt.activation_memory.budget import best_uniform, too_small
from metaopt.activation_memory.importance import gradient_importance, learning_layers
from metaopt.activation_memory.layer_table import LayerTable
from metaopt.activation_memory.profile import Pass, Profiles
from metaopt.activation_memory.saved_activations import LayerRecord, SavedActivations
from metaopt.data.seeding import generator_for
from metaopt.errors import BudgetError, ConfigError, check_positive
from metaopt.evaluation.meter import MIB
from metaopt.types import Parameters

MEMORIES = ("dense", "exact", "compact", "pruned")
DEFAULT_ALLOCATION = "rate_distortion"


@dataclass(frozen=True)
class MemoryConfig:
    """What is kept for backward, and how much of it."""

    memory: str = "dense"
    budget_mib: float | None = None  # bounds all that is held for backward at once; None: no bound

    def __post_init__(self) -> None:
        """Check the mode, the budget, and that they go together."""
        if self.memory not in MEMORIES:
            raise ConfigError(f"memory is {self.memory!r}; allowed are {', '.join(MEMORIES)}: choose one")
        budget = self.budget_mib
        if budget is None:
            return
        check_positive("budget_mib", budget, "64, or 0 in deployment for forward passes alone")
        if self.memory in ("dense", "exact"):
            raise ConfigError(
                f"budget_mib={budget:g} does not go with memory={self.memory}, which leaves no choice; allowed are "
                "compact and pruned: set memory=pruned"
            )

    @property
    def chooses(self) -> bool:
        """Whether an allocation chooses the precisions."""
        return self.memory == "pruned" or self.budget_mib is not None


@dataclass
class AfterStep:
    """What an allocation is to remember of one step: told when the context of :meth:`ActivationMemory.step` is left."""

    state: AllocationState | None


class ActivationMemory:
    """Around each step: chooses the precisions, keeps the activations at them, and watches the gradients.

    It has no state of its own beside what a dry run told of the model, which is the same for every batch of a shape.

    Args:
        config: mode and budget.
        allocation: chooses the precisions, where the mode leaves a choice; None for :data:`DEFAULT_ALLOCATION`.
        profiles: what dry runs tell, shared with others that run the same model under the same loss; None: its own.
    """

    def __init__(
        self, config: MemoryConfig, allocation: Allocation | None = None, profiles: Profiles | None = None
    ) -> None:
        self.config = config
        self.allocation = (allocation or build_allocation(DEFAULT_ALLOCATION)) if config.chooses else None
        self.layers: list[LayerRecord] = []  # what the latest step kept
        self.profiles = profiles or Profiles()

    @property
    def budget(self) -> int | None:
        """The budget in bytes."""
        return None if self.config.budget_mib is None else int(self.config.budget_mib * MIB)

    @property
    def extra_samples(self) -> int:
        """Images of each batch that a pass of its own looks at first, for the allocation."""
        return 0 if self.allocation is None else self.allocation.extra_samples

    @contextmanager
    def step(
        self, model: nn.Module, loss_of: Pass, parameters: Parameters, state: AllocationState | None, images: Tensor
    ) -> Iterator[AfterStep]:
        """Inside it, the forward passes of ``model`` keep what they should, until their backward is done.

        Args:
            model: source model.
            loss_of: the step's own loss, for passes that only look.
            parameters: adapted tensors, which require gradients.
            state: the allocation's state before the step.
            images: (B, 3, H, W).

        Raises:
            ConfigError: the budget is below what the cheapest precisions need for this batch.
        """
        after, allocation = AfterStep(state), self.allocation
        if self.config.memory == "dense":
            yield after
            return
        if allocation is None or state is None:
            with SavedActivations(model, memory=self.config.memory) as saved:
                yield after
            self.layers = saved.layers
            return
        learning = learning_layers(parameters)
        if allocation.extra_samples:
            few = torch.randperm(len(images), generator=generator_for("published importance", int(state.steps)))
            few = images[few[: allocation.extra_samples].to(images.device)]
            state = allocation.observe(self._importance(model, loss_of, parameters, few), state)
            del few
        table = self._table(model, loss_of, parameters, images)
        with self._budget_as_given():
            chosen = allocation.precisions(table, list(learning), state, self.budget)
        with _watched(parameters) as gradients, SavedActivations(model, memory="pruned", precisions=chosen) as saved:
            yield after
        self.layers, after.state = saved.layers, state
        if not allocation.extra_samples and all(name in gradients for name in learning.values()):
            after.state = allocation.observe(gradient_importance(gradients, learning), state)

    def prepare(self, model: nn.Module, loss_of: Pass, parameters: Parameters, images: Tensor) -> None:
        """Dry runs now rather than in the first step on such a batch."""
        if self.allocation is not None:
            self._table(model, loss_of, parameters, images)
            if self.allocation.extra_samples and self.budget is not None:
                self._table(model, loss_of, parameters, images[: self.allocation.extra_samples])

    def _importance(self, model: nn.Module, loss_of: Pass, parameters: Parameters, images: Tensor) -> Tensor:
        """GI of each learning layer from a pass that only looks, within the same budget."""
        if self.budget is None:
            saved = SavedActivations(model, memory="exact")
        else:
            table = self._table(model, loss_of, parameters, images)
            with self._budget_as_given():
                chosen = best_uniform(table, self.budget)
            saved = SavedActivations(model, memory="pruned", precisions=chosen)
        learning = learning_layers(parameters)
        leaves = [parameters[name] for name in learning.values()]
        with saved:
            found = torch.autograd.grad(loss_of(images), leaves, allow_unused=True, materialize_grads=True)
        return gradient_importance(dict(zip(learning.values(), found, strict=True)), learning)

    @contextmanager
    def _budget_as_given(self) -> Iterator[None]:
        """Refusals name the budget in the setting's own words, not rounded to whole bytes."""
        try:
            yield
        except BudgetError as error:
            assert self.config.budget_mib is not None
            raise too_small(error.smallest, self.config.budget_mib) from None

    def _table(self, model: nn.Module, loss_of: Pass, parameters: Parameters, images: Tensor) -> LayerTable:
        prunes = self.config.memory == "pruned"
        return self.profiles.table(model, loss_of, parameters, images, prunes=prunes)


@contextmanager
def _watched(parameters: Parameters) -> Iterator[Parameters]:
    """Collects the gradients that the backward passes inside bring; the last pass counts."""
    gradients: Parameters = {}

    def note(name: str, gradient: Tensor) -> None:
        gradients[name] = gradient.detach()

    with ExitStack() as hooks:
        for name, tensor in parameters.items():
            if tensor.requires_grad:
                hooks.callback(tensor.register_hook(partial(note, name)).remove)
        yield gradients
