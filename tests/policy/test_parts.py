"""What every part of a policy promises. A row of ``metaopt.registry.PARTS`` enrols a part here."""

from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metaopt import registry
from metaopt.errors import ConfigError
from metaopt.models import SourceModel
from metaopt.models.spec import ModelSpec
from metaopt.objectives import WeightedObjective
from metaopt.online import OnlineAdapter
from metaopt.optimizers.adam import Adam
from metaopt.policy import AdaptationPolicy
from metaopt.policy.part import Part, settings
from metaopt.policy.parts.batch_statistics import BatchStatistics

from ..meta.cases import CLASSES, images, start, tiny_resnet, tiny_vit
from ..tiny import assert_goes_on

# Every part as its settings are by default, and what some of them can do beside that.
CASES: dict[str, tuple[str, Any]] = {
    **{name: (name, True) for name in registry.PARTS},
    "batch statistics with a prior": ("batch_statistics", 16),
    "experts that stay as they start": ("experts", {"gates": "frozen", "initial": "frozen"}),
    "a periodic gate": ("update_gate", {"every": 2}),
    "a teacher of views that predicts": ("teacher", {"predicts": True, "views": 2, "restore": 0.3}),
    "learned pruning": ("pruning", "learned"),
}
BATCHES = [images(seed) * (1.0 if seed < 2 else 0.2) for seed in range(4)]  # with a shift in their midst
CLEAN = torch.cat([images(seed) for seed in range(90, 94)])  # of the source, for parts that take something of it


def vit() -> SourceModel:
    """One that says how large its images are."""
    return SourceModel(tiny_vit().module, spec=ModelSpec("custom:vit", CLASSES, (3, 8, 8))).requires_grad_(False)


MODELS: dict[str, Callable[[], SourceModel]] = {"BatchNorm": tiny_resnet, "LayerNorm": vit}
OTHERS: dict[str, Callable[[], SourceModel]] = {"BatchNorm": vit, "LayerNorm": lambda: tiny_resnet(6)}

pytestmark = [pytest.mark.parametrize("case", CASES), pytest.mark.parametrize("model", sorted(MODELS))]


def build(case: str, model: str) -> Part:
    """The part for a model, as if meta-trained: no learned tensor is at its start."""
    name, values = CASES[case]
    kind, network, generator = registry.get("part", name), MODELS[model](), torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        part = kind.build(settings(kind.Config, values, name), network).double()
    with torch.no_grad():
        for tensor in part.parameters():
            tensor += 0.1 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
    return part


def tent(part: Part) -> AdaptationPolicy:
    """Entropy and Adam, batch statistics, and the part."""
    named = {"batch_statistics": BatchStatistics(), part.name: part}
    parts = [named[name] for name in registry.PARTS if name in named]
    adapts = "experts_norm" if part.name == "experts" else "norm"
    return AdaptationPolicy("tent", WeightedObjective({"entropy": 1.0}), Adam(lr=1e-2), parts, adapts)


def adapter_of(part: Part, model: SourceModel) -> OnlineAdapter:
    memory = "pruned" if part.name == "pruning" else "dense"  # where nothing is pruned, nobody asks it
    policy = tent(part)
    policy.prepare(model, lambda: CLEAN)
    return OnlineAdapter(model, policy, memory=memory)


def run(adapter: OnlineAdapter, batches: list[Tensor] = BATCHES[:3]) -> list[Tensor]:
    return [adapter(batch) for batch in batches]


def same(first: Any, second: Any) -> bool:
    """Whether two trees are equal, bit for bit."""
    leaves, others = (pytree.tree_leaves(tree) for tree in (first, second))
    assert pytree.tree_structure(first) == pytree.tree_structure(second)
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(leaves, others, strict=True))


def copied(part: Part) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in part.state_dict().items()}


def test_it_is_its_row_and_the_same_whenever_it_is_built(case: str, model: str) -> None:
    part = build(case, model)
    assert isinstance(part, Part) and part.name == CASES[case][0] and isinstance(part.config, type(part).Config)
    assert all(kind.name in registry.PARTS for kind in part.uses)
    assert same(copied(build(case, model)), copied(part)) and build(case, model).to_dict() == part.to_dict()


def test_file_brings_it_back_with_what_it_learned(case: str, model: str, tmp_path: Path) -> None:
    part = build(case, model)
    torch.save({"part": part.to_dict(), "weights": part.state_dict()}, tmp_path / "part.pt")
    values = torch.load(tmp_path / "part.pt", weights_only=True)
    loaded = type(part).from_dict(values["part"]).double()
    loaded.load_state_dict(values["weights"])
    assert loaded.config == part.config and same(loaded.to_dict(), part.to_dict())
    assert same(copied(loaded), copied(part))
    learns = [[name for name, tensor in each.named_parameters() if tensor.requires_grad] for each in (part, loaded)]
    assert learns[0] == learns[1]
    assert same(run(adapter_of(loaded, MODELS[model]())), run(adapter_of(part, MODELS[model]())))


def test_its_state_is_a_tree_of_tensors_that_keeps_its_shape(case: str, model: str) -> None:
    part = build(case, model)
    adapter = adapter_of(part, MODELS[model]())
    first = adapter.policy.init(adapter.parameters).get(part.name)
    assert all(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(first) if leaf is not None)
    assert same(adapter.policy.init(adapter.parameters).get(part.name), first)
    assert (first is None) == (part.name not in adapter.state)
    run(adapter)
    last = adapter.state.get(part.name)
    assert pytree.tree_structure(last) == pytree.tree_structure(first)
    for before, after in zip(pytree.tree_leaves(first), pytree.tree_leaves(last), strict=True):
        if isinstance(before, Tensor):
            assert (before.dtype, before.device) == (after.dtype, after.device)
            assert before.shape == after.shape or before.numel() == 0  # empty: the first batch tells the shape


def test_reset_brings_everything_back(case: str, model: str) -> None:
    adapter, fresh = (adapter_of(build(case, model), MODELS[model]()) for _ in range(2))
    first = run(adapter)
    assert all(bool(torch.isfinite(logits).all()) for logits in first)
    assert adapter.events["restored"] == (case in ("restoration", "domain_memory"))
    without = adapter.events["skipped"] + adapter.events["refused"]
    assert adapter.steps == 3 and adapter.updates == 3 - without
    adapter.reset()
    assert same(adapter.state, fresh.state) and same(adapter.parameters, fresh.parameters)
    assert adapter.events == fresh.events
    assert same(run(adapter), first) and same(run(fresh), first)


def test_it_learns_nothing_and_changes_no_model_online(case: str, model: str) -> None:
    part, network = build(case, model), MODELS[model]()
    weights = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    adapter = adapter_of(part, network)
    tensors = copied(part)  # with what it has taken of clean images
    run(adapter)
    assert same(copied(part), tensors) and same(copied(adapter.policy.part(part.name)), tensors)
    assert same(dict(network.state_dict()), weights)


def test_save_and_load_go_on_bit_for_bit(case: str, model: str, tmp_path: Path) -> None:
    assert_goes_on(lambda: adapter_of(build(case, model), MODELS[model]()), BATCHES, 2, tmp_path / "state.pt")


def test_another_model_gets_a_part_that_runs_there_or_none(case: str, model: str) -> None:
    part = build(case, model)
    before, values = copied(part), part.to_dict()
    for make in (OTHERS[model], MODELS[model]):
        found, words = part.transferred(make())
        assert words and "\n" not in words
        assert same(copied(part), before) and same(part.to_dict(), values)
        if found is not None:
            assert type(found) is type(part)
            adapter = adapter_of(found, make())
            assert all(bool(torch.isfinite(logits).all()) for logits in run(adapter))


def test_what_it_learns_is_in_one_group_each(case: str, model: str) -> None:
    part = build(case, model)
    own = dict(part.named_parameters())
    grouped = [name for group in part.learned_groups().values() for name in group]
    assert sorted(grouped) == sorted(own)
    for group in part.learned_groups().values():
        assert all(own[name] is tensor for name, tensor in group.items())
    assert {id(tensor) for tensor in part.direct()} <= {id(tensor) for tensor in own.values()}
    rate, penalty = part.meta_rate(), part.penalty()
    assert rate is None or rate > 0
    assert penalty is None or (penalty.shape == () and float(penalty.detach()) >= 0)


def test_where_it_starts_the_adapted_tensors_keep_their_names_and_shapes(case: str, model: str) -> None:
    given = start(MODELS[model]())
    kept = {name: tensor.clone() for name, tensor in given.items()}
    found = build(case, model).start(given)
    assert [(name, t.shape, t.dtype) for name, t in found.items()] == [(n, t.shape, t.dtype) for n, t in given.items()]
    assert same(given, kept)


def bad_settings(case: str) -> Iterator[tuple[str, Any]]:
    """What no part may take, and the key that the message has to name."""
    name, _ = CASES[case]
    names = [each.name for each in fields(registry.get("part", name).Config)]
    yield "parts.nonsense", {"nonsense": 1}
    for each in names:
        yield f"parts.{each}", {each: {"a": 1}}
    yield f"parts.{names[0]}" if names else "parts", object()


def test_settings_are_checked(case: str, model: str) -> None:
    config = registry.get("part", CASES[case][0]).Config
    assert settings(config, True, "parts") == settings(config, {}, "parts") == config()
    assert settings(config, config(), "parts") == config()
    for key, values in bad_settings(case):
        with pytest.raises(ConfigError) as caught:
            settings(config, values, "parts")
        assert str(caught.value).startswith(key) and "\n" not in str(caught.value)
