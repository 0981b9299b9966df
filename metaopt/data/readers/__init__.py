"""Where streams come from: a row here, a module beside this one and a file in ``configs/data/`` for each source."""

from metaopt.data.readers.arrays import Arrays
from metaopt.data.readers.base import Reader
from metaopt.data.readers.cifar_c import CifarC
from metaopt.data.readers.digits import Digits

READERS: dict[str, type[Reader]] = {reader.name: reader for reader in (Digits, Arrays, CifarC)}
"""Every reader by the name that configurations call it."""
