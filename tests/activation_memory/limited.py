"""Run in a process of its own by test_hard_limit.py: one Tent step under a hard limit on the process's memory.

Ends with 0 when the step was finished, with 3 when the allocator refused. Prints the gradient's norm.
"""

import contextlib
import resource
import sys
from pathlib import Path

import torch
from torch import nn

from metaopt.activation_memory import SavedActivations  # pyright: ignore[reportMissingImports]
from metaopt.models import SourceModel, load_source_model

REFUSED = 3


def data_bytes() -> int:
    """Bytes that RLIMIT_DATA counts now: private writable mappings."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmData:")[1].split()[0]) * 1024


def step(model: SourceModel, images: torch.Tensor, memory: str) -> float:
    keeping = contextlib.nullcontext() if memory == "dense" else SavedActivations(model, memory=memory)
    with keeping:
        logits = model(images, batch_statistics=True).logits
    loss = torch.special.entr(logits.softmax(dim=1)).sum(dim=1).mean()
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(loss, learned)
    return float(torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt())


def main(memory: str, mib: int) -> int:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = load_source_model("cifar_resnet20", channels_last=False)
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(isinstance(module, nn.BatchNorm2d))
    images = torch.rand(200, 3, 32, 32)
    step(model, images[:2], memory)  # loads libraries and starts threads
    limit = data_bytes() + mib * 2**20
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    try:
        print(step(model, images, memory))
    except RuntimeError as error:
        if "allocate memory" not in str(error):
            raise
        return REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
