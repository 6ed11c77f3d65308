"""Mixed precision where the device gains by it: bfloat16, else float16 with scaled gradients on a GPU."""
from functools import lru_cache

import torch
from fastai.callback.fp16 import MixedPrecision

__all__ = ['amp', 'autocast_dtype', 'Autocast', 'amp_dtype']


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


class Autocast(MixedPrecision):
    """fastai's MixedPrecision in `autocast_dtype` and around the model's forward pass alone: the loss stays in float32

    float16 gradients are scaled, and a step whose gradients overflow is left out.
    """
    @property
    def dtype(self): return autocast_dtype(torch.device(self.dls.device))
    def before_fit(self):
        self.handles = []
        self.learn.scaler,self.scales = torch.amp.GradScaler(torch.device(self.dls.device).type, enabled=self.dtype is torch.float16),[]
        if self.dtype is None: return
        cast = amp(self.dls.device, self.dtype)
        def enter(*_): cast.__enter__()
        def leave(*_): cast.__exit__(None, None, None)
        self.handles = [self.model.register_forward_pre_hook(enter), self.model.register_forward_hook(leave, always_call=True)]
    def before_batch(self): pass
    def after_loss(self): pass
    def after_fit(self):
        for h in self.handles: h.remove()
        self.learn.scaler = None


def amp_dtype(learn):
    "What the Learner's forward passes are autocast to, None for float32"
    return getattr(getattr(learn, 'autocast', None), 'dtype', None)
