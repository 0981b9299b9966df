"""Deployment: a model that predicts and adapts, batch by batch."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metaopt.activation_memory import ActivationMemory, MemoryConfig, Profiles
from metaopt.errors import CheckpointError, check_kind
from metaopt.experts.adapter import NAME as EXPERTS
from metaopt.files import atomic_save, safe_load
from metaopt.models import SourceModel, prior_layers
from metaopt.online.stream_watch import StreamWatch
from metaopt.optimizers.update import NONFINITE, FiniteGuard, InPlaceApply, gradients_of
from metaopt.policy import AdaptationPolicy
from metaopt.policy.parts.pruning import Pruning
from metaopt.policy.state import State, copied_state, state_from_dict, state_to_dict
from metaopt.policy.step import adaptation_step, evaluate_on, loss_of
from metaopt.types import Parameters, StepOutput

FORMAT = "metaopt-online"
VERSION = 2


class OnlineAdapter:
    """Predicts on each batch, then adapts on it, without labels.

    The source model never changes: the adapter runs a skeleton of its own, which shares the network's tensors and has
    its experts, and keeps the adapted tensors beside it. So adapters in several threads may share one network. Creating
    an adapter only freezes the model (its tensors no longer require gradients).

    Args:
        model: the model the policy was trained on: a ``SourceModel``, or any module that takes images in [0, 1].
        policy: a method; ``AdaptationPolicy.load("ckpt.pt")`` or one of ``build_method``. The adapter keeps a copy
            of it, on the model's device and in its type.
        memory: ``dense``: activations are kept as torch keeps them; ``exact``, ``compact`` or ``pruned``: see
            :mod:`metaopt.activation_memory.engine`.
        budget_mib: bounds what is held for backward at once; needs ``memory="pruned"`` (or ``compact``).
        profiles: what dry runs tell of the model, shared among adapters of one model and objective; None: its own.

    Raises:
        CheckpointError: the policy was trained on another model.
        ModelError: the model has no normalisation layer that can adapt, or no place for the method's experts.
        ConfigError: memory and budget do not go together, or model or policy are of another type; a step raises it
            where the budget is too small for the batch.
    """

    def __init__(
        self,
        model: nn.Module,
        policy: AdaptationPolicy,
        *,
        memory: str = "dense",
        budget_mib: float | None = None,
        profiles: Profiles | None = None,
    ) -> None:
        named = f"build_method(load_method({policy!r}))" if isinstance(policy, str) else "build_method(config)"
        check_kind("policy", policy, AdaptationPolicy, "an AdaptationPolicy", f"give metaopt.{named}")
        check_kind("model", model, nn.Module, "an nn.Module", "give the network itself")
        self.source = model if isinstance(model, SourceModel) else SourceModel(model)
        policy.check_source(self.source)
        self.model = policy.attach(self.source)
        self.model.requires_grad_(False)
        self.layout = policy.layout(self.model)
        reference = next(iter(self.layout.take(self.model).values()))
        self.policy = copy.deepcopy(policy).to(reference.device, reference.dtype).requires_grad_(False)
        config, pruning = MemoryConfig(memory, budget_mib), self.policy.part("pruning") or Pruning()
        if config.chooses:
            self.policy.parts["pruning"] = pruning
        elif "pruning" in self.policy.parts:  # with nothing to choose, nothing is remembered of the layers either
            del self.policy.parts["pruning"]
        self.memory = ActivationMemory(config, pruning.allocation, profiles)
        self.guard = FiniteGuard()
        self.apply = None if self.policy.rule is None else InPlaceApply(self.policy.rule, self.guard)
        trained_on = policy.training.get("config", {}).get("batch_size")
        normalises = self.policy.part("batch_statistics") is not None and bool(prior_layers(self.model.module))
        self.watch = StreamWatch(self.model.num_classes, trained_on, normalises)
        self.steps = 0  # batches seen since creation or reset
        self.updates = 0  # updates applied since then
        self.start: Parameters  # where adaptation starts
        self.parameters: Parameters
        self.state: State
        self._frozen = False
        self.reset()

    @property
    def warnings(self) -> list[str]:
        """What the stream so far does not seem to be, a line each: see :mod:`metaopt.online.stream_watch`."""
        return list(self.watch.found.values())

    @property
    def position(self) -> int:
        """Batches met, updated on or not, those aside that the guard refused: what augmented views are drawn from."""
        return self.steps - self.guard.events[NONFINITE]

    def reset(self) -> None:
        """Back to the source: parameters, experts, moments, memory, teacher and counters are as in a new adapter."""
        with torch.no_grad():
            start = self.policy.start(self.layout.take(self.model))
            self.start = {name: tensor.detach() for name, tensor in start.items()}
            self.parameters = {name: tensor.clone().requires_grad_() for name, tensor in self.start.items()}
            self.state = copied_state(self.policy.init(self.parameters))
        self.steps = self.updates = 0
        self.watch.reset()
        self.guard.events.clear()
        names = (NONFINITE, *(event for part in self.policy.listed for event in part.events))
        self.guard.events.update({name: 0 for name in names})

    def __call__(self, images: Tensor) -> Tensor:
        """Predict, then adapt (inside ``frozen()``: predict only).

        Args:
            images: (B, 3, H, W) in [0, 1].

        Returns:
            Logits (B, C) of the model as it was *before* this batch's update, detached.
        """
        return self.step(images).logits

    def step(self, images: Tensor) -> StepOutput:
        """As a call, with the loss and its terms beside the logits; all detached."""
        if self._frozen or self.apply is None:
            with torch.no_grad():
                output = evaluate_on(self.policy, self.model, self.parameters, images, self.state, self.position)
        else:
            memory = None if self.memory.config.memory == "dense" else self.memory
            with torch.enable_grad():
                self.parameters, self.state, output = adaptation_step(
                    self.policy,
                    self.model,
                    self.parameters,
                    self.state,
                    images,
                    self.apply,
                    self.position,
                    memory,
                    self.start,
                )
        if not self._frozen:
            self.steps += 1
            self.updates += output.updated
            self.watch.see(output.logits.detach())
            self.guard.events.update(output.events)
        loss = None if output.loss is None else output.loss.detach()
        terms = {name: value.detach() for name, value in output.terms.items()}
        return replace(output, logits=output.logits.detach(), loss=loss, terms=terms)

    def prepare(self, images: Tensor) -> None:
        """Find out now, by dry runs, what a batch of this shape keeps; else the first step on one does.

        Args:
            images: (B, 3, H, W) in [0, 1].
        """
        if self.apply is not None:
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
    def frozen(self) -> Iterator["OnlineAdapter"]:
        """Within this context the adapter predicts with what it has learned and changes nothing."""
        before, self._frozen = self._frozen, True
        try:
            yield self
        finally:
            self._frozen = before

    def export(self) -> dict[str, Tensor]:
        """The adapted model as a plain ``state_dict`` of the wrapped module: copies, ready to load or save.

        It is the teacher's where that predicts. Experts are not part of it: see :meth:`export_experts`.
        """
        return self._exported("module.")

    def export_experts(self) -> dict[str, Tensor]:
        """The adapted experts and gates as a ``state_dict`` of `metaopt.experts.Experts`: copies; empty without any."""
        return self._exported(f"{EXPERTS}.")

    def _exported(self, prefix: str) -> dict[str, Tensor]:
        own = dict(self.model.named_parameters(remove_duplicate=False))
        current = self.parameters
        for part in self.policy.listed:
            current = part.exported(current, self.state.get(part.name))
        # By identity, because a layer that is used twice has two names there and one here.
        adapted = {id(own[name]): tensor for name, tensor in current.items()}
        weights = self.model.state_dict()
        weights.update({name: adapted[id(tensor)] for name, tensor in own.items() if id(tensor) in adapted})
        return {
            name.removeprefix(prefix): tensor.detach().clone()
            for name, tensor in weights.items()
            if name.startswith(prefix)
        }

    def save(self, path: str | Path) -> None:
        """Write the adaptation so far (not the model, not the policy), atomically.

        Raises:
            OutputError: the file cannot be written.
        """
        parameters = {name: tensor.detach().clone() for name, tensor in self.parameters.items()}
        values: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "method": self.policy.method,
            "seed": self.policy.seed,
            "source": self.model.weights_sha256(),
            "parameters": parameters,
            "state": state_to_dict(self.state),
            "steps": self.steps,
            "updates": self.updates,
            "events": dict(self.guard.events),
        }
        atomic_save(values, path)

    def load(self, path: str | Path) -> None:
        """Go on from where :meth:`save` was called, bit for bit.

        Raises:
            CheckpointError: the file is missing, damaged, or of another model or method.
        """
        values = safe_load(path, checksums=True)
        if not isinstance(values, dict) or (values.get("format"), values.get("version")) != (FORMAT, VERSION):
            raise CheckpointError(
                f"'{path}' holds no online adaptation; allowed are files of OnlineAdapter.save: give one of those"
            )
        try:
            shapes = {name: tuple(tensor.shape) for name, tensor in values["parameters"].items()}
            if shapes != {name: tuple(tensor.shape) for name, tensor in self.parameters.items()}:
                raise ValueError("its parameters are of another model")
            if values["source"] != self.model.weights_sha256():
                raise ValueError("it is of a model with other weights")
            if values["method"] != self.policy.method:
                raise ValueError(f"it is of method {values['method']!r}, not {self.policy.method!r}")
            state = state_from_dict(values["state"], copied_state(self.policy.init(self.parameters)))
            steps, updates, events = int(values["steps"]), int(values["updates"]), dict(values["events"])
            seed = int(values["seed"])
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"'{path}' does not fit this adapter ({error}); load it beside the model and method that wrote it"
            ) from error
        self.parameters = {
            name: values["parameters"][name].to(tensor).requires_grad_() for name, tensor in self.parameters.items()
        }
        self.state, self.steps, self.updates = state, steps, updates
        self.policy.seed = seed
        self.guard.events.clear()
        self.guard.events.update(events)
