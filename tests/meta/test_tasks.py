"""Tasks: drawn from their generator alone, made anew alike, never on the shifts of the benchmark."""

import math
from collections import Counter

import pytest
import torch
from torch import Tensor

from metaopt.data.shifts import META, REPORT, SELECTION, TEST, WIDE, Shift, shift_names
from metaopt.errors import ConfigError, DataError
from metaopt.meta import MetaTrainer, Task, TaskConfig, TaskSampler
from metaopt.meta.loss import CleanTeacher, Unsupervised, build_meta_loss
from metaopt.meta.selection import held_out_tasks
from metaopt.meta.unroll import MetaBatch
from metaopt.types import StepOutput

from ..tiny import random_images, tiny_config, tiny_model

KEEP = Shift("keep", lambda images, strength, generator: images, "none")
PLAIN = TaskConfig(batch_size=8, composed=0.0, occlusion=0.0, flip=False, translate=0)


def coordinates(count: int = 4, side: int = 16) -> Tensor:
    """Images that say in each pixel which image it is, and its row and column."""
    number = torch.arange(count).view(-1, 1, 1).expand(count, side, side) / count
    row = torch.arange(side).view(1, -1, 1).expand(count, side, side) / side
    column = torch.arange(side).view(1, 1, -1).expand(count, side, side) / side
    return torch.stack((number, row, column), dim=1)


def draw(sampler: TaskSampler, seed: int = 0, steps: int = 3) -> Task:
    return sampler.sample(steps, torch.Generator().manual_seed(seed))


def meta_sampler(**changes: object) -> TaskSampler:
    config = TaskConfig(batch_size=8, **changes)  # type: ignore[arg-type]
    return TaskSampler(random_images(24), shift_names(META), config, lambda images: images.mean(dim=(2, 3)))


def equal(first: MetaBatch, second: MetaBatch) -> bool:
    if first.targets is None or second.targets is None:
        return first.targets is second.targets and torch.equal(first.images, second.images)
    return torch.equal(first.images, second.images) and torch.equal(first.targets, second.targets)


def test_a_seed_names_a_task() -> None:
    sampler = meta_sampler()
    first, same, other = draw(sampler, 1), draw(sampler, 1), draw(sampler, 2)
    assert first.name == same.name and all(map(torch.equal, first.order, same.order))
    assert all(equal(a, b) for a, b in zip(first, same, strict=True))
    assert not torch.equal(first[0].images, other[0].images)


def test_batches_are_made_anew_alike_in_any_order() -> None:
    task = draw(meta_sampler(), 3, steps=4)
    assert len(task) == 5
    in_order = list(task)
    torch.rand(7)  # the global generator has no say
    assert all(equal(task[position], in_order[position]) for position in (4, 0, 2, 2, 1, 3))
    assert not any(torch.equal(in_order[0].images, batch.images) for batch in in_order[1:])
    with pytest.raises(IndexError):
        task[5]
    with pytest.raises(IndexError):
        task[-1]


def test_the_global_generator_is_left_alone() -> None:
    before = torch.random.get_rng_state()
    list(draw(meta_sampler(), 5))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_training_tasks_never_hold_the_shifts_of_benchmark_selection_and_report() -> None:
    trainer = MetaTrainer(tiny_model(), random_images(32), None, tiny_config(selection_tasks=20))
    randomness = torch.Generator().manual_seed(0)
    met: Counter[str] = Counter()
    for _ in range(500):
        met.update(shift.name for shift, _ in trainer.sampler.sample(2, randomness).shifts)
    assert set(met) == {*shift_names(META), *shift_names(WIDE), "occlusion"}
    assert min(met.values()) > 50
    for family in (TEST, SELECTION, REPORT):
        assert not set(met) & set(shift_names(family))
    chosen = {shift.name for task in trainer.selection for shift, _ in task.shifts} - {"occlusion"}
    assert chosen == set(shift_names(SELECTION))
    assert len(shift_names(TEST)) == 15 and not chosen & set(shift_names(TEST))


def test_strengths_are_continuous_in_their_range() -> None:
    sampler = meta_sampler(strength=(1.0, 4.0), composed=0.5, occlusion=0.5)
    randomness = torch.Generator().manual_seed(0)
    tasks = [sampler.sample(1, randomness) for _ in range(400)]
    strengths = torch.tensor([strength for task in tasks for _, strength in task.shifts])
    assert 1.0 <= strengths.min() < 1.05 and 3.95 < strengths.max() <= 4.0
    assert len(strengths.unique()) > 0.99 * len(strengths)
    first = torch.tensor([task.shifts[0][1] for task in tasks])
    assert abs(float(first.mean()) - 2.5) < 4 * 3 / math.sqrt(12 * 400)


def test_the_second_of_two_shifts_reaches_half_as_far_up_the_range() -> None:
    sampler = meta_sampler(strength=(1.0, 4.0), composed=1.0, occlusion=0.0)
    randomness = torch.Generator().manual_seed(0)
    tasks = [sampler.sample(1, randomness) for _ in range(400)]
    first, second = torch.tensor([[s for _, s in task.shifts] for task in tasks if len(task.shifts) == 2]).T
    assert 1.0 <= second.min() < 1.05 and 2.45 < second.max() <= 2.5
    assert first.max() > 3.9


def test_shifts_are_composed_and_occluded_as_often_as_asked() -> None:
    randomness = torch.Generator().manual_seed(0)
    tasks = [meta_sampler(composed=0.5, occlusion=0.25).sample(1, randomness) for _ in range(400)]
    names = [[shift.name for shift, _ in task.shifts] for task in tasks]
    occluded = sum("occlusion" in row for row in names) / 400
    composed = sum(len(set(row) - {"occlusion"}) == 2 for row in names) / 400
    assert abs(occluded - 0.25) < 0.09
    assert abs(composed - 0.5 * 0.75) < 0.1  # two draws of four shifts differ in three cases of four
    alone = [meta_sampler(composed=0.0, occlusion=0.0).sample(1, randomness) for _ in range(50)]
    assert all(len(task.shifts) == 1 for task in alone)


def test_every_image_comes_before_any_comes_again() -> None:
    sampler = TaskSampler(random_images(24), [KEEP], PLAIN)
    order = torch.stack(draw(sampler, 0, steps=8).order)
    assert order.shape == (9, 8)
    for start in range(0, 72, 24):
        assert sorted(order.flatten()[start : start + 24].tolist()) == list(range(24))
    few = draw(TaskSampler(random_images(5), [KEEP], PLAIN), 0, steps=2)
    assert [len(index) for index in few.order] == [5, 5, 5]  # fewer than a batch


def test_without_augmentation_and_shift_the_images_are_as_they_are() -> None:
    images = random_images(16)
    task = draw(TaskSampler(images, [KEEP], PLAIN))
    for position, batch in enumerate(task):
        assert torch.equal(batch.images, images[task.order[position]])
        assert batch.targets is None


@pytest.mark.parametrize("flip", [False, True])
def test_augmentation_moves_and_mirrors_within_reach(flip: bool) -> None:
    config = TaskConfig(batch_size=8, composed=0.0, occlusion=0.0, flip=flip, translate=2)
    task = draw(TaskSampler(coordinates(32), [KEEP], config), steps=7)
    pixels = torch.cat([batch.images for batch in task]) * torch.tensor([32.0, 16.0, 16.0]).view(3, 1, 1)
    number, row, column = pixels.unbind(1)
    assert (number == number[:, :1, :1]).all()
    inner = slice(3, 13)  # where no border is repeated
    moves = (row - torch.arange(16.0).view(16, 1))[:, inner, inner]
    assert set(moves.flatten().tolist()) == {-2.0, -1.0, 0.0, 1.0, 2.0}
    assert (moves == moves[:, :1, :1]).all()
    mirrored = column[:, 0, 12] < column[:, 0, 4]
    assert bool(mirrored.any()) == flip and not bool(mirrored.all())
    assert not flip or 10 < int(mirrored.sum()) < 54
    straight = torch.where(mirrored.view(-1, 1, 1), column.flip(2), column) - torch.arange(16.0)
    assert set(straight[:, inner, inner].flatten().tolist()) == {-2.0, -1.0, 0.0, 1.0, 2.0}
    assert column.min() == 0 and column.max() == 15  # the border is repeated, nothing comes from elsewhere


def test_the_teachers_view_is_cached_or_augmented() -> None:
    images, seen = random_images(20), []

    def teacher(batch: Tensor) -> Tensor:
        seen.append(batch)
        return batch.flatten(1)[:, :5].softmax(dim=1)

    cached = TaskSampler(images, [KEEP], TaskConfig(batch_size=8, clean_view="cached"), teacher)
    task = draw(cached)
    for position, batch in [*enumerate(task), *enumerate(task)]:
        if position == 0:
            assert batch.targets is None  # nothing has adapted yet, so nothing is scored
            continue
        assert batch.targets is not None
        torch.testing.assert_close(batch.targets, images[task.order[position]].flatten(1)[:, :5].softmax(dim=1))
    assert sum(len(batch) for batch in seen) == 20  # each clean image once, however many batches were made

    seen.clear()
    darken = Shift("darken", lambda batch, strength, generator: batch / 2, "none")
    config = TaskConfig(batch_size=8, composed=0.0, occlusion=0.0, clean_view="augmented")
    batch = draw(TaskSampler(images, [darken], config, teacher))[1]
    assert batch.targets is not None
    assert torch.equal(seen[-1], batch.images * 2)  # the teacher sees the same augmented view, before the shift
    torch.testing.assert_close(batch.targets, seen[-1].flatten(1)[:, :5].softmax(dim=1))


def test_the_teacher_is_the_source_model_in_source_mode() -> None:
    trainer = MetaTrainer(tiny_model(), random_images(32), None, tiny_config())
    task = trainer.sampler.sample(2, torch.Generator().manual_seed(0))
    for position in range(1, len(task)):
        batch = task[position]
        assert batch.targets is not None and not batch.targets.requires_grad
        torch.testing.assert_close(batch.targets.sum(dim=1), torch.ones(16))
        alone = tiny_model()(trainer.images[task.order[position]]).logits.softmax(dim=1)
        torch.testing.assert_close(batch.targets, alone.detach())


def test_no_teacher_predicts_where_training_is_scored_by_the_objective_itself() -> None:
    trainer = MetaTrainer(tiny_model(), random_images(32), None, tiny_config(loss="unsupervised"))
    assert trainer.sampler.sample(2, torch.Generator().manual_seed(0))[1].targets is None
    assert all(task[1].targets is not None for task in trainer.selection)  # which is by the clean teacher always


def test_all_randomness_is_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """So a task is the same on every device; here the shift is asked what it was given."""
    given = []

    def spy(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
        given.append(generator)
        return images

    list(draw(TaskSampler(random_images(16), [Shift("spy", spy, "none")], PLAIN)))
    assert given and all(generator.device == torch.device("cpu") for generator in given)


def test_held_out_tasks_are_fixed_by_their_seed() -> None:
    trainer = MetaTrainer(tiny_model(), random_images(32), None, tiny_config())

    def drawn(seed: int) -> list[Task]:
        return held_out_tasks(trainer.images, trainer.teach, trainer.config, shift_names(REPORT), 4, 2, seed=seed)

    first, same, other = drawn(1), drawn(1), drawn(2)
    assert [task.name for task in first] == [task.name for task in same] != [task.name for task in other]
    assert all(equal(a[1], b[1]) for a, b in zip(first, same, strict=True))
    assert {shift.family for task in first for shift, _ in task.shifts} <= {REPORT, "extra"}


def test_refusals() -> None:
    for change, message in (
        ({"batch_size": 0}, "batch_size is 0"),
        ({"strength": (0.0, 5.0)}, r"meta.strength is \(0.0, 5.0\); allowed is 0 < low <= high <= 5"),
        ({"strength": (3.0, 2.0)}, "meta.strength"),
        ({"strength": (1.0, 5.1)}, "meta.strength"),
        ({"strength": (float("nan"), 5.0)}, "meta.strength"),
        ({"composed": 1.1}, r"meta.composed is 1.1; allowed is \[0, 1\]"),
        ({"occlusion": -0.1}, "meta.occlusion is -0.1"),
        ({"translate": -1}, "meta.translate is -1"),
        ({"clean_view": "both"}, "meta.clean_view is 'both'; allowed are cached, augmented"),
    ):
        with pytest.raises(ConfigError, match=message):
            TaskConfig(**change)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"meta\.shifts is empty"):
        TaskSampler(random_images(4), [], PLAIN)
    with pytest.raises(DataError, match="unknown corruption 'gausian_blur': did you mean 'gaussian_blur'"):
        TaskSampler(random_images(4), ["gausian_blur"], PLAIN)


def test_losses() -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(6, 4, dtype=torch.float64), torch.rand(6, 4, dtype=torch.float64).softmax(dim=1)
    batch = MetaBatch(torch.zeros(6, 3, 2, 2), targets)
    output = StepOutput(logits, loss=torch.tensor(0.7))
    expected = -(targets * (logits - logits.logsumexp(dim=1, keepdim=True))).sum(dim=1).mean()
    torch.testing.assert_close(CleanTeacher()(output, batch), expected, rtol=0, atol=1e-12)
    assert Unsupervised()(output, batch) is output.loss
    assert isinstance(build_meta_loss("clean_teacher"), CleanTeacher)
    assert not CleanTeacher.own_objective and Unsupervised.own_objective
    with pytest.raises(ConfigError, match=r"meta\.loss is 'labels'; allowed are clean_teacher, unsupervised"):
        build_meta_loss("labels")


def test_a_tempered_teacher_asks_for_the_ranking_not_for_confidence() -> None:
    torch.manual_seed(0)
    logits = torch.randn(40, 5, dtype=torch.float64)
    batch = MetaBatch(torch.zeros(40, 3, 2, 2), logits.softmax(dim=1))
    for factor in (0.25, 1.0, 4.0):
        output = StepOutput(factor * logits)
        assert float(CleanTeacher(tempered=True)(output, batch)) == pytest.approx(
            float(CleanTeacher()(StepOutput(logits), batch)), rel=1e-3
        )
    sharper = StepOutput(4.0 * logits)
    assert float(CleanTeacher()(sharper, batch)) > float(CleanTeacher(tempered=True)(sharper, batch)) + 0.1
