"""What makes a CPU fast at training."""
import ctypes
import sys
from functools import lru_cache

__all__ = ['keep_freed_memory']

M_TRIM_THRESHOLD,M_MMAP_THRESHOLD = -1,-3 # of <malloc.h>


@lru_cache
def keep_freed_memory():
    """Have glibc keep freed memory for the next tensor instead of returning it; True where that could be set

    By default every activation is a fresh mapping whose pages the kernel zeroes one by one: nearly half of a ConvNet-4
    training step. The process then holds on to its peak memory until it ends.
    """
    if not sys.platform.startswith('linux'): return False
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None) # musl has none
    return bool(mallopt and mallopt(M_MMAP_THRESHOLD, 1 << 30) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
