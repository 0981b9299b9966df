"""Which tensors adapt."""

import pytest
import torch
from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d, LayerNorm2d, RmsNorm  # type: ignore[attr-defined]
from torch import Tensor, nn
from torch.func import functional_call
from torchvision.ops import FrozenBatchNorm2d

from metaopt.errors import ModelError
from metaopt.parameters import ParameterLayout, adapted_layout, detached, flatten, full_layout, norm_kind, unflatten


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        (nn.BatchNorm1d(4), "batch_norm"),
        (nn.BatchNorm2d(4), "batch_norm"),
        (nn.BatchNorm3d(4), "batch_norm"),
        (nn.SyncBatchNorm(4), "batch_norm"),
        (BatchNormAct2d(4), "batch_norm"),
        (nn.LayerNorm(4), "layer_norm"),
        (LayerNorm2d(4), "layer_norm"),
        (nn.GroupNorm(2, 4), "group_norm"),
        (nn.RMSNorm(4), "rms_norm"),
        (RmsNorm(4), "rms_norm"),
        (nn.Linear(4, 4), None),
        (nn.Identity(), None),
    ],
)
def test_each_normalisation_is_known_by_its_kind(module: nn.Module, kind: str | None) -> None:
    assert norm_kind(module) == kind
    if kind is not None:
        layout = adapted_layout(nn.Sequential(nn.Linear(4, 4), module))
        roles = [role for role in ("weight", "bias") if getattr(module, role, None) is not None]
        assert layout.names == tuple(f"1.{role}" for role in roles)
        assert [tensor.kind for tensor in layout.tensors] == [f"{kind}.{role}" for role in roles]


def test_a_class_of_ones_own_is_known_by_its_base() -> None:
    class MyNorm(nn.LayerNorm):
        pass

    class LlamaRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

    assert norm_kind(MyNorm(3)) == "layer_norm"
    assert adapted_layout(LlamaRMSNorm()).names == ("weight",)


@pytest.mark.parametrize("frozen", [FrozenBatchNorm2d(4), FrozenBatchNormAct2d(4)])
def test_frozen_batch_normalisation_is_refused_by_name(frozen: nn.Module) -> None:
    model = nn.Sequential(nn.LayerNorm(4), frozen)
    with pytest.raises(ModelError, match=rf"{type(frozen).__name__}.*replace it by torch.nn.BatchNorm2d"):
        adapted_layout(model)


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Linear(4, 4), nn.ReLU()),
        nn.BatchNorm2d(4, affine=False),
        nn.LayerNorm(4, elementwise_affine=False),
    ],
)
def test_a_model_with_nothing_to_adapt_is_refused(model: nn.Module) -> None:
    with pytest.raises(ModelError, match=rf"{type(model).__name__} has no normalisation layer with a weight or bias"):
        adapted_layout(model)


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.BatchNorm1d(4)
        self.bare = nn.LayerNorm(4, elementwise_affine=False)
        self.last = nn.LayerNorm(4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.bare(self.first(x)))


def test_names_kinds_depths_and_shapes_follow_the_model() -> None:
    layout = adapted_layout(Mixed())
    found = [(tensor.name, tensor.kind, tensor.depth, tensor.shape, tensor.numel) for tensor in layout.tensors]
    assert found == [
        ("first.weight", "batch_norm.weight", 0.0, (4,), 4),
        ("first.bias", "batch_norm.bias", 0.0, (4,), 4),
        ("last.weight", "layer_norm.weight", 1.0, (4,), 4),
    ]
    assert layout.numel == 12
    assert adapted_layout(nn.BatchNorm1d(4)).tensors[0].depth == 0.0


def test_a_layout_survives_as_primitives() -> None:
    layout = adapted_layout(Mixed())
    rows = layout.to_list()
    assert ParameterLayout.from_list(rows) == layout
    assert all(isinstance(value, str | float | list) for row in rows for value in row.values())


def test_it_takes_the_models_own_tensors() -> None:
    model = Mixed()
    taken = adapted_layout(model).take(model)
    assert taken["last.weight"] is model.last.weight
    assert list(taken) == ["first.weight", "first.bias", "last.weight"]


def test_a_layer_used_twice_is_listed_once() -> None:
    norm = nn.LayerNorm(4)
    model = nn.Sequential(norm, nn.Linear(4, 4), norm)
    assert adapted_layout(model).names == ("0.weight", "0.bias")


def test_a_weight_shared_by_two_layers_is_listed_once_and_moves_both() -> None:
    model = nn.Sequential(nn.LayerNorm(4), nn.LayerNorm(4)).double()
    model[1].weight = model[0].weight  # type: ignore[union-attr]
    layout = adapted_layout(model)
    assert layout.names == ("0.weight", "0.bias", "1.bias")
    doubled = {name: 2 * tensor if name == "0.weight" else tensor for name, tensor in layout.take(model).items()}
    x = torch.randn(3, 4, dtype=torch.float64)
    hidden = functional_call(model, doubled, (x,))
    expected = 2 * nn.functional.layer_norm(2 * nn.functional.layer_norm(x, (4,)), (4,))
    torch.testing.assert_close(hidden, expected)


def test_a_weight_shared_with_another_kind_of_module_is_found() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4))
            self.norm = nn.LayerNorm(4)
            self.norm.weight = self.scale

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x) * self.scale

    model = Tied()
    layout = adapted_layout(model)
    assert layout.names == ("norm.weight", "norm.bias")
    assert layout.take(model)["norm.weight"] is model.scale
    three = {"norm.weight": torch.full((4,), 3.0), "norm.bias": torch.zeros(4)}
    x = torch.randn(2, 4)
    torch.testing.assert_close(functional_call(model, three, (x,)), 9 * nn.functional.layer_norm(x, (4,)))


def test_flatten_and_unflatten_are_inverse_and_differentiable() -> None:
    tensors = {"a": torch.randn(2, 3), "b": torch.randn(()), "c": torch.randn(0), "d": torch.randn(3, 2).T}
    flat = flatten(tensors)
    assert flat.shape == (13,)
    back = unflatten(flat, tensors)
    assert list(back) == list(tensors)
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())
    flat = flat.requires_grad_()
    (slope,) = torch.autograd.grad(unflatten(flat, tensors)["b"], flat)
    assert slope.tolist() == [0.0] * 6 + [1.0] + [0.0] * 6


def test_detached_tensors_are_leaves() -> None:
    source = torch.ones(2, requires_grad=True)
    cut = detached({"a": 2 * source})["a"]
    assert cut.is_leaf and cut.requires_grad and cut.tolist() == [2.0, 2.0]


def test_the_full_layout_is_every_parameter_once() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 4, bias=False))
    net.append(net[1])  # used twice
    layout = full_layout(net)
    assert layout.names == ("0.weight", "0.bias", "1.weight", "1.bias", "3.weight")
    kinds = ["Conv2d.weight", "Conv2d.bias", "batch_norm.weight", "batch_norm.bias", "Linear.weight"]
    assert [tensor.kind for tensor in layout.tensors] == kinds
    assert [tensor.depth for tensor in layout.tensors] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert layout.numel == sum(tensor.numel() for tensor in net.parameters())
