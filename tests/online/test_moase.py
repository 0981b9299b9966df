"""Methods with experts and a teacher, deployed: against the published step by hand, and the adapter's promises."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from metaopt.data import generator_for
from metaopt.errors import ModelError
from metaopt.evaluation import state_mib
from metaopt.experts import attach_experts
from metaopt.experts.mixture import EXPERT_TENSORS
from metaopt.models import SourceModel
from metaopt.objectives.views import augmented_view
from metaopt.online import OnlineAdapter
from metaopt.online.footprint import Case, measure_footprint
from metaopt.policy import AdaptationPolicy, MethodConfig, build_method
from metaopt.policy.parts.teacher import TeacherConfig
from metaopt.policy.without_step import evaluate_on

from ..experts.families import build
from ..tiny import BARE, tiny_net

TEACHER = TeacherConfig(momentum=0.9, restore=0.05, views=1, predicts=True)
LR, BETAS = 1e-2, (0.9, 0.99)


def method(
    adapts: str = "experts_norm", experts: bool = True, teacher: TeacherConfig | None = None
) -> AdaptationPolicy:
    parts = {**BARE, "experts": experts, "teacher": teacher or (TEACHER if experts else replace(TEACHER, proximal=0.0))}
    name = "moase" if experts else "cotta"
    rule, objective = {"betas": BETAS}, {"teacher": 1.0}
    return build_method(MethodConfig(name, "adam", LR, rule, objective, adapts=adapts, parts=parts))


def network(family: str, dtype: torch.dtype = torch.float32) -> tuple[SourceModel, list[Tensor]]:
    """A model and six batches for it."""
    model, images = build(family, dtype)
    generator = torch.Generator().manual_seed(7)
    shape = (4, *images.shape[1:])
    return model, [torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(6)]


CASES: dict[str, tuple[str, Callable[[], AdaptationPolicy]]] = {
    "vit": ("vit", method),
    "cnn": ("cifar_resnet", method),
    "all": ("vit", lambda: method("all")),
    "experts": ("cifar_resnet", lambda: method("experts", teacher=replace(TEACHER, predicts=False))),
    "initial anchor": (
        "vit",
        lambda: method(teacher=TeacherConfig(anchor="initial", group="expert", restore=0.05, views=2, predicts=True)),
    ),
    "cotta": ("cifar_resnet", lambda: method("all", experts=False)),
}


def new_adapter(
    case: str, dtype: torch.dtype = torch.float32, memory: str = "dense"
) -> tuple[OnlineAdapter, list[Tensor]]:
    family, make = CASES[case]
    model, batches = network(family, dtype)
    return OnlineAdapter(model, make(), memory=memory), batches


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def tensors_of(adapter: OnlineAdapter) -> list[Tensor]:
    return [*adapter.parameters.values(), *adapter.state["teacher"].average.values()]


def adapting(model: SourceModel, adapts: str) -> dict[str, torch.nn.Parameter]:
    """The adapting tensors, told by their names."""
    own = {name for name, _ in model.named_parameters() if name.rpartition(".")[2] in EXPERT_TENSORS}
    kinds = (torch.nn.LayerNorm, torch.nn.BatchNorm2d)
    norms = {name for name, module in model.named_modules() if isinstance(module, kinds)}
    chosen = {"experts": own, "all": {name for name, _ in model.named_parameters()}}
    keep = chosen.get(adapts, own | {n for n, _ in model.named_parameters() if n.rpartition(".")[0] in norms})
    return {name: tensor for name, tensor in model.named_parameters() if name in keep}


def by_hand(case: str, count: int) -> tuple[list[Tensor], SourceModel]:
    """The published step with torch's Adam on whole copies of the model: logits, and the student after ``count``."""
    family, make = CASES[case]
    model, batches = network(family, torch.float64)
    policy = make()
    settings = policy.part("teacher").config
    if policy.part("experts") is not None:
        attach_experts(model, policy.part("experts").config.mixtures, seed=0)
    student, teacher, start = model, copy.deepcopy(model), copy.deepcopy(model)
    learning = adapting(student, policy.adapts)
    optimizer, logits = torch.optim.Adam(learning.values(), lr=LR, betas=BETAS), []
    for step, images in enumerate(batches[:count]):
        with torch.no_grad():
            views = [augmented_view(images, generator_for("teacher view", 0, step, i)) for i in range(settings.views)]
            target = torch.stack([teacher(view, batch_statistics=True).logits for view in views]).mean(dim=0)
        own = student(images, batch_statistics=True).logits
        logits.append(target if settings.predicts else own.detach())
        loss = torch.nn.functional.cross_entropy(own, target.softmax(dim=1))
        anchor = teacher if settings.anchor == "teacher" else start
        groups: dict[str, list[Tensor]] = {}
        for name, tensor in learning.items():
            if name.rpartition(".")[2] in EXPERT_TENSORS:
                group = name if settings.group == "tensor" else name.rpartition(".")[0]
                distance = (tensor - anchor.get_parameter(name).detach()).flatten(1)
                groups.setdefault(group, []).append(distance)
        for distances in groups.values():
            loss = loss + settings.proximal * torch.cat(distances, dim=1).norm(dim=1).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for name, tensor in learning.items():
                mean = teacher.get_parameter(name)
                mean.copy_(settings.momentum * mean + (1 - settings.momentum) * tensor)
                draws = torch.rand(tensor.shape, generator=generator_for("restore", settings.seed, step, name))
                tensor[draws < settings.restore] = start.get_parameter(name)[draws < settings.restore]
    return logits, student


@pytest.mark.parametrize("case", CASES)
def test_the_step_is_the_published_one(case: str) -> None:
    expected, student = by_hand(case, 5)
    adapter, batches = new_adapter(case, torch.float64)
    for images, logits in zip(batches[:5], expected, strict=True):
        torch.testing.assert_close(adapter(images), logits, rtol=0, atol=1e-9)
    assert set(adapter.parameters) == set(adapting(student, adapter.policy.adapts))
    for name, tensor in adapter.parameters.items():
        torch.testing.assert_close(tensor.detach(), student.get_parameter(name).detach(), rtol=0, atol=1e-8)
    moved = sum(not torch.equal(t, adapter.model.get_parameter(n)) for n, t in adapter.parameters.items())
    assert moved > len(adapter.parameters) / 2


@pytest.mark.parametrize("case", CASES)
def test_a_stream_may_be_cut_saved_and_reset(case: str, tmp_path: Path) -> None:
    whole, batches = new_adapter(case)
    expected = [whole(images) for images in batches]
    first, second = new_adapter(case)[0], new_adapter(case)[0]
    start = [first(images) for images in batches[:2]]
    before = [tensor.clone() for tensor in tensors_of(first)]
    first(batches[2] * float("nan"))
    assert same(tensors_of(first), before) and first.events == {"nonfinite": 0, "broken_images": 1}
    assert int(first.state["teacher"].step) == 2
    with first.frozen():
        frozen = first(batches[2])
    first.save(tmp_path / "stream.pt")
    second(batches[4])
    second.load(tmp_path / "stream.pt")
    assert same(start + [second(images) for images in batches[2:]], expected) and torch.equal(frozen, expected[2])
    assert same(tensors_of(second), tensors_of(whole))
    second.reset()
    assert same([second(images) for images in batches], expected)


@pytest.mark.parametrize("case", ["vit", "cnn", "cotta"])
def test_the_users_model_stays_as_it_is(case: str) -> None:
    family, make = CASES[case]
    model, batches = network(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hooks, plain = [len(module._forward_hooks) for module in model.modules()], model(batches[0]).logits
    adapters = [OnlineAdapter(model, make()) for _ in range(2)]
    both = [[adapter(images) for adapter in adapters] for images in batches]
    assert all(torch.equal(a, b) for a, b in both)
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model(batches[0]).logits, plain)


@pytest.mark.parametrize("case", ["vit", "all", "cotta"])
def test_frozen_tensors_are_shared_and_nothing_else_is_remembered(case: str) -> None:
    adapter, batches = new_adapter(case)
    for images in batches[:2]:
        adapter(images)

    def storages(tensors: object) -> set[int]:
        return {tensor.untyped_storage().data_ptr() for tensor in tensors}  # type: ignore[attr-defined]

    source = adapter.source
    network_storages = storages([*source.parameters(), *source.buffers()])
    own = storages(t for n, t in adapter.model.named_parameters() if not n.startswith("experts."))
    assert own <= network_storages
    assert not storages(adapter.state["teacher"].average.values()) & (
        network_storages | storages(adapter.parameters.values())
    )
    scalars = sum(tensor.numel() for tensor in adapter.parameters.values())
    remembered = {name: adapter.state[name] for name in ("rule", "teacher")}
    assert state_mib(remembered) * 2**20 == 3 * 4 * scalars + 16  # two moments, a mean, two counters


@pytest.mark.parametrize("case", ["vit", "cnn", "all", "cotta"])
def test_memory_exact_gives_the_same_parameters(case: str) -> None:
    (dense, batches), (exact, _) = new_adapter(case, torch.float64), new_adapter(case, torch.float64, "exact")
    for images in batches[:3]:
        torch.testing.assert_close(exact(images), dense(images), rtol=0, atol=1e-10)
    for name, tensor in dense.parameters.items():
        torch.testing.assert_close(exact.parameters[name], tensor, rtol=0, atol=1e-10)


@pytest.mark.parametrize("memory", ["compact", pytest.param("pruned", marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", ["vit", "cnn", "cotta"])
def test_memory_that_is_coded_stays_close(case: str, memory: str) -> None:
    (dense, batches), (coded, _) = new_adapter(case), new_adapter(case, memory=memory)
    for images in batches[:3]:
        reference, logits = dense(images), coded(images)
    assert torch.nn.functional.cosine_similarity(logits.flatten(), reference.flatten(), dim=0) > 0.99
    assert coded.updates == 3


@pytest.mark.parametrize("case", ["vit", "cnn", "cotta"])
def test_the_exports_are_the_adapted_model(case: str) -> None:
    adapter, batches = new_adapter(case)
    for images in batches[:3]:
        adapter(images)
    fresh = build(CASES[case][0])[0]
    fresh.module.load_state_dict(adapter.export(), strict=True)
    experts = adapter.policy.part("experts")
    assert bool(adapter.export_experts()) == (experts is not None)
    if experts is not None:
        attach_experts(fresh, experts.config.mixtures, seed=9).load_state_dict(adapter.export_experts(), strict=True)
    with adapter.frozen():
        expected = adapter(batches[3])
    view = augmented_view(batches[3], generator_for("teacher view", 0, 3, 0))
    torch.testing.assert_close(fresh(view, batch_statistics=True).logits.detach(), expected, rtol=1e-5, atol=1e-5)
    adapter.export()["norm.weight" if case == "vit" else "bn1.weight"].zero_()
    with adapter.frozen():
        assert torch.equal(adapter(batches[3]), expected)


def test_a_model_without_a_place_for_experts_is_refused() -> None:
    with pytest.raises(ModelError, match="has no module for experts"):
        OnlineAdapter(tiny_net(), method())


def test_a_teacher_that_sees_the_same_images_has_nothing_to_teach_at_first() -> None:
    """Why rounding alone moves the published method from its start, and what views and confidence change."""
    model, batches = network("vit", torch.float64)

    def gradient(**changes: object) -> float:
        policy = method(teacher=TeacherConfig(predicts=True, **changes))  # type: ignore[arg-type]
        adapter = OnlineAdapter(model, policy)
        loss = evaluate_on(policy, adapter.model, adapter.parameters, batches[0]).loss
        assert loss is not None
        gradients = torch.autograd.grad(loss, list(adapter.parameters.values()), allow_unused=True)
        return max(float(each.abs().max()) for each in gradients if each is not None)

    assert gradient() < 1e-12
    assert gradient(views=1) > 1e-3
    confidence = model(batches[0]).logits.softmax(dim=1).amax(dim=1).mean().item()
    assert gradient(views=1, sure_above=confidence - 1e-6) < 1e-12
    assert gradient(views=1, sure_above=confidence + 1e-6) > 1e-3


def test_the_footprint_is_measured_with_experts_and_teacher() -> None:
    model, batches = network("vit")
    dense, exact = measure_footprint(model, method(), batches[0], [Case("dense"), Case("exact")], repeats=1)
    assert exact.cosine == pytest.approx(1.0, abs=1e-5) and 0 < exact.held_mib < dense.held_mib
    assert not hasattr(model, "experts")
