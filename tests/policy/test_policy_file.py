"""Nonsense in a policy's file: refused in one line as it is read, before anything of its size is built."""

import resource
import time
from typing import Any

import pytest
import torch

from metaopt import registry
from metaopt.errors import CheckpointError, ModelError
from metaopt.online import OnlineAdapter
from metaopt.policy import AdaptationPolicy
from metaopt.policy.part import Part
from metaopt.policy.parts.fisher import Fisher
from metaopt.policy.untrained import DEFAULT_PARTS

from ..meta.cases import tiny_resnet
from ..tiny import BARE, tiny_model, tiny_policy, with_parts

ALL = {**DEFAULT_PARTS, "update_gate": True, "pruning": "learned"}


@pytest.fixture
def values() -> dict[str, Any]:
    """What a file holds of a policy with most parts, as meta-training leaves it."""
    model = tiny_model()
    policy = tiny_policy(model, parts=ALL)
    shapes = policy.layout(policy.attach(model)).shapes
    policy = with_parts(policy, Fisher(information={name: torch.ones(shape) for name, shape in shapes.items()}))
    policy.training = {
        "config": {"selection_shifts": ("gamma",), "deploy_step_scale": 1.5, "frozen": None},
        "shifts": ["fog"],
        "epochs": 3,
        "best_epoch": 2,
        "selection": [0.5, 0.25],
        "skipped": 0,
    }
    return policy.to_dict()


def put(values: Any, path: str, value: Any) -> Any:
    """The same with another value at a dotted path; keys that hold dots are written with slashes."""
    first, _, rest = path.partition(".")
    key: Any = int(first) if isinstance(values, list) else first.replace("/", ".")
    copy = values.copy()
    copy[key] = put(values[key], rest, value) if rest else value
    return copy


NONSENSE = [
    ("method", 3),
    ("method", ""),
    ("tensors", "bn1.weight"),
    ("tensors", ["bn1.weight"] * 4),
    ("tensors", ["a", "b", "c", "d"]),
    ("generator.hidden", 9),
    ("generator.hidden", True),
    ("generator.clamp", float("nan")),
    ("training", []),
    ("training", {1: 2}),
    ("training", {"a": torch.zeros(1)}),
    ("training.shifts", "fog"),
    ("training.shifts", [1]),
    ("training.shifts", None),
    ("training.epochs", -1),
    ("training.epochs", 1.5),
    ("training.best_epoch", True),
    ("training.skipped", "0"),
    ("training.selection", [None]),
    ("training.config", ["x"]),
    ("training.config.selection_shifts", [b"gamma"]),
    ("training.config.sizes", [64]),
    ("training.config.sizes", [16, 8]),
    ("training.config.sizes", [2.0, 8.0]),
    ("training.config.deploy_step_scale", 0),
    ("training.config.deploy_step_scale", float("nan")),
    ("source.sha256", 7),
    ("source.sha256", "x" * 64),
    ("source.layout", []),
    ("source.layout.0.shape", [-8]),
    ("source.layout.0.shape", [7]),
    ("source.layout.0.depth", float("nan")),
    ("source.layout.0.name", 3),
    ("source.layout.0.name", "module.bn2.weight"),
    ("source.layout.0", {}),
    ("source.spec.name", None),
    ("source.spec.num_classes", 10.0),
    ("source.spec.mean", (float("nan"),) * 3),
    ("source.spec.std", (float("inf"),) * 3),
    ("source.spec.input_size", (10**400, 1)),
    ("objective.learned", "yes"),
    ("objective.terms", {}),
    ("objective.weights.slr", float("nan")),
    ("objective.terms.discrepancy.mean", []),
    ("objective.terms.discrepancy.mean", [3, 4]),
    ("objective.terms.discrepancy.std.0", torch.tensor(-1.0)),
    ("objective.terms.discrepancy.std.0", torch.zeros(7)),
    ("parts.restoration.config", True),
    ("parts.restoration.config.base", 2),
    ("parts.initialization.sizes", {"module.bn1.weight": 48}),
    ("parts.initialization.sizes.module/bn1/weight", -8),
    ("parts.initialization.sizes.module/bn1/weight", 10**12),
    ("parts.batch_statistics.layers", "ab"),
    ("parts.batch_statistics.layers", [1, 2]),
    ("parts.pruning.head", {"hidden": 10**7}),
    ("parts.pruning.head", {"width": 1}),
    ("parts.fisher.information.module/bn1/weight", torch.ones(3)),
    ("parts.fisher.information.module/bn1/weight", torch.full((8,), float("nan"))),
    ("parts.fisher.information.module/bn1/weight", -torch.ones(8)),
    ("parts.fisher.information.module/bn1/weight", 1.0),
    ("weights.rule/log_step_sizes", torch.zeros(5)),
    ("weights.rule/log_step_sizes", torch.zeros(4, dtype=torch.int64)),
    ("weights.rule/log_step_sizes", torch.zeros(4, dtype=torch.complex64)),
    ("weights.rule/log_step_sizes", [0.0] * 4),
    ("weights.rule/memory/key", torch.full((8, 2), float("inf"))),
]


@pytest.mark.parametrize(("path", "value"), NONSENSE)
def test_nonsense_is_refused_when_it_is_read(values: dict[str, Any], path: str, value: Any) -> None:
    AdaptationPolicy.from_dict(values)
    with pytest.raises(CheckpointError, match="is damaged") as caught:
        AdaptationPolicy.from_dict(put(values, path, value), "ckpt.pt")
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500


HUGE: dict[str, tuple[str, Any]] = {
    "hidden of a width": ("generator.hidden", 20_000),
    "hidden beyond an address": ("generator.hidden", 4 * 10**9),
    "head of pruning": ("parts.pruning.head", {"hidden": 3 * 10**8}),
    "offsets": ("parts.initialization.sizes", {"module.bn1.weight": 10**10}),
    "names": ("tensors", [f"t{index}" for index in range(10**6)]),
}


@pytest.mark.parametrize("name", HUGE)
def test_what_would_be_huge_is_refused_at_once_and_in_little_memory(values: dict[str, Any], name: str) -> None:
    AdaptationPolicy.from_dict(values)
    nonsense = put(values, *HUGE[name])
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(CheckpointError, match="is damaged"):
        AdaptationPolicy.from_dict(nonsense)
    assert time.monotonic() - started < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024, "KiB"


class Reading(Part):
    """One of a user's own, that looks at its tensors while it is made."""

    name = "reading"

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self.scale = torch.nn.Parameter(torch.ones(1))
        self.first = float(self.scale.detach()[0])


def test_a_part_that_reads_its_tensors_as_it_is_made_can_be_loaded(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(registry.PARTS, "reading", Reading)
    weights = {**values["weights"], "parts.reading.scale": torch.full((1,), 2.0)}
    with_it = {**values, "parts": {**values["parts"], "reading": {"config": {}}}, "weights": weights}
    assert AdaptationPolicy.from_dict(with_it).part("reading").scale.tolist() == [2.0]


SITE = "parts.experts.sites.0"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("parts.experts.sites", [{}]),
        (f"{SITE}.width", 10**9),
        (f"{SITE}.width", "16"),
        (f"{SITE}.width", -1),
        (f"{SITE}.axis", 2),
        (f"{SITE}.placement", "before"),
        (f"{SITE}.depth", 1),
        ("parts.experts.config.bottleneck", 10**9),
        ("parts.experts.config.experts", 16),
    ],
)
def test_nonsense_of_experts_is_refused(path: str, value: Any) -> None:
    values = tiny_policy(tiny_resnet(), parts={**BARE, "experts": True}).to_dict()
    AdaptationPolicy.from_dict(values)
    with pytest.raises(CheckpointError, match="is damaged"):
        AdaptationPolicy.from_dict(put(values, path, value))


def test_experts_at_other_sites_than_the_models_are_refused() -> None:
    values = tiny_policy(tiny_resnet(), parts={**BARE, "experts": True}).to_dict()
    assert values["parts"]["experts"]["sites"][0]["axis"] == 1
    policy = AdaptationPolicy.from_dict(put(values, f"{SITE}.axis", -1))
    with pytest.raises(ModelError, match="sites"):
        OnlineAdapter(tiny_resnet(), policy)
