"""Muon against the singular value decomposition, timm's Muon and torch's Adam."""
import pytest
import timm
import torch
from timm.optim import Muon as TimmMuon
from torch.utils._python_dispatch import TorchDispatchMode

from grdd_fastai.models.create import create_backbone
from grdd_fastai.training.optim import Muon, orthogonalized


@pytest.mark.parametrize('shape, within', [((8, 8), .3), ((64, 576), .05), ((100, 20), .05), ((3, 16, 40), .05)])
def test_orthogonalized_is_the_orthogonal_factor_of_the_svd(shape, within):
    torch.manual_seed(0)
    G = torch.randn(shape)
    U,_,Vh = torch.linalg.svd(G, full_matrices=False)
    assert (orthogonalized(G) - U@Vh).norm() < within*Vh.norm() # a square one has singular values near 0, which stay smaller

def test_orthogonalized_does_not_see_the_scale():
    G = torch.randn(16, 40)
    # powers of two, which bfloat16 multiplies without rounding
    for c in (2.**-20, 2.**20): assert torch.equal(orthogonalized(c*G), orthogonalized(G))
    assert torch.equal(orthogonalized(torch.zeros(4, 6)), torch.zeros(4, 6))

def test_ten_steps_are_timms():
    "Convolutions, a linear layer and BatchNorm, under the same gradients; timm's matrices in bfloat16"
    torch.manual_seed(0)
    nets = [timm.create_model('convnet4', num_classes=5) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    start = [p.detach().clone() for p in nets[0].parameters()]
    decayed,rest = ([p for p in nets[1].parameters() if (p.ndim > 1) == matrix] for matrix in (True, False))
    opts = [Muon(nets[0].parameters(), lr=.02, weight_decay=.1),
            TimmMuon([dict(params=decayed, weight_decay=.1), dict(params=rest, weight_decay=0.)], lr=.02, betas=(.9, .95), eps=1e-8)]
    for _ in range(10):
        for p,q in zip(nets[0].parameters(), nets[1].parameters()):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for opt in opts: opt.step()
    for s,p,q in zip(start, nets[0].parameters(), nets[1].parameters()):
        assert (p - q).norm() < .03*(p - s).norm(), p.shape

def test_vectors_take_adams_steps():
    torch.manual_seed(0)
    p,q = (torch.nn.Parameter(torch.ones(7)) for _ in range(2))
    ours,adam = Muon([p], lr=.01, weight_decay=9.),torch.optim.Adam([q], lr=.01, betas=(.9, .95))
    for _ in range(20):
        p.grad = torch.randn(7)
        q.grad = p.grad.clone()
        ours.step(), adam.step()
    assert torch.allclose(p, q, atol=1e-6)

def test_weight_decay_and_parameters_without_gradient():
    W,still = torch.nn.Parameter(torch.ones(3, 4)),torch.nn.Parameter(torch.ones(3, 4))
    W.grad = torch.zeros(3, 4)
    Muon([W, still], lr=.1, weight_decay=.5).step()
    assert torch.allclose(W, torch.full((3, 4), .95)) and torch.equal(still, torch.ones(3, 4))

def test_the_layout_in_memory_changes_nothing():
    torch.manual_seed(0)
    a = torch.nn.Parameter(torch.randn(8, 4, 3, 3))
    b = torch.nn.Parameter(a.detach().clone(memory_format=torch.channels_last))
    a.grad = torch.randn(8, 4, 3, 3)
    b.grad = a.grad.clone(memory_format=torch.channels_last)
    for p in (a, b): Muon([p]).step()
    assert torch.allclose(a, b, atol=1e-6)

def steps_of(net, n=6):
    "The parameters of `net` after `n` steps of Muon with seeded random gradients"
    opt = Muon(net.parameters(), lr=.02, weight_decay=.1)
    torch.manual_seed(1)
    for _ in range(n):
        for p in net.parameters(): p.grad = torch.randn_like(p)
        opt.step()
    return list(net.parameters())

def test_matrices_in_a_stack_take_the_steps_that_they_take_alone(monkeypatch):
    "On a GPU matrices of one shape are computed as a stack, which may round differently"
    alone = steps_of(create_backbone('convnet4', 5))
    monkeypatch.setattr('grdd_fastai.training.optim.autocast_dtype', lambda device: None) # compute in float32, where rounding is small
    exact = steps_of(create_backbone('convnet4', 5))
    together = lambda ps: [[p for p in ps if p.shape == s] for s in {p.shape:0 for p in ps}]
    monkeypatch.setattr('grdd_fastai.training.optim.alike', together)
    for a,b,c in zip(steps_of(create_backbone('convnet4', 5)), exact, alone):
        assert torch.allclose(a, b, atol=1e-6) and torch.allclose(b, c, atol=.05)

def kernels(net, device):
    "The number of operations that torch dispatches in a step of Muon on `device`"
    class Count(TorchDispatchMode):
        n = 0
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            self.n += not func.is_view and func is not torch.ops.aten.detach.default
            return out
    params = [torch.nn.Parameter(torch.empty(p.shape, device=device)) for p in net.parameters()]
    opt = Muon(params)
    for p in params: p.grad = torch.empty_like(p)
    opt.step()
    with Count() as count: opt.step()
    return count.n

def test_a_gpu_starts_few_kernels_a_step():
    "The forward and backward passes of this network launch 309 kernels"
    assert kernels(create_backbone('resnet12_320', 0), 'meta') < 500
