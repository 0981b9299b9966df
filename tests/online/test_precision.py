"""Networks in half precision and under autocast: finite, adapted, and about as good as in float32."""

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metaopt.catalogue import load_method
from metaopt.data import apply_shift, load_digits
from metaopt.models import SourceModel
from metaopt.models.cifar_resnet import CifarResNet
from metaopt.models.digits_vit import digits_vit
from metaopt.online import OnlineAdapter
from metaopt.policy import AdaptationPolicy, MethodConfig, build_method

from ..tiny import BARE, assert_goes_on, random_images, small_digits, tiny_model, trained_model
from .methods import BATCHES, METHODS, UPDATES, UPDATING, run

HALF = (torch.float16, torch.bfloat16)
MEMORIES = ("dense", "exact", "compact", "pruned")
