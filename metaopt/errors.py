"""One family of errors.

Every message is one line and says three things: the value that was met, what is allowed, and the fix. The commands in
``pretrain/`` and ``adapt/`` print it without a traceback and exit with code 2.
"""


class MetaoptError(Exception):
    """Base of every error that a user can cause and mend."""


class ConfigError(MetaoptError):
    """A setting is unknown, out of range, or does not go with another one."""


class BudgetError(ConfigError):
    """A budget of bytes is below what a model needs at least."""


class CheckpointError(MetaoptError):
    """A checkpoint is missing, unreadable, unsafe, foreign, or made for another model."""


class ModelError(MetaoptError):
    """A model cannot be built, loaded or adapted."""


class DataError(MetaoptError):
    """Images or labels are missing or have the wrong shape, type or range."""


class OutputError(MetaoptError):
    """A result cannot be written where it was asked for."""
