"""What a device computes in."""
import subprocess
import sys

import pytest
import torch

from grdd_fastai.core.device import autocast_dtype, cpu_seed, deterministic, fastest_convolutions, ieee_float32


@pytest.mark.parametrize('supported, dtype', [(True, torch.bfloat16), (False, torch.float16)])
def test_a_gpu_without_bfloat16_gets_float16(monkeypatch, supported, dtype):
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation=True: supported)
    assert autocast_dtype(torch.device('cuda')) is dtype and autocast_dtype(torch.device('meta')) is None

def test_full_float32_is_set_inside_and_restored_after_an_error():
    cudnn,matmul = torch.backends.cudnn,torch.backends.cuda.matmul
    before = cudnn.allow_tf32,matmul.allow_tf32
    assert before[0] # torch's default
    with pytest.raises(ValueError), ieee_float32():
        assert not matmul.allow_tf32 and not cudnn.allow_tf32
        raise ValueError
    assert (cudnn.allow_tf32, matmul.allow_tf32) == before

@pytest.mark.parametrize('how, timed', [('plain', True), ('algorithms', False), ('cudnn', False)])
def test_convolutions_are_timed_unless_runs_have_to_repeat(monkeypatch, how, timed):
    "cudnn.deterministic is what fastai's `set_seed(reproducible=True)` sets"
    cudnn = torch.backends.cudnn
    monkeypatch.setattr(cudnn, 'deterministic', how == 'cudnn')
    with deterministic(how == 'algorithms'):
        with pytest.raises(ValueError), fastest_convolutions():
            assert cudnn.benchmark is timed
            raise ValueError
        assert cudnn.benchmark is False

def test_the_seed_of_the_cpu_is_that_of_torch_and_touches_no_gpu(monkeypatch):
    torch.manual_seed(3)
    seeded,after = torch.rand(4),torch.rand(4)
    torch.manual_seed(3)
    torch.rand(4)
    monkeypatch.setattr(torch.cuda, 'manual_seed_all', lambda seed: pytest.fail('the GPU was seeded'))
    with cpu_seed(3): assert torch.equal(torch.rand(4), seeded)
    assert torch.equal(torch.rand(4), after)

@pytest.mark.skipif(not hasattr(torch.backends.cudnn, 'conv'), reason='torch before 2.9 has no flags for each kind of layer')
def test_full_float32_beside_the_newer_flags():
    "This runs in a new process, because a process that has set the newer flags cannot use the older ones again"
    code = """
import torch
from grdd_fastai.core.device import ieee_float32
conv = torch.backends.cudnn.conv
conv.fp32_precision = 'ieee'
torch.backends.cudnn.rnn.fp32_precision = 'tf32'
with ieee_float32(): pass
conv.fp32_precision,torch.backends.cudnn.rnn.fp32_precision = 'tf32','ieee'
with ieee_float32(): assert conv.fp32_precision == 'ieee'
assert conv.fp32_precision == 'tf32'
"""
    subprocess.run([sys.executable, '-c', code], check=True)
