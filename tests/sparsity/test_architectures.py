"""Whole networks: gradients as plain torch's in ``exact``, near them in codes, and far fewer bytes."""

import pytest
import timm
import torch
from torch import Tensor, nn

from metaopt.measure import MemoryMeter
from metaopt.models import SourceModel
from metaopt.sparsity import Rate, SavedActivations

from .cases import Checkpointed, GruClassifier, SharedWeights, cosine, gradients, only_norms_learn


class BatchStatistics(nn.Module):
    """A source model as adaptation calls it."""

    def __init__(self, name: str, **arguments: object) -> None:
        super().__init__()
        module = timm.create_model(name, num_classes=10, **arguments)
        normalises = any(isinstance(part, nn.BatchNorm2d) for part in module.modules())
        self.model = SourceModel(module, channels_last=normalises)

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images, batch_statistics=True).logits


def frozen_middle() -> nn.Module:
    model = only_norms_learn(BatchStatistics("cifar_resnet20"))
    for name, parameter in model.named_parameters():
        if "layer2" in name:
            parameter.requires_grad_(False)
    return model


# name -> model, shape of a batch, most bytes of the dense ones that 8-bit codes may hold
NETWORKS = {
    "resnet20": (lambda: only_norms_learn(BatchStatistics("cifar_resnet20")), (8, 3, 32, 32), 0.14),
    "resnet20, all learn": (lambda: BatchStatistics("cifar_resnet20"), (8, 3, 32, 32), 0.25),
    "resnet50": (lambda: only_norms_learn(BatchStatistics("resnet50")), (2, 3, 64, 64), 0.16),
    "mobilenetv3": (lambda: only_norms_learn(BatchStatistics("mobilenetv3_small_100")), (4, 3, 64, 64), 0.15),
    "convnext": (lambda: only_norms_learn(BatchStatistics("convnext_atto")), (2, 3, 64, 64), 0.16),
    "vit": (
        lambda: only_norms_learn(BatchStatistics("vit_tiny_patch16_224", img_size=64, depth=3)),
        (4, 3, 64, 64),
        0.27,
    ),
    "swin": (
        lambda: only_norms_learn(
            BatchStatistics("swin_tiny_patch4_window7_224", img_size=112, depths=(2, 2), num_heads=(3, 6))
        ),
        (2, 3, 112, 112),
        0.3,
    ),
    "gru": (lambda: only_norms_learn(GruClassifier()), (16, 12, 24), 0.6),
    "gru, all learn": (GruClassifier, (16, 12, 24), 0.6),
    "shared weights": (SharedWeights, (4, 8, 16, 16), 0.6),
    "frozen middle": (frozen_middle, (8, 3, 32, 32), 0.14),
    "checkpoint": (lambda: Checkpointed(reentrant=False), (4, 8, 16, 16), 0.6),
}


def build(name: str) -> tuple[nn.Module, Tensor, float]:
    torch.manual_seed(0)
    make, shape, share = NETWORKS[name]
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model, torch.rand(shape), share


def dense(model: nn.Module, batch: Tensor) -> tuple[list[Tensor], float]:
    with MemoryMeter([*model.parameters(), *model.buffers(), batch]) as meter:
        return gradients(model, batch), meter.peak_mib * 2**20


@pytest.mark.parametrize("name", NETWORKS)
def test_exact_memory_gives_the_gradients_of_plain_torch(name: str):
    model, batch, _ = build(name)
    wanted, held = dense(model, batch)
    context = SavedActivations(model, memory="exact")
    found = gradients(model, batch, context)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))
    assert context.peak_bytes <= 1.02 * held
    assert context.held_bytes == 0


@pytest.mark.parametrize("name", NETWORKS)
def test_codes_come_near_the_gradients_in_far_fewer_bytes(name: str):
    model, batch, share = build(name)
    wanted, held = dense(model, batch)
    context = SavedActivations(model, memory="compact")
    assert cosine(gradients(model, batch, context), wanted) > 0.995
    with context:
        loss = model(batch).square().sum()
        assert loss.requires_grad and context.held_bytes <= share * held
    del loss
    assert context.held_bytes == 0


def test_unfused_attention_is_computed_again():
    model, batch, _ = build("vit")
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    wanted, held = dense(model, batch)
    context = SavedActivations(model, memory="exact")
    found = gradients(model, batch, context)
    assert cosine(found, wanted) > 1 - 1e-9
    assert context.peak_bytes < held
    assert {record.kind: record.held_bytes for record in context.layers}["softmax"] == 0


def test_reentrant_checkpointing_goes_through():
    torch.manual_seed(0)
    model, batch = Checkpointed(reentrant=True), torch.rand(4, 8, 16, 16)
    model(batch).square().sum().backward()
    wanted = [parameter.grad for parameter in model.parameters()]
    model.zero_grad(set_to_none=True)
    with SavedActivations(model, memory="exact"):
        model(batch).square().sum().backward()
    for parameter, gradient in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_backward_may_come_after_the_context_and_twice():
    model, batch, _ = build("resnet20")
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with SavedActivations(model, memory="compact") as context:
        losses = [model(part).square().sum() for part in (batch, batch.flip(0))]
    first = torch.autograd.grad(losses[0], learning, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(losses[0], learning), strict=True))
    held = context.held_bytes
    torch.autograd.grad(losses[1], learning)
    assert 0 == context.held_bytes < held


def test_functional_call_with_other_tensors():
    model, batch, _ = build("vit")
    own = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    others = {name: parameter.detach().clone().requires_grad_() for name, parameter in own.items()}
    found = []
    for context in (None, SavedActivations(model, memory="exact")):
        if context is None:
            result = torch.func.functional_call(model, others, (batch,))
        else:
            with context:
                result = torch.func.functional_call(model, others, (batch,))
        found.append(torch.autograd.grad(result.square().sum(), list(others.values())))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
def test_resnet56_within_the_promised_bytes():
    model = only_norms_learn(BatchStatistics("cifar_resnet56"))
    batch = torch.rand(200, 3, 32, 32)
    for memory, rate, limit in (("exact", Rate(), 425), ("compact", Rate(8), 120), ("compact", Rate(3), 55)):
        context = SavedActivations(model, memory=memory, default=rate)
        gradients(model, batch, context)
        assert context.peak_bytes <= limit * 2**20
