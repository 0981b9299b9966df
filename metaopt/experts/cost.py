"""What the experts cost, measured beside the same model without them."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from metaopt.evaluation import MemoryMeter, Stopwatch
from metaopt.experts.adapter import expert_layout, get_experts
from metaopt.models import SourceModel
from metaopt.parameters import adapted_layout, call_with


@dataclass(frozen=True)
class ExpertCosts:
    """Costs of a model with its experts and without, on one batch."""

    parameters: int  # scalars of experts and gates
    backbone_parameters: int
    flops: int  # of a forward pass, experts and all
    backbone_flops: int
    held_mib: float  # held by autograd after the forward pass, adapting norm affine, experts and gates
    backbone_held_mib: float  # the same, adapting norm affine alone, without experts
    latency_ratio: float  # forward pass with over without experts, median over pairs


def expert_costs(model: SourceModel, images: Tensor, *, batch_statistics: bool = False, pairs: int = 5) -> ExpertCosts:
    """Measure the experts of a model.

    Args:
        model: with experts attached; nothing about it changes.
        images: (B, 3, H, W) in [0, 1].
        batch_statistics: whether BatchNorm layers normalise by the batch.
        pairs: forward passes with and without experts that are timed in turn.

    Raises:
        ModelError: the model has no experts.
    """
    experts = get_experts(model)
    held_mib, flops = _held_and_flops(model, images, batch_statistics, with_experts=True)
    with experts.bypassed():
        backbone_held_mib, backbone_flops = _held_and_flops(model, images, batch_statistics, with_experts=False)
    return ExpertCosts(
        parameters=sum(parameter.numel() for parameter in experts.parameters()),
        backbone_parameters=sum(parameter.numel() for parameter in model.module.parameters()),
        flops=flops,
        backbone_flops=backbone_flops,
        held_mib=held_mib,
        backbone_held_mib=backbone_held_mib,
        latency_ratio=_latency_ratio(model, lambda: model(images, batch_statistics), pairs),
    )


def _held_and_flops(
    model: SourceModel, images: Tensor, batch_statistics: bool, *, with_experts: bool
) -> tuple[float, int]:
    from torch.utils.flop_counter import FlopCounterMode  # here, for it brings in Triton

    # Detached stand-ins: only what adapts may make autograd hold anything, whatever the model's own flags say.
    tensors = {name: tensor.detach() for name, tensor in model.named_parameters()}
    names = adapted_layout(model).names + (expert_layout(model).names if with_experts else ())
    swapped = {**tensors, **{name: tensors[name].requires_grad_() for name in names}}
    meter = MemoryMeter([*model.parameters(), *model.buffers(), images])
    with torch.enable_grad(), meter, FlopCounterMode(display=False) as counter:
        output = call_with(model, swapped, (images, batch_statistics))
    held = meter.held_mib  # while the output's graph is alive
    del output
    return held, counter.get_total_flops()


def _latency_ratio(model: SourceModel, forward: Callable[[], object], pairs: int) -> float:
    experts, device = get_experts(model), next(model.parameters()).device
    ratios: list[float] = []
    for _ in range(pairs + 1):
        watch = Stopwatch(device)
        with watch.step(), torch.no_grad():
            forward()
        with experts.bypassed(), watch.forward():
            forward()
        ratios.append(watch.step_ms[0] / watch.forward_ms[0])
    return statistics.median(ratios[1:])  # the first pair warms up
