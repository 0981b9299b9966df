"""How the golden cases are built: inputs, and all that speaks to the library's composition."""

from collections.abc import Mapping, Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from metaopt.cli.assemble import assemble_method, meta_train_config
from metaopt.cli.compose import compose
from metaopt.cli.settings import MetaTrainSettings, OnlineSettings
from metaopt.data import load_digits, shift_names, to_float
from metaopt.data.shifts import META, WIDE
from metaopt.meta import MetaTrainConfig, MetaTrainer
from metaopt.meta.build_policy import build_policy as build_untrained
from metaopt.models import SourceModel, load_source_model
from metaopt.online import OnlineAdapter
from metaopt.policy import AdaptationPolicy
from metaopt.policy.state import state_to_dict

BATCH, BATCHES, CLEAN = 8, 10, 24
RESNET, VIT = MODELS = ("cifar_resnet20", "digits_vit")

# ---------------------------------------------------------------------------------------------------------------------
# Inputs


@cache
def _digits() -> Tensor:
    return to_float(load_digits().unlabeled.images).double()


def clean_images() -> Tensor:
    """Unlabeled images of the source domain, (24, 3, 32, 32) float64."""
    return _digits()[:CLEAN].clone()


def stream() -> list[Tensor]:
    """Ten batches of eight: five with noise, then five dark ones of low contrast."""
    generator = torch.Generator().manual_seed(1)
    images = _digits()[CLEAN : CLEAN + BATCH * BATCHES].split(BATCH)
    noise = [torch.randn(batch.shape, generator=generator, dtype=torch.float64) for batch in images]
    first = [images[k] + 0.2 * noise[k] for k in range(5)]
    second = [0.1 + 0.25 * images[k] + 0.02 * noise[k] for k in range(5, BATCHES)]
    return [batch.clamp(0, 1) for batch in first + second]


# ---------------------------------------------------------------------------------------------------------------------
# How: all that speaks to the library's composition (a port changes this part alone)


def build_model(name: str, dtype: torch.dtype = torch.float64) -> SourceModel:
    """Untrained, with random weights and BatchNorm's running statistics of the clean images."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = load_source_model(name).double()
    if name == VIT:  # whose logits are 0 as built, and attention even
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for tensor in model.parameters():
                if tensor.ndim > 1:
                    tensor += 0.1 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
    model.to(dtype)
    layers = [layer for layer in model.modules() if isinstance(layer, _BatchNorm)]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = 1.0
        layer.train()
    with torch.no_grad():
        model(clean_images().to(dtype))
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
    return model.eval()


def meta_config(argv: Sequence[str]) -> MetaTrainConfig:
    """As ``pretrain/meta_train.py`` composes it."""
    return meta_train_config(compose(MetaTrainSettings, "meta_train", argv))


def build_policy(model: SourceModel, argv: Sequence[str]) -> AdaptationPolicy:
    """The policy before meta-training."""
    images = clean_images().to(next(model.parameters()).dtype)
    return build_untrained(model, images, meta_config(argv)).policy


def build_trainer(model: SourceModel, argv: Sequence[str]) -> MetaTrainer:
    """Meta-training on the clean images."""
    images = clean_images().to(next(model.parameters()).dtype)
    return MetaTrainer(model, images, (*shift_names(META), *shift_names(WIDE)), meta_config(argv))


def build_adapter(model: SourceModel, argv: Sequence[str], policy: AdaptationPolicy | None) -> OnlineAdapter:
    """A method as ``adapt/online.py`` composes it, on a model."""
    path = [] if policy is None else ["policy_path=given"]
    settings = compose(OnlineSettings, "online", [*argv, *path])
    images = clean_images().to(next(model.parameters()).dtype)
    method = assemble_method(settings.method, policy, model, lambda: images)
    assert settings.memory is not None
    return OnlineAdapter(model, method, memory=settings.memory, budget_mib=settings.budget_mib)


def weights_of(policy: AdaptationPolicy) -> dict[str, Tensor]:
    """All learned tensors, by the names and in the order of the recording."""
    found = {recorded_name(name): tensor for name, tensor in policy.state_dict().items()}
    return {name: found[name] for name in sorted(found, key=recorded_place)}


def load_weights(policy: AdaptationPolicy, weights: Mapping[str, Tensor]) -> None:
    """Set all learned tensors, by the names of the recording."""
    policy.load_state_dict({name: weights[recorded_name(name)] for name in policy.state_dict()})


RECORDED = {  # how learned tensors were called, by how they start now
    "rule.": "rule.",
    "objective.": "objective.",
    "parts.batch_statistics.": "prior.",
    "parts.experts.": "learned_experts.",
    "parts.initialization.": "initialization.",
    "parts.restoration.": "restoration.",
    "parts.update_gate.": "gate.",
    "parts.pruning.allocation.": "pruning.",
}
ORDER = ("prior", "objective", "rule", "pruning", "learned_experts", "restoration", "gate", "initialization")


def recorded_name(name: str) -> str:
    start = next(start for start in RECORDED if name.startswith(start))
    return RECORDED[start] + name.removeprefix(start)


def recorded_place(name: str) -> int:
    return ORDER.index(name.partition(".")[0])


def events_of(adapter: OnlineAdapter) -> dict[str, int]:
    """Counts by name, without what nobody counted when the outputs were recorded, where it did not happen."""
    return {name: count for name, count in adapter.events.items() if count or name != "anchored"}


def state_of(adapter: OnlineAdapter) -> list[Tensor]:
    """Tensors of the adapter's state, in the order of the recording."""
    state = state_to_dict(adapter.state)
    return [t for part in ("rule", "pruning", "teacher", "update_gate", "shift_distance") for t in state.get(part, ())]
