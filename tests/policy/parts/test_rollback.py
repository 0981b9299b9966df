"""Roll-back: bit for bit to where adaptation did good, holds that double, and nothing where no harm is told."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metaopt.errors import CheckpointError, ConfigError
from metaopt.online import OnlineAdapter
from metaopt.policy import AdaptationPolicy, MethodConfig, build_method
from metaopt.policy.part import Part
from metaopt.policy.parts.domain_memory import DomainMemory, DomainMemoryConfig
from metaopt.policy.parts.rollback import Rollback, RollbackConfig, packed, unpacked
from metaopt.policy.parts.verdict import VerdictConfig, VerdictPart
from metaopt.policy.step import StepContext

from ...tiny import BARE, assert_goes_on, random_images, tiny_model, tiny_policy
from .test_domain_memory import adam, stream

STREAM = [random_images(16, seed) for seed in range(40)]
GOOD, HARM = -50.0, 50.0


def judge(difference: float) -> VerdictPart:
    """A verdict, asked at each batch, that finds the adapted model better or worse by so much, whatever it sees."""
    part = VerdictPart(VerdictConfig(every=1))
    part.spread = torch.full((3,), 0.1)
    part.weights[[0, 2], :, 0] = difference
    return part


def adapter(difference: float | None, **config: int) -> OnlineAdapter:
    policy: AdaptationPolicy = tiny_policy(tiny_model(), parts=BARE)
    if difference is not None:
        for part in (judge(difference), Rollback(RollbackConfig(**config))):
            policy.parts[part.name] = part
    return OnlineAdapter(tiny_model(), policy)


def says(found: OnlineAdapter, difference: float) -> None:
    """Let the verdict find so much from now on."""
    found.policy.part("verdict").weights[[0, 2], :, 0] = difference


def noted(found: OnlineAdapter) -> list[Tensor]:
    """Copies of parameters and of the state that snapshots are of."""
    kept = {name: state for name, state in found.state.items() if name not in ("verdict", "rollback")}
    leaves = pytree.tree_leaves([found.parameters, kept])
    return [leaf.detach().clone() for leaf in leaves if isinstance(leaf, Tensor)]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("difference", [GOOD, 0.0])
def test_nothing_changes_where_no_harm_is_told(difference: float) -> None:
    watched, plain = adapter(difference), adapter(None)
    for images in STREAM:
        assert torch.equal(watched(images), plain(images))
    assert all(torch.equal(watched.parameters[name], tensor) for name, tensor in plain.parameters.items())
    assert watched.events["rolled_back"] == watched.events["held"] == 0
    assert (int(watched.state["rollback"].taken) > 0) == (difference == GOOD)


def test_it_goes_back_bit_for_bit_to_the_last_snapshot() -> None:
    found, then = adapter(GOOD, every=3, hold=4), []
    for index, images in enumerate(STREAM[:8]):
        found(images)
        if index == 5:  # the second of the snapshots, at the third and the sixth batch
            then = noted(found)
    assert int(found.state["rollback"].taken) == 2 and not same(noted(found), then)
    says(found, HARM)
    found(STREAM[8])
    assert found.events["rolled_back"] == 0  # one hearing alone
    found(STREAM[9])
    assert found.events["rolled_back"] == 1 and same(noted(found), then)
    assert [int(snapshot.number) for snapshot in found.state["rollback"].snapshots] == [1, 0, 0]
    updates = found.updates
    for images in STREAM[10:14]:
        found(images)
    assert found.updates == updates and found.events["held"] == 4
    found(STREAM[14])
    assert found.updates == updates + 1


def test_further_harm_goes_further_back_and_holds_twice_as_long() -> None:
    found, held = adapter(GOOD, every=3, hold=2), []
    for images in STREAM[:7]:
        found(images)
    says(found, HARM)
    for images in STREAM[7:35]:
        before = found.events["rolled_back"]
        found(images)
        if found.events["rolled_back"] > before:
            held.append(int(found.state["rollback"].hold))
    assert held == [2, 4, 8, 16]
    assert all(int(snapshot.number) == 0 for snapshot in found.state["rollback"].snapshots)
    assert int(found.state["rollback"].taken) == 2


def test_without_a_snapshot_it_begins_anew_and_the_source_answers() -> None:
    found, source = adapter(HARM, hold=5), tiny_model()
    for images in STREAM[:2]:
        found(images)
    assert all(torch.equal(found.parameters[name], tensor) for name, tensor in found.start.items())
    fresh = adapter(None)
    assert same(noted(found), noted(fresh))
    for images in STREAM[2:7]:
        assert torch.allclose(found(images), source(images).logits, atol=1e-6)
    with found.frozen() as frozen:
        assert torch.equal(frozen(STREAM[7]), fresh(STREAM[7]))  # the hold is over: what it does then is as at first
    assert torch.equal(found(STREAM[7]), adapter(None)(STREAM[7]))


def test_a_frozen_adapter_answers_as_the_hold_does() -> None:
    found, source = adapter(HARM, hold=5), tiny_model()
    for images in STREAM[:3]:
        found(images)
    before = noted(found), found.state["rollback"]
    with found.frozen() as frozen:
        assert torch.allclose(frozen(STREAM[9]), source(STREAM[9]).logits, atol=1e-6)
    assert same(noted(found), before[0]) and found.state["rollback"] is before[1]


@pytest.mark.parametrize("difference", [GOOD, HARM])
@pytest.mark.parametrize("stop", [3, 9])
def test_it_goes_on_from_a_file_and_starts_anew_at_a_reset(difference: float, stop: int, tmp_path: Path) -> None:
    def made() -> OnlineAdapter:
        return adapter(difference, every=2, hold=3)

    whole = made()
    answers = [whole(images) for images in STREAM[:12]]
    loaded = assert_goes_on(made, STREAM[:12], stop, tmp_path / "adaptation.pt")
    assert loaded.events == whole.events
    loaded.reset()
    assert int(loaded.state["rollback"].taken) == int(loaded.state["rollback"].hold) == 0
    assert all(torch.equal(loaded(images), answer) for images, answer in zip(STREAM[:12], answers, strict=True))


class Restless(Part):
    """Takes every batch for the first of another domain."""

    name = "restless"
    events = ("restored",)

    def restore(self, context: StepContext) -> None:
        context.begin_anew("restored")


def test_a_domain_that_is_taken_for_another_ends_no_hold() -> None:
    policy = tiny_policy(tiny_model(), parts=BARE)
    for part in (Restless(), judge(HARM), Rollback(RollbackConfig(hold=5))):
        policy.parts[part.name] = part
    found = OnlineAdapter(tiny_model(), policy)
    for images in STREAM[:7]:
        found(images)
    assert found.events["restored"] == 7 and found.events["rolled_back"] == 1 and found.events["held"] == 5
    assert found.updates == 2


def test_the_verdict_that_it_brings_along_judges_before_it() -> None:
    config = MethodConfig("tent", update="adam", objective={"entropy": 1.0}, parts={**BARE, "rollback": True})
    assert [part.name for part in build_method(config).listed][-2:] == ["verdict", "rollback"]
    restores = build_method(
        MethodConfig("tent", update="adam", objective={"entropy": 1.0}, parts={"restoration": True})
    )
    names = [part.name for part in restores.listed]
    assert names.index("restoration") < names.index("shift_distance")


def test_memory_is_bounded() -> None:
    found, sizes = adapter(GOOD, every=1, snapshots=2), []
    for images in STREAM[:20]:
        found(images)
        sizes.append(sum(leaf.numel() for leaf in pytree.tree_leaves(found.state) if isinstance(leaf, Tensor)))
    assert len(set(sizes[2:])) == 1 and sizes[2] < 4 * sum(tensor.numel() for tensor in noted(found))
    assert [int(snapshot.number) for snapshot in found.state["rollback"].snapshots] == [20, 19]


def test_packed_comes_back_with_its_types_and_shapes() -> None:
    tree = {"a": torch.randn(2, 3), "b": (torch.tensor(7), None, torch.randn(4).double()), "c": torch.zeros(0)}
    found = unpacked(*packed(tree), {**tree, "c": torch.zeros(5)})
    assert pytree.tree_structure(found) == pytree.tree_structure(tree)
    for own, back in zip(pytree.tree_leaves(tree), pytree.tree_leaves(found), strict=True):
        assert own is None or (own.dtype == back.dtype and torch.equal(own, back))
    with pytest.raises(ValueError, match="has 4 tensors, and 1 are adapted"):
        unpacked(*packed(tree), [torch.zeros(1)])


def test_a_snapshot_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    found = adapter(GOOD, every=1)
    for images in STREAM[:3]:
        found(images)
    latest, *others = found.state["rollback"].snapshots
    cut = found.state["rollback"]._replace(snapshots=(latest._replace(values=latest.values[:-1]), *others))
    found.state = {**found.state, "rollback": cut}
    found.save(tmp_path / "adaptation.pt")
    with pytest.raises(CheckpointError, match="rollback has a snapshot that is cut off"):
        adapter(GOOD, every=1).load(tmp_path / "adaptation.pt")


@pytest.mark.parametrize("name", ["snapshots", "every", "hold"])
def test_settings_out_of_range(name: str) -> None:
    with pytest.raises(ConfigError, match=f"rollback.{name} is 0"):
        RollbackConfig(**{name: 0})


def test_beside_a_memory_of_domains_neither_keeps_the_other_within_itself() -> None:
    policy = adam(DomainMemory(DomainMemoryConfig(2)), judge(GOOD), Rollback(RollbackConfig(every=1)))
    found, sizes = OnlineAdapter(tiny_model(), policy), []
    for images in stream("abc" * 8):
        found(images)
        sizes.append(sum(leaf.numel() for leaf in pytree.tree_leaves(found.state) if isinstance(leaf, Tensor)))
    assert found.events["recalled"] > 10 and int(found.state["rollback"].taken) == 24
    assert sizes[-1] == sizes[11]
    assert all("rollback" not in domain.state for domain in found.state["domain_memory"])
