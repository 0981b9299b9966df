"""SURGEON's importance, by hand in float64, and which gradient stands for which layer."""

import math

import pytest
import torch

from metaopt.activation_memory.importance import gradient_importance, layer_importance, learning_layers, match_layers


def test_importance_is_the_papers() -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = {f"n{i}.weight": torch.randn(3 + i, generator=generator, dtype=torch.float64) for i in range(4)}
    sizes = [4000, 1000, 250, 90]
    norms = [
        math.sqrt(sum(float(x) ** 2 for x in gradient)) / math.sqrt(gradient.numel()) for gradient in gradients.values()
    ]
    products = [norm * math.log(sum(sizes) / size) for norm, size in zip(norms, sizes, strict=True)]
    expected = [product / max(products) for product in products]
    layers = learning_layers(gradients)
    found = layer_importance(gradient_importance(gradients, layers).double(), torch.tensor(sizes, dtype=torch.float64))
    assert found.tolist() == pytest.approx(expected, rel=1e-6)


def test_without_a_gradient_all_layers_are_alike() -> None:
    assert layer_importance(torch.zeros(3), torch.tensor([1.0, 2.0, 3.0])).tolist() == [1.0, 1.0, 1.0]
    assert layer_importance(torch.ones(1), torch.tensor([5.0])).tolist() == [1.0]  # log(ΣM / M) is 0 for one layer


def test_a_layers_weight_counts_and_its_bias_where_it_has_none() -> None:
    names = ["a.bias", "a.weight", "b.c.weight", "d.bias", "weight"]
    found = learning_layers({name: torch.zeros(2) for name in names})
    assert found == {"a": "a.weight", "b.c": "b.c.weight", "d": "d.bias", "": "weight"}


def test_layers_without_a_weight_of_their_own_take_the_nearest_upstream() -> None:
    learning = ["norm1", "norm2", "norm3"]
    kept = ["stem", "norm1", "relu1", "conv2", "norm2", "attention", "gelu", "norm3", "head"]
    assert match_layers(kept, learning) == [0, 0, 0, 0, 1, 1, 1, 2, 2]
    assert match_layers(["norm2", "relu"], learning) == [1, 1]
    assert match_layers(["conv"], learning) == [0]
