"""The file of an adaptation that a stream can go on from: what it holds, and all that is checked before it is used."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metaopt.errors import CheckpointError
from metaopt.files import atomic_save, is_finite, safe_load, says
from metaopt.online.compute_dial import ComputeDial
from metaopt.optimizers.update import NONFINITE
from metaopt.policy import AdaptationPolicy
from metaopt.policy.fingerprint import policy_sha256
from metaopt.policy.state import State, copied_state, state_from_dict, state_to_dict
from metaopt.policy.step import REFUSED
from metaopt.types import Parameters

FORMAT = "metaopt-online"
VERSION = 3

NEVER_NEGATIVE = frozenset({"age", "count", "rest", "second_moment", "step", "steps", "variance"})
"""Fields of rules' and parts' states that are counts or sums of squares."""


class Adaptation(NamedTuple):
    """How far a stream has come."""

    parameters: Parameters  # the adapted tensors, by name
    state: State  # of the rule and the parts
    steps: int  # batches seen
    updates: int  # of these, updated on
    events: Mapping[str, int]  # how often each happened
    waiting: Tensor | None  # images that wait for an update
    least: int  # that one is made on
    seed: int  # of augmented views
    passes: float  # of the network, counted for each image
    images: int  # answered
    dial: Mapping[str, Any] | None  # what the compute dial remembers; None: there is none


def adaptation_to_dict(adaptation: Adaptation, policy: AdaptationPolicy) -> dict[str, Any]:
    """Tensors and primitives, copied, and what tells the policy that it is of, as the adapter runs it."""
    return {
        "method": policy.method,
        "policy": policy_sha256(policy),
        "parameters": {name: tensor.detach().clone() for name, tensor in adaptation.parameters.items()},
        "state": state_to_dict(adaptation.state),
        "steps": adaptation.steps,
        "updates": adaptation.updates,
        "waiting": torch.empty(0) if adaptation.waiting is None else adaptation.waiting.clone(),
        "least": adaptation.least,
        "seed": adaptation.seed,
        "events": dict(adaptation.events),
        "passes": adaptation.passes,
        "images": adaptation.images,
        "dial": {} if adaptation.dial is None else dict(adaptation.dial),
    }


def adaptation_from_dict(
    values: Mapping[str, Any], policy: AdaptationPolicy, like: Parameters, classes: int
) -> Adaptation:
    """Inverse of :func:`adaptation_to_dict`, for the policy as the adapter runs it.

    Args:
        values: what it gave.
        policy: the adapter's.
        like: the adapted tensors of the model, whose names, shapes, type and device those of the file get.
        classes: C of the model.

    Raises:
        Exception: of nearly any kind, with the reason: values of another model or policy, or that no stream leads to.
    """
    _check_values(values)
    return _fitting(values, policy, like, classes)


def write_adaptation(path: str | Path, adaptation: Adaptation, policy: AdaptationPolicy, source: str) -> None:
    """Write it atomically.

    Args:
        path: the file.
        adaptation: so far.
        policy: that it is of, as the adapter runs it.
        source: SHA-256 of the model's weights.

    Raises:
        OutputError: the file cannot be written.
    """
    values = adaptation_to_dict(adaptation, policy)
    atomic_save({"format": FORMAT, "version": VERSION, "source": source, **values}, path)


def read_adaptation(
    path: str | Path, policy: AdaptationPolicy, source: str, like: Parameters, classes: int
) -> Adaptation:
    """Read one that goes on with this model and policy; no code in the file is ever run.

    Args:
        path: the file.
        policy: as the adapter runs it.
        source: SHA-256 of the model's weights.
        like: the adapted tensors of the model, whose names, shapes, type and device those of the file get.
        classes: C of the model.

    Returns:
        Tensors of its own, on the device of ``like``; nothing else was changed.

    Raises:
        CheckpointError: the file is missing, foreign, of another version or damaged, holds values that no stream leads
            to, or is of another model, method or policy.
    """
    values = safe_load(path, checksums=True)
    if not says(values, "format", FORMAT):
        raise CheckpointError(
            f"'{path}' holds no online adaptation; allowed are files of OnlineAdapter.save: give one of those"
        )
    if not says(values, "version", VERSION):
        raise CheckpointError(
            f"'{path}' has version {_one_line(values.get('version'))}; this release reads version {VERSION}: adapt "
            "again and save it"
        )
    try:
        _check_values(values)
        if not isinstance(values["source"], str):
            raise ValueError(f"its source is {values['source']!r:.80}, no text")
    except Exception as error:  # values of any type can raise nearly anything
        raise CheckpointError(f"'{path}' is damaged ({_reason(error)}); adapt again and save it") from error
    try:
        return _fitting(values, policy, like, classes, source)
    except Exception as error:
        raise CheckpointError(
            f"'{path}' does not fit this adapter ({_reason(error)}); load it beside the model and method that wrote it"
        ) from error


def _check_values(values: Mapping[str, Any]) -> None:
    """Refuse what no adapter writes, whatever its model and method."""
    for key in ("method", "policy"):
        if not isinstance(values[key], str):
            raise ValueError(f"its {key} is {values[key]!r:.80}, no text")
    if not isinstance(values["parameters"], dict) or not isinstance(values["state"], dict):
        raise ValueError("it holds no parameters and state by name")
    for name, tensor in values["parameters"].items():
        _check_tensor(name, tensor)
    for name, tensors in values["state"].items():
        if not isinstance(tensors, list):
            raise ValueError(f"its state of {name!r:.80} is no list")
        for tensor in tensors:
            _check_tensor(f"state of {name}", tensor)
    _check_tensor("waiting images", values["waiting"])
    for key in ("steps", "updates", "least", "seed"):
        if not _is_count(values[key]):
            raise ValueError(f"its {key} is {values[key]!r:.80}, no count")
    _cost(values)
    steps, updates, events = values["steps"], values["updates"], values["events"]
    if not isinstance(events, dict) or not all(isinstance(n, str) and _is_count(c) for n, c in events.items()):
        raise ValueError(f"its events are {events!r:.80}, no counts by name")
    if sum(events.get(name, 0) for name in (NONFINITE, REFUSED, "skipped")) + updates > steps:
        raise ValueError(f"of {steps} batches it left out more")


def _check_tensor(name: Any, tensor: Any) -> None:
    if not isinstance(name, str) or not isinstance(tensor, Tensor):
        raise ValueError(f"{name!r:.80} is no tensor with a name")
    if not is_finite(tensor):
        raise ValueError(f"its {name:.80} holds NaN or infinity")


def _fitting(
    values: Mapping[str, Any], policy: AdaptationPolicy, like: Parameters, classes: int, source: str | None = None
) -> Adaptation:
    """The adaptation, once it is known to be of this model and policy."""
    parameters: Parameters = values["parameters"]
    if {name: tensor.shape for name, tensor in parameters.items()} != {n: own.shape for n, own in like.items()}:
        raise ValueError("its parameters are of another model")
    if source is not None and values["source"] != source:
        raise ValueError("it is of a model with other weights")
    if values["method"] != policy.method:
        raise ValueError(f"it is of method {values['method']!r:.80}, not {policy.method!r}")
    fresh = copied_state(policy.init(like))
    state = state_from_dict(values["state"], fresh)
    if values["policy"] != policy_sha256(policy):
        raise ValueError("it is of another policy of that name, with other settings or learned values")
    for name, own in like.items():
        if parameters[name].dtype != own.dtype:
            raise ValueError(f"its {name} is {parameters[name].dtype}, not {own.dtype}")
    _check_state(values["state"], state, fresh)
    for part in policy.listed:
        part.check_state(state.get(part.name), classes)
    adapted = {name: parameters[name].to(own.device, copy=True) for name, own in like.items()}
    waiting = values["waiting"].to(next(iter(like.values())).device) if values["waiting"].numel() > 0 else None
    return Adaptation(
        adapted,
        state,
        values["steps"],
        values["updates"],
        dict(values["events"]),
        waiting,
        max(1, values["least"]),
        values["seed"],
        *_cost(values),
    )


def _cost(values: Mapping[str, Any]) -> tuple[float, int, Mapping[str, Any] | None]:
    """What the stream has cost, and what the dial remembers of it, if there is one."""
    passes, images, dial = values["passes"], values["images"], values["dial"]
    if type(passes) is not float or not 0 <= passes < math.inf or not _is_count(images):
        raise ValueError(f"its passes are {passes!r:.80} over {images!r:.80} images, no counts")
    if not isinstance(dial, dict):
        raise ValueError(f"its dial is {dial!r:.80}, nothing by name")
    if dial:
        ComputeDial(1).load_state_dict(dial)
    return passes, images, dial or None


def _check_state(stored: Mapping[str, list[Tensor]], state: State, fresh: State) -> None:
    """Refuse types that were converted, and counts and squares below 0."""
    for name, tensors in stored.items():
        kinds = [leaf.dtype for leaf in pytree.tree_leaves(fresh[name]) if isinstance(leaf, Tensor)]
        if kinds != [tensor.dtype for tensor in tensors]:
            raise ValueError(f"its state of {name} is of other types")
    for path, leaf in pytree.tree_flatten_with_path(state)[0]:
        fields = {str(key).removeprefix(".") for key in path}
        if isinstance(leaf, Tensor) and fields & NEVER_NEGATIVE and bool((leaf < 0).any()):
            raise ValueError(f"its state{pytree.keystr(path)} is below 0")


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _reason(error: Exception) -> str:
    return _one_line(error, 200) or type(error).__name__


def _one_line(value: object, most: int = 80) -> str:
    return " ".join(str(value).split())[:most]
