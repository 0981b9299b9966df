"""Tiny networks, images and settings that the tests of the policy, of meta-training and of deployment share."""

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from metaopt import registry
from metaopt.data import ImageSet, load_digits, to_float
from metaopt.meta import MetaTrainConfig
from metaopt.models import SourceModel
from metaopt.objectives.discrepancy import Discrepancy
from metaopt.online import OnlineAdapter
from metaopt.optimizers.mgg import GeneratorConfig
from metaopt.policy import AdaptationPolicy, SourceRecord, new_policy
from metaopt.policy.part import Part
from metaopt.types import SourceStatistics

SIDE = 16  # pixels
CLASSES = 10


class TinyNet(nn.Module):
    """Two strided convolutions with batch normalisation and one linear layer."""

    def __init__(self, classes: int = CLASSES, width: int = 8) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = (
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(2 * width),
        )
        self.linear = nn.Linear(2 * width * (SIDE // 8) ** 2, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())).relu()
        return self.linear(functional.max_pool2d(x, 2).flatten(1))


def tiny_net(seed: int = 0, classes: int = CLASSES, dtype: torch.dtype = torch.float32) -> TinyNet:
    """Untrained, with affine tensors and running statistics that are not the neutral ones."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = TinyNet(classes)
        for norm in (net.bn1, net.bn2):
            assert norm.running_mean is not None and norm.running_var is not None
            for tensor, centre in (
                (norm.weight, 1.0),
                (norm.bias, 0.0),
                (norm.running_var, 0.3),
                (norm.running_mean, 0),
            ):
                tensor.data.copy_(centre + 0.1 * torch.rand_like(tensor))
    return net.to(dtype).eval()


def batch_normalised() -> TinyNet:
    """The same in float64 and by plain torch, for steps by hand: BatchNorm by the batch, its buffers gone."""
    net = tiny_net(dtype=torch.float64).train()
    for norm in (net.bn1, net.bn2):
        norm.track_running_stats, norm.running_mean, norm.running_var = False, None, None
    return net


def entropies(logits: Tensor) -> Tensor:
    """Of each prediction, (B,) nats."""
    return -(logits.softmax(dim=1) * logits.log_softmax(dim=1)).sum(dim=1)


def assert_goes_on(adapters: Callable[[], OnlineAdapter], stream: list[Tensor], cut: int, path: Path) -> OnlineAdapter:
    """Saved after ``cut`` batches and loaded by another adapter, a stream goes on bit for bit; gives that adapter."""
    whole, first, second = (adapters() for _ in range(3))
    expected = [whole(images) for images in stream]
    found = [first(images) for images in stream[:cut]]
    first.save(path)
    second.load(path)
    found += [second(images) for images in stream[cut:]]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert second.events == whole.events
    return second


def tiny_model(seed: int = 0, classes: int = CLASSES, dtype: torch.dtype = torch.float32) -> SourceModel:
    """An untrained source model."""
    return SourceModel(tiny_net(seed, classes, dtype))


def random_images(count: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Noise of varying brightness, (count, 3, 16, 16) in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    brightness = torch.rand(count, 3, 1, 1, generator=generator, dtype=torch.float64)
    noise = torch.rand(count, 3, SIDE, SIDE, generator=generator, dtype=torch.float64)
    return (0.5 * brightness + 0.5 * noise).to(dtype)


def small_digits(part: ImageSet) -> Tensor:
    """A part of the digits at 16x16."""
    return functional.avg_pool2d(to_float(part.images), 2)


@cache
def _trained_weights() -> dict[str, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net, part = TinyNet().train(), load_digits().source
        images, labels = small_digits(part), part.labels
        assert labels is not None
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
        for _ in range(6):
            for index in torch.randperm(len(images)).split(50):
                optimizer.zero_grad()
                functional.cross_entropy(net(images[index]), labels[index]).backward()
                optimizer.step()
    return net.state_dict()


def trained_model() -> SourceModel:
    """A source model that has learned the small digits; trained once a session, in about two seconds."""
    net = TinyNet()
    net.load_state_dict(_trained_weights())
    return SourceModel(net)


def tiny_config(**changes: object) -> MetaTrainConfig:
    """Meta-training of a few seconds at most."""
    values: dict[str, object] = {
        "batch_size": 16,
        "flip": False,
        "steps": 3,
        "epochs": 2,
        "unrolls": 2,
        "selection_tasks": 1,
        "deploy_step_scale": 1.0,
        "clean": 0.0,
        "alternating": 0.0,
        "mixed": 0.0,
    }
    return MetaTrainConfig(**{**values, **changes})  # type: ignore[arg-type]


BARE: Mapping[str, Any] = {"batch_statistics": True}
"""Parts of a policy that learns its generator and its objective alone."""


def tiny_policy(
    model: SourceModel,
    variant: str = "residual",
    objective: dict[str, float] | None = None,
    seed: int = 0,
    parts: Mapping[str, Any] = BARE,
) -> AdaptationPolicy:
    """A policy for the model, as if meta-trained: no learned tensor is at its start."""
    policy = new_policy(
        model,
        GeneratorConfig(variant=variant),
        objective or {"slr": 1.0, "diversity": 0.5, "discrepancy": 0.1},
        parts,
        seed=seed,
    )
    reference = next(model.parameters())
    policy.to(reference.dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in policy.parameters():
            tensor += 0.1 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)
    policy.prepare(model, lambda: random_images(32, seed=99, dtype=reference.dtype))
    policy.source = SourceRecord.of(model, policy.layout(policy.attach(model)))
    policy.training = {"epochs": 3, "selection": [0.5, 0.25]}
    return policy


def with_parts(policy: AdaptationPolicy, *parts: Part) -> AdaptationPolicy:
    """The same policy with these parts too, or in place of its own of their names, in the registry's order."""
    named = {part.name: part for part in (*policy.listed, *parts)}
    ordered = [named[name] for name in registry.PARTS if name in named]
    found = AdaptationPolicy(policy.method, policy.objective, policy.rule, ordered, policy.adapts, policy.seed)
    found.source, found.training = policy.source, policy.training
    return found


def statistics_of(policy: AdaptationPolicy) -> SourceStatistics | None:
    """What the objective compares features with."""
    assert policy.objective is not None
    term = policy.objective.named_terms["discrepancy"]
    assert isinstance(term, Discrepancy)
    return term.statistics
