"""Deployment: a model that predicts and adapts, batch by batch."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from metaopt.activation_memory import ActivationMemory, MemoryConfig, Profiles
from metaopt.errors import BudgetError, check_kind
from metaopt.models import SourceModel
from metaopt.online.adapted import Adapted
from metaopt.online.compiling import compile_network
from metaopt.online.compute_dial import ComputeDial, dial_of, holds_nothing
from metaopt.online.frozen import FrozenAdapter, frozen_here
from metaopt.online.gathering import WAITING
from metaopt.online.incoming import Images, as_images, intact_images
from metaopt.optimizers.update import NONFINITE, InPlaceApply, gradients_of, is_finite
from metaopt.policy import AdaptationPolicy
from metaopt.policy.parts.pruning import Pruning
from metaopt.policy.precision import run_network
from metaopt.policy.step import adaptation_step, loss_of
from metaopt.policy.without_step import evaluate_on, predict_on
from metaopt.types import StepOutput

BROKEN = "broken_images"  # event: some of the batch are no images, and were left out


class OnlineAdapter(Adapted):
    """Predicts on each batch, then adapts on it, without labels.

    The source model never changes: the adapter runs a skeleton of its own, which shares the network's tensors and has
    its experts, and keeps the adapted tensors beside it. So adapters in several threads may share one network, and
    threads may share an adapter: its calls run one after another, each as a whole. Layers whose tensors its user has
    frozen (``requires_grad_(False)``), where others are not, do not adapt. Where the network is moved or cast later,
    the adapter goes on as it is.

    An image with NaN, or with a pixel far outside [0, 1], is left out: its logits are NaN, the rest of its batch goes
    on as if it had come alone, and the event ``broken_images`` is counted. Batches much smaller than those that the
    policy was meta-trained with are answered at once and gathered for an update (:mod:`metaopt.online.gathering`).

    A network in half precision runs as it is, and so does one under ``torch.autocast``; adapted tensors, state, losses
    and the logits given are in float32 all the same (`metaopt.policy.precision`).

    Args:
        model: the model the policy was trained on: a ``SourceModel``, or any module that takes images in [0, 1].
        policy: a method; ``AdaptationPolicy.load("ckpt.pt")`` or one of ``build_method``. The adapter keeps a copy
            of it, on the model's device and in its type, float32 at least.
        memory: ``dense``: activations are kept as torch keeps them; ``exact``, ``compact`` or ``pruned``: see
            :mod:`metaopt.activation_memory.engine`.
        budget_mib: bounds what is held for backward at once; needs ``memory="pruned"`` (or ``compact``). 0: nothing is
            held, whatever ``memory`` says, as with ``compute=1``.
        compute: forward passes that a batch costs in the mean, counted (`metaopt.online.compute_dial`), from 1, forward
            passes alone, to any number; None: as many as the method takes.
        profiles: what dry runs tell of the model, shared among adapters of one model and objective; None: its own.
        gather: images that an update is made on at least; None: half of a batch of the policy's meta-training, and 1
            for a method without.
        compile: run the network by ``torch.compile``: the first batch of a shape takes a minute or so longer. Where
            activations are kept small, or a term reads features, passes that are learned from run uncompiled, and a
            line in the log says so.

    Raises:
        CheckpointError: the policy was trained on another model.
        ModelError: the model has no normalisation layer that can adapt, or no place for the method's experts.
        ConfigError: memory and budget do not go together, compute is below 1 or asked of a method that never updates,
            or model or policy are of another type; a step raises it where the budget is too small for the batch.
    """

    def __init__(
        self,
        model: nn.Module,
        policy: AdaptationPolicy,
        *,
        memory: str = "dense",
        budget_mib: float | None = None,
        compute: float | None = None,
        profiles: Profiles | None = None,
        compile: bool = False,
        gather: int | None = None,
    ) -> None:
        named = f"build_method(load_method({policy!r}))" if isinstance(policy, str) else "build_method(config)"
        check_kind("policy", policy, AdaptationPolicy, "an AdaptationPolicy", f"give metaopt.{named}")
        check_kind("model", model, nn.Module, "an nn.Module", "give the network itself")
        source = model if isinstance(model, SourceModel) else SourceModel(model)
        super().__init__(source, policy, dial_of(policy, compute, budget_mib), gather)
        config = MemoryConfig(memory, None if holds_nothing(budget_mib) else budget_mib)
        config = MemoryConfig() if self._forward_only else config
        pruning = self.policy.part("pruning") or Pruning()
        if config.chooses:
            self.policy.parts["pruning"] = pruning
        elif "pruning" in self.policy.parts:  # with nothing to choose, nothing is remembered of the layers either
            del self.policy.parts["pruning"]
        self.memory = ActivationMemory(config, pruning.allocation, profiles)
        if compile:
            compile_network(self.model, self.policy.objective, self.memory.config.memory)
        rule, dial = self.policy.rule, self.dial
        length = None if dial is None else lambda: dial.length
        self.apply = None if rule is None else InPlaceApply(rule, is_finite, length)
        self.reset()

    @property
    def position(self) -> int:
        """Batches met, those aside that were not finite or wait: what augmented views are drawn from."""
        return self.steps - self.events[NONFINITE] - self.events[WAITING]

    @property
    def _forward_only(self) -> bool:
        return self.dial is not None and self.dial.forward_only

    def __call__(self, images: Images) -> Tensor:
        """Predict, then adapt (inside ``frozen()``: predict only).

        Args:
            images: (B, 3, H, W), floats in [0, 1] or bytes.

        Returns:
            Logits (B, C) of the model as it was *before* this batch's update, detached.

        Raises:
            DataError: the images are none, or scaled otherwise (`metaopt.online.incoming`); nothing has changed then.
        """
        return self.step(images).logits

    def step(self, images: Images) -> StepOutput:
        """As a call, with the loss and its terms beside the logits; all detached."""
        return self._step(images, frozen_here(self))

    def _step(self, images: Images, frozen: FrozenAdapter | None) -> StepOutput:
        with self._lock:
            images = as_images(images, self.model.mean)
            intact = intact_images(images)
            if intact is None:
                output = self._answered(images, frozen)
            else:
                output = self._answered_in_part(images, intact, frozen)
            if frozen is None:
                self.events.update(output.events)
        return output

    def _answered_in_part(self, images: Tensor, intact: Tensor, frozen: FrozenAdapter | None) -> StepOutput:
        """NaN for broken images, and nothing learned of them; a batch of nothing else is none."""
        logits = images.new_full((len(images), self.model.num_classes), torch.nan)
        output = StepOutput(logits, updated=False)
        if bool(intact.any()):
            output = self._answered(images[intact], frozen)
            logits = logits.to(output.logits)
            logits[intact] = output.logits
        return replace(output, logits=logits, events=(BROKEN, *output.events))

    def _answered(self, images: Tensor, frozen: FrozenAdapter | None) -> StepOutput:
        """The output on intact images, (B, C, H, W), and what is learned of them; detached."""
        arguments = self.policy, self.model, self.parameters
        gathered = None if frozen is not None else self.gathering.add(images)
        learns = self.apply is not None and not self._forward_only
        with torch.set_grad_enabled(gathered is not None and learns):
            if frozen is not None and frozen.as_exported:
                output = StepOutput(run_network(self.model, self._exported(), images, {}).logits, updated=False)
            elif frozen is not None:
                few = len(images) < self.gathering.least
                output = replace(evaluate_on(*arguments, images, self.state, self.position, few), updated=False)
            elif gathered is None:
                self.state, output = predict_on(*arguments, images, self.state, remember=self.dial is not None)
                output = replace(output, events=(WAITING,))
            else:
                output = self._adapted(gathered, len(images))
        logits = output.logits.detach()[-len(images) :]  # those before were answered when they came
        if frozen is None:
            self.steps += 1
            self.updates += output.updated
            self.passes, self.images = self.passes + output.passes, self.images + len(images)
            if self.dial is not None:
                self.dial.take(len(images), output, 0 if gathered is None else len(gathered))
            self.watch.see(logits)
        loss = None if output.loss is None else output.loss.detach()
        terms = {name: value.detach() for name, value in output.terms.items()}
        return replace(output, logits=logits, loss=loss, terms=terms)

    def _adapted(self, gathered: Tensor, own: int) -> StepOutput:
        """The output on gathered images, the last ``own`` of them new, and an update; on fewer where a budget asks."""
        memory = None if self.memory.config.memory == "dense" else self.memory
        while True:
            arguments = self.policy, self.model, self.parameters, self.state, gathered, self.apply, self.position
            try:
                limits = {} if self.dial is None else self._limits(self.dial, len(gathered), own)
                self.parameters, self.state, output = adaptation_step(*arguments, memory, self.start, **limits)
                return output
            except BudgetError:
                if len(gathered) <= own:
                    raise
                gathered = self.gathering.fewer(gathered, own)

    def _limits(self, dial: ComputeDial, images: int, own: int) -> dict[str, Any]:
        """What a dial tells a step on so many images, of which its own had no answer before."""
        return {"allow": partial(dial.allows, own=own), "answered": images - own, "frugal": dial.frugal}

    def prepare(self, images: Images) -> None:
        """Find out now, by dry runs, what a batch of this shape keeps; else the first step on one does.

        Args:
            images: (B, 3, H, W) in [0, 1].
        """
        images = as_images(images, self.model.mean)
        if self.apply is not None and not self._forward_only:
            self.memory.prepare(self.model, self._loss_of, self.parameters, images)

    def look(self, images: Tensor) -> None:
        """Loss and gradient of a batch, kept for backward as a step's are, and nothing that comes of them.

        Args:
            images: (B, 3, H, W) in [0, 1].
        """
        kept = self.memory.step(self.model, self._loss_of, self.parameters, self.state.get("pruning"), images)
        with torch.enable_grad(), kept:
            gradients_of(self._loss_of(images), self.parameters)

    def _loss_of(self, images: Tensor) -> Tensor:
        return loss_of(evaluate_on(self.policy, self.model, self.parameters, images, self.state, self.position))

    @contextmanager
    def frozen(self, as_exported: bool = False) -> Iterator[FrozenAdapter]:
        """Within this context the adapter predicts with what it has learned and changes nothing.

        That holds for calls in the same thread; what the context gives does so in any.

        Args:
            as_exported: predict as the network of :meth:`export_model` does, without what depends on the batch.
        """
        with FrozenAdapter(self, self._step, as_exported).in_this_thread() as frozen:
            yield frozen
