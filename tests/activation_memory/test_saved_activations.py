"""The context: what is stored, counted and named, and what is refused."""

import gc

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from metaopt.activation_memory import Precision, SavedActivations
from metaopt.errors import ConfigError
from metaopt.evaluation import MemoryMeter

from .cases import SharedWeights, Wrap, gradients, only_norms_learn


class Block(nn.Module):
    """Convolution, normalisation, ReLU, convolution, on maps (B, 16, H, W)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.act = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(inplace=True)
        self.second = nn.Conv2d(16, 10, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.act(self.norm(self.first(x)))).mean(dim=(2, 3))


def block() -> Block:
    torch.manual_seed(0)
    model = Block()
    only_norms_learn(model)
    return model


MAP = 8 * 16 * 32 * 32  # entries
BATCH = torch.randn(8, 16, 32, 32)


@pytest.mark.parametrize(
    ("memory", "precision", "wanted"),
    [
        ("exact", Precision(), 4 * MAP),
        ("compact", Precision(16), 2 * MAP + MAP / 8),
        ("compact", Precision(8), MAP),
        ("compact", Precision(4), MAP / 2),
        ("compact", Precision(1), MAP / 8),
        ("pruned", Precision(8, 0.25), MAP / 4 + 2 * MAP / 8),
        ("pruned", Precision(8, 0.0), MAP / 8),
    ],
)
def test_bytes_of_a_block_are_those_of_its_codes(memory: str, precision: Precision, wanted: float):
    """A normalised map, kept or in codes, tells the mask of the ReLU after it; half floats do not: a bit an entry."""
    model = block()
    with SavedActivations(model, memory=memory, default=precision) as context:
        loss = model(BATCH).sum()
        assert context.held_bytes == pytest.approx(wanted, rel=0.03, abs=2048)
    loss.backward()
    assert context.held_bytes == 0
    assert context.peak_bytes <= wanted * 1.03 + 2048 + 4 * MAP  # one map at a time is unpacked


def test_the_meter_sees_no_more_than_the_engine_says():
    """Entered inside of the engine, the meter sees what plain torch would keep; around it, nothing is left to see."""
    model = block()
    with MemoryMeter([*model.parameters(), BATCH]) as meter, SavedActivations(model, memory="compact") as context:
        loss = model(BATCH).sum()
        assert context.held_bytes <= 1.05 * MAP
        outside = meter.held_mib * 2**20
    assert outside <= 1.05 * MAP
    loss.backward()


def test_layers_are_named_and_add_up():
    model = block()
    with SavedActivations(model, memory="compact", precisions={"norm": Precision(4)}) as context:
        loss = model(BATCH).sum()
        records = {record.name: record for record in context.layers}
        assert loss.requires_grad
        assert sum(record.held_bytes for record in context.layers) == context.held_bytes
    assert records["norm"].kind == "batch_norm" and records["norm"].precision == Precision(4)
    assert records["norm"].held_bytes == pytest.approx(MAP / 2, rel=0.03)
    assert (records["norm"].dense_bytes, records["act"].dense_bytes) == (pytest.approx(4 * MAP, rel=0.01), 4 * MAP)
    assert records["second"].dense_bytes == 0, "its input is the ReLU's output, which is counted there"


def test_nothing_is_stored_before_the_first_layer_that_learns():
    model = nn.Sequential(nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16), nn.GELU(), block())
    model[:3].requires_grad_(False)
    with SavedActivations(model) as context:
        assert model(BATCH).requires_grad
    assert {record.name.split(".")[0] for record in context.layers} == {"3"}


def test_the_batch_does_not_count():
    model = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 2))
    batch = torch.randn(100, 64)
    for memory in ("exact", "compact"):
        with SavedActivations(only_norms_learn(model), memory=memory) as context:
            loss = model(batch).sum()
            assert 0 < context.held_bytes <= 2 * 100 * 4
        loss.backward()


def test_one_storage_that_several_nodes_save_is_stored_once():
    x = torch.randn(64, 64)
    a, b = (torch.ones(64, requires_grad=True) for _ in range(2))
    for memory, size in (("exact", 4), ("compact", 1)):
        shared = Wrap(lambda x, a, b: (x := x + 1).mul(a).sum() + (x * b).sum() + (x.view(64, 64) * b).sum())
        with SavedActivations(shared, memory=memory) as context:
            loss = shared(x, a, b)
            assert context.held_bytes == pytest.approx(size * x.numel(), rel=0.15)
        loss.backward()


def test_a_small_view_does_not_keep_a_large_storage():
    model = Wrap(lambda x, w: (x + 1)[:, :2] * w)
    w = torch.ones(2, requires_grad=True)
    with SavedActivations(model) as context:
        loss = model(torch.randn(1000, 256), w).sum()
        assert context.held_bytes <= 2 * 1000 * 2 * 4
    loss.backward()


@pytest.mark.parametrize("memory", ["exact", "compact"])
def test_a_change_in_place_is_refused_or_does_not_matter(memory: str):
    hidden: list[torch.Tensor] = []

    def scaled(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        hidden.append(x + 1)
        return hidden[0] * w

    model, x, w = Wrap(scaled), torch.randn(64, 64), torch.randn(64, requires_grad=True)
    wanted = (x + 1).sum(dim=0)
    with SavedActivations(model, memory=memory):
        loss = model(x, w).sum()
    hidden[0].zero_()
    if memory == "exact":
        with pytest.raises(RuntimeError, match="changed in place after it was saved"):
            loss.backward()
    else:
        loss.backward()
        torch.testing.assert_close(w.grad, wanted, rtol=0.01, atol=0.5)


def test_the_loss_outside_of_the_model_is_left_alone():
    model, batch = block(), BATCH
    with SavedActivations(model, memory="compact") as context:
        logits = model(batch)
        before = context.held_bytes
        kept = logits.repeat(1000, 1).exp()
        assert context.held_bytes - before == kept.nbytes
    assert {record.name for record in context.layers} <= {"first", "norm", "act", "second", ""}


def test_the_model_carries_nothing_outside_of_the_context():
    model = block()
    with pytest.raises(ZeroDivisionError), SavedActivations(model):
        model(BATCH)
        raise ZeroDivisionError
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with MemoryMeter([*model.parameters(), BATCH]) as meter:
        loss = model(BATCH).sum()
        assert meter.held_mib * 2**20 >= 8 * MAP
    del loss


def test_an_error_inside_a_layer_leaves_the_names_in_order():
    model = nn.Sequential(Wrap(lambda x: x), Wrap(lambda x: x.view(-1, 7)))
    with SavedActivations(model) as context:
        with pytest.raises(RuntimeError):
            model(BATCH)
        assert context._active is not None and context._active.running == []


def test_a_dropped_graph_is_freed_without_the_garbage_collector():
    model = block()
    gc.collect()
    gc.disable()
    try:
        with SavedActivations(model, memory="compact") as context:
            loss = model(BATCH).sum()
            del loss
            assert context.held_bytes == 0
    finally:
        gc.enable()


def test_second_derivatives_through_a_model_with_shared_weights():
    torch.manual_seed(0)
    model, batch = SharedWeights().double(), torch.rand(2, 8, 6, 6, dtype=torch.float64)
    parameters = list(model.parameters())
    found = []
    for context in (None, SavedActivations(model, memory="exact")):
        if context is not None:
            context.__enter__()
        slopes = torch.autograd.grad(F.log_softmax(model(batch), dim=1)[:, 0].sum(), parameters, create_graph=True)
        size = torch.stack([slope.square().sum() for slope in slopes]).sum()
        found.append(torch.autograd.grad(size, parameters, allow_unused=True))
        if context is not None:
            context.__exit__(None, None, None)
    for a, b in zip(*found, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"memory": "tiny"}, "memory is 'tiny'; allowed are exact, compact, pruned"),
        ({"memory": "exact", "default": Precision(8)}, "with memory=exact; allowed are 32 bits"),
        (
            {"memory": "compact", "precisions": {"norm": Precision(8, 0.5)}},
            "precision of norm keeps 0.5 with memory=compact",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(arguments: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        SavedActivations(block(), **arguments)


def test_the_context_is_entered_once_at_a_time():
    model = block()
    with SavedActivations(model) as context, pytest.raises(RuntimeError, match="active already"):
        context.__enter__()


def test_gradients_of_one_bit_still_point_the_right_way():
    model = block()
    wanted = gradients(model, BATCH)
    found = gradients(model, BATCH, SavedActivations(model, memory="compact", default=Precision(1)))
    assert F.cosine_similarity(torch.cat(found), torch.cat(wanted), dim=0) > 0.7


@pytest.mark.parametrize("bits", range(1, 9))
def test_a_relus_mask_is_exact_at_every_width(bits: int):
    """The gradient of the normalisation's bias depends on the mask alone."""
    model = block()
    with torch.no_grad():
        model.norm.weight.uniform_(0.5, 2.0)
        model.norm.bias.uniform_(-0.5, 0.5)
    bias = [name for name, _ in model.named_parameters() if name.startswith("norm")].index("norm.bias")
    wanted = gradients(model, BATCH)[bias]
    found = gradients(model, BATCH, SavedActivations(model, memory="compact", default=Precision(bits)))[bias]
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)
