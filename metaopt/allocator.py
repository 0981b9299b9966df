"""What becomes of freed memory between one batch and the next.

glibc gives large freed blocks back to the system at once, and asks anew for the next batch's activations: each of their
pages then costs a fault and a zeroing. A meta-training run, which allocates the same sizes again and again, can keep
them. Deployment must not: what it frees, others on the device may need. So it is a command's choice, never an import's.
"""

import ctypes
import os

# Parameters of mallopt(3), from glibc's malloc.h.
M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4


def keep_freed_memory() -> bool:
    """Have this process's malloc keep what is freed; memory in use stays as it was at its highest.

    For CPU tensors under glibc. Elsewhere (musl, macOS, Windows) nothing happens.

    Returns:
        Whether the allocator took the settings.
    """
    try:
        if not os.confstr("CS_GNU_LIBC_VERSION"):
            return False
    except (AttributeError, ValueError, OSError):  # Windows; a C library that does not know the name
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # No block in a mapping of its own, and the heap's top is never given back. The thresholds themselves would not do:
    # as C ints they end at 2 GiB, and some releases refuse a mapping threshold above 32 MiB.
    return mallopt(M_MMAP_MAX, 0) == 1 and mallopt(M_TRIM_THRESHOLD, -1) == 1
