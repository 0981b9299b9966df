"""What is kept for backward: codecs, the engine that stores by them, and the allocations that choose the precision."""

from metaopt.activation_memory.allocation import ALLOCATIONS as ALLOCATIONS
from metaopt.activation_memory.allocation import Allocation as Allocation
from metaopt.activation_memory.allocation import AllocationState as AllocationState
from metaopt.activation_memory.allocation import build_allocation as build_allocation
from metaopt.activation_memory.budget import LayerTable as LayerTable
from metaopt.activation_memory.engine import DEFAULT_ALLOCATION as DEFAULT_ALLOCATION
from metaopt.activation_memory.engine import MEMORIES as MEMORIES
from metaopt.activation_memory.engine import ActivationMemory as ActivationMemory
from metaopt.activation_memory.engine import MemoryConfig as MemoryConfig
from metaopt.activation_memory.learned_precision import LearnedPrecision as LearnedPrecision
from metaopt.activation_memory.learned_precision import LearnedPrecisionConfig as LearnedPrecisionConfig
from metaopt.activation_memory.packs import Precision as Precision
from metaopt.activation_memory.profile import Profile as Profile
from metaopt.activation_memory.profile import Profiles as Profiles
from metaopt.activation_memory.saved_activations import LayerRecord as LayerRecord
from metaopt.activation_memory.saved_activations import SavedActivations as SavedActivations
