"""Tasks as streams of deployment may be: of any shifts, sizes and classes; without that, bit for bit as ever."""

import hashlib
import math
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from metaopt.data import load_digits
from metaopt.data.shifts import META, Shift, shift_names
from metaopt.errors import CheckpointError, ConfigError
from metaopt.meta import MetaTrainConfig, MetaTrainer, Task, TaskConfig, TaskSampler
from metaopt.meta.skew import SKEWS
from metaopt.meta.speed import measure_memory
from metaopt.policy import AdaptationPolicy
from metaopt.policy.untrained import DEFAULT_PARTS

from ..tiny import random_images, small_digits, tiny_config, tiny_model, trained_model
from .test_resume import bit_equal, through_file

IMAGES, CLASSES = 128, 10
KEEP = Shift("keep", lambda images, strength, generator: images, "none")
PAINTS = [
    Shift(f"paint{tone}", lambda images, strength, generator, tone=tone: torch.full_like(images, tone / 10), "none")
    for tone in range(6)
]
PLAIN: dict[str, Any] = {"batch_size": 32, "composed": 0.0, "occlusion": 0.0}
LIFE: dict[str, Any] = {
    "sizes": (4, 24),
    "changing": 0.5,
    "skewed": 0.6,
    "clean": 0.2,
    "alternating": 0.3,
    "mixed": 0.3,
    "gradual": 0.5,
}


def labelled_images() -> Tensor:
    """Of ten classes, 8 to 18 images each, that are told by their brightness; flips and moves leave them alike."""
    classes = torch.multinomial(torch.ones(CLASSES), IMAGES, True, generator=torch.Generator().manual_seed(0))
    return (classes / CLASSES + 0.05).view(-1, 1, 1, 1).expand(-1, 3, 8, 8).contiguous()


def classes_of(images: Tensor) -> Tensor:
    return (images.mean(dim=(1, 2, 3)) * CLASSES).floor().long()


def teach(images: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(classes_of(images), CLASSES).float()


def sampler(shifts: list[Shift] | None = None, **changes: Any) -> TaskSampler:
    return TaskSampler(labelled_images(), shifts or [KEEP], TaskConfig(**{**PLAIN, **changes}), teach)


def tasks_of(sampler: TaskSampler, count: int, steps: int = 8) -> list[Task]:
    generator = torch.Generator().manual_seed(0)
    return [sampler.sample(steps, generator) for _ in range(count)]


def sizes_of(task: Task) -> list[int]:
    return [len(index) for index in task.order]


def near(found: float, expected: float, count: int) -> bool:
    """Within four standard errors of a share."""
    return abs(found - expected) < 4 * math.sqrt(expected * (1 - expected) / count)


RECORDED = [  # of the release before: seed, digest of order and pixels, the draw after it; name, seed, first images
    (160516793, "e4211ccce8a3bae7", 1110745632, "speckle_noise@0.9+saturate@1.2", 374217481, [19, 23, 0, 15, 5]),
    (1415635672, "1288158152a78225", 1172740723, "gaussian_blur@2.3", 732152370, [11, 14, 13, 6, 12]),
    (952774788, "582694e19fcb2b1c", 1148865855, "speckle_noise@3.4+saturate@2.1", 1225505127, [18, 11, 14, 21, 2]),
    (
        1106320404,
        "6253cf083ba451f3",
        1688201777,
        "spatter@1.8+speckle_noise@1.6+occlusion@1.0",
        390252802,
        [0, 10, 21, 1, 18],
    ),
]


@pytest.mark.parametrize("seed", range(4))
def test_off_every_draw_is_that_of_before(seed: int) -> None:
    seed_kept, digest, after, name, seed_shifted, first = RECORDED[seed]
    generator = torch.Generator().manual_seed(seed)
    plain = TaskConfig(batch_size=8, composed=0.0, occlusion=0.0)
    kept = TaskSampler(random_images(24), [KEEP], plain).sample(4, generator)
    held = [torch.stack(kept.order), *(batch.images for batch in kept)]
    assert hashlib.sha256(b"".join(each.numpy().tobytes() for each in held)).hexdigest()[:16] == digest
    assert (kept.seed, int(torch.randint(2**31, (), generator=generator))) == (seed_kept, after)
    config = TaskConfig(batch_size=8, composed=0.5, occlusion=0.5)
    shifted = TaskSampler(random_images(24), shift_names(META), config).sample(2, torch.Generator().manual_seed(seed))
    assert (shifted.name, shifted.seed, shifted.order[0][:5].tolist()) == (name, seed_shifted, first)


def test_options_leave_the_sequence_of_draws_and_plain_tasks_alone() -> None:
    plain = tasks_of(sampler(PAINTS), 60)
    lively = tasks_of(sampler(PAINTS, skewed=0.3, clean=0.1, alternating=0.2, mixed=0.1, gradual=0.3), 60)
    assert [task.seed for task in plain] == [task.seed for task in lively]
    same = [
        a for a, b in zip(plain, lively, strict=True) if a.name == b.name and all(map(torch.equal, a.order, b.order))
    ]
    assert 5 < len(same) < 40


def test_sizes_are_log_uniform_in_their_range() -> None:
    tasks = tasks_of(sampler(sizes=(8, 100)), 400, steps=2)
    assert all(len(set(sizes_of(task))) == 1 for task in tasks)
    sizes = torch.tensor([sizes_of(task)[0] for task in tasks], dtype=torch.float64)
    assert sizes.min() == 8 and 95 < sizes.max() <= 100
    assert near(float((sizes < math.sqrt(8 * 100)).double().mean()), 0.5, 400)
    assert tasks[0].name.endswith(f"x{sizes_of(tasks[0])[0]}")
    for task in tasks[:20]:  # every image comes before any comes again
        uses = torch.cat(task.order).bincount(minlength=IMAGES)
        assert int(uses.max() - uses.min()) <= 1
        assert [len(batch.images) for batch in task] == sizes_of(task)


def test_sizes_change_within_a_task_as_often_as_asked() -> None:
    tasks = tasks_of(sampler(sizes=(8, 100), changing=0.5), 300, steps=4)
    changing = [task for task in tasks if len(set(sizes_of(task))) > 1]
    assert near(len(changing) / 300, 0.5, 300)
    assert {8 <= size <= 100 for task in tasks for size in sizes_of(task)} == {True}
    assert all(len(task.largest.images) == max(sizes_of(task)) for task in changing[:5])
    assert changing[0].name.endswith(f"x{min(sizes_of(changing[0]))}-{max(sizes_of(changing[0]))}")


def test_sizes_are_at_most_the_number_of_images() -> None:
    few = TaskSampler(random_images(10), [KEEP], TaskConfig(sizes=(4, 64)))
    assert {max(sizes_of(task)) for task in tasks_of(few, 60, 1)} == set(range(4, 11))
    assert sizes_of(tasks_of(TaskSampler(random_images(10), [KEEP], TaskConfig(sizes=(40, 64))), 1, 1)[0]) == [10, 10]


@pytest.fixture(scope="module")
def skewed() -> dict[str, list[tuple[Task, list[Tensor]]]]:
    """Tasks by their skew, each with the classes of its batches, as the source model sees them."""
    found: dict[str, list[tuple[Task, list[Tensor]]]] = {name: [] for name in SKEWS}
    for task in tasks_of(sampler(skewed=1.0), 120):
        found[task.skew].append((task, [classes_of(batch.images) for batch in task]))
    return found


def test_each_skew_is_drawn_as_often_and_named(skewed: dict[str, Any]) -> None:
    assert all(near(len(found) / 120, 0.25, 120) for found in skewed.values())
    assert all(task.name.split()[-1] == kind for kind, found in skewed.items() for task, _ in found)
    some = tasks_of(sampler(skewed=0.3), 300, steps=1)
    assert near(sum(task.skew != "" for task in some) / 300, 0.3, 300)


def test_sorted_tasks_hold_one_class_after_the_other(skewed: dict[str, Any]) -> None:
    begins = Counter[int]()
    for _, batches in skewed["sorted"]:
        stream = torch.cat(batches)
        runs, lengths = stream.unique_consecutive(return_counts=True)
        assert len(runs) == len(runs.unique())  # none comes back
        assert max(len(batch.unique()) for batch in batches) <= 2
        assert lengths.max() >= 32  # a run is a batch long at least; the first and last are cut
        begins[int(runs[0])] += 1
    assert len(begins) > 4


def test_a_few_classes_are_one_to_three(skewed: dict[str, Any]) -> None:
    counts = Counter(len(torch.cat(batches).unique()) for _, batches in skewed["few_classes"])
    assert set(counts) == {1, 2, 3}
    for _, batches in skewed["few_classes"]:
        shares = torch.cat(batches).bincount() / (9 * 32)
        shares = shares[shares > 0]
        assert (shares - 1 / len(shares)).abs().max() < 0.15  # each as often


def test_dirichlet_batches_have_classes_of_their_own(skewed: dict[str, Any]) -> None:
    shares = torch.stack([torch.bincount(b, minlength=10) / 32 for _, batches in skewed["dirichlet"] for b in batches])
    # The mean square of a Dirichlet share is (1 + a) / (C (1 + a C)); of 32 draws, a little more.
    expected = 0.1 * 1.1 / 2.0 * 10
    squares = float(shares.square().sum(dim=1).mean())
    assert abs(squares - (expected + (1 - expected) / 32)) < 0.06
    assert (shares.mean(dim=0) - 0.1).abs().max() < 0.06  # none is favoured
    within = torch.stack(
        [torch.stack([torch.bincount(b, minlength=10) / 32 for b in bs]).mean(0) for _, bs in skewed["dirichlet"]]
    )
    assert float(within.square().sum(dim=1).mean()) < 0.5 * squares  # the batches of a task differ


def test_a_long_tail_is_ten_to_one(skewed: dict[str, Any]) -> None:
    counts = torch.stack([torch.cat(bs).bincount(minlength=10).sort().values for _, bs in skewed["long_tail"]]).double()
    mean = counts.mean(dim=0) / counts.sum(dim=1).mean()
    expected = 10 ** torch.linspace(-1, 0, 10, dtype=torch.float64)
    torch.testing.assert_close(mean, expected / expected.sum(), rtol=0.15, atol=0.005)
    last = torch.cat([bs[-1] for _, bs in skewed["long_tail"]])
    assert len(last.unique()) == 10  # which classes are frequent differs between tasks


@pytest.mark.parametrize("kind", SKEWS)
def test_images_of_a_skewed_task_take_turns_and_are_augmented_apart(kind: str, skewed: dict[str, Any]) -> None:
    pools = classes_of(labelled_images()).bincount()
    for task, _ in skewed[kind][:5]:
        for image in range(0, IMAGES, 7):
            cls = int(classes_of(labelled_images())[image])
            uses = torch.cat(task.order).bincount(minlength=IMAGES)[classes_of(labelled_images()) == cls]
            assert int(uses.max() - uses.min()) <= 1 and len(uses) == int(pools[cls])
    noise = TaskSampler(random_images(16), [KEEP], TaskConfig(**{**PLAIN, "skewed": 1.0}), teach)
    task = next(task for task in tasks_of(noise, 60) if task.skew == kind)
    copies = Counter((position, image) for position, index in enumerate(task.order) for image in index.tolist())
    (position, image), count = copies.most_common(1)[0]
    views = task[position].images[task.order[position] == image]
    assert count >= 2 and len(views.flatten(1).unique(dim=0)) > 1


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("sizes", [None, (2, 5)])
def test_skewed_tasks_of_fewer_classes_than_they_ask_for(count: int, sizes: tuple[int, int] | None) -> None:
    images = labelled_images()
    images = images[classes_of(images) < count]
    few = TaskSampler(images, [KEEP], TaskConfig(batch_size=6, skewed=1.0, sizes=sizes, changing=0.0), teach)
    for task in tasks_of(few, 20, steps=1):
        assert all(len(batch.images) == len(index) for batch, index in zip(task, task.order, strict=True))


def test_classes_are_told_by_the_source_model_even_where_nobody_teaches() -> None:
    with pytest.raises(ConfigError, match=r"meta\.skewed is 1.0 and nothing tells the images' classes"):
        TaskSampler(labelled_images(), [KEEP], TaskConfig(skewed=1.0))
    alone = TaskSampler(labelled_images(), [KEEP], TaskConfig(**PLAIN, skewed=1.0), classifier=teach)
    for ours, taught in zip(tasks_of(alone, 5), tasks_of(sampler(skewed=1.0), 5), strict=True):
        assert all(map(torch.equal, ours.order, taught.order))
        assert ours[1].targets is None and taught[1].targets is not None
    trainer = MetaTrainer(trained_model(), digits(), None, tiny_config(skewed=1.0, loss="unsupervised"))
    predicted = trainer.source(trainer.images).logits.argmax(dim=1)
    few = [task for task in tasks_of(trainer.sampler, 40, 2) if task.skew == "few_classes"]
    assert few and all(len(predicted[torch.cat(task.order)].unique()) <= 3 for task in few)


def test_targets_are_those_of_each_image_of_a_skewed_task() -> None:
    for task in tasks_of(sampler(skewed=1.0, sizes=(8, 40), changing=1.0), 8):
        for position in range(1, len(task)):
            batch = task[position]
            assert batch.targets is not None and torch.equal(batch.targets.argmax(dim=1), classes_of(batch.images))


def test_clean_tasks_are_the_augmented_images_as_they_are() -> None:
    tasks = tasks_of(sampler(PAINTS, clean=0.3, occlusion=0.9, composed=0.9), 300, steps=1)
    clean = [task for task in tasks if not task.shifts]
    assert near(len(clean) / 300, 0.3, 300)
    assert {task.name for task in clean} == {"clean"}
    noise = TaskSampler(random_images(32), PAINTS, TaskConfig(clean=1.0, occlusion=1.0, batch_size=8))
    kept = TaskSampler(random_images(32), [KEEP], TaskConfig(composed=0.0, occlusion=0.0, batch_size=8))
    task = tasks_of(noise, 1)[0]
    for position in range(len(task)):  # the same order and seed under a shift that does nothing
        same = Task(kept, tasks_of(kept, 1)[0].plan, task.order, task.seed)
        assert torch.equal(task[position].images, same[position].images)


def painted(images: Tensor) -> list[int]:
    """Which paint each image has."""
    assert bool((images == images[:, :1, :1, :1]).all())
    return (images[:, 0, 0, 0] * 10).round().long().tolist()


def test_alternating_batches_have_another_shift_each_in_turn() -> None:
    tasks = tasks_of(sampler(PAINTS, alternating=0.4), 200, steps=7)
    alternating = [task for task in tasks if len(task.plan.chains) > 1]
    assert near(len(alternating) / 200, 0.4, 200)
    assert {len(task.plan.chains) for task in alternating} == {2, 3, 4}
    for task in alternating[:20]:
        tones = [painted(batch.images) for batch in task]
        assert all(len(set(tone)) == 1 for tone in tones)
        turn, firsts = len(task.plan.chains), [tone[0] for tone in tones]
        assert len(set(firsts[:turn])) == turn and firsts[turn:] == firsts[:-turn]
        assert task.name.endswith(" alternating") and task.name.count(" | ") == turn - 1
        assert len({strength for _, strength in task.shifts}) == turn


def test_mixed_images_have_one_of_several_shifts_each() -> None:
    tasks = tasks_of(sampler(PAINTS, mixed=0.4), 200, steps=3)
    mixed = [task for task in tasks if len(task.plan.chains) > 1]
    assert near(len(mixed) / 200, 0.4, 200)
    for task in mixed[:20]:
        first, second = (painted(task[position].images) for position in (0, 1))
        assert 2 <= len(set(first)) <= 4 and set(first) | set(second) <= {
            int(shift.name[-1]) for shift, _ in task.shifts
        }
        assert first != second and task.name.endswith(" mixed")
    pairs = [task for task in mixed if len(task.plan.chains) == 2]
    first = [painted(task[0].images).count(int(task.shifts[0][0].name[-1])) / 32 for task in pairs]
    assert near(sum(first) / len(first), 0.5, 32 * len(first))


@pytest.mark.parametrize("count", [1, 2])
def test_alternating_takes_shifts_again_where_there_are_few(count: int) -> None:
    for task in tasks_of(sampler(PAINTS[:count], alternating=1.0), 30, steps=3):
        names = [chain[0][0].name for chain in task.plan.chains]
        assert 2 <= len(names) <= 4
        assert count == 1 or all(a != b for a, b in pairwise(names))


def test_gradual_strength_rises_and_falls_linearly_within_its_bounds() -> None:
    met: list[float] = []

    def spy(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
        met.append(strength)
        return images

    tasks = tasks_of(sampler([Shift("spy", spy, "none")], gradual=0.5), 200)
    gradual = [task for task in tasks if task.name.endswith(" gradual")]
    assert near(len(gradual) / 200, 0.5, 200)
    peaks = set()
    for task in gradual:
        met.clear()
        list(task)
        factors = torch.tensor(met, dtype=torch.float64) / task.shifts[0][1]
        peak = int(factors.argmax())
        peaks.add(peak)
        assert factors[peak] == 1.0 and factors.min() == pytest.approx(0.1)
        for slope, sign in ((factors[: peak + 1].diff(), 1), (factors[peak:].diff(), -1)):
            assert bool((sign * slope > 0).all()) and (len(slope) < 2 or float(slope.std()) < 1e-12)
    assert peaks == set(range(9))
    plain = next(task for task in tasks if task not in gradual)
    met.clear()
    list(plain)
    assert set(met) == {plain.shifts[0][1]}


def lively(seed: int = 0, **changes: Any) -> MetaTrainer:
    values: dict[str, Any] = {**LIFE, "epochs": 2, "unrolls": 3, "selection_tasks": 3, "seed": seed, **changes}
    return MetaTrainer(tiny_model(), random_images(32), None, tiny_config(**values))


def test_batches_are_made_anew_alike_with_all_on() -> None:
    tasks, same = (tasks_of(lively().sampler, 30, 4) for _ in range(2))
    assert len({len(task.plan.chains) for task in tasks}) > 2 and {task.skew for task in tasks} == {"", *SKEWS}
    for first, second in zip(tasks, same, strict=True):
        assert first.name == second.name and len(first) == 5
        for position in (4, 0, 2, 2):
            a, b = first[position], second[position]
            assert torch.equal(a.images, b.images) and len(a.images) == sizes_of(first)[position]
            assert (a.targets is None) == (position == 0)


def test_with_all_on_stopped_and_resumed_is_unbroken(tmp_path: Any) -> None:
    whole, first, second = (lively() for _ in range(3))
    policy = whole.run()
    first.run(stop_after=1)
    second.load_state_dict(through_file(first.state_dict(), tmp_path))
    assert bit_equal(dict(second.run().state_dict()), dict(policy.state_dict()))
    assert bit_equal(second.state_dict(), whole.state_dict())
    other = lively(skewed=0.5)
    with pytest.raises(CheckpointError, match="other settings of skewed; allowed are the same ones"):
        other.load_state_dict(first.state_dict())


def test_a_run_of_before_goes_on_with_all_off() -> None:
    first, second = (MetaTrainer(tiny_model(), random_images(32), None, tiny_config()) for _ in range(2))
    first.run(stop_after=1)
    state = first.state_dict()
    for key in LIFE:
        del state["config"][key]
    with pytest.raises(CheckpointError, match=r"other settings of .*sizes, skewed"):
        lively(unrolls=2, selection_tasks=1).load_state_dict(state)
    second.load_state_dict(state)
    first.run()
    second.run()
    assert bit_equal(second.state_dict(), first.state_dict())


def digits() -> Tensor:
    return small_digits(load_digits().unlabeled)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gradient": "full"},
        {"loss": "unsupervised", "update_every": 1},
        {"clean_view": "augmented"},
        {"parts": {**DEFAULT_PARTS, "pruning": "learned"}},
        {"parts": {**DEFAULT_PARTS, "update_gate": {"share": 0.5}}},
    ],
    ids=["default", "full", "unsupervised", "augmented", "precisions", "gate"],
)
def test_meta_training_with_all_on_learns_finitely(changes: dict[str, Any], tmp_path: Any) -> None:
    values = {**LIFE, "sizes": (8, 64), "unrolls": 4, "steps": 4, "selection_tasks": 4, **changes}
    trainer = MetaTrainer(trained_model(), digits(), None, tiny_config(**values))
    before = {name: tensor.clone() for name, tensor in trainer.policy.state_dict().items()}
    losses: list[float] = []
    policy = trainer.run(on_unroll=losses.append)
    assert len(losses) == 8 and all(map(math.isfinite, (*losses, *trainer.progress.selection)))
    assert trainer.progress.skipped == 0
    assert trainer.progress.best_loss <= trainer.progress.selection[0]
    assert any(not torch.equal(before[name], tensor) for name, tensor in trainer.policy.state_dict().items())
    policy.save(tmp_path / "ckpt.pt")
    loaded = AdaptationPolicy.load(tmp_path / "ckpt.pt")
    assert {key: loaded.training["config"][key] for key in LIFE} == {**LIFE, "sizes": (8, 64)}
    assert loaded.batch_size == 8


def test_budgets_are_of_the_largest_batch_of_a_task(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {**DEFAULT_PARTS, "pruning": "learned"}
    trainer = lively(sizes=(2, 32), changing=1.0, skewed=0.0, selection_tasks=4, epochs=1, parts=parts)
    assert any(sizes_of(task)[0] < max(sizes_of(task)) for task in trainer.selection)
    assert trainer.budgets is not None
    sample, asked = trainer.budgets.sample, list[int]()

    def spy(images: Tensor, generator: torch.Generator) -> Any:
        asked.append(len(images))
        return sample(images, generator)

    monkeypatch.setattr(trainer.budgets, "sample", spy)
    drawn, met = trainer.sampler.sample, list[Task]()
    monkeypatch.setattr(trainer.sampler, "sample", lambda *given: met.append(drawn(*given)) or met[-1])
    trainer.run()  # selection runs each batch of its tasks under a budget, which the largest has to fit in
    assert asked == [max(sizes_of(task)) for task in met] != [sizes_of(task)[0] for task in met]


def test_speed_is_measured_with_all_on() -> None:
    trainer = lively(loss="unsupervised", parts=DEFAULT_PARTS)
    assert measure_memory(trainer, 2) > 0


def test_refusals() -> None:
    for change, message in (
        ({"sizes": (1, 8)}, r"meta\.sizes is \(1, 8\); allowed are whole numbers 2 <= low <= high"),
        ({"sizes": (8, 4)}, r"meta\.sizes is \(8, 4\)"),
        ({"sizes": (8,)}, r"meta\.sizes is \(8,\)"),
        ({"sizes": (2.0, 8.5)}, r"meta\.sizes is \(2.0, 8.5\)"),
        ({"changing": 0.5}, r"meta\.changing is 0.5 and meta\.sizes is not set"),
        ({"sizes": (4, 8), "changing": 1.5}, r"meta\.changing is 1.5; allowed is \[0, 1\]"),
        ({"skewed": -0.1}, r"meta\.skewed is -0.1; allowed is \[0, 1\]"),
        ({"clean": 2}, r"meta\.clean is 2; allowed is \[0, 1\]"),
        ({"alternating": float("nan")}, r"meta\.alternating is nan"),
        ({"mixed": "x"}, r"meta\.mixed is x"),
        ({"gradual": 1.1}, r"meta\.gradual is 1.1"),
        (
            {"clean": 0.5, "alternating": 0.0, "mixed": 0.6},
            r"meta\.clean, meta\.alternating and meta\.mixed add up to 1\.1; ",
        ),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            MetaTrainConfig(**change)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
    TaskConfig(clean=0.2, alternating=0.7, mixed=0.1)
