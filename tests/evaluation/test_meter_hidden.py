"""The byte meter against what hides from saved-tensor hooks: attributes, packed objects, recomputation."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

from metaopt.evaluation import MemoryMeter
from metaopt.evaluation.meter import MIB

N = 1000  # floats, 4000 bytes


@dataclass
class Record:
    kept: Tensor


class Slotted:
    __slots__ = ("__private", "kept")

    def __init__(self, kept: Tensor) -> None:
        self.kept = kept
        self.__private = kept


HIDING_PLACES: dict[str, Callable[[Tensor], Any]] = {
    "attribute": lambda kept: kept,
    "list in dict": lambda kept: {"a": [1, kept]},
    "key": lambda kept: {kept: 1},
    "dataclass": Record,
    "slots": Slotted,
    "closure": lambda kept: lambda: kept,
    "default": lambda kept: eval("lambda x=kept: x", {"kept": kept}),
    "partial": lambda kept: functools.partial(torch.add, kept),
    "method": lambda kept: Record(kept).__eq__,
    "array": lambda kept: kept.numpy().copy(),
    "bytes": lambda kept: kept.numpy().tobytes(),
    "its own memory": lambda kept: kept.numpy()[3:],
    "view": lambda kept: kept.view(10, -1)[:, 3],
}


def hiding(place: Callable[[Tensor], Any]) -> Callable[[Tensor], Tensor]:
    class Hiding(torch.autograd.Function):
        """Says that it saves nothing."""

        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            ctx.x = place(x.detach().clone())
            return 2 * x

        @staticmethod
        def backward(ctx, *gradients: Tensor) -> Tensor:
            return 2 * gradients[0]

    return Hiding.apply  # type: ignore[return-value]


def held(meter: MemoryMeter) -> int:
    return round(meter.held_mib * MIB)


def peak(meter: MemoryMeter) -> int:
    return round(meter.peak_mib * MIB)


@pytest.mark.parametrize("place", HIDING_PLACES)
def test_a_clone_hidden_on_ctx_is_caught(place: str) -> None:
    x = torch.randn(N, requires_grad=True)
    with MemoryMeter([x]) as meter:
        y = hiding(HIDING_PLACES[place])(x).sum()
        assert held(meter) == 4 * N
        y.backward()
        assert held(meter) == 4 * N  # backward frees what was saved, not what the node itself refers to
        del y
        assert held(meter) == 0
    assert peak(meter) == 4 * N
    assert x.grad is not None and torch.equal(x.grad, torch.full((N,), 2.0))


@pytest.mark.parametrize(
    "backward", [lambda y: torch.autograd.backward(y, torch.ones(N)), lambda y: y.sum().backward()]
)
def test_it_is_caught_by_the_backward_pass_at_the_latest(backward: Callable[[Tensor], None]) -> None:
    x = torch.randn(N, requires_grad=True)
    with MemoryMeter([x]) as meter:
        backward(hiding(HIDING_PLACES["attribute"])(x))
    assert peak(meter) == 4 * N


def test_a_parameter_or_the_batch_on_ctx_does_not_count() -> None:
    x, weight = torch.randn(N, requires_grad=True), nn.Parameter(torch.randn(N))
    with MemoryMeter([x]) as meter:
        hiding(lambda _: (x[3:], weight, nn.Linear(10, 10)))(x).sum().backward()
    assert peak(meter) == 0


def test_an_attribute_set_in_backward_counts_and_one_deleted_there_does_not() -> None:
    class Late(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            ctx.early = x.detach().clone()
            return 2 * x

        @staticmethod
        def backward(ctx, *gradients: Tensor) -> Tensor:
            del ctx.early
            ctx.late = [gradients[0].repeat(3)]
            return 2 * gradients[0]

    x = torch.randn(N, requires_grad=True)
    with MemoryMeter([x]) as meter:
        y: Tensor = Late.apply(x).sum()  # type: ignore[union-attr]
        assert held(meter) == 4 * N
        y.backward()
        assert held(meter) == peak(meter) == 12 * N


def test_the_graph_of_the_second_order_is_searched_too() -> None:
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            ctx.x = x.detach() + 0
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx, *gradients: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            doubled: Tensor = hiding(HIDING_PLACES["attribute"])(x)
            return gradients[0] * doubled

    x = torch.randn(N, requires_grad=True)
    with MemoryMeter([x]) as meter:
        y: Tensor = Square.apply(x).sum()  # type: ignore[union-attr]
        assert held(meter) == 4 * N
        (slope,) = torch.autograd.grad(y, x, create_graph=True)
        # Beside the two hidden clones, the product saves the constant one of its factors, expanded from a scalar.
        assert held(meter) == 4 * N + 4 * N + 4
        (curvature,) = torch.autograd.grad(slope.sum(), x)
    assert torch.equal(curvature, torch.full((N,), 2.0))


def test_gradients_under_the_meter_and_foreign_hooks_are_right_in_both_orders() -> None:
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor) -> Tensor:
        with saved_tensors_hooks(lambda t: [t.detach().clone()], lambda packed: packed[0]):
            return (hiding(HIDING_PLACES["list in dict"])(x).sin() * x.exp()).sum()

    with MemoryMeter():
        assert gradcheck(function, x)
    with save_on_cpu(), MemoryMeter():  # double backward needs hooks that keep the graph
        assert gradgradcheck(lambda x: hiding(HIDING_PLACES["attribute"])(x).sin() * x.exp(), x)


class Codec:
    """Packs into half precision; what it packed of one storage it packs once."""

    def __init__(self) -> None:
        self.known: dict[int, Record] = {}

    def pack(self, tensor: Tensor) -> tuple[Record, int]:
        return self.known.setdefault(tensor.data_ptr(), Record(tensor.detach().half())), 7

    def unpack(self, packed: tuple[Record, int]) -> Tensor:
        return packed[0].kept.float()


@pytest.mark.parametrize("around", [True, False], ids=["around the meter", "inside the meter"])
def test_of_a_packed_tensor_the_packed_form_counts(around: bool) -> None:
    x = torch.randn(N, requires_grad=True)
    codec = Codec()
    hooks, meter = saved_tensors_hooks(codec.pack, codec.unpack), MemoryMeter([x])
    with hooks if around else meter, meter if around else hooks:
        y = x.exp()
        z = y.sin() + y.cos()  # both save y, which exp has saved already: packed once
        codec.known.clear()
        del y
        assert held(meter) == 2 * N
        z.sum().backward()
        assert held(meter) == 0
    # Backward of the two unpacks the one tensor for each in turn.
    assert peak(meter) == 2 * N + 4 * N


def test_what_a_hook_keeps_elsewhere_counts_once_backward_runs() -> None:
    x = torch.randn(N, requires_grad=True)
    shelf: list[Tensor] = []

    def pack(tensor: Tensor) -> int:
        shelf.append(tensor.detach())
        return len(shelf) - 1

    with MemoryMeter([x]) as meter, saved_tensors_hooks(pack, lambda index: shelf[index]):
        y = x.exp().sin().exp()
        y.sum().backward()
        assert held(meter) == 2 * 4 * N  # the two outputs of exp, one of which is the input of sin
        del y
        shelf.clear()
        assert held(meter) == 0
    assert peak(meter) == 2 * 4 * N


def test_what_unpacking_leaves_in_the_packed_object_counts() -> None:
    x = torch.randn(N, requires_grad=True)

    def unpack(packed: dict[str, Tensor]) -> Tensor:
        packed["dense"] = packed["half"].float()
        return packed["dense"]

    with MemoryMeter([x]) as meter, saved_tensors_hooks(lambda tensor: {"half": tensor.half()}, unpack):
        y = x.exp().sum()
        y.backward(retain_graph=True)
        assert held(meter) == 6 * N
        y.backward()
        assert held(meter) == 0


def test_an_object_that_is_filled_when_the_operator_is_done_counts_as_filled() -> None:
    x = torch.randn(N, requires_grad=True)
    late: list[Record] = []

    def pack(tensor: Tensor) -> Record:
        late.append(Record(tensor.detach()))
        return late[-1]

    with MemoryMeter([x]) as meter, saved_tensors_hooks(pack, lambda packed: packed.kept.float()):
        y = x.exp()
        late.pop().kept = y.detach().half()  # functions that do not build the graph come before the object is settled
        z = y.sum()
        del y
        assert held(meter) == 2 * N
        assert peak(meter) == 2 * N
        z.backward()
        assert held(meter) == 0
    assert peak(meter) == 2 * N + 4 * N  # what was unpacked counts until it has been used
