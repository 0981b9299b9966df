r"""How a first-order unroll answers for a learned allocation.

The gradient of a normalisation layer's weight is g = Σ δ·x̂, with the gradient δ at the layer's output and the
normalised activation x̂. Kept at precision k, backward sees Q_k(x̂) in its place. So one forward and one backward pass
tell

    g_l(k) = Σ δ_l · Q_k(x̂_l)        for every layer l and every precision k of the menu,

and a soft choice p_lk of the head stands for the gradient Σ_k p_lk · g_l(k), which is differentiable in the head. What
a coarser x̂_l does to the gradients of layers upstream, through δ, is left out.

Rounding errs to either side, so that most of its harm is of second order, which a first-order meta-gradient does not
see. What it sees is the *noise* that these bring into the update u,

    ρ = Σ_l s_l · Σ_k p_lk · ‖g_l(k) − g_l‖² / ‖g_l‖²,        s_l = ‖u_l‖² / ‖u‖²,

whose price ``UnrollConfig.noise_price`` is added to the meta-loss: a layer that the learned step sizes move little may
be coarse.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from metaopt.activation_memory.allocation import AllocationState
from metaopt.activation_memory.distortion import as_kept
from metaopt.activation_memory.importance import learning_layers
from metaopt.activation_memory.layer_table import LayerTable
from metaopt.activation_memory.learned_precision import LearnedPrecision
from metaopt.activation_memory.precision import Precision
from metaopt.norm_layers import channels_first
from metaopt.types import Parameters


@dataclass(frozen=True)
class BudgetTask:
    """What a task asks of a learned allocation."""

    table: LayerTable  # of the model at the task's batch size
    budget: int  # bytes


@dataclass
class _Layer:
    """What a forward pass showed of one normalisation layer."""

    normalised: Tensor  # x̂, channels in dimension 1 or last
    output: Tensor  # of the normalisation, with its graph
    channels_first: bool
    permuted: bool  # whether the output has its channels in dimension 1, and x̂, as the operator saw it, last
    weight: Tensor | None
    bias: Tensor | None

    def weight_gradient(self, delta: Tensor, normalised: Tensor, shape: torch.Size) -> Tensor:
        """Σ δ·x̂ over all but the weight's own dimensions."""
        product = (delta.movedim(1, -1) if self.permuted else delta) * normalised
        if self.channels_first:
            return product.sum(dim=[dim for dim in range(product.ndim) if dim != 1])
        return product.sum(dim=list(range(product.ndim - len(shape))))

    def kept(self, precision: Precision) -> Tensor:
        """Q_k(x̂)."""
        x = self.normalised
        if self.channels_first:
            return as_kept(x, precision, self.weight, self.bias)
        return as_kept(x.reshape(-1, x.shape[-1]), precision, self.weight, self.bias).view_as(x)


@dataclass
class PrecisionProbe:
    """Watches one forward pass of the model."""

    model: nn.Module
    learning: dict[str, str]  # the weight of each learning layer, by the layer's name
    layers: dict[str, list[_Layer]] = field(default_factory=dict)

    @contextmanager
    def watching(self) -> Iterator["PrecisionProbe"]:
        """Inside it, forward passes are recorded."""
        with ExitStack() as hooks:
            for name, tensor in self.learning.items():
                if tensor.endswith("weight"):
                    self._watch(name, self.model.get_submodule(name), hooks)
            yield self

    def _watch(self, name: str, module: nn.Module, hooks: ExitStack) -> None:
        """Note what a layer normalises and gives; of layers that go on to an activation (timm's), what that takes."""
        between: list[Tensor] = []

        def entered(_child: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            if between:
                return None
            between.append(inputs[0])
            return (inputs[0].clone(), *inputs[1:])  # the activation may work in place

        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            output = between.pop() if between else output
            with torch.no_grad():
                found = _normalised(module, inputs[0])
            if found is not None and output.requires_grad:
                normalised, permuted = found
                first = isinstance(module, (_BatchNorm, nn.GroupNorm))
                weight, bias = (getattr(module, role, None) for role in ("weight", "bias"))
                self.layers.setdefault(name, []).append(_Layer(normalised, output, first, permuted, weight, bias))

        for child in module.children():
            hooks.callback(child.register_forward_pre_hook(entered).remove)
        hooks.callback(module.register_forward_hook(hook).remove)

    def errors(self, loss: Tensor, table: LayerTable, like: Parameters) -> dict[str, Tensor]:
        """g_l(k) − g_l of each learning layer for each precision of the table's menu, (R, *shape) by the layer's name.

        Args:
            loss: of the recorded pass; its graph stays.
            table: the layers; where one is unknown to it, its precision is nobody's choice, and it is left out.
            like: the adapted tensors.
        """
        names = [name for name in self.layers if name in table.names]
        outputs = [layer.output for name in names for layer in self.layers[name]]
        deltas = iter(torch.autograd.grad(loss, outputs, retain_graph=True, materialize_grads=True))
        found: dict[str, Tensor] = {}
        for name in names:
            shape = like[self.learning[name]].shape
            for layer in self.layers[name]:
                delta = next(deltas)
                each = [
                    layer.weight_gradient(delta, layer.kept(precision) - layer.normalised, shape)
                    for precision in table.menu
                ]
                found[name] = found.get(name, 0.0) + torch.stack(each)
        return found


@dataclass(frozen=True)
class Spoiled:
    """What soft choices of the precisions, (L, R), do to one step's gradient."""

    correction: Parameters  # Σ_k p_lk · (g_l(k) − g_l), to be added to the exact one; zero where nothing is known
    noise: dict[str, Tensor]  # Σ_k p_lk · ‖g_l(k) − g_l‖² / ‖g_l‖² by the name of the layer's weight, scalars

    @classmethod
    def by(
        cls,
        choices: Tensor,
        table: LayerTable,
        errors: dict[str, Tensor],
        learning: dict[str, str],
        gradients: Parameters,
    ) -> "Spoiled":
        """From the errors of :meth:`PrecisionProbe.errors`, and the exact gradients g."""
        correction = {name: torch.zeros_like(tensor) for name, tensor in gradients.items()}
        noise: dict[str, Tensor] = {}
        rows = {name: row for row, name in enumerate(table.names)}
        for name, error in errors.items():
            weight, chosen = learning[name], choices[rows[name]]
            correction[weight] = correction[weight] + torch.einsum("r,r...->...", chosen, error)
            size = gradients[weight].square().sum().clamp_min(torch.finfo(error.dtype).tiny)
            noise[weight] = torch.dot(chosen, error.flatten(1).square().sum(dim=1) / size)
        return cls(correction, noise)

    def in_update(self, updates: Parameters) -> Tensor:
        """ρ, scalar.

        Args:
            updates: u, what the rule made of the gradients.
        """
        sizes = {name: updates[name].detach().square().sum() for name in updates}
        total = torch.stack(list(sizes.values())).sum().clamp_min(torch.finfo(torch.float32).tiny)
        return torch.stack([sizes[name] / total * value for name, value in self.noise.items()]).sum()


def soft_choices(
    head: LearnedPrecision, task: BudgetTask, like: Parameters, state: AllocationState, scale: float
) -> Tensor:
    """p, (L, R), whose derivative counts ``scale`` times: it stands for that many steps."""
    choices = head.soft_choices(task.table, list(learning_layers(like)), state, task.budget)
    fixed = choices.detach()
    return fixed + scale * (choices - fixed)


def _normalised(module: nn.Module, x: Tensor) -> tuple[Tensor, bool] | None:
    """x̂ of a layer's input, and whether its channels were moved to the end for it; None for a kind of its own."""
    if isinstance(module, _BatchNorm):
        mean, var = module.running_mean, module.running_var
        return functional.batch_norm(x, mean, var, training=mean is None, eps=module.eps), False
    if isinstance(module, nn.GroupNorm):
        return functional.group_norm(x, module.num_groups, eps=module.eps), False
    if not isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return None
    shape = list(module.normalized_shape)
    moved = len(shape) == 1 and x.ndim > 2 and channels_first(module, x)
    x = x.movedim(1, -1) if moved else x
    if isinstance(module, nn.LayerNorm):
        return functional.layer_norm(x, shape, eps=module.eps), moved
    return functional.rms_norm(x, shape, eps=module.eps), moved
