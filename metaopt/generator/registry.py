"""The table of update rules: what a method can be composed of, and what one set of contracts holds for."""

from collections.abc import Callable
from functools import partial

from metaopt.generator.mgg import VARIANTS, GeneratorConfig, GradientGenerator
from metaopt.generator.rules import SGD, Adam
from metaopt.types import UpdateRule


def _fresh_generator(variant: str, **settings: float) -> GradientGenerator:
    return GradientGenerator(GeneratorConfig(variant, **settings))  # type: ignore[arg-type]


HAND_MADE_RULES: dict[str, Callable[..., UpdateRule]] = {"adam": Adam, "sgd": SGD}
"""Rules without learned tensors, by the name that ``method.update`` calls them."""

UPDATE_RULES: dict[str, Callable[..., UpdateRule]] = {
    **HAND_MADE_RULES,
    **{variant: partial(_fresh_generator, variant) for variant in VARIANTS},
}
"""Every rule by name; each is built from its settings as keywords, of which ``lr`` is common to all."""
