"""What is kept for backward: packs, the context that stores by them, and allocations, which choose the precision."""

from metaopt.activation_memory.allocation import ALLOCATIONS as ALLOCATIONS
from metaopt.activation_memory.allocation import Allocation as Allocation
from metaopt.activation_memory.allocation import AllocationState as AllocationState
from metaopt.activation_memory.allocation import build_allocation as build_allocation
from metaopt.activation_memory.engine import DEFAULT_ALLOCATION as DEFAULT_ALLOCATION
from metaopt.activation_memory.engine import MEMORIES as MEMORIES
from metaopt.activation_memory.engine import ActivationMemory as ActivationMemory
from metaopt.activation_memory.engine import MemoryConfig as MemoryConfig
from metaopt.activation_memory.layer_table import LayerTable as LayerTable
from metaopt.activation_memory.learned_precision import LearnedPrecision as LearnedPrecision
from metaopt.activation_memory.learned_precision import LearnedPrecisionConfig as LearnedPrecisionConfig
from metaopt.activation_memory.precision import Precision as Precision
from metaopt.activation_memory.profile import Profile as Profile
from metaopt.activation_memory.profile import Profiles as Profiles
from metaopt.activation_memory.saved_activations import LayerRecord as LayerRecord
from metaopt.activation_memory.saved_activations import SavedActivations as SavedActivations
