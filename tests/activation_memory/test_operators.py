"""Every operator's gradient under the engine, with each input frozen in turn."""

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.attention import SDPBackend, sdpa_kernel

from metaopt.activation_memory import Precision, SavedActivations
from metaopt.errors import ConfigError

from .cases import OPERATORS, Operator, Wrap


@pytest.fixture(autouse=True)
def store_tiny_tensors_too(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("store", "activations", "linear", "attention", "norms"):
        monkeypatch.setattr(f"metaopt.activation_memory.{module}.SMALL", 1)


def inputs_of(case: Operator, frozen: int | None, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in case.shapes]
    # Away from the kinks of the piecewise functions, where a finite difference says nothing.
    inputs = [tensor + 0.02 * tensor.sign() for tensor in inputs]
    return [tensor.requires_grad_(index != frozen) for index, tensor in enumerate(inputs)]


CASES = [
    pytest.param(case, frozen, id=f"{case.name}-{'none' if frozen is None else frozen}")
    for case in OPERATORS
    for frozen in (None, *range(len(case.shapes) if len(case.shapes) > 1 else 0))
]


@pytest.mark.parametrize(("case", "frozen"), CASES)
def test_both_orders_are_right_with_exact_memory(case: Operator, frozen: int | None):
    context = SavedActivations(wrapped := Wrap(case.function), memory="exact")
    with context, sdpa_kernel(SDPBackend.MATH):
        assert gradcheck(wrapped, inputs_of(case, frozen), fast_mode=True)
        if case.twice:
            assert gradgradcheck(wrapped, inputs_of(case, frozen), fast_mode=True)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("case", "frozen"), CASES)
def test_exact_memory_gives_the_gradients_of_plain_torch(
    case: Operator, frozen: int | None, dtype: torch.dtype, layout: torch.memory_format
):
    inputs = inputs_of(case, frozen, dtype)
    inputs = [
        x.detach().contiguous(memory_format=layout).requires_grad_(x.requires_grad) if x.ndim == 4 else x
        for x in inputs
    ]
    learning = [tensor for tensor in inputs if tensor.requires_grad]
    wrapped = Wrap(case.function)
    plain = wrapped(*inputs)
    weights = torch.linspace(-1, 1, plain.numel(), dtype=torch.float64).view(plain.shape).to(dtype)
    wanted = torch.autograd.grad(plain, learning, weights)
    with SavedActivations(wrapped, memory="exact") as context:
        result = wrapped(*inputs)
    assert torch.equal(result, plain)
    found = torch.autograd.grad(result, learning, weights)
    for a, b in zip(found, wanted, strict=True):
        rtol, atol = {torch.float64: (1e-9, 1e-9), torch.float32: (1e-5, 1e-5)}.get(dtype, (0.05, 0.05))
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)
        assert a.stride() == b.stride()
    del result
    assert context.held_bytes == 0


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize(("case", "frozen"), CASES)
def test_codes_come_near_the_gradients_of_plain_torch(case: Operator, frozen: int | None, bits: int):
    inputs = inputs_of(case, frozen, torch.float32)
    learning = [tensor for tensor in inputs if tensor.requires_grad]
    wrapped = Wrap(case.function)
    plain = wrapped(*inputs)
    weights = torch.linspace(-1, 1, plain.numel()).view(plain.shape)
    wanted = torch.autograd.grad(plain, learning, weights)
    with SavedActivations(wrapped, memory="compact", default=Precision(bits=bits)):
        result = wrapped(*inputs)
        assert torch.equal(result, plain)
        found = torch.autograd.grad(result, learning, weights)
    for a, b in zip(found, wanted, strict=True):
        scale = float(b.abs().max()) + 1e-6
        torch.testing.assert_close(a, b, rtol=0, atol=scale * (0.05 if bits == 8 else 0.005))


@pytest.mark.parametrize("case", [case for case in OPERATORS if case.name in ("batch_norm", "gelu", "layer_norm")])
def test_second_derivatives_of_codes_are_refused_with_a_way_out(case: Operator):
    inputs = inputs_of(case, None, torch.float32)
    wrapped = Wrap(case.function)
    with SavedActivations(wrapped, memory="compact"):
        result = wrapped(*inputs)
    with pytest.raises(ConfigError, match=r"exact or dense: set one, or meta\.gradient=first_order"):
        torch.autograd.grad(result.sum(), inputs, create_graph=True)


@pytest.mark.parametrize("memory", ["exact", "compact"])
@pytest.mark.parametrize("case", OPERATORS, ids=lambda case: case.name)
def test_autocast_goes_on_as_without_the_engine(case: Operator, memory: str):
    inputs = inputs_of(case, None, torch.float32)
    wrapped = Wrap(case.function)
    found = []
    for context in (None, SavedActivations(wrapped, memory=memory)):
        with torch.autocast("cpu", torch.bfloat16):
            if context is None:
                result = wrapped(*inputs)
            else:
                with context:
                    result = wrapped(*inputs)
        weights = torch.linspace(-1, 1, result.numel()).view(result.shape).to(result.dtype)
        found.append((result, torch.autograd.grad(result, inputs, weights)))
    (plain, wanted), (result, compact) = found
    assert torch.equal(plain, result)
    for a, b in zip(compact, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0.06 * float(b.abs().max()) + 1e-6)


def test_dropout_keeps_a_bit_an_entry():
    wrapped = Wrap(lambda x: torch.nn.functional.dropout(x, 0.3))
    x = torch.randn(64, 1024, requires_grad=True)
    with SavedActivations(wrapped, memory="exact") as context:
        result = wrapped(x)
        held = context.held_bytes
        (found,) = torch.autograd.grad(result.sum(), x)
    torch.testing.assert_close(found, (result != 0) / 0.7)
    assert held == x.numel() // 8
