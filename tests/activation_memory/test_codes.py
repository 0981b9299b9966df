"""Codecs: what goes in comes out, in its own shape, type and memory order."""

import pytest
import torch
from torch import Tensor

from metaopt.activation_memory import Precision
from metaopt.activation_memory.bits import pack_codes, packed_bytes, unpack_codes
from metaopt.activation_memory.byte_counter import OUTSIDE, ByteCounter
from metaopt.activation_memory.codes import integers, mask
from metaopt.activation_memory.packs import half
from metaopt.activation_memory.sparse import largest, sparse
from metaopt.activation_memory.uniform import coded
from metaopt.errors import ConfigError

LAYOUTS = {
    "contiguous": lambda: torch.randn(3, 5, 7, 9),
    "channels_last": lambda: torch.randn(3, 5, 7, 9).contiguous(memory_format=torch.channels_last),
    "slice": lambda: torch.randn(3, 5, 14, 9)[:, :, ::2],
    "transposed": lambda: torch.randn(9, 7, 5, 3).transpose(0, 3).transpose(1, 2),
    "single row": lambda: torch.randn(1, 5, 700, 9),
    "many pieces": lambda: torch.randn(40, 16, 32, 32),
    "vector": lambda: torch.randn(1001),
}


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_of_any_width_come_back(bits: int):
    codes = torch.randint(0, 2**bits, (8 * 37,), dtype=torch.uint8)
    packed = torch.empty(packed_bytes(codes.numel(), bits), dtype=torch.uint8)
    pack_codes(codes.clone(), bits, packed, torch.empty_like(codes))
    assert packed.numel() == 37 * bits
    assert torch.equal(unpack_codes(packed, bits, torch.empty_like(codes), torch.empty_like(codes)), codes)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bits", [8, 6, 3])
def test_uniform_codes_err_by_half_a_bin_at_most(layout: str, bits: int):
    tensor = LAYOUTS[layout]()
    counter = ByteCounter()
    pack = coded(tensor, bits, (1,) if tensor.ndim == 4 else (), counter)
    found = pack.unpack()
    assert found.shape == tensor.shape and found.dtype == tensor.dtype
    assert (
        (found.is_contiguous(memory_format=torch.channels_last))
        == (tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last))
        or tensor.ndim != 4
        or tensor.shape[0] == 1
    )
    error = (found - tensor).abs()
    low, high = pack.offset - pack.scale / 2, pack.offset + (2**bits - 0.5) * pack.scale
    rounding = 1e-3 * pack.scale  # of the edges themselves
    inside = (tensor >= low - rounding) & (tensor <= high + rounding)
    assert float((error / pack.scale)[inside].max()) <= 0.502
    assert bits < 6 or bool(inside.all())
    assert counter.held == pack._payload.buffer.numel() <= packed_bytes(tensor.numel(), bits) + 64 * bits


def test_a_constant_channel_comes_back_as_it_was():
    tensor = torch.randn(16, 4, 8, 8)
    tensor[:, 2] = 3.25
    for bits in (8, 4, 2, 1):
        assert torch.allclose(coded(tensor, bits, (1,), ByteCounter()).unpack()[:, 2], torch.tensor(3.25), atol=1e-3)


def test_float64_keeps_its_type():
    assert coded(torch.randn(2, 4, 30, 30, dtype=torch.float64), 8, (1,), ByteCounter()).unpack().dtype == torch.float64


@pytest.mark.parametrize("layout", LAYOUTS)
def test_masks_take_a_bit(layout: str):
    tensor = LAYOUTS[layout]() > 0.3
    counter = ByteCounter()
    pack = mask(tensor, counter)
    assert torch.equal(pack.unpack(), tensor)
    assert counter.held <= tensor.numel() // 8 + 64


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3, 9), (100, 300), (-40_000, 20_000), (0, 10**6)])
def test_integers_come_back_in_their_type(low: int, high: int):
    tensor = torch.randint(low, high + 1, (5, 300))
    tensor[0, :2] = torch.tensor([low, high])
    counter = ByteCounter()
    pack = integers(tensor, low, high, counter)
    assert torch.equal(pack.unpack(), tensor) and pack.unpack().dtype == torch.int64
    assert counter.held < tensor.nbytes


@pytest.mark.parametrize("scale", [1.0, 1e6])
def test_halves_choose_the_type_that_fits(scale: float):
    tensor = torch.randn(50, 50) * scale
    torch.testing.assert_close(
        half(tensor, ByteCounter()).unpack(), tensor, rtol=1e-3 if scale == 1 else 1e-2, atol=1e-3
    )


@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("bits", [8, 16, 32])
def test_sparsity_keeps_the_largest_and_zeroes_the_rest(keep: float, bits: int):
    tensor = torch.randn(64, 16, 12, 12).contiguous(memory_format=torch.channels_last)
    counter = ByteCounter()
    pack = sparse(tensor, Precision(bits, keep), counter)
    found = pack.unpack()
    kept = found != 0
    assert float(kept.float().mean()) == pytest.approx(keep, abs=0.02)
    torch.testing.assert_close(found[kept], tensor[kept], rtol=0, atol=0.03)
    if 0 < keep < 1:
        assert float(tensor[~kept].abs().max()) <= float(tensor[kept].abs().min()) + 0.03
    assert counter.held <= tensor.numel() * (1 / 8 + (keep + 0.02) * bits / 8) + 1024


@pytest.mark.parametrize("keep", [1 / 256, 0.05, 0.25, 0.5, 0.75, 0.999])
@pytest.mark.parametrize("power", [1.0, 6.0])
def test_the_largest_entries_are_those_of_a_sort(keep: float, power: float):
    tensor = torch.randn(50, 16, 24, 24, generator=torch.Generator().manual_seed(0)).abs() ** power
    kept = tensor[largest(tensor, keep)]
    torch.testing.assert_close(kept.sort(descending=True).values, tensor.flatten().topk(len(kept)).values)
    assert len(kept) == round(keep * tensor.numel())


def test_equal_entries_are_never_more_than_the_share():
    tensor = torch.randint(0, 4, (20_000,), generator=torch.Generator().manual_seed(0)).float()
    for keep in (0.1, 0.3, 0.6):
        assert tensor[largest(tensor, keep)].tolist().count(0.0) == 0
        assert int(largest(tensor, keep).sum()) <= keep * tensor.numel()


@pytest.mark.parametrize(
    ("values", "message"), [({"bits": 9}, r"bits=9; allowed are 1 to 8, 16 or 32"), ({"keep": 1.5}, r"keep=1.5")]
)
def test_a_rate_out_of_range_is_refused(values: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        Precision(**values)


def test_the_ledger_counts_a_shared_storage_once():
    counter, tensor = ByteCounter(), torch.zeros(100)
    holds = [counter.hold(tensor), counter.hold(tensor[:10])]
    assert counter.held == 400
    holds.pop()
    assert counter.held == 400
    holds.pop()
    assert (counter.held, counter.peak) == (0, 400)


def lent(counter: ByteCounter) -> Tensor:
    return counter.lend(torch.zeros(100), OUTSIDE)


def test_what_is_lent_counts_until_it_is_dropped():
    counter = ByteCounter()
    tensor = lent(counter)
    assert counter.held == tensor.nbytes
    del tensor
    assert (counter.held, counter.peak) == (0, 400)


def test_what_is_lent_counts_for_as_long_as_another_tensor_has_its_storage():
    """Autograd makes tensors of its own of two that a node saved, and holds both while the node runs."""
    counter = ByteCounter()
    first, second = lent(counter).detach(), lent(counter).detach()
    assert (counter.held, counter.peak) == (800, 800)
    del first
    assert counter.held == second.nbytes
