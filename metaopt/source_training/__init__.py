"""Training of the embedded source models."""

from metaopt.source_training.digits import default_cache_dir as default_cache_dir
from metaopt.source_training.digits import train_digits_source as train_digits_source
from metaopt.source_training.recipes import RECIPES as RECIPES
from metaopt.source_training.recipes import Recipe as Recipe
from metaopt.source_training.training import train_classifier as train_classifier
