"""What a stream has made of a model so far: begun anew, saved and loaded, told of, and exported."""

import copy
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn

from metaopt.experts.adapter import NAME as EXPERTS
from metaopt.models import SourceModel, prior_layers
from metaopt.online.adaptation_file import (
    Adaptation,
    adaptation_from_dict,
    adaptation_to_dict,
    read_adaptation,
    write_adaptation,
)
from metaopt.online.compute_dial import RESTED, ComputeDial
from metaopt.online.export import copied_weights, exported_tensors, not_exported
from metaopt.online.gathering import Gathering
from metaopt.online.stream_watch import StreamWatch
from metaopt.optimizers.update import NONFINITE
from metaopt.parameters import own_values
from metaopt.policy import AdaptationPolicy
from metaopt.policy.parts.verdict import Verdict, VerdictPart
from metaopt.policy.state import State, copied_state
from metaopt.types import Parameters


class Adapted:
    """All that `OnlineAdapter` changes from batch to batch, and the ways in and out of it.

    Args:
        source: the model as it came, which never changes.
        policy: copied, on the model's device and in its type, float32 at least.
        dial: what bounds the cost of the stream, if something does.
        gather: images that an update is made on at least; None: as the policy was meta-trained.

    Raises:
        CheckpointError: the policy was trained on another model.
        ModelError: the model has no normalisation layer that can adapt, or no place for the method's experts.
    """

    def __init__(
        self, source: SourceModel, policy: AdaptationPolicy, dial: ComputeDial | None, gather: int | None
    ) -> None:
        self.source, self.dial = source, dial
        policy.check_source(source)
        self.model = policy.attach(source)
        self.model.requires_grad_(False)
        self.layout = policy.layout(self.model)
        reference = next(iter(self._own_values().values()))
        self.policy = copy.deepcopy(policy).to(reference.device, reference.dtype).requires_grad_(False)
        self.events: Counter[str] = Counter()  # batches on which something out of the ordinary was done, by its name
        self.gathering = Gathering.of(self.policy) if gather is None else Gathering(gather)
        self.steps = 0  # batches seen since creation or reset, but for those without an intact image
        self.updates = 0  # of these, updated on
        self.passes, self.images = 0.0, 0  # passes of the network, counted for each image, and images answered
        normalises = self.policy.part("batch_statistics") is not None and bool(prior_layers(self.model.module))
        handled = normalises and self.policy.part("class_skew") is not None
        self.watch = StreamWatch(self.model.num_classes, self.policy.batch_size, normalises, handled)
        self.start: Parameters  # where adaptation starts
        self.parameters: Parameters
        self.state: State
        self._lock = RLock()

    @property
    def warnings(self) -> list[str]:
        """What the stream so far does not seem to be, a line each: see :mod:`metaopt.online.stream_watch`."""
        with self._lock:
            return list(self.watch.found.values())

    @property
    def mean_forwards(self) -> float | None:
        """Forward passes a batch so far, as `metaopt.online.compute_dial` counts them; None before any."""
        return self.passes / self.images if self.images else None

    def reset(self) -> None:
        """Back to the source: parameters, experts, moments, memory, teacher and counters are as in a new adapter."""
        with self._lock:
            with torch.no_grad():
                start = self.policy.start(self._own_values())
                self.start = {name: tensor.detach() for name, tensor in start.items()}
                self.parameters = {name: tensor.clone().requires_grad_() for name, tensor in self.start.items()}
                self.state = copied_state(self.policy.init(self.parameters))
            self.steps = self.updates = 0
            self.passes, self.images = 0.0, 0
            self.gathering.reset()
            if self.dial is not None:
                self.dial.reset()
            self.watch.reset()
            self.events.clear()
            names = (
                NONFINITE,
                *([] if self.dial is None else [RESTED]),
                *(event for part in self.policy.listed for event in part.events),
            )
            self.events.update({name: 0 for name in names})

    def _own_values(self) -> Parameters:
        return own_values(self.model, self.layout.names)

    def verdict(self) -> Verdict | None:
        """How often the adapted model and the source err on the latest images, as estimated without labels.

        None for a method without the part ``verdict``, and before the first batch.

        Raises:
            ConfigError: the part is not fitted (`metaopt.fit_verdict`).
        """
        with self._lock:
            part = self.policy.part(VerdictPart.name)
            return None if part is None else part.verdict(self.state[part.name])

    def export(self) -> dict[str, Tensor]:
        """The adapted model as a plain ``state_dict`` of the wrapped module: copies in its types, to load or save.

        It is the teacher's where that predicts, and BatchNorm's running statistics are those of the source and of the
        stream, so that the network predicts in ``eval()`` as the adapter does in ``frozen(as_exported=True)``. What it
        cannot have is in :attr:`not_exported`, experts (:meth:`export_experts`) for one.
        """
        with self._lock:
            return self._copied("module.")

    def export_experts(self) -> dict[str, Tensor]:
        """The adapted experts and gates as a ``state_dict`` of `metaopt.experts.Experts`: copies; empty without any."""
        with self._lock:
            return self._copied(f"{EXPERTS}.")

    def export_model(self) -> nn.Module:
        """A copy of the wrapped module with the exported weights, in ``eval()``.

        It takes what that takes: images less the mean, by the standard deviation (``source.mean`` and ``source.std``).
        """
        module = copy.deepcopy(self.source.module).eval()
        module.load_state_dict(self.export())
        return module

    @property
    def not_exported(self) -> tuple[str, ...]:
        """What the adapter does at each batch and an exported network cannot, a few words each."""
        return not_exported(self.policy, self.state)

    def _copied(self, prefix: str) -> dict[str, Tensor]:
        return copied_weights(self.model, self._exported(), prefix)

    def _exported(self) -> Parameters:
        return exported_tensors(self.policy, self.model, self.parameters, self.state)

    def save(self, path: str | Path) -> None:
        """Write the adaptation so far (not the model, not the policy), atomically.

        Raises:
            OutputError: the file cannot be written.
        """
        with self._lock:
            write_adaptation(path, self._adaptation(), self.policy, self.model.weights_sha256())

    def load(self, path: str | Path) -> None:
        """Go on from where :meth:`save` was called, bit for bit.

        Raises:
            CheckpointError: the file is missing or damaged, or of another model, method or policy; nothing has changed.
        """
        classes = self.source.num_classes
        self._go_on(read_adaptation(path, self.policy, self.model.weights_sha256(), self.parameters, classes))

    def state_dict(self) -> dict[str, Any]:
        """The adaptation so far as tensors and primitives, copied; that it is of this network stays to be known."""
        with self._lock:
            return adaptation_to_dict(self._adaptation(), self.policy)

    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        """Go on from where :meth:`state_dict` was taken, bit for bit.

        Raises:
            Exception: of nearly any kind, with the reason: the values do not fit; nothing has changed.
        """
        self._go_on(adaptation_from_dict(values, self.policy, self.parameters, self.source.num_classes))

    def _adaptation(self) -> Adaptation:
        gathering, seed = self.gathering, self.policy.seed
        counts = self.steps, self.updates, self.events
        cost = self.passes, self.images, None if self.dial is None else self.dial.state_dict()
        return Adaptation(self.parameters, self.state, *counts, gathering.waiting, gathering.least, seed, *cost)

    def _go_on(self, found: Adaptation) -> None:
        with self._lock:
            self.parameters = {name: tensor.requires_grad_() for name, tensor in found.parameters.items()}
            self.state, self.steps, self.updates = found.state, found.steps, found.updates
            self.gathering.waiting, self.gathering.least = found.waiting, found.least
            self.policy.seed = found.seed
            self.passes, self.images = found.passes, found.images
            if self.dial is not None:
                self.dial.reset()
                if found.dial is not None:
                    self.dial.load_state_dict(found.dial)
            self.events.clear()
            self.events.update(found.events)
