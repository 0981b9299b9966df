"""Run in a process of its own by test_resident_memory.py: resident set size beside what the meter says.

The numbers are comparable only where freed memory goes back to the system at once: see ``ENVIRONMENT`` there.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from metaopt.evaluation import MemoryMeter
from metaopt.models import load_source_model


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def entropy(logits: Tensor) -> Tensor:
    return torch.special.entr(logits.softmax(dim=1)).sum(dim=1).mean()


class Hiding(torch.autograd.Function):
    """Keeps a clone where nobody looks."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.notes = {"clone": [x.clone()]}
        return x.sin()

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> Tensor:
        return gradients[0] * ctx.notes["clone"][0].cos()


def build(case: str, name: str, batch: int) -> tuple[nn.Module, Tensor, Callable[[], Tensor]]:
    torch.manual_seed(0)
    model = load_source_model(name, channels_last=False)
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(isinstance(module, nn.BatchNorm2d))
    images = torch.rand(batch, 3, 32, 32)

    def forward(x: Tensor) -> Tensor:
        return model(x, batch_statistics=True).logits

    def hiding(x: Tensor) -> Tensor:
        scale = model.get_parameter("module.bn1.weight").mean()
        return Hiding.apply(x.repeat(1, 16, 1, 1) * scale).mean(dim=(1, 2, 3)) + forward(x).sum(dim=1)  # type: ignore[union-attr]

    runs = {
        "dense": lambda: entropy(forward(images)),
        "checkpoint": lambda: entropy(checkpoint(forward, images, use_reentrant=False)),  # type: ignore[arg-type]
        "hiding": lambda: hiding(images).square().mean(),
    }
    return model, images, runs[case]


def measure(case: str, name: str, batch: int) -> dict[str, float]:
    model, images, forward = build(case, name, batch)
    forward().backward()  # warms up: libraries, thread pools, gradients
    before = resident_mib()
    peak = 0.0

    def after_first_layer(*_: object) -> None:
        nonlocal peak
        peak = max(peak, resident_mib() - before)

    with MemoryMeter([images], model=model) as meter:
        loss = forward()
        after_forward, held = resident_mib() - before, meter.held_mib
        # The first layer that backward comes to: what is recomputed has been recomputed after it.
        waiting = [loss.grad_fn]
        while waiting:
            node = waiting.pop()
            if node is not None and node.name() == "AddmmBackward0":
                node.register_hook(after_first_layer)
            elif node is not None:
                waiting.extend(previous for previous, _ in node.next_functions)
        loss.backward()
    return {"held": held, "after_forward": after_forward, "peak_held": meter.peak_mib, "in_backward": peak}


if __name__ == "__main__":
    cases, model_name, batch_size = sys.argv[1].split(","), sys.argv[2], int(sys.argv[3])
    print(json.dumps({case: measure(case, model_name, batch_size) for case in cases}))
