"""What is kept for backward: codecs, the engine that stores by them, and the rules that choose the rates."""

from metaopt.sparsity.codec import Rate as Rate
from metaopt.sparsity.head import LearnedRates as LearnedRates
from metaopt.sparsity.head import RatesConfig as RatesConfig
from metaopt.sparsity.memory import DEFAULT_RULE as DEFAULT_RULE
from metaopt.sparsity.memory import MEMORIES as MEMORIES
from metaopt.sparsity.memory import ActivationMemory as ActivationMemory
from metaopt.sparsity.memory import MemoryConfig as MemoryConfig
from metaopt.sparsity.profile import Profile as Profile
from metaopt.sparsity.profile import Profiles as Profiles
from metaopt.sparsity.ratios import LayerTable as LayerTable
from metaopt.sparsity.rules import PRUNING_RULES as PRUNING_RULES
from metaopt.sparsity.rules import PruningRule as PruningRule
from metaopt.sparsity.rules import PruningState as PruningState
from metaopt.sparsity.rules import build_rule as build_rule
from metaopt.sparsity.saved import LayerRecord as LayerRecord
from metaopt.sparsity.saved import SavedActivations as SavedActivations
