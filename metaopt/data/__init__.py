"""Images and how they drift: the embedded digits, readers of files, corruptions, shifts and streams."""

from metaopt.data.arrangements import arrange
from metaopt.data.images import ImageSet, to_bytes, to_float
from metaopt.data.readers import READERS
from metaopt.data.readers.arrays import Arrays, load_arrays
from metaopt.data.readers.base import Reader
from metaopt.data.readers.cifar_c import CifarC
from metaopt.data.readers.digits import Digits, load_digits
from metaopt.data.seeding import generator_for
from metaopt.data.shifts import register_shift, shift_names
from metaopt.data.stream import Batch, Domain, Stream, batch_count, batches
