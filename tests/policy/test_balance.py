"""Class balance: its equation, what it leaves alone, where it comes from, and that a few images do not mislead it."""

import pytest
import torch
from torch import Tensor

from metaopt.errors import ConfigError
from metaopt.inner_loop import MetaBatch, unrolled_loss
from metaopt.meta import MetaTrainer
from metaopt.meta.loss import CleanTeacher
from metaopt.online import OnlineAdapter
from metaopt.policy import (
    AdaptationPolicy,
    ClassBalance,
    MethodConfig,
    build_method,
    policy_from_dict,
    policy_to_dict,
    transferred,
)
from metaopt.policy.balance import COUNT
from metaopt.types import StepOutput

from ..inner_loop.cases import TeacherLoss, policy_for, start, task, tiny_resnet
from ..tiny import random_images, tiny_config, tiny_model, tiny_policy


def logits(images: int = 40, favoured: float = 1.5) -> Tensor:
    """Of a model that favours class 0."""
    drawn = torch.randn(images, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn[:, 0] += favoured
    return drawn


def balanced_policy(strength: float = 1.0) -> AdaptationPolicy:
    policy = tiny_policy(tiny_model())
    policy.balance = ClassBalance(strength)
    return policy


@pytest.mark.parametrize("strength", [0.4, 1.0])
def test_each_class_loses_the_logarithm_of_its_share(strength: float) -> None:
    given = logits()
    found = ClassBalance(strength)(given)
    for index in range(5):
        total = sum(float(row.exp()[index] / row.exp().sum()) for row in given)
        share = (total + COUNT / 5) / (40 + COUNT)
        torch.testing.assert_close(found[:, index], given[:, index] - strength * torch.tensor(share).double().log())


def test_predictions_become_more_even_and_a_small_batch_is_hardly_corrected() -> None:
    given = logits(400)
    before, after = (z.softmax(dim=1).mean(dim=0) for z in (given, ClassBalance()(given)))
    assert after.max() - after.min() < 0.5 * (before.max() - before.min())
    one = logits(1)
    moved = ClassBalance()(one) - one
    assert moved.max() - moved.min() < 0.25


def test_an_image_with_nan_spoils_only_its_own_prediction() -> None:
    given = logits()
    spoiled = given.clone()
    spoiled[3] = torch.nan
    found = ClassBalance()(spoiled)
    assert found[3].isnan().all() and found[torch.arange(40) != 3].isfinite().all()


def test_the_objective_and_so_the_updates_do_not_see_it() -> None:
    plain, corrected = tiny_policy(tiny_model()), balanced_policy()
    first, second = OnlineAdapter(tiny_model(), plain), OnlineAdapter(tiny_model(), corrected)
    for seed in range(3):
        batch = random_images(16, seed)
        raw, found = first.step(batch), second.step(batch)
        assert torch.equal(found.logits, ClassBalance()(raw.logits)) and not torch.equal(found.logits, raw.logits)
        assert raw.loss is not None and found.loss is not None and torch.equal(raw.loss, found.loss)
    with first.frozen(), second.frozen():
        assert torch.equal(second(batch), ClassBalance()(first(batch)))


def test_a_closed_gate_predicts_with_it_too() -> None:
    closed = MethodConfig("policy", update="generator", objective_from_policy=True, update_every=2)
    plain, corrected = (build_method(closed, policy=p) for p in (tiny_policy(tiny_model()), balanced_policy()))
    first, second = OnlineAdapter(tiny_model(), plain), OnlineAdapter(tiny_model(), corrected)
    for seed in range(4):
        assert torch.equal(second(random_images(16, seed)), ClassBalance()(first(random_images(16, seed))))
    assert second.updates == 2


def test_the_unroll_is_deployment() -> None:
    network, batches = tiny_resnet(), task(3)
    policy = policy_for(network)
    plain = unrolled_loss(policy, network, start(network), batches, TeacherLoss())
    policy.balance = ClassBalance()
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
    output = StepOutput(ClassBalance()(right))
    batch = MetaBatch(torch.zeros(30, 3, 1, 1), targets)
    naive, fair = CleanTeacher()(output, batch), CleanTeacher(balance=1.0)(output, batch)
    torch.testing.assert_close(fair, CleanTeacher()(StepOutput(right), batch), rtol=0.0, atol=1e-4)
    assert naive > 2 * fair


def test_methods_take_a_strength_or_the_policys_own() -> None:
    policy = balanced_policy(0.7)
    learned = MethodConfig("policy", update="generator", objective_from_policy=True)
    assert build_method(learned, policy=policy).balance is policy.balance
    assert build_method(MethodConfig("mgtta", update="generator", balance=0.0), policy=policy).balance is None
    tent = MethodConfig("tent", update="adam", objective={"entropy": 1.0})
    assert build_method(tent, policy=policy).balance is None
    batch, fixed = random_images(16), build_method(MethodConfig("bn", balance=0.5))
    found = OnlineAdapter(tiny_model(), fixed)(batch)
    assert torch.equal(found, ClassBalance(0.5)(OnlineAdapter(tiny_model(), build_method(MethodConfig("bn")))(batch)))


def test_file_transfer_and_meta_training_keep_it() -> None:
    policy = balanced_policy(0.7)
    loaded = policy_from_dict(policy_to_dict(policy))
    assert loaded.balance is not None and loaded.balance.strength == 0.7
    assert policy_from_dict(policy_to_dict(tiny_policy(tiny_model()))).balance is None
    statistics = policy.statistics
    assert statistics is not None
    found, notes = transferred(policy, tiny_model(), lambda: statistics)
    assert found.balance is not None and "class balance: the same" in notes
    for loss, balance, expected in (
        ("clean_teacher", 1.0, 1.0),
        ("clean_teacher", None, None),
        ("unsupervised", 1.0, None),
    ):
        trained = MetaTrainer(tiny_model(), random_images(32), None, tiny_config(loss=loss, balance=balance)).policy
        assert (None if trained.balance is None else trained.balance.strength) == expected


def test_bad_numbers_are_refused() -> None:
    for strength in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match=r"balance is"):
            MethodConfig("bn", balance=strength)
        with pytest.raises(ConfigError, match=r"balance is"):
            tiny_config(balance=strength)
    with pytest.raises(ConfigError, match=r"balance is 0"):
        tiny_config(balance=0.0)
