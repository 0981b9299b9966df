"""Golden outputs of every method, policy and meta-training on two small models: a rebuild must change none of them.

    python -m tests.golden.cases --record  # writes golden.pt beside this file

Inputs come from fixed generators and the scanned digits. The first part says how each thing is built and speaks to the
library; the second says what is run and recorded, in names of its own. Learned tensors go by their names in the
``state_dict`` of a policy at the time of recording: a port maps them in `weights_of` and `load_weights`.
"""

import argparse
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metaopt.models import SourceModel
from metaopt.policy import AdaptationPolicy

from .build import (
    BATCH,
    MODELS,
    RESNET,
    build_adapter,
    build_model,
    build_policy,
    build_trainer,
    clean_images,
    events_of,
    load_weights,
    meta_config,
    recorded_name,
    recorded_place,
    state_of,
    stream,
    weights_of,
)

FILE = Path(__file__).with_name("golden.pt")

# ---------------------------------------------------------------------------------------------------------------------
# What: policies, streams and meta-trainings, and what is recorded of each

BARE = (
    "parts.restoration=false",
    "parts.batch_statistics=true",
    "parts.class_balance=false",
    "parts.initialization=false",
    "parts.weight_ensembling=false",
)
EXPERTS = ("recipe=experts", "parts.experts.bottleneck=2")
VIEWS = "method.parts.teacher.views=2"
PLAIN_TASKS = ("meta.clean=0", "meta.alternating=0", "meta.mixed=0")
SMALL = (f"batch_size={BATCH}", "parts.class_skew=false", "parts.class_balance=true", *PLAIN_TASKS)
POLICIES: dict[str, tuple[str, ...]] = {
    "default": SMALL,
    "gate": (*SMALL, "parts.update_gate.share=0.5"),
    "rates": (*SMALL, "parts.pruning=learned"),
    "experts": (*SMALL, *EXPERTS, "parts.update_gate.share=0.5"),
    "published": (*SMALL, "generator=published", *BARE),
    "step_sizes": (*SMALL, "generator=step_sizes", *BARE),
}
"""Arguments of ``pretrain/meta_train.py``, by the policy's name; learned tensors are those of the file."""
RESNET_ONLY = ("rates",)
# Their first gradient is 0 but for rounding, which Adam and the proximal loss then blow up: only what comes before that
# is recorded.
ILL_CONDITIONED = ("moase, no views",)
GATE_BIAS = {"gate": 1.1, "experts": 0.7}  # at which the gate opens at some batches of the stream
NOISE = {"offset": 0.02, "log_step_sizes": 0.2, "learned_experts": 0.05}  # by a part of the tensor's name
OTHER_NOISE = 0.1
MANY = 5000  # scalars of a tensor above which its digest stands for it

METHODS: dict[str, tuple[tuple[str, ...], str | None]] = {
    "source": (("method=source",), None),
    "bn": (("method=bn",), None),
    "bn, prior and balance": (
        ("method=bn", "method.parts.batch_statistics.prior=16", "method.parts.class_balance=1"),
        None,
    ),
    "bn, initialization": (("method=bn", "method.parts.initialization=true"), "default"),
    "tent": (("method=tent",), None),
    "tent, all parts": (
        (
            "method=tent",
            "method.parts.batch_statistics.prior=16",
            "method.parts.class_balance=1",
            "method.parts.restoration=true",
            "method.parts.update_gate.every=2",
        ),
        None,
    ),
    "tent, learned start and restoration": (
        ("method=tent", "method.parts.restoration=true", "method.parts.initialization=true"),
        "default",
    ),
    "tent, exact": (("method=tent", "memory=exact"), None),
    "tent, compact": (("method=tent", "memory=compact"), None),
    "sgd": (("method=tent", "method.update=sgd", "method.lr=0.01"), None),
    "adam": (("method=adam",), None),
    "adam, all parts": (
        (
            "method=adam",
            "method.parts.batch_statistics.prior=16",
            "method.parts.class_balance=1",
            "method.parts.restoration=true",
            "method.parts.update_gate.every=2",
        ),
        None,
    ),
    "adam, learned objective": (("method=adam",), "default"),
    "adam, four terms": (("method=adam", "method.objective.entropy=1", "method.objective.discrepancy=0.4"), None),
    "surgeon": (("method=surgeon",), None),
    "surgeon, pruned": (("method=surgeon", "memory=pruned"), None),
    "cotta": (("method=cotta", VIEWS), None),
    "moase": (("method=moase", VIEWS), None),
    "moase, all": (("method=moase", VIEWS, "method.adapts=all"), None),
    "moase, experts": (("method=moase", VIEWS, "method.adapts=experts"), None),
    "moase, no views": (("method=moase",), None),
    "mgtta": (("method=mgtta",), "published"),
    **{f"policy {name}": (("method=policy",), name) for name in POLICIES},
    "policy default, every 2": (("method=policy", "method.parts.update_gate.every=2"), "default"),
    "policy default, bare": (
        (
            "method=policy",
            "method.parts.batch_statistics={prior: null}",
            "method.parts.class_balance=false",
            "method.parts.restoration=false",
            "method.parts.initialization=false",
            "method.parts.weight_ensembling=false",
            "method.objective.entropy=1",
            "method.lr=0.003",
        ),
        "default",
    ),
    "policy default, pruned": (("method=policy", "memory=pruned", "budget_mib=1.6"), "default"),
    "policy gate, pruned": (("method=policy", "memory=pruned", "budget_mib=1.6"), "gate"),
    "policy rates, pruned": (("method=policy", "memory=pruned", "budget_mib=1.4"), "rates"),
}
"""Arguments of ``adapt/online.py`` and the policy that is given, by the case's name."""

SHORT = (
    *SMALL,
    "meta.epochs=3",
    "meta.unrolls=2",
    "meta.steps=3",
    "meta.first_steps=2",
    "meta.selection_tasks=1",
)
TRAININGS: dict[str, tuple[str, ...]] = {
    "default": SHORT,
    "gate": (*SHORT, "parts.update_gate.share=0.5", "meta.continued=0.5"),
    "full": (*SHORT, "meta.gradient=full", "meta.steps=2"),
    "rates": (*SHORT, "parts.pruning=learned"),
    "experts": (*SHORT, *EXPERTS),
    "published": (
        "recipe=published",
        "batch_size=4",
        "meta.epochs=3",
        "meta.unrolls=2",
        "meta.steps=3",
        "meta.first_steps=3",
    ),
}
"""Arguments of ``pretrain/meta_train.py``, by the case's name."""


def digest(tensor: Tensor) -> Tensor:
    """Sum and sum of squares, (2,) float64."""
    values = tensor.detach().double()
    return torch.stack([values.sum(), values.square().sum()])


def digests(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Of each tensor by its name."""
    return {"names": list(tensors), "digests": torch.stack([digest(tensor) for tensor in tensors.values()])}


def packed(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Names, shapes and values; of a tensor with many scalars its digest."""
    parts = [digest(t) if t.numel() > MANY else t.detach().double().flatten() for t in tensors.values()]
    return {
        "names": list(tensors),
        "shapes": [list(tensor.shape) for tensor in tensors.values()],
        "values": torch.cat(parts),
    }


def unpacked(values: Mapping[str, Any]) -> dict[str, Tensor]:
    """Inverse of `packed`, where no tensor has many scalars."""
    sizes = [torch.Size(shape).numel() for shape in values["shapes"]]
    pieces = values["values"].split(sizes)
    named = zip(values["names"], values["shapes"], pieces, strict=True)
    return {name: piece.view(shape) for name, shape, piece in named}


def moved_policy(model: SourceModel, name: str) -> AdaptationPolicy:
    """A policy none of whose learned tensors is at its start; for the recording alone."""
    policy = build_policy(model, POLICIES[name])
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        named = {recorded_name(name): tensor for name, tensor in policy.named_parameters()}
        for key, tensor in sorted(named.items(), key=lambda item: recorded_place(item[0])):
            scale = next((value for part, value in NOISE.items() if part in key), OTHER_NOISE)
            tensor += scale * torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            if key == "gate.bias":
                tensor.fill_(GATE_BIAS[name])
    return policy


@dataclass(frozen=True)
class Streamed:
    """One method on the stream."""

    model: str
    argv: tuple[str, ...]
    policy: str | None = None
    dtype: torch.dtype = torch.float64
    ill_conditioned: bool = False

    def run(self, policies: Mapping[str, Any]) -> dict[str, Any]:
        """Outputs; ``policies`` are those of the file."""
        model, policy = build_model(self.model, self.dtype), None
        if self.policy is not None:
            policy = build_policy(model, POLICIES[self.policy])
            load_weights(policy, unpacked(policies[f"{self.model}/{self.policy}"]["weights"]))
        adapter = build_adapter(model, self.argv, policy)
        batches = [batch.to(self.dtype) for batch in stream()]
        outputs = [adapter.step(batch) for batch in batches]
        with adapter.frozen():
            frozen = adapter(batches[0])
        if self.ill_conditioned:
            logits = torch.stack([output.logits for output in outputs[:2]])
            return {"logits": logits, "updates": adapter.updates, "events": events_of(adapter)}
        losses = [output.loss for output in outputs if output.loss is not None]
        distances = [o.signals["shift_distance"] for o in outputs if "shift_distance" in o.signals]
        state = state_of(adapter)
        return {
            "logits": torch.stack([output.logits for output in outputs]),
            "frozen": frozen,
            "losses": torch.stack(losses) if losses else None,
            "distances": torch.stack(distances) if distances else None,
            "updated": [output.updated for output in outputs],
            "updates": adapter.updates,
            "events": events_of(adapter),
            "parameters": digests(adapter.parameters),
            "state": torch.stack([digest(tensor) for tensor in state]) if state else None,
        }


@dataclass(frozen=True)
class Trained:
    """One meta-training."""

    model: str
    argv: tuple[str, ...]
    dtype: torch.dtype = torch.float64

    def run(self, policies: Mapping[str, Any]) -> dict[str, Any]:
        """Meta-losses, selection and all weights."""
        trainer, losses = build_trainer(build_model(self.model, self.dtype), self.argv), []
        best = trainer.run(on_unroll=losses.append)
        return {
            "losses": torch.tensor(losses, dtype=torch.float64),
            "selection": torch.tensor(trainer.progress.selection, dtype=torch.float64),
            "best_epoch": trainer.progress.best_epoch,
            "skipped": trainer.progress.skipped,
            "price": torch.tensor(trainer.progress.lagrange_multiplier, dtype=torch.float64),
            "weights": packed(weights_of(trainer.policy)),
            "best": packed(weights_of(best)),
        }


@dataclass(frozen=True)
class Built:
    """The source model itself: a different build shows here."""

    model: str
    dtype: torch.dtype = torch.float64

    def run(self, policies: Mapping[str, Any]) -> dict[str, Any]:
        """Digests of its tensors, and logits of the clean images."""
        model = build_model(self.model, self.dtype)
        with torch.no_grad():
            logits = model(clean_images()).logits
        return {"tensors": digests(model.state_dict()), "logits": logits, "inputs": digest(torch.stack(stream()))}


Case = Streamed | Trained | Built

CASES: dict[str, Case] = {
    **{f"{model}/model": Built(model) for model in MODELS},
    **{
        f"{model}/{name}": Streamed(model, argv, policy, ill_conditioned=name in ILL_CONDITIONED)
        for model in MODELS
        for name, (argv, policy) in METHODS.items()
        if model == RESNET or policy not in RESNET_ONLY
    },
    **{
        f"{model}/training {name}": Trained(model, argv)
        for model in MODELS
        for name, argv in TRAININGS.items()
        if model == RESNET or name not in RESNET_ONLY
    },
    f"{RESNET}/policy default, float32": Streamed(RESNET, ("method=policy",), "default", torch.float32),
    f"{RESNET}/tent, float32": Streamed(RESNET, ("method=tent",), None, torch.float32),
}


def draw_policies() -> dict[str, Any]:
    """Learned tensors and settings of each policy, by model and name."""
    return {
        f"{model}/{name}": {
            "argv": list(argv),
            "config": repr(meta_config(argv)),
            "weights": packed(weights_of(moved_policy(build_model(model), name))),
        }
        for model in MODELS
        for name, argv in POLICIES.items()
        if model == RESNET or name not in RESNET_ONLY
    }


def record() -> dict[str, Any]:
    """All policies, and the outputs of all cases."""
    policies, outputs = draw_policies(), {}
    for name, case in CASES.items():
        begin = time.perf_counter()
        outputs[name] = case.run(policies)
        print(f"{time.perf_counter() - begin:6.1f} s  {name}", flush=True)
    return {"policies": policies, "outputs": outputs}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", action="store_true", help="write the file")
    parser.add_argument("--out", type=Path, default=FILE)
    arguments = parser.parse_args()
    if arguments.record:
        torch.save(record(), arguments.out)
        print(arguments.out, arguments.out.stat().st_size)
