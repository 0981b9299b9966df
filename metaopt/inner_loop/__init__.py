"""Differentiable inner loops: unroll the policy's one step and differentiate the meta-loss in what it learns."""

from metaopt.inner_loop.backends import BACKENDS as BACKENDS
from metaopt.inner_loop.backends import build_backend as build_backend
from metaopt.inner_loop.evaluate import deployed as deployed
from metaopt.inner_loop.evaluate import unrolled_loss as unrolled_loss
from metaopt.inner_loop.func import FuncApply as FuncApply
from metaopt.inner_loop.func import InPlaceApply as InPlaceApply
from metaopt.inner_loop.func import gradients_of as gradients_of
from metaopt.inner_loop.meta_gradient import meta_gradient as meta_gradient
from metaopt.inner_loop.rates import RateTask as RateTask
from metaopt.inner_loop.unroll import PARTS as PARTS
from metaopt.inner_loop.unroll import MetaBatch as MetaBatch
from metaopt.inner_loop.unroll import MetaGradient as MetaGradient
from metaopt.inner_loop.unroll import UnrollConfig as UnrollConfig
from metaopt.inner_loop.unroll import learned_tensors as learned_tensors
from metaopt.inner_loop.unroll import part_of as part_of
from metaopt.inner_loop.unroll import squares_by_part as squares_by_part
