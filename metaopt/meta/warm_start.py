"""Where meta-training begins, and what it leaves alone: another policy's learned parts, and parts that are frozen.

A gate, or rates, that are learned on top of a frozen generator leave it as good as it was, and need few unrolls.
"""

from collections.abc import Collection
from dataclasses import asdict

from metaopt.errors import CheckpointError, ConfigError
from metaopt.meta.unroll import learned_groups
from metaopt.models import SourceModel
from metaopt.optimizers.mgg import GradientGenerator
from metaopt.policy import AdaptationPolicy


def begin_with(policy: AdaptationPolicy, start: AdaptationPolicy | None, model: SourceModel) -> None:
    """Take over all that ``start`` has learned. Parts that it lacks stay as they are.

    Args:
        policy: the one to be trained; changed in place.
        start: meta-trained on the same model; None: nothing is taken over.
        model: the source model.

    Raises:
        CheckpointError: it was trained on another model, or with another generator or other experts.
    """
    if start is None:
        return
    start.check_source(model)
    theirs = asdict(start.rule.config) if isinstance(start.rule, GradientGenerator) else {}
    assert isinstance(policy.rule, GradientGenerator)
    ours = asdict(policy.rule.config)
    differing = sorted(key for key in ours if theirs.get(key) != ours[key])
    if differing:
        raise CheckpointError(
            f"the policy to start with has other settings of generator.{', generator.'.join(differing)}; allowed are "
            "the same ones: repeat those that it was trained with"
        )
    own, given = policy.state_dict(), start.state_dict()
    for name, tensor in own.items():
        if name in given and given[name].shape != tensor.shape:
            raise CheckpointError(
                f"the policy to start with has {name} of shape {tuple(given[name].shape)}; allowed is "
                f"{tuple(tensor.shape)}: repeat the settings that it was trained with"
            )
    policy.load_state_dict(own | {name: tensor for name, tensor in given.items() if name in own})


def unscale(policy: AdaptationPolicy, start: AdaptationPolicy | None) -> None:
    """Where step sizes go on learning, they begin as those of ``start`` ended: without its ``deploy_step_scale``."""
    if start is not None and isinstance(policy.rule, GradientGenerator):
        policy.rule.scale_step_sizes(1 / start.training.get("config", {}).get("deploy_step_scale", 1.0))


def freeze(
    policy: AdaptationPolicy, parts: Collection[str], only: Collection[str] | None = None, *, on_top: bool = False
) -> None:
    """Leave these parts as they are.

    Args:
        policy: changed in place.
        parts: to be left alone.
        only: parts that learn, while all others are left alone; None: all but ``parts``.
        on_top: whether the policy begins with another one's learned parts.

    Raises:
        ConfigError: the policy has no such part that learns, nothing would be left to learn, or ``only`` leaves alone a
            generator that nobody has trained.
    """
    groups, tensors = learned_groups(policy), dict(policy.named_parameters())
    present = list(groups)
    for key, named in (("frozen", parts), ("only", only or ())):
        for part in named:
            if part not in present:
                raise ConfigError(
                    f"meta.{key} names {part!r}; allowed are the parts that this policy learns, {', '.join(present)}: "
                    "choose among those"
                )
    if only is not None:
        if not on_top and "generator" not in only:
            raise ConfigError(
                f"meta.only=[{','.join(only)}] leaves the generator untrained; allowed is that on top of a trained "
                "policy alone: set start=start.pt, that policy's file, or add generator"
            )
        parts = {*parts, *(part for part in present if part not in only)}
    for part in present:
        if part in parts:
            for name in groups[part]:
                tensors[name].requires_grad_(False)
    if present and all(part in parts for part in present):
        raise ConfigError(
            f"meta.frozen=[{','.join(part for part in present if part in parts)}] leaves nothing to learn; allowed are "
            "all parts but one at most: leave one out"
        )
