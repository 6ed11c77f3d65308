"""A stand-in for an accelerator: torch's device 'meta', whose tensors have shapes but no numbers, with a count of operations and copies"""
import contextlib
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.device('meta')
aten = torch.ops.aten
COPIES = {aten._to_copy.default, aten.copy_.default}
READS = {aten._local_scalar_dense.default, aten.nonzero.default} # for their results the host waits until all work is done


class Accelerator(TorchDispatchMode):
    """A context in which the `operations` with the device 'meta' are counted

    `reads` are the numbers that the host asked for, which are all 1; `uploads` and `downloads` are the copies to and from the device, and
    `moved` has their shapes. An operation that mixes tensors of the device with those of the host raises AssertionError.
    """
    def __init__(self):
        super().__init__()
        self.clear()

    def clear(self):
        self.operations = self.reads = self.uploads = self.downloads = 0
        self.moved = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        here = [t for t in inputs if t.device == DEVICE]
        if here and func in READS:
            self.reads += 1
            if func is aten._local_scalar_dense.default: return 1
            return torch.zeros(here[0].numel(), here[0].ndim, dtype=torch.int64, device=DEVICE)
        if func is aten._to_copy.default and here and (kwargs or {}).get('device') == torch.device('cpu'):
            self.count('downloads', here[0])
            return torch.zeros(here[0].shape, dtype=kwargs.get('dtype') or here[0].dtype)
        host = [t for t in inputs if t.device.type == 'cpu']
        if here and func not in COPIES:
            self.operations += 1
            mixed = [tuple(t.shape) for t in host if t.ndim] # scalars of the host are passed to the operation as arguments
            assert not mixed, f'{func} mixes tensors of the accelerator with those of the host of shapes {mixed}'
        out = func(*args, **(kwargs or {}))
        arrived = host and any(t.device == DEVICE for t in tree_leaves(out) if isinstance(t, torch.Tensor))
        if func in COPIES and arrived: self.count('uploads', host[0])
        return out

    def count(self, what, tensor):
        setattr(self, what, getattr(self, what) + 1)
        self.moved[what, tuple(tensor.shape)] += 1


@contextlib.contextmanager
def accelerator(monkeypatch, room=2**30):
    "The context of an `Accelerator` with `room` free bytes, for which the library takes the ways that it takes for an NVIDIA GPU"
    from grdd_fastai.core import device as settings
    from grdd_fastai.data import loaders
    cast,real_send = torch.autocast,settings.LateNumber.send
    def send(self, scalar):
        if not self.is_late(scalar): return real_send(self, scalar)
        self.sent = torch.ones(()) # a copy that nobody waits for
    def autocast(kind, *args, **kwargs): return contextlib.nullcontext() if kind == 'meta' else cast(kind, *args, **kwargs)
    monkeypatch.setattr(torch, 'autocast', autocast)
    monkeypatch.setattr(settings.LateNumber, 'is_late', staticmethod(lambda scalar: scalar.device == DEVICE))
    monkeypatch.setattr(settings.LateNumber, 'send', send)
    monkeypatch.setattr(loaders, 'free_memory', lambda device: room if device == DEVICE else None)
    with Accelerator() as counts: yield counts
