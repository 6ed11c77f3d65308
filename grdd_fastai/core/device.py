"""What the device can do: mixed precision, memory that is kept, deterministic kernels."""
import contextlib
import ctypes
import os
import sys
from functools import lru_cache

import torch

__all__ = ['keep_freed_memory', 'amp', 'autocast_dtype', 'deterministic']


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


def amp(device, dtype): return torch.autocast(torch.device(device).type, dtype or torch.bfloat16, enabled=dtype is not None)

def autocast_dtype(device):
    """What forward passes on `device` are autocast to, None for float32

    bfloat16 on a CPU with AVX512-BF16 or AMX, on NVIDIA's Ampere and newer, and on Apple's GPUs where a convolution runs in it; float16 on
    older NVIDIA GPUs.
    """
    if device.type == 'cuda': return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == 'mps': return torch.bfloat16 if _convolves(device.type, torch.bfloat16) else None
    if device.type != 'cpu': return None
    flags = (getattr(torch.cpu, f'_is_{k}_supported', lambda: False) for k in ('avx512_bf16', 'amx_tile'))
    return torch.bfloat16 if any(f() for f in flags) else None

@lru_cache
def _convolves(device, dtype):
    try:
        with torch.autocast(device, dtype): y = torch.nn.Conv2d(3, 4, 3, device=device)(torch.ones(1, 3, 8, 8, device=device))
        y.sum().backward()
        return bool(torch.isfinite(y).all())
    except (RuntimeError, TypeError): return False # an older torch or system


@contextlib.contextmanager
def deterministic(on=True):
    "Deterministic kernels inside, where `on`: what CUDA needs to repeat a run to the bit; slower"
    was = torch.are_deterministic_algorithms_enabled(),torch.backends.cudnn.benchmark
    if on:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8') # cuBLAS reads it when CUDA starts
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    try: yield
    finally:
        torch.use_deterministic_algorithms(was[0])
        torch.backends.cudnn.benchmark = was[1]
