"""Muon against the singular value decomposition, timm's Muon and torch's Adam."""
import pytest
import timm
import torch
from timm.optim import Muon as TimmMuon

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
