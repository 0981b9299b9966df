"""The seed of what a method draws online: set by meta-training and by the commands, and kept in the policy's file."""

from pathlib import Path
from typing import Any

import pytest
import torch

from metaopt.catalogue import load_method
from metaopt.cli.assemble import assemble_method
from metaopt.cli.compose import compose
from metaopt.cli.settings import OnlineSettings
from metaopt.meta import MetaTrainer
from metaopt.online import OnlineAdapter
from metaopt.policy import AdaptationPolicy, build_method, new_policy, transferred

from ..tiny import random_images, tiny_config, tiny_model, tiny_policy

TWO_VIEWS = {"entropy": 1.0, "consistency": 1.0}
DRAWING: dict[str, dict[str, Any]] = {
    "views": {"name": "surgeon"},
    "teacher's views": {"name": "cotta", "parts": {"teacher": {"views": 2, "restore": 0.0, "sure_above": 1.0}}},
    "restores": {"name": "cotta", "parts": {"teacher": {"views": 0, "restore": 0.5}}},
}


def test_meta_training_sets_it_and_the_file_keeps_it(tmp_path: Path) -> None:
    config = tiny_config(seed=3, epochs=1, unrolls=1, objective=TWO_VIEWS)
    policy = MetaTrainer(tiny_model(), random_images(32), None, config).run()
    policy.save(tmp_path / "ckpt.pt")
    assert policy.seed == AdaptationPolicy.load(tmp_path / "ckpt.pt").seed == 3
    assert build_method(load_method("policy"), policy=policy).seed == 3
    assert build_method(load_method("policy"), policy=policy, seed=5).seed == 5
    assert transferred(policy, tiny_model(seed=1))[0].seed == 3


def test_a_file_without_one_has_seed_0() -> None:
    policy = tiny_policy(tiny_model())
    policy.seed = 4
    values = policy.to_dict()
    assert AdaptationPolicy.from_dict(values).seed == 4
    del values["seed"]
    assert AdaptationPolicy.from_dict(values).seed == 0


@pytest.mark.parametrize("drawing", DRAWING)
def test_what_is_drawn_online_differs_between_seeds_alone(drawing: str) -> None:
    changes = dict(DRAWING[drawing])
    config = load_method(changes.pop("name"), lr=0.01, **changes)

    def logits(seed: int) -> torch.Tensor:
        adapter = OnlineAdapter(tiny_model(), build_method(config, seed=seed))
        return torch.stack([adapter(random_images(8, k)) for k in range(3)])[1:]

    assert torch.equal(logits(0), logits(0)) and torch.equal(logits(0), torch.stack([*logits_of(config)]))
    assert not torch.equal(logits(0), logits(1))


def logits_of(config: Any) -> list[torch.Tensor]:
    """As where no seed is given."""
    adapter = OnlineAdapter(tiny_model(), build_method(config))
    return [adapter(random_images(8, k)) for k in range(3)][1:]


def test_the_commands_seed_is_the_methods() -> None:
    for argv, expected in ((["method=surgeon", "seed=2"], 2), (["method=surgeon"], 0)):
        settings = compose(OnlineSettings, "online", argv)
        method = assemble_method(settings.method, None, tiny_model(), lambda: random_images(8), seed=settings.seed)
        assert method.seed == expected


def test_a_stream_goes_on_with_the_views_of_the_adapter_that_was_saved(tmp_path: Path) -> None:
    first, second = (OnlineAdapter(tiny_model(), build_method(load_method("surgeon"), seed=seed)) for seed in (1, 2))
    first(random_images(8))
    first.save(tmp_path / "state.pt")
    second.load(tmp_path / "state.pt")
    for seed in range(1, 3):
        assert torch.equal(first(random_images(8, seed)), second(random_images(8, seed)))


def test_a_new_policy_has_its_seed() -> None:
    assert (new_policy(tiny_model(), seed=7).seed, new_policy(tiny_model()).seed) == (7, 0)
