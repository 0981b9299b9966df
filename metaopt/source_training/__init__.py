"""Training of the embedded source models."""

from metaopt.source_training.digits import default_cache_dir, train_digits_source
from metaopt.source_training.training import RECIPES, Recipe, train_classifier
