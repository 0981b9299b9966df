"""Images and how they drift: the embedded digits, readers of files, corruptions, shifts and streams."""

from metaopt.data.images import ImageSet as ImageSet
from metaopt.data.images import to_bytes as to_bytes
from metaopt.data.images import to_float as to_float
from metaopt.data.images import validate_images as validate_images
from metaopt.data.readers import READERS as READERS
from metaopt.data.readers.arrays import Arrays as Arrays
from metaopt.data.readers.arrays import load_arrays as load_arrays
from metaopt.data.readers.base import Reader as Reader
from metaopt.data.readers.cifar_c import CifarC as CifarC
from metaopt.data.readers.digits import Digits as Digits
from metaopt.data.readers.digits import load_digits as load_digits
from metaopt.data.seeding import generator_for as generator_for
from metaopt.data.shifts import Shift as Shift
from metaopt.data.shifts import compose as compose
from metaopt.data.shifts import get_shift as get_shift
from metaopt.data.shifts import register_shift as register_shift
from metaopt.data.shifts import shift_names as shift_names
from metaopt.data.stream import Batch as Batch
from metaopt.data.stream import Domain as Domain
from metaopt.data.stream import Stream as Stream
from metaopt.data.stream import batches as batches
from metaopt.data.stream import corrupt as corrupt
