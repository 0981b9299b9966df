"""The learned initialization: what it changes, its meta-gradient, its file, and who may start there."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from metaopt.errors import ConfigError
from metaopt.meta import MetaTrainer
from metaopt.meta.evaluate import unrolled_loss
from metaopt.meta.meta_gradient import meta_gradient
from metaopt.meta.unroll import UnrollConfig, learned_tensors
from metaopt.models import SourceModel
from metaopt.online import OnlineAdapter
from metaopt.optimizers.update import gradients_of
from metaopt.parameters import detached, flatten
from metaopt.policy import AdaptationPolicy, MethodConfig, build_method, transferred
from metaopt.policy.part import Part
from metaopt.policy.parts.initialization import Initialization, InitializationConfig
from metaopt.policy.parts.restoration import Restoration, RestorationConfig
from metaopt.policy.step import StepContext
from metaopt.policy.untrained import DEFAULT_PARTS
from metaopt.policy.without_step import evaluate_on
from metaopt.types import Parameters

from ..meta.cases import GRADIENTS, MODELS, TeacherLoss, images, policy_for, start, task
from ..tiny import BARE, random_images, tiny_config, tiny_model, tiny_policy, with_parts

OFFSET = "parts.initialization.offset"
LEARNED = MethodConfig("policy", update="generator", objective_from_policy=True, parts={**BARE, "initialization": True})
TENT = {"update": "adam", "objective": {"entropy": 1.0}}


def untrained(model: SourceModel) -> Initialization:
    return Initialization.build(InitializationConfig(), model)


def initialization_of(policy: AdaptationPolicy) -> Initialization:
    found = policy.part("initialization")
    assert isinstance(found, Initialization)
    return found


def case(model: str = "resnet", *parts: Part) -> tuple[AdaptationPolicy, Parameters]:
    network = MODELS[model]()
    policy = policy_for(network, "residual", parts=[untrained(network), *parts])
    torch.manual_seed(3)
    initialization_of(policy).offset.data.normal_(std=0.1)
    return policy, start(network)


def tiny_case() -> AdaptationPolicy:
    initialization = untrained(tiny_model())
    initialization.offset.data.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    return with_parts(tiny_policy(tiny_model()), initialization)


def test_it_moves_the_tensors_that_it_knows() -> None:
    learned = Initialization(InitializationConfig(decay=1.0), {"b": 2, "a": 4})
    learned.offset.data = torch.arange(6.0)
    given = {"a": torch.ones(2, 2), "other": torch.ones(1), "b": torch.zeros(2)}
    found = learned.start(given)
    assert list(found) == ["a", "other", "b"] and found["other"] is given["other"]
    assert torch.equal(found["a"], torch.tensor([[3.0, 4.0], [5.0, 6.0]]))
    assert torch.equal(found["b"], torch.tensor([0.0, 1.0]))
    assert float(learned.penalty().detach()) == 0 + 1 + 4 + 9 + 16 + 25


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("model", sorted(MODELS))
def test_the_unroll_is_deployment(gradient: str, model: str) -> None:
    policy, parameters = case(model)
    batches = task(4)
    taken = meta_gradient(
        policy, MODELS[model](), parameters, None, batches, TeacherLoss(), config=UnrollConfig(gradient)
    )
    adapter = OnlineAdapter(MODELS[model](), policy)
    for position, loss in enumerate([None, *taken.losses]):
        logits = adapter(batches[position].images)
        if loss is not None:
            targets = batches[position].targets
            assert targets is not None
            torch.testing.assert_close(torch.nn.functional.cross_entropy(logits, targets), loss, rtol=0, atol=1e-12)
    del policy.parts["initialization"]
    without = unrolled_loss(policy, MODELS[model](), parameters, batches, TeacherLoss())
    assert not torch.allclose(torch.stack(without), torch.stack(taken.losses), rtol=1e-4)


def test_its_first_order_gradient_is_the_mean_of_the_positions_gradients() -> None:
    policy, parameters = case()
    steps, batches, network = 3, task(3), MODELS["resnet"]()
    found = meta_gradient(policy, network, parameters, None, batches, TeacherLoss()).gradients[OFFSET]
    assert policy.rule is not None
    theta: Parameters = {name: tensor.detach() for name, tensor in policy.start(parameters).items()}
    state, expected = policy.rule.init(parameters), torch.zeros_like(found)
    for position in range(steps + 1):
        here = detached(theta)
        output = evaluate_on(policy, network, here, batches[position].images)
        if position > 0:
            score = TeacherLoss()(output, batches[position])
            expected += flatten(gradients_of(score, here, retain_graph=True)) / steps
        assert output.loss is not None
        updates, state = policy.rule.update(gradients_of(output.loss, here), state)
        theta = {name: tensor.detach() - updates[name].detach() for name, tensor in here.items()}
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert int((expected != 0).sum()) > len(expected) // 2


@pytest.mark.parametrize("restores", [False, True])
def test_its_full_gradient_is_that_of_finite_differences(restores: bool) -> None:
    restoration = Restoration(RestorationConfig(base=0.2, peak=0.6, threshold=3.0))
    policy, parameters = case("resnet", *([restoration] if restores else []))
    network, batches = MODELS["resnet"](), task(3)
    initialization = initialization_of(policy)
    found = meta_gradient(
        policy, network, parameters, None, batches, TeacherLoss(), config=UnrollConfig("full", term_steps=None)
    ).gradients[OFFSET]

    def loss() -> float:
        return float(torch.stack(unrolled_loss(policy, network, parameters, batches, TeacherLoss())).mean())

    torch.manual_seed(1)
    direction = torch.randn_like(initialization.offset)
    direction /= direction.norm()
    before, step = initialization.offset.data.clone(), 1e-5
    ends = []
    for sign in (1, -1):
        initialization.offset.data = before + sign * step * direction
        ends.append(loss())
    assert float(found @ direction) == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-5, abs=1e-8)


def test_meta_training_learns_it_from_the_teacher_and_not_from_its_own_objective() -> None:
    for loss in ("clean_teacher", "unsupervised"):
        trainer = MetaTrainer(tiny_model(), random_images(32), None, tiny_config(loss=loss, epochs=1))
        if loss == "unsupervised":
            assert trainer.policy.part("initialization") is None
            continue
        learned = initialization_of(trainer.policy)
        assert OFFSET in learned_tensors(trainer.policy)
        assert not learned.offset.any()
        trainer.run()
        assert learned.offset.any()
    config = tiny_config(parts={**DEFAULT_PARTS, "initialization": False})
    assert MetaTrainer(tiny_model(), random_images(32), None, config).policy.part("initialization") is None


def test_decay_holds_it_at_the_source() -> None:
    norms = []
    for decay in (0.0, 100.0):
        parts = {**DEFAULT_PARTS, "initialization": {"decay": decay}}
        config = tiny_config(parts=parts, unrolls=6, epochs=1, select_best=False)
        trainer = MetaTrainer(tiny_model(), random_images(32), None, config)
        trainer.run()
        norms.append(float(initialization_of(trainer.policy).offset.detach().square().sum()))
    assert norms[1] < norms[0] / 2


def test_an_adapter_starts_there_and_reset_and_restoration_come_back_there() -> None:
    policy = tiny_case()
    source = tiny_model()
    own = start(source)
    expected = initialization_of(policy).start({name: tensor.clone() for name, tensor in own.items()})
    before: dict[str, Tensor] = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    adapter = OnlineAdapter(source, policy)
    first = {name: tensor.detach().clone() for name, tensor in adapter.parameters.items()}
    assert all(torch.equal(first[name], tensor.detach()) for name, tensor in expected.items())
    adapter(random_images(8))
    assert any(not torch.equal(adapter.parameters[name], first[name]) for name in first)
    adapter.reset()
    assert all(torch.equal(adapter.parameters[name], first[name]) for name in first)
    assert all(torch.equal(tensor, before[name]) for name, tensor in source.state_dict().items())
    found = StepContext(policy, source, own, {}, random_images(8)).start
    assert all(torch.equal(found[name], first[name]) for name in first)


def test_the_file_brings_it_back_and_another_model_leaves_it_out() -> None:
    assert AdaptationPolicy.from_dict(tiny_policy(tiny_model()).to_dict()).part("initialization") is None
    policy = tiny_case()
    loaded = AdaptationPolicy.from_dict(policy.to_dict())
    assert initialization_of(loaded).sizes == initialization_of(policy).sizes
    batch = random_images(8)
    assert torch.equal(OnlineAdapter(tiny_model(), loaded)(batch), OnlineAdapter(tiny_model(), policy)(batch))
    found, notes = transferred(policy, tiny_model())
    assert found.part("initialization") is None and policy.part("initialization") is not None
    assert any(note.startswith("initialization: left out") for note in notes)


def test_methods_start_at_the_source_unless_told_otherwise() -> None:
    policy = tiny_case()
    assert build_method(LEARNED, policy=policy).part("initialization") is policy.part("initialization")
    mgtta = MethodConfig("mgtta", update="generator", parts=dict(BARE))
    assert build_method(mgtta, policy=policy).part("initialization") is None
    for method, updates in (("tent", TENT), ("bn", {})):
        without = MethodConfig(method, **updates, parts=dict(BARE))
        assert build_method(without, policy=policy).part("initialization") is None
        config = MethodConfig(method, **updates, parts={**BARE, "initialization": True})
        batch = random_images(8)
        logits = OnlineAdapter(tiny_model(), build_method(config, policy=policy))(batch)
        plain = OnlineAdapter(tiny_model(), build_method(without))(batch)
        assert not torch.allclose(logits, plain, rtol=1e-3)
        with pytest.raises(ConfigError, match=r"'\w+' has parts.initialization and no policy.*give a policy"):
            build_method(config)
    del policy.parts["initialization"]
    assert build_method(LEARNED, policy=policy).part("initialization") is None


def test_without_an_offset_it_is_the_source() -> None:
    policy, _ = case()
    initialization_of(policy).offset.data.zero_()
    with_it = OnlineAdapter(MODELS["resnet"](), policy)
    del policy.parts["initialization"]
    without = OnlineAdapter(MODELS["resnet"](), policy)
    for seed in range(3):
        assert torch.equal(with_it(images(seed)), without(images(seed)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.0}, r"initialization.lr is 0.0; it must be positive and finite"),
        ({"decay": -1.0}, r"initialization.decay is -1.0; allowed are finite values of at least 0"),
    ],
)
def test_settings_are_checked(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_config(parts={**DEFAULT_PARTS, "initialization": changes})


def test_a_method_that_starts_there_asks_for_a_policy() -> None:
    config = MethodConfig("tent", update="adam", objective={"entropy": 1.0})
    assert not config.needs_policy and replace(config, parts={"initialization": True}).needs_policy
