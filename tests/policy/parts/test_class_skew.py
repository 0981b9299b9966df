"""Class skew: what tells it, what the cautious pass is, what it spares the policy, and what even streams notice."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from metaopt.data import load_digits
from metaopt.errors import ConfigError
from metaopt.meta import MetaTrainer
from metaopt.models import Shrinkage, SourceModel, prior_layers
from metaopt.models.class_shares import concentration, evenness, expected_entropy, uneven, with_own_prior
from metaopt.models.class_variation import class_variation, variation
from metaopt.online import OnlineAdapter
from metaopt.policy import AdaptationPolicy, MethodConfig, build_method
from metaopt.policy.parts.class_skew import ClassSkew, ClassSkewConfig, Look, SkewState
from metaopt.policy.parts.restoration import Restoration
from metaopt.policy.step import StepContext
from metaopt.policy.untrained import new_policy
from metaopt.types import StepOutput

from ...meta.cases import tiny_resnet
from ...tiny import BARE, random_images, small_digits, tiny_config, tiny_model, tiny_policy, trained_model

NEVER = {"evenness": 1e-9, "slope": 1e9}


def policy(skew: dict[str, float] | None, **parts: object) -> AdaptationPolicy:
    """A tiny policy, with the part where it has settings."""
    return tiny_policy(tiny_model(), parts={**BARE, **parts, **({} if skew is None else {"class_skew": skew})})


def certain(classes: Sequence[int], count: int = 10) -> Tensor:
    """Logits of images whose classes are beyond doubt."""
    return 50.0 * functional.one_hot(torch.tensor(classes), count).double()


@pytest.mark.parametrize(("images", "classes"), [(1, 4), (3, 2), (4, 3), (5, 3)])
def test_the_expected_entropy_is_the_mean_over_all_draws(images: int, classes: int) -> None:
    entropies = []
    for draw in itertools.product(range(classes), repeat=images):
        shares = torch.bincount(torch.tensor(draw), minlength=classes).double() / images
        entropies.append(float(torch.special.entr(shares).sum()))
    assert expected_entropy(images, classes) == pytest.approx(sum(entropies) / len(entropies), abs=1e-12)


def test_even_classes_have_evenness_1_and_one_class_little() -> None:
    drawn = torch.randint(10, (4000,), generator=torch.Generator().manual_seed(0)).tolist()
    assert evenness(certain(drawn)) == pytest.approx(1.0, abs=0.01)
    assert evenness(certain([3] * 50)) == pytest.approx(1 / math.exp(expected_entropy(50, 10)), abs=1e-6)
    assert evenness(certain([3])) == pytest.approx(1.0)  # of one image nobody can tell
    spoiled = certain(drawn[:40])
    spoiled[5] = torch.nan
    assert evenness(spoiled) == pytest.approx(evenness(certain(drawn[:5] + drawn[6:40])))


def test_concentration_is_1_of_one_class_and_0_of_even_ones() -> None:
    one, even = torch.tensor(1.0), torch.full((4,), 0.25)
    assert concentration(torch.empty(0), torch.tensor(0.0)) == 1
    assert concentration(even, one) == pytest.approx(0.0, abs=1e-6)
    assert concentration(torch.tensor([1.0, 0, 0, 0]), one) == 1
    # Half even, half taken for one class: shares 5/8, 1/8, 1/8, 1/8.
    assert concentration(even, torch.tensor(0.5)) == pytest.approx(((25 + 3) / 64 - 0.25) / 0.75, abs=1e-6)


def test_the_batchs_own_prior_is_the_likeliest_one() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(30, 4, generator=generator, dtype=torch.float64) + torch.tensor([2.0, 1.0, 0.0, 0.0])
    found = with_own_prior(logits)
    prior = (found - logits)[0].exp()
    torch.testing.assert_close(found - logits, prior.log().expand(30, 4))
    assert float(prior.sum()) == pytest.approx(1)

    def objective(pi: Tensor) -> float:
        """Log likelihood of the batch, and of a quarter of an image of each class."""
        return float((logits.softmax(1) @ pi).log().sum() + (pi.log() / 4).sum())

    for k, j in itertools.permutations(range(4), 2):  # no move of mass between two classes is any better
        moved = prior.clone()
        moved[k], moved[j] = moved[k] + 0.03 * prior[j], moved[j] - 0.03 * prior[j]
        assert objective(moved) < objective(prior)
    spoiled = torch.cat([logits, torch.full((1, 4), torch.nan, dtype=torch.float64)])
    torch.testing.assert_close(with_own_prior(spoiled)[:30], found)
    alone = logits[:1]
    assert torch.equal(with_own_prior(alone).argmax(1), alone.argmax(1))  # one image tells nothing of its neighbours


def sure(shares: Sequence[float], images: int, seed: int) -> Tensor:
    """Logits that are as sure as they should be, of images whose classes are drawn by these shares."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.multinomial(torch.tensor(shares), images, replacement=True, generator=generator)
    # Of z ~ N(m one-hot, 1), the posterior of even classes is softmax(m z).
    return 2.5 * (
        2.5 * functional.one_hot(classes, len(shares)) + torch.randn(images, len(shares), generator=generator)
    )


def test_uneven_classes_are_told_by_a_likelihood_ratio_that_even_ones_seldom_reach() -> None:
    even, tail = [1.0] * 10, [10 ** (-k / 9) for k in range(10)]
    assert sum(uneven(sure(even, 60, seed), 0.99) for seed in range(300)) <= 9  # of 3 to be expected
    assert sum(uneven(sure(tail, 200, seed), 0.99) for seed in range(50)) >= 48
    assert sum(uneven(sure([1.0, 1.0, *[0.0] * 8], 16, seed), 0.99) for seed in range(50)) >= 45
    assert not uneven(sure(even, 1, 0), 0.5) and not uneven(torch.full((3, 10), torch.nan), 0.5)


def test_the_policys_own_answer_is_corrected_where_classes_are_uneven_and_learned_from() -> None:
    part = load_digits().stream
    assert part.labels is not None
    picked = torch.cat([(part.labels == label).nonzero().squeeze(1)[: 60 // (label + 1)] for label in range(8)])
    images, never = small_digits(part)[picked], {"evenness": 1e-9, "slope": 1e9}
    corrected, plain = (
        OnlineAdapter(trained_model(), digits_policy(class_skew={**never, **more}))
        for more in ({}, {"temperature": None})
    )
    assert torch.equal(corrected(digits(None, 60)[0]), plain(digits(None, 60)[0]))  # even
    torch.testing.assert_close(corrected(images), with_own_prior(plain(images) / 2.5))
    assert corrected.updates == plain.updates == 2
    assert all(torch.equal(tensor, plain.parameters[name]) for name, tensor in corrected.parameters.items())


def test_variation_between_images_and_between_classes_without_chance() -> None:
    generator = torch.Generator().manual_seed(0)
    classes = torch.arange(8).repeat_interleave(500)
    means = torch.randn(8, 400, generator=generator, dtype=torch.float64)
    values = means[classes] + 2 * torch.randn(4000, 400, generator=generator, dtype=torch.float64)
    total, between = variation(values, classes, 2.0)
    assert total == pytest.approx((4 + 1 * 7 / 8) / 2, rel=0.02)
    assert between == pytest.approx(7 / 8 / 2, rel=0.02)
    few = variation(values[::500], classes[::500])
    assert few[0] == few[1]  # one image of each class: nothing tells images from classes


def norm(model: SourceModel, name: str) -> nn.BatchNorm2d:
    """A BatchNorm layer of a model."""
    layer = model.module.get_submodule(name)
    assert isinstance(layer, nn.BatchNorm2d)
    return layer


def test_clean_images_of_the_source_itself_have_no_offset() -> None:
    model, images = tiny_resnet(), random_images(24, seed=3).double()
    layer = norm(model, "bn1")
    assert layer.running_mean is not None and layer.running_var is not None
    mean, std = (torch.tensor(each, dtype=torch.float64).view(1, 3, 1, 1) for each in (model.spec.mean, model.spec.std))
    seen = model.module.get_submodule("conv1")((images - mean) / std)
    layer.running_mean.copy_(seen.mean((0, 2, 3)))
    found = class_variation(model, images, batch_size=7)
    assert found.offset[0] == pytest.approx(0.0, abs=1e-12) and bool((found.offset[1:] > 0).all())
    scale = layer.running_var + layer.eps
    torch.testing.assert_close(found.between_images[0], (seen.mean((2, 3)).var(dim=0) / scale).mean())
    assert len(found.predicted) == 24 and bool((found.between_classes <= found.between_images).all())


@pytest.mark.parametrize("grad", [False, True])
def test_statistics_are_shrunk_by_the_formula(grad: bool) -> None:
    model, images = tiny_resnet(), random_images(6, seed=1).double()
    layers, unshifted = prior_layers(model.module), torch.tensor([0.0, 1e9, 1e-3, 1e-2], dtype=torch.float64)
    unshifted = unshifted.repeat(3)[: len(layers)]
    with torch.set_grad_enabled(grad):
        found = model(images, batch_statistics=True, prior=Shrinkage(unshifted)).logits
    shares = []
    for name, v in zip(layers, unshifted, strict=True):
        layer = norm(model, name)

        def shrunk(x: Tensor, layer: nn.BatchNorm2d = layer, v: Tensor = v) -> Tensor:
            mean, var, source, spread = (
                x.mean((0, 2, 3)),
                x.var((0, 2, 3), False),
                layer.running_mean,
                layer.running_var,
            )
            assert source is not None and spread is not None
            distance = ((mean - source) ** 2 / (spread + layer.eps)).mean()
            share = max(0.0, float(1 - v / distance))
            shares.append(share)
            mean, var = source + share * (mean - source), spread + share * (var - spread)
            return functional.batch_norm(x, mean, var, layer.weight, layer.bias, False, 0.0, layer.eps)

        layer.forward = shrunk  # type: ignore[method-assign]
    torch.testing.assert_close(found, model(images).logits, rtol=1e-10, atol=1e-10)
    assert shares[0] == 1 and shares[1] == 0 and any(0 < share < 1 for share in shares)


def digits_policy(**parts: object) -> AdaptationPolicy:
    """Of the small digits' model, before meta-training."""
    found = new_policy(trained_model(), parts={"batch_statistics": True, **parts})
    found.prepare(trained_model(), lambda: small_digits(load_digits().source)[:128])
    return found


def digits(label: int | None, count: int = 40) -> tuple[Tensor, Tensor]:
    """Images of one class, or of all in their order, and their labels."""
    part = load_digits().stream
    assert part.labels is not None
    picked = torch.arange(len(part.labels)) if label is None else (part.labels == label).nonzero().squeeze(1)
    return small_digits(part)[picked[:count]], part.labels[picked[:count]]


def test_a_skewed_batch_is_answered_with_caution_and_not_learned_from() -> None:
    adapter = OnlineAdapter(trained_model(), digits_policy(class_skew=True, class_balance=True))
    before = {name: tensor.clone() for name, tensor in adapter.parameters.items()}
    images, _ = digits(3)
    policy, part = adapter.policy, adapter.policy.part("class_skew")
    look = part._look(StepContext(policy, adapter.model, before, policy.init(before), images))
    assert look.skewed and look.own is not None
    assert torch.equal(adapter(images), with_own_prior((look.logits + look.own) / 2 / 4))
    assert adapter.events["skewed"] == 1 and adapter.updates == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter.parameters.items())
    adapter(digits(None)[0])
    assert adapter.events["skewed"] == 1 and adapter.updates == 1  # all classes: learned from at once


def test_on_a_stream_sorted_by_class_it_is_near_the_source_where_batch_statistics_are_lost() -> None:
    streams = [digits(label) for label in range(10)]

    def error(adapter: OnlineAdapter) -> float:
        wrong = [int((adapter(images).argmax(1) != labels).sum()) for images, labels in streams]
        return 100 * sum(wrong) / sum(len(labels) for _, labels in streams)

    source = error(OnlineAdapter(trained_model(), build_method(MethodConfig("source"))))
    watching, uncorrected = (
        error(OnlineAdapter(trained_model(), digits_policy(class_skew={"temperature": value}))) for value in (2.5, None)
    )
    assert uncorrected < source + 1 and watching < uncorrected - 5
    assert error(OnlineAdapter(trained_model(), digits_policy())) > source + 5


def test_few_images_before_the_first_look_are_answered_with_caution() -> None:
    adapter = OnlineAdapter(trained_model(), digits_policy(class_skew=True), gather=40)
    images, _ = digits(3)
    first = adapter(images[:8])
    part = adapter.policy.part("class_skew")
    parameters = {name: tensor.clone() for name, tensor in adapter.parameters.items()}
    context = StepContext(adapter.policy, adapter.model, parameters, adapter.policy.init(parameters), images[:8])
    with torch.no_grad():
        context.signals["skewed"] = torch.tensor(1.0)
        both = part._cautious(context).logits + context.forward(parameters=context.start, batch_statistics=True).logits
    torch.testing.assert_close(first, both / 2)
    assert adapter.events["waiting"] == 1


def test_an_even_stream_is_answered_as_without_the_part() -> None:
    watching, plain = (OnlineAdapter(tiny_model(), policy(skew)) for skew in (NEVER, None))
    for seed in range(10):
        images = random_images(8, seed=seed)
        assert torch.equal(watching(images), plain(images))
    assert watching.events["skewed"] == 0 and watching.updates == plain.updates == 10


def test_networks_without_batch_normalisation_are_never_looked_at() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 4, stride=4), nn.GroupNorm(2, 6), nn.Flatten(), nn.Linear(96, 10))
    watching, plain = (
        OnlineAdapter(SourceModel(net), tiny_policy(SourceModel(net), parts=parts))
        for parts in ({"class_skew": True}, {})
    )
    for seed in range(3):
        assert torch.equal(watching(random_images(6, seed)), plain(random_images(6, seed)))
    assert watching.events["skewed"] == 0 and watching.updates == 3
    state = watching.state["class_skew"]
    assert float(state.shares.sum()) == pytest.approx(1) and state.moments.count == 18 and state.batches == 3


def test_of_networks_without_batch_normalisation_a_lasting_lean_is_no_unevenness() -> None:
    net = nn.Sequential(nn.Conv2d(3, 6, 4, stride=4), nn.GroupNorm(2, 6), nn.Flatten(), nn.Linear(96, 10))
    adapter = OnlineAdapter(SourceModel(net), tiny_policy(SourceModel(net), parts={"class_skew": True}))
    part = adapter.policy.part("class_skew")
    state = adapter.policy.init(adapter.parameters)
    lean, found = torch.tensor([4.0, 3.0, *[0.0] * 8]), []
    for logits in (sure([1.0] * 10, 2000, seed=0) + lean).split(100):
        context = StepContext(adapter.policy, adapter.model, adapter.parameters, state, torch.zeros(100, 3, 16, 16))
        context.signals["skewed"] = torch.tensor(0.0)
        answered = part.answer(context, logits)
        assert torch.equal(answered, logits if context.signals["uneven"] == 0 else with_own_prior(logits / 2.5))
        part.judge(context, StepOutput(answered))
        found.append(bool(context.signals["uneven"]))
        state = context.state
    assert uneven(logits, 0.999) and sum(found) <= 2
    one = StepContext(adapter.policy, adapter.model, adapter.parameters, state, torch.zeros(100, 3, 16, 16))
    one.signals["skewed"] = torch.tensor(0.0)
    part.answer(one, sure([1.0, 0.0, 0.0, 1.0, *[0.0] * 6], 100, seed=1) + lean)
    assert one.signals["uneven"] == 1


def test_looks_are_rare_while_classes_are_even(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []
    look = ClassSkew._look
    monkeypatch.setattr(ClassSkew, "_look", lambda self, context: looked.append(1) or look(self, context))
    adapter = OnlineAdapter(tiny_model(), policy({**NEVER, "every": 4}))
    for seed in range(9):
        adapter(random_images(8, seed=seed))
    assert len(looked) == 3


def test_behind_a_skewed_batch_each_of_the_next_ones_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[bool] = []
    look = ClassSkew._look

    def noted(self: ClassSkew, context: StepContext) -> Look:
        found = look(self, context)
        looked.append(found.skewed)
        return found

    monkeypatch.setattr(ClassSkew, "_look", noted)
    adapter = OnlineAdapter(trained_model(), digits_policy(class_skew={"every": 4}))
    for label in (3, None, None, 5, *[None] * 7):
        adapter(digits(label)[0])
    # The skewed first and fourth, four behind the fourth, then the next that is due by itself.
    assert looked == [True, False, False, True, *[False] * 4, False]


def test_class_changes_are_no_change_of_domain_while_batches_are_skewed() -> None:
    restoring = Restoration()
    adapter = OnlineAdapter(tiny_model(), policy(NEVER, restoration=True))
    part = adapter.policy.part("class_skew")
    part.correlation.fill_(0.5)
    parameters = adapter.parameters
    effects = []
    for skewed in (0.0, 1.0):
        state = adapter.policy.init(parameters)
        state = {**state, "class_skew": state["class_skew"]._replace(skewed=torch.tensor(skewed))}
        context = StepContext(adapter.policy, adapter.model, parameters, state, random_images(9, seed=0))
        part.observe(context)
        effects.append(float(context.signals["design_effect"]))
    assert effects == [1.0, 1 + 8 * 0.5]
    assert restoring.begins_anew(torch.tensor(20.0)) and not restoring.begins_anew(torch.tensor(20.0 / effects[1]))


def test_it_needs_clean_images_and_says_so() -> None:
    adapter = OnlineAdapter(tiny_model(), tiny_policy(tiny_model(), parts={**BARE, "class_skew": True}))
    adapter.policy.part("class_skew").correlation.fill_(-1.0)
    with pytest.raises(ConfigError, match=r"class_skew knows nothing of the source; .* set source.images=PATH"):
        adapter(random_images(8, seed=0))


def test_other_settings_in_deployment_keep_what_it_knows_of_the_source() -> None:
    learned = digits_policy(class_skew=True)
    found = build_method(MethodConfig("policy", update="generator", parts={"class_skew": {"every": 3}}), policy=learned)
    part, before = found.part("class_skew"), learned.part("class_skew")
    assert part.config == ClassSkewConfig(every=3) and before.config == ClassSkewConfig()
    assert part.layers == before.layers and torch.equal(part.variation, before.variation)
    adapter = OnlineAdapter(trained_model(), found)
    adapter(digits(3)[0])
    assert adapter.events["skewed"] == 1


def test_a_hand_made_method_looks_too_and_asks_for_clean_images() -> None:
    parts = {"batch_statistics": True, "class_skew": {"temperature": None}}
    config = MethodConfig("tent", "adam", lr=0.001, objective={"entropy": 1.0}, parts=parts)
    images, method = digits(3)[0], build_method(config)
    with pytest.raises(ConfigError, match="class_skew knows nothing of the source"):
        OnlineAdapter(trained_model(), method)(images)
    method.prepare(trained_model(), lambda: small_digits(load_digits().source)[:128])
    adapter = OnlineAdapter(trained_model(), method)
    adapter(images)
    assert adapter.events["skewed"] == 1 and adapter.updates == 0


@pytest.mark.parametrize("frozen", [(), ("class_skew",)])
def test_meta_training_learns_the_scales_where_they_are_not_frozen(frozen: tuple[str, ...]) -> None:
    tasks: dict[str, Any] = {"skewed": 1.0, "clean": 1.0, "translate": 0, "unrolls": 4}
    parts = {"batch_statistics": 16, "class_skew": True}
    config = tiny_config(batch_size=40, parts=parts, frozen=frozen, **tasks)
    trainer = MetaTrainer(trained_model(), small_digits(load_digits().unlabeled), ("gaussian_blur", "saturate"), config)
    part = trainer.policy.part("class_skew")
    part.log_scales.data.fill_(-5.0)  # where statistics are all the source's, nothing depends on them
    before = part.log_scales.detach().clone()
    trainer.run()
    assert torch.equal(part.log_scales, before) == bool(frozen) and bool(torch.isfinite(part.log_scales).all())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"every": 0}, "class_skew.every is 0"),
        ({"evenness": 1.0}, "class_skew.evenness is 1.0; allowed is 0 < evenness < 1"),
        ({"slope": 0.0}, "class_skew.slope is 0.0"),
        ({"temperature": 0.0}, "class_skew.temperature is 0.0"),
        ({"cautious_temperature": -1.0}, "class_skew.cautious_temperature is -1.0"),
        ({"certainty": 1.0}, "class_skew.certainty is 1.0; allowed is 0 < certainty < 1"),
    ],
)
def test_settings_out_of_range(settings: dict[str, float], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ClassSkewConfig(**settings)  # type: ignore[arg-type]


def test_a_state_of_other_classes_is_refused() -> None:
    part = ClassSkew()
    state: SkewState = part.init({"weight": torch.zeros(2)})
    part.check_state(state, 10)
    part.check_state(state._replace(shares=torch.full((10,), 0.1)), 10)
    with pytest.raises(ValueError, match="shares of 7 classes and the model has 10"):
        part.check_state(state._replace(shares=torch.full((7,), 1 / 7)), 10)
