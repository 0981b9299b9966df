"""Class balance: its equation, what it leaves alone, where it comes from, and that a few images do not mislead it."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from metaopt.errors import ConfigError
from metaopt.meta import MetaTrainer
from metaopt.meta.evaluate import unrolled_loss
from metaopt.meta.loss import CleanTeacher
from metaopt.meta.unroll import MetaBatch
from metaopt.online import OnlineAdapter
from metaopt.policy import AdaptationPolicy, MethodConfig, build_method, transferred
from metaopt.policy.parts.class_balance import COUNT, ClassBalance, ClassBalanceConfig
from metaopt.policy.untrained import DEFAULT_PARTS
from metaopt.types import StepOutput

from ..meta.cases import TeacherLoss, policy_for, start, task, tiny_resnet
from ..tiny import BARE, random_images, tiny_config, tiny_model, tiny_policy

LEARNED = MethodConfig("policy", update="generator", objective_from_policy=True, inherit=True)


def logits(images: int = 40, favoured: float = 1.5) -> Tensor:
    """Of a model that favours class 0."""
    drawn = torch.randn(images, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn[:, 0] += favoured
    return drawn


def balanced_policy(strength: float = 1.0) -> AdaptationPolicy:
    return tiny_policy(tiny_model(), parts={**BARE, "class_balance": strength})


@pytest.mark.parametrize("strength", [0.4, 1.0])
def test_each_class_loses_the_logarithm_of_its_share(strength: float) -> None:
    given = logits()
    found = ClassBalance(ClassBalanceConfig(strength)).corrected(given)
    for index in range(5):
        total = sum(float(row.exp()[index] / row.exp().sum()) for row in given)
        share = (total + COUNT / 5) / (40 + COUNT)
        torch.testing.assert_close(found[:, index], given[:, index] - strength * torch.tensor(share).double().log())


def test_predictions_become_more_even_and_a_small_batch_is_hardly_corrected() -> None:
    given = logits(400)
    before, after = (z.softmax(dim=1).mean(dim=0) for z in (given, ClassBalance().corrected(given)))
    assert after.max() - after.min() < 0.5 * (before.max() - before.min())
    one = logits(1)
    moved = ClassBalance().corrected(one) - one
    assert moved.max() - moved.min() < 0.25


def test_an_image_with_nan_spoils_only_its_own_prediction() -> None:
    given = logits()
    spoiled = given.clone()
    spoiled[3] = torch.nan
    found = ClassBalance().corrected(spoiled)
    assert found[3].isnan().all() and found[torch.arange(40) != 3].isfinite().all()


def test_the_objective_and_so_the_updates_do_not_see_it() -> None:
    plain, corrected = tiny_policy(tiny_model()), balanced_policy()
    first, second = OnlineAdapter(tiny_model(), plain), OnlineAdapter(tiny_model(), corrected)
    for seed in range(3):
        batch = random_images(16, seed)
        raw, found = first.step(batch), second.step(batch)
        assert torch.equal(found.logits, ClassBalance().corrected(raw.logits))
        assert not torch.equal(found.logits, raw.logits)
        assert raw.loss is not None and found.loss is not None and torch.equal(raw.loss, found.loss)
    with first.frozen(), second.frozen():
        assert torch.equal(second(batch), ClassBalance().corrected(first(batch)))


def test_a_closed_gate_predicts_with_it_too() -> None:
    closed = replace(LEARNED, parts={"update_gate": {"every": 2}})
    plain, corrected = (build_method(closed, policy=p) for p in (tiny_policy(tiny_model()), balanced_policy()))
    first, second = OnlineAdapter(tiny_model(), plain), OnlineAdapter(tiny_model(), corrected)
    for seed in range(4):
        raw = first(random_images(16, seed))
        assert torch.equal(second(random_images(16, seed)), ClassBalance().corrected(raw))
    assert second.updates == 2


def test_the_unroll_is_deployment() -> None:
    network, batches = tiny_resnet(), task(3)
    policy = policy_for(network)
    plain = unrolled_loss(policy, network, start(network), batches, TeacherLoss())
    policy = policy_for(network, parts=[ClassBalance()])
    adapter = OnlineAdapter(tiny_resnet(), policy)
    expected = [TeacherLoss()(StepOutput(adapter(batch.images)), batch) for batch in batches][1:]
    found = unrolled_loss(policy, network, start(network), batches, TeacherLoss())
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=0.0, atol=1e-12)
    assert not torch.allclose(torch.stack(found), torch.stack(plain), rtol=1e-3)


def test_the_meta_loss_corrects_for_the_classes_of_its_own_few_images() -> None:
    """A model that is right about a batch of one class is not blamed for what an even prior makes of it."""
    targets = torch.zeros(30, 5, dtype=torch.float64)
    targets[:, 2] = 1.0
    right = 12.0 * targets
    output = StepOutput(ClassBalance().corrected(right))
    batch = MetaBatch(torch.zeros(30, 3, 1, 1), targets)
    naive, fair = CleanTeacher()(output, batch), CleanTeacher(balance=1.0)(output, batch)
    torch.testing.assert_close(fair, CleanTeacher()(StepOutput(right), batch), rtol=0.0, atol=1e-4)
    assert naive > 2 * fair


def test_methods_take_a_strength_or_the_policys_own() -> None:
    policy = balanced_policy(0.7)
    assert build_method(LEARNED, policy=policy).part("class_balance") is policy.part("class_balance") is not None
    without = replace(LEARNED, parts={"class_balance": False})
    mgtta = MethodConfig("mgtta", update="generator", parts=dict(BARE))
    tent = MethodConfig("tent", update="adam", objective={"entropy": 1.0}, parts=dict(BARE))
    for config in (without, mgtta, tent):
        assert build_method(config, policy=policy).part("class_balance") is None
    batch, fixed = random_images(16), build_method(MethodConfig("bn", parts={**BARE, "class_balance": 0.5}))
    found = OnlineAdapter(tiny_model(), fixed)(batch)
    plain = OnlineAdapter(tiny_model(), build_method(MethodConfig("bn", parts=dict(BARE))))(batch)
    assert torch.equal(found, ClassBalance(ClassBalanceConfig(0.5)).corrected(plain))


def test_file_transfer_and_meta_training_keep_it() -> None:
    policy = balanced_policy(0.7)
    loaded = AdaptationPolicy.from_dict(policy.to_dict())
    assert loaded.part("class_balance").config.strength == 0.7
    assert AdaptationPolicy.from_dict(tiny_policy(tiny_model()).to_dict()).part("class_balance") is None
    found, notes = transferred(policy, tiny_model())
    assert found.part("class_balance").config.strength == 0.7 and "class_balance: as learned" in notes
    for loss, balance, expected in (
        ("clean_teacher", 1.0, 1.0),
        ("clean_teacher", None, None),
        ("unsupervised", 1.0, None),
    ):
        config = tiny_config(loss=loss, parts={**DEFAULT_PARTS, "class_balance": balance})
        trained = MetaTrainer(tiny_model(), random_images(32), None, config).policy.part("class_balance")
        assert (None if trained is None else trained.config.strength) == expected


def test_bad_numbers_are_refused() -> None:
    for strength in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match=r"class_balance.strength is"):
            MethodConfig("bn", parts={"class_balance": strength})
        with pytest.raises(ConfigError, match=r"class_balance.strength is"):
            tiny_config(parts={**DEFAULT_PARTS, "class_balance": strength})
    with pytest.raises(ConfigError, match=r"class_balance.strength is 0"):
        tiny_config(parts={**DEFAULT_PARTS, "class_balance": {"strength": 0.0}})
