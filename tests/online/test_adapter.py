"""The adapter: predicts, adapts, goes back, holds still, is saved, and leaves its source alone."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metaopt.errors import DataError, ModelError
from metaopt.online import OnlineAdapter

from ..tiny import tiny_model, tiny_net
from .methods import (
    BATCHES,
    DEFAULT,
    METHODS,
    QUIET,
    UPDATES,
    UPDATING,
    bits,
    new_adapter,
    prediction,
    restored,
    run,
    same,
)


@pytest.mark.parametrize("method", METHODS)
def test_reset_brings_everything_back(method: str) -> None:
    adapter, fresh = new_adapter(method), new_adapter(method)
    first = run(adapter)
    adapter(BATCHES[0] * float("nan"))
    adapter.reset()
    assert adapter.steps == adapter.updates == 0
    assert adapter.events == QUIET[method]
    assert same(run(adapter), first) and same(run(fresh), first)
    assert same(list(adapter.parameters.values()), list(fresh.parameters.values()))
    assert adapter.updates == UPDATES[method] and adapter.steps == 8


@pytest.mark.parametrize("method", METHODS)
def test_the_source_model_never_changes(method: str) -> None:
    model = tiny_model()
    before, constants = bits(model), (model.mean.clone(), model.std.clone())
    flags = [tensor.requires_grad for tensor in model.parameters()]
    adapter = OnlineAdapter(model, METHODS[method]())
    run(adapter)
    adapter(BATCHES[0] * float("nan"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model.mean, constants[0]) and torch.equal(model.std, constants[1])
    assert all(tensor.grad is None for tensor in model.parameters())
    assert [tensor.requires_grad for tensor in model.parameters()] == flags


@pytest.mark.parametrize("method", UPDATING)
def test_it_adapts(method: str) -> None:
    adapter = new_adapter(method)
    assert not torch.equal(adapter(BATCHES[0]), adapter(BATCHES[0]))


@pytest.mark.parametrize("method", UPDATING)
def test_logits_are_those_before_the_update(method: str) -> None:
    for count in range(1, len(BATCHES)):
        adapter, other = new_adapter(method), new_adapter(method)
        run(adapter, BATCHES[:count])
        run(other, BATCHES[:count])
        found = adapter.step(BATCHES[count])
        other.parameters = restored(other, found.signals.get("shift_distance"))
        with other.frozen():
            expected = other(BATCHES[count])
        # Beside a prior, normalisation rounds otherwise where no graph is kept.
        tolerance = 1e-6 if method in DEFAULT else 0.0
        torch.testing.assert_close(found.logits, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("method", METHODS)
def test_frozen_changes_nothing(method: str) -> None:
    adapter, undisturbed = new_adapter(method), new_adapter(method)
    run(adapter, BATCHES[:3])
    run(undisturbed, BATCHES[:3])
    counts = adapter.steps, adapter.updates
    with adapter.frozen() as inner:
        first = adapter(BATCHES[5])
        assert torch.equal(inner(BATCHES[5]), first)
        with adapter.frozen():
            assert torch.equal(adapter(BATCHES[5]), first)
        assert torch.equal(adapter(BATCHES[5]), first)  # leaving the inner context does not thaw the outer one
        assert not first.requires_grad
    assert torch.equal(inner(BATCHES[5]), first)  # outside the context too
    assert (adapter.steps, adapter.updates) == counts
    assert same(run(adapter, BATCHES[3:]), run(undisturbed, BATCHES[3:]))


@pytest.mark.parametrize("method", DEFAULT)
def test_the_default_policys_parts_act_along_the_stream(method: str) -> None:
    """What else is tested of it here would say little if they did not."""
    adapter = new_adapter(method)
    outputs = [adapter.step(images) for images in BATCHES]
    assert adapter.events["restored"] == 2
    assert sum(output.updated for output in outputs) == UPDATES[method] == adapter.updates
    for name, tensor in adapter.model.named_parameters():
        assert name not in adapter.start or not torch.equal(adapter.start[name], tensor)
    counts = adapter.policy.part("batch_statistics").counts()
    assert counts is not None and counts.shape == (2,)


@pytest.mark.parametrize("method", METHODS)
def test_a_stream_of_single_images_is_adapted_on(method: str) -> None:
    adapter = new_adapter(method)
    logits = run(adapter, [images[:1] for images in BATCHES])
    assert all(bool(each.isfinite().all()) for each in logits)
    assert adapter.steps == 8 and adapter.events["nonfinite"] == 0
    assert (adapter.updates > 0) == (method in UPDATING)
    moved = [not torch.equal(tensor, adapter.start[name]) for name, tensor in adapter.parameters.items()]
    assert any(moved) == (method in UPDATING)
    rest, undisturbed = run(adapter, BATCHES[:2]), new_adapter(method)
    run(undisturbed, [images[:1] for images in BATCHES])
    assert same(rest, run(undisturbed, BATCHES[:2]))


def test_an_augmented_view_depends_on_the_step_and_the_seed() -> None:
    adapter = new_adapter("two views")

    def loss(steps: int, seed: int) -> float:
        adapter.steps, adapter.policy.seed = steps, seed
        with adapter.frozen():
            value = adapter.step(BATCHES[0]).loss
        assert value is not None
        return value.item()

    assert loss(0, 0) == loss(0, 0)
    assert len({loss(0, 0), loss(1, 0), loss(0, 1)}) == 3


@pytest.mark.parametrize("method", ["tent", *DEFAULT])
def test_frozen_ends_with_an_error_too(method: str) -> None:
    adapter = new_adapter(method)
    with pytest.raises(RuntimeError, match="inside"), adapter.frozen():
        raise RuntimeError("inside")
    adapter(BATCHES[0])
    assert adapter.updates == 1


@pytest.mark.parametrize("method", METHODS)
def test_the_export_is_the_adapted_model(method: str) -> None:
    adapter = new_adapter(method)
    run(adapter)
    plain, source = tiny_net(seed=3), tiny_net().state_dict()
    plain.load_state_dict(adapter.export(), strict=True)
    running = [name for name in source if "running" in name]
    plain.load_state_dict({name: source[name] for name in running}, strict=False)  # those of the batch count here
    with adapter.frozen():
        found = prediction(adapter, plain, BATCHES[2])
        torch.testing.assert_close(found, adapter(BATCHES[2]), rtol=1e-5, atol=1e-5)
    changed = {name for name, tensor in adapter.export().items() if not torch.equal(tensor, source[name])}
    assert changed == {
        *(["bn1.weight", "bn1.bias", "bn2.weight", "bn2.bias"] if method in UPDATING else []),
        *([] if method == "source" else running),
    }


@pytest.mark.parametrize("method", ["tent", *DEFAULT])
def test_the_export_is_a_copy(method: str) -> None:
    adapter, undisturbed = new_adapter(method), new_adapter(method)
    for tensor in adapter.export().values():
        tensor.zero_()
    assert same(run(adapter), run(undisturbed))


def test_a_layer_used_twice_adapts_and_is_exported_under_both_names() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.first = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
            self.mix, self.second = nn.Conv2d(4, 4, 3), self.first
            self.linear = nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.second(self.mix(self.first(self.conv(x)).relu()))
            return self.linear(x.mean(dim=(2, 3)))

    torch.manual_seed(0)
    net = Twice().eval()
    fresh = copy.deepcopy(net)
    adapter = OnlineAdapter(net, METHODS["tent"]())
    run(adapter)
    fresh.load_state_dict(adapter.export(), strict=True)
    assert torch.equal(adapter.export()["first.weight"], adapter.export()["second.weight"])
    with adapter.frozen():
        torch.testing.assert_close(fresh.train()(BATCHES[1]).detach(), adapter(BATCHES[1]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["tent", *DEFAULT])
def test_a_gradient_whose_square_overflows_is_refused(method: str) -> None:
    """It would stay in the second moments as infinity, and turn into NaN at the next batch."""
    adapter, count = new_adapter(method), 3 if method == "default with gate" else 2  # where that gate is open
    run(adapter, BATCHES[:count])
    images, policy = BATCHES[count], adapter.policy
    assert policy.objective is not None
    weights = policy.objective.log_weights.clone()
    policy.objective.log_weights.data.fill_(50.0)  # times 5e21: the gradient is finite, its square is not
    adapter(images)
    policy.objective.log_weights.data.copy_(weights)
    assert adapter.events["nonfinite"] == 1
    other = new_adapter(method)
    expected = run(other, BATCHES[:count] + BATCHES[count + 1 :])[count:]
    for found, logits in zip(run(adapter, BATCHES[count + 1 :]), expected, strict=True):
        torch.testing.assert_close(found, logits)
    assert adapter.updates == other.updates


@pytest.mark.parametrize("method", ["residual", *DEFAULT])
def test_one_policy_serves_models_of_several_types(method: str) -> None:
    policy = METHODS[method]()
    policy.source = None  # as a method that was never tied to a model
    single = OnlineAdapter(tiny_model(), policy)
    expected = run(OnlineAdapter(tiny_model(), copy.deepcopy(policy)))
    double = OnlineAdapter(tiny_model(dtype=torch.float64), policy)
    assert double(BATCHES[0].double()).dtype == torch.float64
    assert same(run(single), expected)
    assert next(policy.parameters()).dtype == torch.float32


@pytest.mark.parametrize("method", ["residual", *DEFAULT])
def test_two_adapters_of_one_policy_do_not_meet(method: str) -> None:
    policy, model = METHODS[method](), tiny_model()
    first, second = OnlineAdapter(model, policy), OnlineAdapter(model, policy)
    expected = run(new_adapter(method))
    mixed = [(first(images), second(images)) for images in BATCHES]
    assert same([a for a, _ in mixed], expected) and same([b for _, b in mixed], expected)


@pytest.mark.parametrize("method", ["residual", *DEFAULT])
def test_a_step_tells_its_loss_and_terms(method: str) -> None:
    output = new_adapter(method).step(BATCHES[0])
    assert output.loss is not None and not output.loss.requires_grad
    assert set(output.terms) == {"slr", "diversity", "discrepancy"}
    assert not any(term.requires_grad for term in output.terms.values())
    assert new_adapter("bn").step(BATCHES[0]).loss is None


@pytest.mark.parametrize("method", ["residual", *DEFAULT])
def test_it_adapts_under_no_grad_too(method: str) -> None:
    expected = run(new_adapter(method))
    adapter = new_adapter(method)
    with torch.no_grad():
        assert same(run(adapter), expected)


def test_bad_models_and_images_are_refused() -> None:
    bare = nn.Sequential(nn.Flatten(), nn.Linear(768, 4))
    with pytest.raises(ModelError, match="no normalisation layer"):
        OnlineAdapter(bare, METHODS["bn"]())
    with pytest.raises(DataError, match="shape"):
        new_adapter("tent")(torch.rand(4, 1, 16, 16))


@pytest.mark.parametrize("method", ["residual", *DEFAULT])
@pytest.mark.parametrize("count", [1, 3, 4, 5, 6])
def test_memory_of_the_past_is_not_kept(method: str, count: int) -> None:
    """No graph links one step to the next: the state is made of leaves."""
    adapter = new_adapter(method)
    run(adapter, BATCHES[:count])
    for leaf in pytree.tree_leaves(adapter.state):
        assert not isinstance(leaf, Tensor) or (leaf.grad_fn is None and not leaf.requires_grad)
    assert all(tensor.is_leaf for tensor in adapter.parameters.values())


@pytest.mark.parametrize("method", METHODS)
def test_an_empty_batch_is_refused_and_counts_for_nothing(method: str) -> None:
    adapter = new_adapter(method)
    adapter(BATCHES[0])
    with pytest.raises(DataError, match=r"images have shape \(0, 3, 16, 16\); at least one image is needed"):
        adapter(BATCHES[0][:0])
    undisturbed = new_adapter(method)
    undisturbed(BATCHES[0])
    assert torch.equal(adapter(BATCHES[1]), undisturbed(BATCHES[1])) and adapter.steps == 2
