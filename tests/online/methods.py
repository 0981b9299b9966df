"""The methods that the adapter's tests run over, and what they expect of each."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from metaopt.models import SourceModel
from metaopt.online import OnlineAdapter
from metaopt.optimizers.mgg import VARIANTS
from metaopt.policy import AdaptationPolicy, MethodConfig, build_method
from metaopt.policy.untrained import DEFAULT_PARTS

from ..tiny import BARE, random_images, tiny_model, tiny_policy

BATCHES = [random_images(8, seed) for seed in range(8)]
# Two of the batches count as a new domain, which brings some of the start back.
# Random images look skewed to a random network: none counts as such here, and every second batch is looked at.
PARTS = {
    **DEFAULT_PARTS,
    "restoration": {"threshold": 1.2},
    "class_skew": {"every": 2, "evenness": 1e-9, "slope": 1e9},
}
SKEWED = {**PARTS, "class_skew": {"every": 2, "evenness": 0.999, "slope": 1e-9}}


def method(name: str, update: str, objective: dict[str, float]) -> AdaptationPolicy:
    return build_method(MethodConfig(name, update=update, lr=1e-2, objective=objective, parts=dict(BARE)))


def default_policy(gate_bias: float | None = None) -> AdaptationPolicy:
    """What meta-training learns by default; with a bias it has a learned gate too."""
    policy = tiny_policy(tiny_model(), parts=PARTS if gate_bias is None else {**PARTS, "update_gate": True})
    if gate_bias is not None:
        policy.part("update_gate").bias.data.fill_(gate_bias)
    return policy


DEFAULT: dict[str, Callable[[], AdaptationPolicy]] = {
    "default": default_policy,
    "default with gate": lambda: default_policy(gate_bias=0.8),
    "default, skewed": lambda: tiny_policy(tiny_model(), parts=SKEWED),
}
UPDATING: dict[str, Callable[[], AdaptationPolicy]] = {
    "tent": lambda: method("tent", "adam", {"entropy": 1.0}),
    "sgd": lambda: method("sgd", "sgd", {"slr": 1.0, "diversity": 1.0}),
    "two views": lambda: method("two views", "adam", {"filtered": 1.0, "consistency": 1.0}),
    **{variant: lambda variant=variant: tiny_policy(tiny_model(), variant) for variant in VARIANTS},
    **DEFAULT,
}
METHODS = {
    "source": lambda: build_method(MethodConfig("source")),
    "bn": lambda: build_method(MethodConfig("bn", parts=dict(BARE))),
    **UPDATING,
}
UPDATES = {name: 8 if name in UPDATING else 0 for name in METHODS} | {"default with gate": 5}
"""Batches of the eight that are updated on."""
QUIET: dict[str, dict[str, int]] = {
    **{name: {"nonfinite": 0} for name in METHODS},
    **{name: {"nonfinite": 0, "restored": 0, "anchored": 0, "skewed": 0} for name in DEFAULT},
    "default with gate": {"nonfinite": 0, "restored": 0, "skipped": 0, "anchored": 0, "skewed": 0},
}
"""What is counted of each method, before anything happened."""


def restored(adapter: OnlineAdapter, distance: Tensor | None) -> dict[str, Tensor]:
    """The adapted tensors after what comes back of the start before a batch at that distance."""
    restoration, tensors = adapter.policy.part("restoration"), adapter.parameters
    if restoration is None:
        return tensors
    assert distance is not None
    strength = restoration.strength(distance)
    return {name: torch.lerp(tensor, adapter.start[name], strength) for name, tensor in tensors.items()}


def prediction(adapter: OnlineAdapter, net: nn.Module, images: Tensor) -> Tensor:
    """What a plain network predicts with the method's statistics and correction, which no weights can hold."""
    statistics, balance = adapter.policy.part("batch_statistics"), adapter.policy.part("class_balance")
    counts = None if statistics is None else statistics.counts()
    if counts is None:
        logits = net.train(statistics is not None)(images)
    else:
        logits = SourceModel(net.eval())(images, batch_statistics=True, prior=counts).logits
    return (logits if balance is None else balance.corrected(logits)).detach()


def new_adapter(method: str) -> OnlineAdapter:
    return OnlineAdapter(tiny_model(), METHODS[method]())


def run(adapter: OnlineAdapter, batches: list[Tensor] = BATCHES) -> list[Tensor]:
    return [adapter(images) for images in batches]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def bits(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}
