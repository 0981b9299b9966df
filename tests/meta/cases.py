"""Tiny float64 networks, policies and tasks for the tests of unrolls."""

from collections.abc import Sequence
from typing import Any

import torch
from timm.models import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional

from metaopt.meta.evaluate import unrolled_loss
from metaopt.meta.meta_gradient import meta_gradient
from metaopt.meta.unroll import MetaBatch, MetaGradient, UnrollConfig
from metaopt.models import SourceModel
from metaopt.models.cifar_resnet import BasicBlock
from metaopt.objectives import WeightedObjective
from metaopt.optimizers.backends import build_backend
from metaopt.optimizers.mgg import GeneratorConfig, GradientGenerator
from metaopt.parameters import adapted_layout
from metaopt.policy import AdaptationPolicy
from metaopt.policy.part import Part
from metaopt.policy.parts.batch_statistics import BatchStatistics
from metaopt.types import Parameters, StepOutput

GRADIENTS = ("first_order", "full")
ALL_TERMS: dict[str, Any] = {"term_steps": None}
CLASSES = 4
LR = 0.05


class TinyResNet(nn.Module):
    """A convolution and two residual blocks, of ``width`` (even) and twice ``width`` channels, with BatchNorm."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.blocks = nn.Sequential(BasicBlock(width, width, 1), BasicBlock(width, 2 * width, 2))
        self.head = nn.Linear(2 * width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.blocks(functional.relu(self.bn1(self.conv1(x))))
        return self.head(hidden.mean(dim=(2, 3)))


def tiny_resnet(width: int = 4, dead_channel: bool = False, dtype: torch.dtype = torch.float64) -> SourceModel:
    """A random network; with ``dead_channel`` the gradients of one channel's weight and bias are exactly zero."""
    torch.manual_seed(0)
    module = TinyResNet(width)
    with torch.no_grad():
        for name, tensor in module.named_parameters():
            if "bn" in name:
                tensor.add_(0.2 * torch.randn_like(tensor))
        module.head.weight.mul_(3.0)  # predictions that are neither uniform nor certain
        if dead_channel:
            first = module.blocks[0]
            assert isinstance(first, BasicBlock)
            first.bn1.bias[0] = -50.0  # no ReLU ever opens
    return SourceModel(module.to(dtype)).requires_grad_(False)


def tiny_vit() -> SourceModel:
    torch.manual_seed(0)
    module = VisionTransformer(
        img_size=8, patch_size=4, embed_dim=8, depth=2, num_heads=2, mlp_ratio=2.0, num_classes=CLASSES
    )
    with torch.no_grad():
        for tensor in module.parameters():
            tensor.add_(0.2 * torch.randn_like(tensor))
    return SourceModel(module.double(), mean=(0.5,) * 3, std=(0.5,) * 3).requires_grad_(False)


MODELS = {"resnet": tiny_resnet, "vit": tiny_vit}


def images(seed: int, batch: int = 6, size: int = 8) -> Tensor:
    drawn = torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (0.3 + 0.7 * drawn) * torch.tensor([1.0, 0.6, 0.8], dtype=torch.float64).view(1, 3, 1, 1)


def task(steps: int, batch: int = 6, seed: int = 0, size: int = 8) -> list[MetaBatch]:
    """K + 1 batches with soft targets."""
    found = []
    for position in range(steps + 1):
        randomness = torch.Generator().manual_seed(1000 + seed + position)
        targets = torch.randn(batch, CLASSES, generator=randomness, dtype=torch.float64).mul(2).softmax(dim=1)
        found.append(MetaBatch(images(100 * seed + position, batch, size), targets))
    return found


def start(model: nn.Module) -> Parameters:
    return {name: tensor.detach() for name, tensor in adapted_layout(model).take(model).items()}


def policy_for(
    model: SourceModel,
    variant: str = "residual",
    *,
    terms: dict[str, float] | None = None,
    learned_objective: bool = True,
    seed: int = 0,
    parts: Sequence[Part] = (),
) -> AdaptationPolicy:
    """A float64 policy whose generator and objective are off their special start, on the batch's own statistics.

    Args:
        model: what it adapts.
        variant: of the generator.
        terms: weight of each term of the objective.
        learned_objective: whether these are learned.
        seed: of the generator.
        parts: beside batch statistics, or in their place.
    """
    torch.manual_seed(seed)
    names = adapted_layout(model).names
    objective = WeightedObjective(terms or {"entropy": 0.7, "diversity": 1.3}, learned=learned_objective)
    generator = GradientGenerator(GeneratorConfig(variant, lr=LR, hidden=4), names)
    policy = AdaptationPolicy("policy", objective, generator, [BatchStatistics(), *parts]).double()
    policy.prepare(model, lambda: images(77, 16), 8)
    with torch.no_grad():
        for tensor in generator.parameters():
            tensor.add_(0.1 * torch.randn_like(tensor))
    return policy


class TeacherLoss:
    """Cross-entropy with given targets: a meta-loss other than the inner loss."""

    own_objective = False

    def __call__(self, output: StepOutput, batch: MetaBatch) -> Tensor:
        assert batch.targets is not None
        return functional.cross_entropy(output.logits, batch.targets)


class OwnLoss:
    """The inner loss itself, whose backward pass serves both."""

    own_objective = True

    def __call__(self, output: StepOutput, batch: MetaBatch) -> Tensor:
        assert output.loss is not None
        return output.loss


LOSSES = {"teacher": TeacherLoss, "own": OwnLoss}


def relative_difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp_min(1e-300))


def take(
    policy: AdaptationPolicy, model: SourceModel, batches: list[MetaBatch], loss: str = "teacher", **settings: Any
) -> MetaGradient:
    backend, price = settings.pop("backend", "func"), settings.pop("lagrange_multiplier", 0.0)
    assert policy.rule is not None
    return meta_gradient(
        policy,
        model,
        start(model),
        None,
        batches,
        LOSSES[loss](),
        apply=build_backend(backend, policy.rule),
        config=UnrollConfig(**settings),
        generator=torch.Generator().manual_seed(0),
        lagrange_multiplier=price,
    )


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        difference = relative_difference(found[name], tensor)
        assert difference < tolerance, (name, difference)


def mean_loss(policy: AdaptationPolicy, model: SourceModel, batches: list[MetaBatch]) -> float:
    """Mean over the positions of the teacher's loss, by a plain run of the policy."""
    return float(torch.stack(unrolled_loss(policy, model, start(model), batches, TeacherLoss())).mean())
