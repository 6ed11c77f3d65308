"""Other terms of distillation: each by loops over the images, alone and beside the relatedness, with one teacher and with two."""
import pytest
import torch
from helpers import Grab, fit, like_data, net, stage_two_learner

from grdd_fastai.models.create import create_backbone
from grdd_fastai.terms import RelationalKD, SimilarityPreserving


def huber(a, b): return (a - b)**2/2 if abs(a - b) < 1 else abs(a - b) - .5

def naive_rkd(h_e, h_g):
    "RKD-DA as its paper has it, a pair and a triple of images at a time"
    n = len(h_e)
    def distance(h, i, j): return float((h[i] - h[j]).norm())
    def mean(h): return sum(distance(h, i, j) for i in range(n) for j in range(n) if i != j) / (n*(n - 1))
    def cosine(h, i, j, k): # of the angle at j
        a,b = h[i] - h[j],h[k] - h[j]
        return float(a @ b / (a.norm()*b.norm())) if i != j and k != j else 0.
    mean_e,mean_g = mean(h_e),mean(h_g)
    distances = sum(huber(distance(h_e, i, j)/mean_e, distance(h_g, i, j)/mean_g) for i in range(n) for j in range(n)) / n**2
    angles = sum(huber(cosine(h_e, i, j, k), cosine(h_g, i, j, k)) for i in range(n) for j in range(n) for k in range(n)) / n**3
    return distances + 2*angles

def naive_similarity(h_e, h_g):
    n,total = len(h_e),0.
    for i in range(n):
        rows = [torch.tensor([float(h[i] @ h[j]) for j in range(n)]) for h in (h_e, h_g)]
        total += float(((rows[0]/rows[0].norm() - rows[1]/rows[1].norm())**2).sum())
    return total / n**2

NAIVE = {RelationalKD: naive_rkd, SimilarityPreserving: naive_similarity}

@pytest.mark.parametrize('term', NAIVE, ids=lambda t: t.__name__)
def test_a_term_by_loops(term):
    torch.manual_seed(0)
    student,*teachers = (torch.randn(7, d) for d in (5, 9, 4))
    for given in (teachers[:1], teachers):
        want = sum(NAIVE[term](student, h) for h in given) / len(given)
        assert float(term().loss(student, given)) == pytest.approx(want, rel=1e-4)

@pytest.mark.parametrize('term', NAIVE, ids=lambda t: t.__name__)
def test_a_term_is_zero_for_the_teacher_itself_turned_and_scaled(term):
    torch.manual_seed(0)
    h = torch.randn(6, 5)
    turned = 3*h @ torch.linalg.qr(torch.randn(5, 5))[0]
    assert float(term().loss(turned, [h])) == pytest.approx(0., abs=1e-5)

@pytest.mark.parametrize('term', NAIVE, ids=lambda t: t.__name__)
def test_the_gradients_of_two_images_that_are_the_same_are_finite(term):
    "Their distance is zero"
    torch.manual_seed(0)
    student = torch.randn(6, 5)
    student[3] = student[2]
    student.requires_grad_()
    term().loss(student, [torch.randn(6, 4)]).backward()
    assert torch.isfinite(student.grad).all() and student.grad.abs().sum() > 0

@pytest.mark.parametrize('setting, term', [('rkd_weight', RelationalKD), ('similarity_weight', SimilarityPreserving)])
def test_a_weight_adds_the_term_to_stage_two(data, setting, term):
    "Its value is shown without the weight, and the loss has it with the weight"
    teacher = like_data(create_backbone('convnet4', 0, 16, 5), data)
    losses = []
    for weight in (0., 3.):
        learn = stage_two_learner(data, teacher, net(1), cbs=Grab(), keep_best=False, **{setting:weight})
        fit(learn)
        losses.append(learn.grab.losses[0])
        shown = dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1], strict=False))
    x = learn.grab.x[0].as_subclass(torch.Tensor)
    with torch.no_grad(): value = float(term().loss(net(1).train()(x), [teacher.eval()(x)]))
    assert losses[1] - losses[0] == pytest.approx(3*value, rel=1e-3) and shown[term.parts[0]] > 0
