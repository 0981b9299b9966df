"""Between the package's generator and the oracle's: the same weights, drawn once, under the names of either."""

import torch
from torch import Tensor

from metaopt.optimizers.mgg import GeneratorConfig, GradientGenerator, GradientMemoryLayer

from .oracle import random_weights

ORACLE_NAMES = {
    "query": "Wq",
    "key": "Wk",
    "value": "Wv",
    "initial_weight": "W0",
    "initial_bias": "b0",
    "rate_weight": "w_eta",
    "rate_bias": "c_eta",
    "norm_weight": "ln_weight",
    "norm_bias": "ln_bias",
    "readout_norm_weight": "ln2_weight",
    "readout_norm_bias": "ln2_bias",
    "readout_weight": "Wo",
    "readout_bias": "bo",
}


def oracle_weights(memory: GradientMemoryLayer) -> dict[str, Tensor]:
    """The layer's own tensors, graph and all, under the oracle's names."""
    return {oracle: getattr(memory, name) for name, oracle in ORACLE_NAMES.items()}


def drawn_memory(hidden: int = 8, seed: int = 0) -> GradientMemoryLayer:
    """A float64 layer in which no weight has its special start."""
    memory = GradientMemoryLayer(hidden).double()
    with torch.no_grad():
        for name, tensor in oracle_weights(memory).items():
            tensor.copy_(random_weights(hidden, seed)[name])
    return memory


def drawn_generator(variant: str = "residual", tensors: tuple[str, ...] = (), **settings: float) -> GradientGenerator:
    """A float64 generator in which no weight has its special start."""
    generator = GradientGenerator(GeneratorConfig(variant, **settings), tensors).double()  # type: ignore[arg-type]
    if generator.memory is not None:
        generator.memory.load_state_dict(drawn_memory(generator.config.hidden).state_dict())
    if generator.log_step_sizes is not None:
        spread = torch.linspace(-0.5, 0.7, generator.log_step_sizes.numel(), dtype=torch.float64)
        generator.log_step_sizes.data.copy_(spread)
    return generator
