"""How each embedded source model is trained on the digits."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """One training run: optimizer, schedule and augmentation.

    The learning rate rises over the first fifth of the steps to ``lr`` and falls to zero along a cosine (Smith and
    Topin 2019, "Super-Convergence").
    """

    optimizer: str  # "sgd" (Nesterov momentum 0.9) or "adamw" (betas 0.9, 0.99)
    lr: float  # highest learning rate
    epochs: int
    batch_size: int = 50
    weight_decay: float = 5e-4  # of weights with more than one axis: neither norm layers nor biases
    label_smoothing: float = 0.05
    max_shift: float = 2.0  # pixels, in each direction
    max_rotation: float = 10.0  # degrees, both ways
    max_scale: float = 0.1  # relative, both ways
    max_gradient_norm: float = 1.0


RECIPES = {
    "cifar_resnet20": Recipe(optimizer="sgd", lr=0.1, epochs=20),
    "cifar_resnet56": Recipe(optimizer="sgd", lr=0.1, epochs=15),
    "digits_vit": Recipe(optimizer="adamw", lr=1e-3, epochs=50, weight_decay=0.05),
}
"""Recipe of every model that can be trained on the digits, by its name."""
