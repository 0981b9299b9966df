"""Networks of every kind that the engine must know, small and with random weights, each with its images."""

from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from metaopt.models import load_source_model
from metaopt.parameters import adapted_layout, detached
from metaopt.types import Parameters


class Recurrent(nn.Module):
    """Rows of an image through a GRU, and a layer norm before the classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.norm, self.head = nn.GRU(96, 32, batch_first=True), nn.LayerNorm(32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        hidden, _ = self.gru(x.permute(0, 2, 1, 3).flatten(2))
        return self.head(self.norm(hidden).mean(dim=1))


class Shared(nn.Module):
    """One convolution and one norm used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.norm = nn.Conv2d(3, 16, 3, 2), nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(2):
            x = self.norm(self.conv(x)).relu_()
        return self.head(x.mean((2, 3)))


class Checkpointed(nn.Module):
    """A stage that is computed again in backward."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2), nn.GroupNorm(4, 16), nn.ReLU())
        self.stage = nn.Sequential(nn.Conv2d(16, 16, 3), nn.GroupNorm(4, 16), nn.SiLU())
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(self.stage, self.stem(x), use_reentrant=False)
        assert isinstance(x, Tensor)
        return self.head(x.mean((2, 3)))


class Grouped(nn.Module):
    """Residual blocks with GroupNorm, whose branches are joined in place."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 2)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU(), nn.Conv2d(16, 16, 1))
            for _ in range(3)
        )
        self.norm, self.head = nn.GroupNorm(2, 16), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x).add_(x)
        return self.head(self.norm(x).mean((2, 3)))


class Rooted(nn.Module):
    """Patches through gated blocks with RMSNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norms = nn.Conv2d(3, 32, 4, 4), nn.ModuleList(nn.RMSNorm(32) for _ in range(3))
        self.gates, self.values = (nn.ModuleList(nn.Linear(32, 32) for _ in range(2)) for _ in range(2))
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        for norm, gate, value in zip(self.norms, self.gates, self.values, strict=False):
            hidden = norm(x)
            x = x + nn.functional.silu(gate(hidden)) * value(hidden)
        return self.head(self.norms[-1](x).mean(dim=1))


class Pooled(nn.Module):
    """Batch normalisation, and the largest of each window."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inside, outside in ((3, 16), (16, 32)):
            layers += [nn.Conv2d(inside, outside, 3, padding=1), nn.BatchNorm2d(outside), nn.ReLU(), nn.MaxPool2d(2)]
        self.body, self.head = nn.Sequential(*layers), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


class Excitation(nn.Module):
    """Maps times a gate of their own means: what a pruned normalisation upstream no longer tells is kept here."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Conv2d(16, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x.mean((2, 3), keepdim=True)).sigmoid()


class Excited(nn.Module):
    """Blocks with squeeze and excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 16, 3, 2), nn.Linear(16, 10)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), Excitation())
            for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


def _timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, num_classes=10, **options)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "cifar_resnet20": (lambda: load_source_model("cifar_resnet20").module, 32),
    "resnet50": (_timm("resnet50"), 64),
    "mobilenetv3_small_100": (_timm("mobilenetv3_small_100"), 64),
    "convnext_atto": (_timm("convnext_atto"), 64),
    "vit_tiny": (_timm("vit_tiny_patch16_224", img_size=64, depth=3), 64),
    "swin_tiny": (_timm("swin_tiny_patch4_window7_224", img_size=56, window_size=7, depths=(1, 1, 1, 1)), 56),
    "gru": (Recurrent, 32),
    "grouped": (Grouped, 32),
    "rooted": (Rooted, 32),
    "pooled": (Pooled, 32),
    "excited": (Excited, 32),
    "shared": (Shared, 32),
    "checkpointed": (Checkpointed, 32),
}


def build(name: str, images: int = 4, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Parameters, Tensor]:
    """The network in ``eval()`` with BatchNorm on the batch's statistics, its adapted leaves, and images."""
    make, side = NETWORKS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net, batch = make().to(dtype).eval().requires_grad_(False), torch.rand(images, 3, side, side, dtype=dtype)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = module.running_var = None
    return net, detached(adapted_layout(net).take(net)), batch
