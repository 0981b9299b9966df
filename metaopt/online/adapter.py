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
from metaopt.errors import CheckpointError
from metaopt.experts.adapter import NAME as EXPERTS
from metaopt.files import atomic_save, safe_load
from metaopt.inner_loop import InPlaceApply
from metaopt.models import SourceModel
from metaopt.online.guard import NONFINITE, RESTORED, SKIPPED, FiniteGuard
from metaopt.policy import AdaptationPolicy, PolicyState, check_source
from metaopt.policy.state import copied_state, state_from_list, state_to_list
from metaopt.types import Parameters, StepOutput

FORMAT = "metaopt-online"
VERSION = 1


class OnlineAdapter:
    """Predicts on each batch, then adapts on it, without labels.

    The source model's own tensors never change: the adapter keeps the adapted ones beside it. Creating an adapter only
    freezes the model (its tensors no longer require gradients). Experts stand in a model of the adapter's own, which
    shares the network's tensors.

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
        ConfigError: memory and budget do not go together; a step raises it where the budget is too small for the batch.
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
        self.source = model if isinstance(model, SourceModel) else SourceModel(model)
        check_source(policy, self.source)
        self.model = policy.attach(self.source)  # the source itself, where there are no experts
        self.model.requires_grad_(False)
        self.layout = policy.layout(self.model)
        reference = next(iter(self.layout.take(self.model).values()))
        self.policy = copy.deepcopy(policy).to(reference.device, reference.dtype).requires_grad_(False)
        self.memory = ActivationMemory(MemoryConfig(memory, budget_mib), self.policy.pruning, profiles)
        self.policy.pruning = self.memory.allocation  # where nothing is to choose, nothing is remembered of layers
        self.guard = FiniteGuard()
        self.apply = None if self.policy.rule is None else InPlaceApply(self.policy.rule, self.guard)
        self.steps = 0  # batches seen since creation or reset
        self.parameters: Parameters
        self.state: PolicyState
        self._frozen = False
        self.reset()

    @property
    def updates(self) -> int:
        """Updates applied since creation or the last reset."""
        if not self.policy.updates:
            return 0
        return self.steps - self.guard.events[NONFINITE] - self.guard.events[SKIPPED]

    def reset(self) -> None:
        """Back to the source: parameters, experts, moments, memory, teacher and counters are as in a new adapter."""
        with torch.no_grad():
            own = self.policy.start(self.layout.take(self.model))
            self.parameters = {name: tensor.detach().clone().requires_grad_() for name, tensor in own.items()}
            self.state = copied_state(self.policy.init(self.parameters))
        self.steps = 0
        self.guard.events.clear()
        possible = {NONFINITE: True, RESTORED: self.policy.restoration, SKIPPED: self.policy.gate}
        self.guard.events.update({name: 0 for name, part in possible.items() if part is not None})

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
                output = self.policy.evaluate(self.model, self.parameters, images, self.updates, self.state.teacher)
        else:
            with torch.enable_grad():
                self.parameters, self.state, output = self.policy.step(
                    self.model,
                    self.parameters,
                    self.state,
                    images,
                    self.apply,
                    self.updates,
                    self.memory,
                )
        if not self._frozen:
            self.steps += 1
            self._count(output)
        loss = None if output.loss is None else output.loss.detach()
        terms = {name: value.detach() for name, value in output.terms.items()}
        return replace(output, logits=output.logits.detach(), loss=loss, terms=terms)

    def _count(self, output: StepOutput) -> None:
        if self.policy.gate is not None and not output.updated:
            self.guard.events[SKIPPED] += 1
        restoration = self.policy.restoration
        if restoration is not None and output.distance is not None and restoration.begins_anew(output.distance):
            self.guard.events[RESTORED] += 1

    def prepare(self, images: Tensor) -> None:
        """Find out now, by dry runs, what a batch of this shape keeps; else the first step on one does.

        Args:
            images: (B, 3, H, W) in [0, 1].
        """
        if self.policy.updates:
            self.memory.prepare(self.model, self._loss_of, self.parameters, images)

    def _loss_of(self, images: Tensor) -> Tensor:
        loss = self.policy.evaluate(self.model, self.parameters, images, self.updates, self.state.teacher).loss
        assert loss is not None
        return loss

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
        teacher = self.state.teacher if self.policy.predict_with == "teacher" else None
        current = self.parameters if teacher is None else teacher.average
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
            "source": self.model.weights_sha256(),
            "parameters": parameters,
            "state": state_to_list(self.state),
            "steps": self.steps,
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
            state = state_from_list(values["state"], copied_state(self.policy.init(self.parameters)))
            steps, events = int(values["steps"]), dict(values["events"])
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"'{path}' does not fit this adapter ({error}); load it beside the model and method that wrote it"
            ) from error
        self.parameters = {
            name: values["parameters"][name].to(tensor).requires_grad_() for name, tensor in self.parameters.items()
        }
        self.state, self.steps = state, steps
        self.guard.events.clear()
        self.guard.events.update(events)
