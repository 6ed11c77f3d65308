"""Settings of the device: precision, memory, deterministic kernels and random numbers."""
import contextlib
import ctypes
import os
import sys
from functools import lru_cache

import torch

__all__ = ['keep_freed_memory', 'free_memory', 'sent', 'amp', 'autocast_dtype', 'deterministic', 'fastest_convolutions', 'ieee_float32',
           'seed_generators', 'cpu_seed', 'LateNumber']


M_TRIM_THRESHOLD,M_MMAP_THRESHOLD = -1,-3 # names and numbers from <malloc.h>


@lru_cache
def keep_freed_memory():
    """Make glibc keep freed memory for the next tensor instead of returning it to the system; return whether this could be set

    By default every activation gets new pages from the kernel, which zeroes them one by one. That takes nearly half of a ConvNet-4
    training step. With this setting the process keeps its peak memory until it ends.
    """
    if not sys.platform.startswith('linux'): return False
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None) # musl has no mallopt
    return bool(mallopt and mallopt(M_MMAP_THRESHOLD, 1 << 30) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


def free_memory(device):
    "Free bytes of an NVIDIA GPU; None for other devices, whose memory is the host's"
    return torch.cuda.mem_get_info(device)[0] if device.type == 'cuda' else None


def sent(x, device):
    "Copy the tensor `x` to `device`; only with CUDA the host does not wait, because elsewhere `x` may be freed too early (pytorch#189690)"
    return x.to(device, non_blocking=torch.device(device).type == 'cuda')


def amp(device, dtype):
    "Autocast to `dtype` on `device`, or do nothing if `dtype` is None"
    return torch.autocast(torch.device(device).type, dtype or torch.bfloat16, enabled=dtype is not None)

def autocast_dtype(device):
    """The dtype to which forward passes on `device` are autocast, or None for float32

    It is bfloat16 on CPUs with AVX512-BF16 or AMX, on NVIDIA GPUs from Ampere on, and on Apple GPUs that can run a convolution in it.
    It is float16 on older NVIDIA GPUs.
    """
    if device.type == 'cuda': return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == 'mps': return torch.bfloat16 if _convolves(device.type, torch.bfloat16) else None
    if device.type != 'cpu': return None
    flags = (getattr(torch.cpu, f'_is_{k}_supported', lambda: False) for k in ('avx512_bf16', 'amx_tile'))
    return torch.bfloat16 if any(f() for f in flags) else None

@lru_cache
def _convolves(device, dtype):
    "Whether a convolution autocast to `dtype` runs forward and backward on `device`"
    try:
        with torch.autocast(device, dtype): y = torch.nn.Conv2d(3, 4, 3, device=device)(torch.ones(1, 3, 8, 8, device=device))
        y.sum().backward()
        return bool(torch.isfinite(y).all())
    except (RuntimeError, TypeError): return False # the version of torch or of the system is too old


@contextlib.contextmanager
def deterministic(on=True):
    "Use deterministic kernels if `on`: CUDA needs these slower kernels to repeat a run to the bit"
    deterministic_before = torch.are_deterministic_algorithms_enabled()
    benchmark_before = torch.backends.cudnn.benchmark
    if on:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8') # cuBLAS reads this variable when CUDA starts
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    try: yield
    finally:
        torch.use_deterministic_algorithms(deterministic_before)
        torch.backends.cudnn.benchmark = benchmark_before


@contextlib.contextmanager
def fastest_convolutions():
    """Let cuDNN time its convolutions for each new shape and use the fastest one, which pays where shapes stay the same

    With deterministic kernels it does nothing, because the choice may differ from run to run.
    """
    before = torch.backends.cudnn.benchmark
    repeats = torch.are_deterministic_algorithms_enabled() or torch.backends.cudnn.deterministic # also by fastai's set_seed
    torch.backends.cudnn.benchmark = before or not repeats
    try: yield
    finally: torch.backends.cudnn.benchmark = before


@contextlib.contextmanager
def ieee_float32():
    """Compute float32 in full precision on every device, also convolutions on NVIDIA GPUs from Ampere on

    By default these use TF32, which keeps 10 bits of the fraction instead of 23.
    """
    cudnn,matmul = torch.backends.cudnn,torch.backends.cuda.matmul
    name,full,flags = 'allow_tf32',False,[cudnn, matmul]
    try: before = [getattr(f, name) for f in flags]
    except RuntimeError: # torch does not read these flags after the caller has set the newer ones
        name,full,flags = 'fp32_precision','ieee',[cudnn.conv, matmul]
        before = [getattr(f, name) for f in flags]
    for f in flags: setattr(f, name, full)
    try: yield
    finally:
        for f,old in zip(flags, before): setattr(f, name, old)


def seed_generators(device, seed):
    """Seed the random generators of the CPU and of `device`

    torch.manual_seed seeds those of all kinds of devices, and for each kind that is not there it records a stack trace, which takes a good
    part of the time of a small training step.
    """
    torch.default_generator.manual_seed(seed)
    kind = torch.device(device).type
    if kind in ('cpu', 'meta'): return
    module = torch.get_device_module(kind)
    getattr(module, 'manual_seed_all', module.manual_seed)(seed)

@contextlib.contextmanager
def cpu_seed(seed):
    "A context with the CPU's random generator seeded; its state is restored at the end, and the generators of GPUs are not changed"
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try: yield
    finally: torch.set_rng_state(before)


class LateNumber:
    """A number that is computed on the device and read by the host: an NVIDIA GPU's is read later, so that the host need not wait for it

    Reading a GPU's number at once would wait until the GPU has done all its work, and then the GPU would wait for the host.
    """
    def __init__(self):
        self.sent = None # the number on its way
        self.event = None
    def __getstate__(self): return dict(sent=None, event=None) # events cannot be pickled
    @staticmethod
    def is_late(scalar):
        "Whether `scalar` should be read a step after it was sent"
        return scalar.device.type == 'cuda'
    def send(self, scalar):
        "Start to copy a tensor of one number to the host; call `receive` before the next `send`"
        if self.is_late(scalar):
            if self.event is None: self.host,self.event = torch.empty((), dtype=scalar.dtype, pin_memory=True),torch.cuda.Event()
            self.sent = self.host.copy_(scalar, non_blocking=True)
            self.event.record()
        else: self.sent = scalar
    def receive(self):
        "The number that was sent, as a float; None if none is on its way"
        if self.sent is None: return None
        if self.event is not None: self.event.synchronize()
        number,self.sent = self.sent.item(),None
        return number
