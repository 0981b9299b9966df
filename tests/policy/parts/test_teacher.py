"""The teacher against its equations, and what it costs."""

import pytest
import torch
from torch import Tensor

from metaopt.errors import ConfigError
from metaopt.evaluation import state_mib
from metaopt.experts import ExpertsConfig, attach_experts, expert_layout
from metaopt.models import SourceModel
from metaopt.parameters import adapted_layout
from metaopt.policy import AdaptationPolicy
from metaopt.policy.parts.teacher import (
    Teacher,
    TeacherConfig,
    TeacherState,
    init_teacher,
    proximal_loss,
    restore,
    update_teacher,
)
from metaopt.policy.step import StepContext
from metaopt.types import Parameters
from tests.experts.families import build, stir


def student(dtype: torch.dtype = torch.float64) -> tuple[SourceModel, Tensor, Parameters]:
    """A model with experts, images, and what adapts: norm layers, experts, gates."""
    model, images = build("vit", dtype)
    stir(attach_experts(model, ExpertsConfig()))
    parameters = adapted_layout(model).take(model) | expert_layout(model).take(model)
    return model, images, {name: tensor.detach() for name, tensor in parameters.items()}


def moved(parameters: Parameters, seed: int) -> Parameters:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: tensor + torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
        for name, tensor in parameters.items()
    }


def beside(
    model: SourceModel, parameters: Parameters, state: TeacherState, images: Tensor, config: TeacherConfig
) -> tuple[Teacher, StepContext]:
    """A teacher, and a batch on its way through the step of a method that has one."""
    policy = AdaptationPolicy("taught", parts=[Teacher(config)])
    return policy.part("teacher"), StepContext(policy, model, parameters, {"teacher": state}, images)


def teacher_logits(model: SourceModel, parameters: Parameters, state: TeacherState, images: Tensor) -> Tensor:
    teacher, context = beside(model, parameters, state, images, TeacherConfig())
    return teacher.teach(context)


def test_running_mean() -> None:
    _, _, parameters = student()
    config, state = TeacherConfig(momentum=0.9), init_teacher(parameters)
    students = [moved(parameters, seed) for seed in range(3)]
    for one in students:
        state = update_teacher(config, state, one)
    for name, tensor in parameters.items():
        expected = 0.9**3 * tensor + sum(0.1 * 0.9 ** (2 - i) * one[name] for i, one in enumerate(students))
        torch.testing.assert_close(state.average[name], expected)
    assert int(state.step) == 3


def test_first_teacher_predicts_as_the_source_and_has_no_gradient() -> None:
    model, images, parameters = student()
    state = init_teacher(parameters)
    with torch.no_grad():
        assert torch.equal(teacher_logits(model, parameters, state, images), model(images).logits)
    tracked = {name: tensor.clone().requires_grad_() for name, tensor in parameters.items()}
    after = update_teacher(TeacherConfig(momentum=0.5), state, moved(tracked, 0))
    assert not any(tensor.requires_grad for tensor in after.average.values())
    assert not torch.equal(
        teacher_logits(model, tracked, after, images), teacher_logits(model, parameters, state, images)
    )


def test_frozen_tensors_have_no_second_copy() -> None:
    model, images, parameters = student(torch.float32)
    teacher_mib = (sum(tensor.numel() for tensor in parameters.values()) * 4 + 8) / 2**20  # and an int64 counter
    network = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    state = update_teacher(TeacherConfig(), init_teacher(parameters), moved(parameters, 0))
    storages = {tensor.untyped_storage().data_ptr() for tensor in state.average.values()}
    assert not storages & network  # adaptation in place cannot reach the source through its teacher
    assert state_mib(state) == pytest.approx(teacher_mib, rel=1e-9)
    assert state_mib([state, model]) == pytest.approx(state_mib(model) + teacher_mib, rel=1e-9)
    used: set[int] = set()

    def note(module: torch.nn.Module, _inputs: object, _output: object) -> None:
        used.update(tensor.untyped_storage().data_ptr() for tensor in module.parameters(recurse=False))

    handles = [module.register_forward_hook(note) for module in model.modules()]
    teacher_logits(model, parameters, state, images)
    for handle in handles:
        handle.remove()
    frozen = set(dict(model.named_parameters())) - set(parameters)
    assert used == storages | {model.get_parameter(name).untyped_storage().data_ptr() for name in frozen}


@pytest.mark.parametrize("group", ["tensor", "expert"])
@pytest.mark.parametrize("squared", [False, True])
def test_proximal_loss(group: str, squared: bool) -> None:
    _, _, parameters = student()
    anchor, config = moved(parameters, 0), TeacherConfig(group=group, squared=squared)
    expected = torch.zeros((), dtype=torch.float64)
    for site in ("experts.blocks/0/mlp", "experts.blocks/1/mlp"):
        for expert in range(4):
            gaps = [
                (parameters[f"{site}.{role}"][expert] - anchor[f"{site}.{role}"][expert]).flatten()
                for role in ("down_weight", "down_bias", "up_weight", "up_bias")
            ]
            for gap in [torch.cat(gaps)] if group == "expert" else gaps:
                expected = expected + (gap @ gap if squared else (gap @ gap).sqrt())
    torch.testing.assert_close(proximal_loss(config, parameters, anchor), expected)


def test_proximal_loss_where_student_and_anchor_are_the_same() -> None:
    _, _, parameters = student()
    for squared in (False, True):
        tracked = {name: tensor.clone().requires_grad_() for name, tensor in parameters.items()}
        loss = proximal_loss(TeacherConfig(squared=squared), tracked, parameters)
        own = [tensor for name, tensor in tracked.items() if name.startswith("experts.") and "router" not in name]
        first = torch.autograd.grad(loss, own, create_graph=True)
        second = torch.autograd.grad(sum(gradient.square().sum() for gradient in first), own)  # type: ignore[arg-type]
        assert float(loss.detach()) == 0
        assert all(bool((gradient == 0).all()) for gradient in (*first, *second))
    norms = {name: tensor for name, tensor in parameters.items() if not name.startswith("experts.")}
    assert float(proximal_loss(TeacherConfig(), norms, norms)) == 0


def test_anchor() -> None:
    model, images, initial = student()
    parameters = moved(initial, 1)
    state = TeacherState(moved(initial, 2), torch.tensor(1))
    for config, anchor in (
        (TeacherConfig(proximal=0.25), state.average),
        (TeacherConfig(proximal=0.25, anchor="initial"), initial),
    ):
        teacher, context = beside(model, parameters, state, images, config)
        ((name, (weight, value)),) = teacher.terms(context, model(images)).items()
        assert (name, weight) == ("proximal", 0.25)
        torch.testing.assert_close(value, proximal_loss(config, parameters, anchor), rtol=0.0, atol=0.0)
    for config, given in (
        (TeacherConfig(proximal=0), parameters),
        (TeacherConfig(), {name: tensor for name, tensor in parameters.items() if not name.startswith("experts.")}),
    ):
        teacher, context = beside(model, given, state, images, config)
        assert teacher.terms(context, model(images)) == {}


def test_restore_sets_a_few_scalars_back() -> None:
    _, _, initial = student()
    parameters, config = moved(initial, 0), TeacherConfig(restore=0.1)
    restored = restore(config, parameters, initial, 3)
    back = torch.cat([(restored[name] == initial[name]).flatten() for name in initial])
    kept = torch.cat([(restored[name] == parameters[name]).flatten() for name in initial])
    assert bool((back ^ kept).all())
    assert float(back.double().mean()) == pytest.approx(0.1, abs=0.03)
    assert all(
        torch.equal(a, b)
        for a, b in zip(restored.values(), restore(config, parameters, initial, 3).values(), strict=True)
    )
    for other in (
        restore(config, parameters, initial, 4),
        restore(TeacherConfig(restore=0.1, seed=1), parameters, initial, 3),
    ):
        assert not torch.equal(next(iter(other.values())), next(iter(restored.values())))
    few = {name: parameters[name] for name in list(parameters)[:2]}
    assert all(torch.equal(tensor, restored[name]) for name, tensor in restore(config, few, initial, 3).items())
    assert restore(TeacherConfig(restore=0), parameters, initial, 3) is parameters
    with torch.random.fork_rng(devices=[]):
        state = torch.get_rng_state()
        restore(config, parameters, initial, 3)
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"momentum": 1.5}, r"teacher\.momentum is 1\.5; allowed is \[0, 1\]"),
        ({"restore": -0.1}, r"teacher\.restore is -0\.1; allowed"),
        ({"proximal": float("nan")}, r"teacher\.proximal is nan; allowed are finite values of at least 0"),
        ({"anchor": "source"}, r"teacher\.anchor is 'source'; allowed are teacher, initial"),
        ({"group": "site"}, r"teacher\.group is 'site'; allowed are tensor, expert"),
    ],
)
def test_settings_out_of_range(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TeacherConfig(**settings)


def test_settings_survive_a_checkpoint() -> None:
    teacher = Teacher(TeacherConfig(squared=True, anchor="initial"))
    assert Teacher.from_dict(teacher.to_dict()).config == teacher.config
