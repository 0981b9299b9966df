"""Meta-training: tasks, meta-losses and the trainer."""

from metaopt.meta.config import MetaTrainConfig as MetaTrainConfig
from metaopt.meta.loss import META_LOSSES as META_LOSSES
from metaopt.meta.loss import build_meta_loss as build_meta_loss
from metaopt.meta.selection import held_out_tasks as held_out_tasks
from metaopt.meta.tasks import Task as Task
from metaopt.meta.tasks import TaskConfig as TaskConfig
from metaopt.meta.tasks import TaskSampler as TaskSampler
from metaopt.meta.train import meta_train as meta_train
from metaopt.meta.trainer import MetaTrainer as MetaTrainer
