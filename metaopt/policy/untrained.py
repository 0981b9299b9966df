"""A policy before meta-training: which parts it has by default, and its first values."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from metaopt import registry
from metaopt.errors import check_kind, check_range
from metaopt.models import SourceModel
from metaopt.objectives import WeightedObjective
from metaopt.optimizers.mgg import GeneratorConfig, GradientGenerator
from metaopt.policy.method import MethodConfig, check_teacher
from metaopt.policy.part import Part
from metaopt.policy.policy import AdaptationPolicy

DEFAULT_PARTS: Mapping[str, Any] = {
    "batch_statistics": 16,  # images: what Schneider et al. (NeurIPS 2020) found good across batch sizes
    "initialization": True,
    "restoration": True,
    "weight_ensembling": {"momentum": 0.875, "after": 8, "forget": 8},  # updates: meta-training unrolls 8 by default
    "class_skew": True,
}
"""Parts of a policy that is meta-trained by default, with their settings."""


def new_policy(
    model: SourceModel,
    generator: GeneratorConfig | None = None,
    objective: Mapping[str, float] | None = None,
    parts: Mapping[str, Any] = DEFAULT_PARTS,
    *,
    learned_objective: bool = True,
    seed: int = 0,
    layers: Sequence[str] | None = None,
) -> AdaptationPolicy:
    """A policy before meta-training, drawn from ``seed``: it is tied to no model yet.

    Args:
        model: source model.
        generator: settings of the generator.
        objective: weight of each term at the start; terms of weight 0 are left out. None: SLR and diversity.
        parts: settings of each part, as `MethodConfig.parts` says.
        learned_objective: whether weights, and what could make an objective cheap, are learned.
        seed: of the generator's and the parts' first values, and of what the policy draws online.
        layers: patterns of the norm layers that adapt, as `MethodConfig.layers`; None: all.

    Raises:
        ConfigError: a setting is unknown or out of range.
        ModelError: the model has nothing to adapt, or no place for a part.
    """
    check_kind("model", model, SourceModel, "a SourceModel", "wrap it in SourceModel(model)")
    check_kind("parts", parts, Mapping, "a mapping of settings by part", "give {} for none")
    if generator is not None:
        check_kind("generator", generator, GeneratorConfig, "a GeneratorConfig", "give GeneratorConfig(variant=...)")
    if objective is not None:
        check_kind("objective", objective, Mapping, "a mapping of weights by term", "give for example {'slr': 1}")
    check_range("seed", seed, 0, example="0")
    given = {"slr": 1.0, "diversity": 1.0} if objective is None else objective
    weights = {name: weight for name, weight in given.items() if weight != 0}
    named = MethodConfig("policy", parts=dict(parts)).named_parts()
    adapts = "experts_norm" if "experts" in named else "norm"
    model = AdaptationPolicy("policy", layers=layers).restricted(model)

    def build(name: str) -> Part:
        return registry.get("part", name).build(named[name][1], model, seed)

    with torch.random.fork_rng(devices=[]):
        built = {name: build(name) for name in named if name == "experts"}  # first: their tensors get step sizes too
        torch.manual_seed(seed)
        probe = AdaptationPolicy("policy", parts=[*built.values()], adapts=adapts)
        rule = GradientGenerator(generator or GeneratorConfig(), probe.layout(probe.attach(model)).names)
        built |= {name: build(name) for name in named if name not in built}
    found = [built[name] for name in named if learned_objective or built[name].own_judge != "drop"]
    for part in found:
        if part.own_judge == "freeze" and not learned_objective:
            part.requires_grad_(False)
    learned = WeightedObjective(weights, learned=learned_objective)
    check_teacher("policy", learned, found)
    return AdaptationPolicy("policy", learned, rule, found, adapts, seed, layers=layers)
