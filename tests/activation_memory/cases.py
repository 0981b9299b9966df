"""Networks and operators that the tests of the engine share."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from metaopt.activation_memory import SavedActivations
from metaopt.objectives.entropy import softmax_entropy
from metaopt.parameters import norm_kind


class Wrap(nn.Module):
    """A function as a module, so that the engine sees it run."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


def only_norms_learn(model: nn.Module) -> nn.Module:
    model.requires_grad_(False)
    for module in model.modules():
        if norm_kind(module) is not None:
            module.requires_grad_(True)
    return model


def gradients(model: nn.Module, batch: Tensor, context: SavedActivations | None = None) -> list[Tensor]:
    """Gradients of the predictions' entropy; backward runs inside of the context."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if context is None:
        return list(torch.autograd.grad(softmax_entropy(model(batch)).mean(), learning))
    with context:
        return list(torch.autograd.grad(softmax_entropy(model(batch)).mean(), learning))


def cosine(first: list[Tensor], second: list[Tensor]) -> float:
    flat = [torch.cat([tensor.reshape(-1).double() for tensor in tensors]) for tensors in (first, second)]
    return float(F.cosine_similarity(flat[0], flat[1], dim=0))


class GruClassifier(nn.Module):
    """A recurrent network with LayerNorm, for sequences (B, T, 24)."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.gru = nn.LayerNorm(24), nn.GRU(24, 32, num_layers=2, batch_first=True)
        self.after, self.head = nn.LayerNorm(32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.after(self.gru(self.before(x))[0]).mean(dim=1))


class SharedWeights(nn.Module):
    """One normalised block used three times, on maps (B, 8, H, W)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = x + F.relu(self.norm(self.conv(x)))
        return self.head(x.mean(dim=(2, 3)))


class Checkpointed(nn.Module):
    """Blocks of which the middle one is recomputed in backward."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU()) for _ in range(3)
        )
        self.head, self.reentrant = nn.Linear(8, 10), reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[0](x)
        middle = checkpoint(self.blocks[1], x, use_reentrant=self.reentrant)
        assert isinstance(middle, Tensor)
        return self.head(self.blocks[2](middle).mean(dim=(2, 3)))


@dataclass(frozen=True)
class Operator:
    """A function of a few tensors, large enough that the engine does not leave them as they are."""

    name: str
    function: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]
    twice: bool = True  # whether torch has its second derivative


MAPS, TOKENS, HEADS = (2, 4, 4, 4), (2, 8, 8), (2, 2, 8, 4)

OPERATORS = (
    Operator("batch_norm", lambda x, w, b: F.batch_norm(x, None, None, w, b, True), (MAPS, (4,), (4,))),
    Operator("batch_norm_relu", lambda x, w, b: F.batch_norm(x, None, None, w, b, True).relu_(), (MAPS, (4,), (4,))),
    Operator("batch_norm_silu", lambda x, w, b: F.silu(F.batch_norm(x, None, None, w, b, True)), (MAPS, (4,), (4,))),
    Operator("layer_norm", lambda x, w, b: F.layer_norm(x, (8,), w, b), (TOKENS, (8,), (8,))),
    Operator("group_norm", lambda x, w, b: F.group_norm(x, 2, w, b), (MAPS, (4,), (4,))),
    Operator("rms_norm", lambda x, w: F.rms_norm(x, (8,), w, 1e-6), (TOKENS, (8,))),
    Operator("relu", lambda x: F.relu(x), (MAPS,)),
    Operator("relu6", lambda x: F.relu6(4 * x), (MAPS,)),
    Operator("leaky_relu", lambda x: F.leaky_relu(x, 0.1), (MAPS,)),
    Operator("hardsigmoid", lambda x: F.hardsigmoid(4 * x), (MAPS,), twice=False),
    Operator("hardswish", lambda x: F.hardswish(4 * x), (MAPS,)),
    Operator("gelu", lambda x: F.gelu(x), (TOKENS,)),
    Operator("gelu_tanh", lambda x: F.gelu(x, approximate="tanh"), (TOKENS,)),
    Operator("silu", lambda x: F.silu(x), (TOKENS,)),
    Operator("mish", lambda x: F.mish(x), (TOKENS,)),
    Operator("sigmoid", lambda x: torch.sigmoid(x), (TOKENS,)),
    Operator("conv2d", lambda x, w: F.conv2d(x, w, padding=1), (MAPS, (4, 4, 3, 3))),
    Operator("linear", lambda x, w, b: F.linear(x, w, b), (TOKENS, (8, 8), (8,))),
    Operator("update_gate", lambda x, g: x * g.sigmoid(), (MAPS, (2, 4, 1, 1))),
    Operator("max_pool2d", lambda x: F.max_pool2d(x, 3, 2, 1), (MAPS,)),
    Operator("avg_pool2d", lambda x: F.avg_pool2d(x, 2), (MAPS,)),
    Operator("adaptive_avg_pool2d", lambda x: F.adaptive_avg_pool2d(x, 2), (MAPS,)),
    Operator("softmax", lambda x: x.softmax(dim=-1), (TOKENS,)),
    Operator("attention", lambda q, k, v: (q @ k.transpose(-2, -1) * 0.5).softmax(dim=-1) @ v, (HEADS,) * 3),
    Operator("sdpa", lambda q, k, v: F.scaled_dot_product_attention(q, k, v), (HEADS,) * 3),
    Operator("unknown", lambda x: x.square().cumsum(dim=-1).sqrt(), (TOKENS,)),
)
