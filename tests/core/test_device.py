"""What a device computes in."""
import pytest
import torch

from grdd_fastai.core.device import autocast_dtype


@pytest.mark.parametrize('supported, dtype', [(True, torch.bfloat16), (False, torch.float16)])
def test_a_gpu_without_bfloat16_gets_float16(monkeypatch, supported, dtype):
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation=True: supported)
    assert autocast_dtype(torch.device('cuda')) is dtype and autocast_dtype(torch.device('meta')) is None
