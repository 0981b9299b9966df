"""Meta-training: tasks, unrolls, meta-losses and the trainer."""

from metaopt.meta.config import MetaTrainConfig as MetaTrainConfig
from metaopt.meta.task_config import TaskConfig as TaskConfig
from metaopt.meta.tasks import Task as Task
from metaopt.meta.tasks import TaskSampler as TaskSampler
from metaopt.meta.train import meta_train as meta_train
from metaopt.meta.trainer import MetaTrainer as MetaTrainer
from metaopt.meta.verdict import fit_verdict as fit_verdict
