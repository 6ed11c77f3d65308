"""Other terms of distillation: each by loops over the images, alone and beside the relatedness, with one teacher and with two."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import Grab, fit, like_data, net, stage_two_learner
from torch import nn

from grdd_fastai.core.errors import UserError
from grdd_fastai.data.blocks import plain_dl
from grdd_fastai.distillation import Distill
from grdd_fastai.fewshot.embed import embed
from grdd_fastai.models.create import create_backbone
from grdd_fastai.stage_two import StageTwo, stage_two
from grdd_fastai.terms import (
    DIST,
    ContrastiveKD,
    DecoupledKD,
    DistillationTerm,
    FeatureRegression,
    LogitKD,
    RelationalKD,
    SimilarityPreserving,
)


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


# ---- terms with layers of their own -----------------------------------------------------------------------------------

def test_feature_regression_by_loops():
    "Each of two teachers has its own linear map; the loss is zero if each map gives its teacher's features, at any length"
    torch.manual_seed(0)
    student,*teachers = (torch.randn(7, d) for d in (5, 9, 4))
    term = FeatureRegression()
    term.own_layers = term.make_layers(5, [9, 4], 3)
    def angle(a, b): return 2 - 2*float(a @ b / (a.norm()*b.norm()))
    want = sum(angle(layer.weight @ h + layer.bias, teacher[i]) for layer,teacher in zip(term.own_layers, teachers, strict=True)
               for i,h in enumerate(student)) / (2*len(student))
    assert float(term.loss(student, teachers)) == pytest.approx(want, rel=1e-5)
    assert float(term.loss(student, [3*layer(student) for layer in term.own_layers])) == pytest.approx(0., abs=1e-6)

def test_contrast_by_loops():
    "InfoNCE of an image at a time, for each of two teachers with layers of its own"
    torch.manual_seed(0)
    student,*teachers = (torch.randn(7, d) for d in (5, 9, 4))
    term = ContrastiveKD(T=.3, size=6)
    term.own_layers = term.make_layers(5, [9, 4], 3)
    total = 0.
    for (mine,its),h in zip(term.own_layers, teachers, strict=True):
        a,b = [mine.weight @ x + mine.bias for x in student],[its.weight @ x + its.bias for x in h]
        for i in range(7):
            like = [np.exp(float(F.cosine_similarity(a[i], b[j], dim=0))/.3) for j in range(7)]
            total -= np.log(like[i]/sum(like))
    assert float(term.loss(student, teachers)) == pytest.approx(total/14, rel=1e-5)

def test_contrast_trains_the_layers_of_both_sides(data):
    teacher = like_data(create_backbone('convnet4', 0, 16, 5), data)
    learn = fit(stage_two_learner(data, teacher, net(1), cbs=Grab(), keep_best=False, kl_weight=0., gamma=0., T=.2, crd_weight=3.))
    x,before = learn.grab.x[0].as_subclass(torch.Tensor),learn.grab.weights[0]
    with torch.no_grad(): hs = net(1).train()(x),teacher.eval()(x)
    a,b = (F.linear(h, before[f'heads.contrastive_kd.0.{i}.weight'], before[f'heads.contrastive_kd.0.{i}.bias']) for i,h in enumerate(hs))
    z = F.normalize(a, dim=1) @ F.normalize(b, dim=1).T / .2
    assert learn.grab.losses[0] == pytest.approx(3*float(F.cross_entropy(z, torch.arange(len(x)))), rel=1e-3)
    assert all(not torch.equal(v, learn.model.state_dict()[k]) for k,v in before.items() if k.startswith('heads.') and 'bias' not in k)

def naive_kd(z_e, z_g, y):
    p,q = z_g.softmax(1),z_e.softmax(1)
    return float((p*(p.log() - q.log())).sum(1).mean())

def naive_dist(z_e, z_g, y):
    p,q = z_e.softmax(1).numpy(),z_g.softmax(1).numpy()
    rows = [np.corrcoef(p[i], q[i])[0, 1] for i in range(len(p))]
    columns = [np.corrcoef(p[:, c], q[:, c])[0, 1] for c in range(p.shape[1])]
    return 2 - np.mean(rows) - np.mean(columns)

def naive_dkd(z_e, z_g, y):
    "The loss is computed image by image from two distributions: (target, any other class), and the other classes among themselves"
    total = 0.
    for e,g,c in zip(z_e, z_g, y.tolist(), strict=True):
        p,q = g.softmax(0),e.softmax(0)
        pt,qt = float(p[c]),float(q[c])
        total += pt*np.log(pt/qt) + (1 - pt)*np.log((1 - pt)/(1 - qt))
        rest = [i for i in range(len(e)) if i != c]
        total += 8*sum(float(p[i])/(1 - pt)*np.log(float(p[i])/(1 - pt)*(1 - qt)/float(q[i])) for i in rest)
    return total / len(z_e)

OF_CLASSES = {LogitKD:naive_kd, DIST:naive_dist, DecoupledKD:naive_dkd}

@pytest.mark.parametrize('term', OF_CLASSES, ids=lambda t: t.__name__)
def test_a_term_of_the_classes_by_loops(term):
    torch.manual_seed(0)
    z_e,z_g,y = torch.randn(7, 4).double(),torch.randn(7, 4).double(),torch.tensor([0, 1, 2, 3, 3, 0, 2])
    assert float(term().of_logits(z_e, z_g, y)) == pytest.approx(OF_CLASSES[term](z_e, z_g, y), rel=1e-6)
    assert float(term().of_logits(z_g, z_g, y)) == pytest.approx(0., abs=1e-6)

def test_dkd_takes_logit_distillation_apart():
    "By Eq. 7 of DKD, L_kd of an image is the KL of (target, other classes) plus 1 - p(target) times the KL among the other classes"
    torch.manual_seed(0)
    for c in range(4):
        z_e,z_g,y = torch.randn(1, 4).double(),torch.randn(1, 4).double(),torch.tensor([c])
        doubt = 1 - float(z_g.softmax(1)[0, c])
        assert float(DecoupledKD(beta=doubt).of_logits(z_e, z_g, y)) == pytest.approx(float(LogitKD().of_logits(z_e, z_g, y)))

@pytest.mark.parametrize('setting, term', [('kd_weight', LogitKD), ('dkd_weight', DecoupledKD), ('dist_weight', DIST),
                                           ('regression_weight', FeatureRegression)])
def test_a_term_with_layers_trains_them_beside_the_student(data, setting, term):
    "The first step's loss by hand: the teacher's logits come from its mean features of the base classes, the student's from its new layer"
    teacher = like_data(create_backbone('convnet4', 0, 16, 5), data)
    learn = stage_two_learner(data, teacher, net(1), cbs=Grab(), keep_best=False, kl_weight=0., gamma=0., T=.2, **{setting:3.})
    fit(learn)
    name = next(iter(learn.model.heads))
    x,before = learn.grab.x[0].as_subclass(torch.Tensor),learn.grab.weights[0]
    with torch.no_grad(): h_e,h_g = net(1).train()(x),teacher.eval()(x)
    if term is FeatureRegression:
        mine = F.linear(h_e, before[f'heads.{name}.0.weight'], before[f'heads.{name}.0.bias'])
        want = float((F.normalize(mine, dim=1) - F.normalize(h_g, dim=1)).square().sum(1).mean())
    else:
        h,y = embed(teacher, plain_dl(data, 'train'))
        means = torch.stack([F.normalize(h[y == c], dim=1).mean(0) for c in range(6)])
        z_e,z_g = (F.normalize(a, dim=1) @ F.normalize(b, dim=1).T / .2 for a,b in ((h_e, before[f'heads.{name}.weight']), (h_g, means)))
        dls = learn.dls
        dls.train.epoch = 0
        labels = torch.as_tensor(np.asarray(data.train.y)[np.asarray(dls.train.get_idxs())[:len(x)]])
        want = float(term().of_logits(z_e, z_g, labels))
    assert learn.grab.losses[0] == pytest.approx(3*want, rel=1e-3)
    after = learn.model.state_dict()
    changed = {k.split('.')[0] for k,v in before.items() if not torch.equal(v, after[k])}
    assert changed == {'backbone', 'heads'}

def test_a_term_of_ones_own_may_train_layers(data):
    "The term is given as a callback, and the student starts from the same weights as without it"
    class Own(DistillationTerm):
        parts = ('L_own',)
        def make_layers(self, n_features, of_teachers, n_classes): return nn.Linear(n_features, of_teachers[0] + n_classes)
        def loss(self, student, teachers): return self.own_layers(student).square().mean()
    teacher = like_data(create_backbone('convnet4', 0, 16, 5), data)
    learn = stage_two_learner(data, teacher, net(1), cbs=Own(2.), keep_best=False)
    assert learn.model.heads['own'].weight.shape == (64 + 6, 64)
    for a,b in zip(learn.model.backbone.state_dict().values(), net(1).state_dict().values(), strict=True): assert torch.equal(a, b)
    fit(learn)
    assert learn.recorder.values[-1][list(learn.recorder.metric_names[1:]).index('L_own')] > 0

def test_layers_need_the_teachers_features(data):
    teacher = like_data(create_backbone('convnet4', 6, 16, 5), data)
    learn = stage_two_learner(data, teacher, net(1), kd_weight=1., teacher_output='logits')
    with pytest.raises(UserError, match="LogitKD compares features: give teacher_output='features'"): fit(learn)

def test_a_term_with_layers_is_given_when_the_learner_is_made(data):
    "It may be an instance or a class. A fit is too late: the model has no place for the layers, and an error says so"
    class Own(DistillationTerm):
        parts = ('L_own',)
        def make_layers(self, n_features, of_teachers, n_classes): return nn.Linear(n_features, 1)
        def loss(self, student, teachers): return self.own_layers(student).square().mean()
    teacher = like_data(create_backbone('convnet4', 0, 16, 5), data)
    fit(stage_two_learner(data, teacher, net(1), cbs=Own))
    with pytest.raises(UserError, match=r'Own trains layers of its own: give it when the Learner is made, meta_learner\(\.\.\., cbs=\)'):
        fit(stage_two_learner(data, teacher, net(1)), cbs=Own())

def test_a_student_with_layers_starts_and_teaches_another_as_its_network_does(data):
    first = fit(stage_two_learner(data, like_data(create_backbone('convnet4', 0, 16, 5), data), net(1), kd_weight=1.))
    a,b = (fit(stage_two_learner(data, given, given, cbs=Grab())) for given in (first.model, first.model.backbone))
    assert a.grab.losses == b.grab.losses and a.model.state_dict().keys() == b.model.state_dict().keys()

def test_the_means_of_the_classes_are_those_of_the_features_that_are_known(data):
    "They are of clean images, known or embedded, or of the first view; all terms share them"
    teacher = like_data(create_backbone('convnet4', 0, 16, 5), data)
    h,y = embed(teacher, plain_dl(data, 'train'))
    want = torch.stack([F.normalize(F.normalize(h[y == c], dim=1).mean(0), dim=0) for c in range(6)])
    for how in (dict(), dict(teacher_view='clean'), dict(teacher_view='clean', teacher_features=h)):
        learn = fit(stage_two_learner(data, teacher, net(1), kd_weight=1., dist_weight=1., **how))
        assert torch.allclose(learn.logit_kd.means[0], want, atol=1e-4) and learn.logit_kd.means is learn.dist.means
    two = StageTwo(n_way=3, n_query=2, n_episodes=2, epochs=1, distill=Distill(kd_weight=1., teacher_view='views', views=3))
    learn,fit_it = stage_two(data, two, net(1), teacher, amp=False)
    with learn.no_bar(), learn.no_logging(): fit_it(learn)
    first = torch.from_numpy(np.asarray(learn.teacher.known[0].arrays[0], np.float32))
    want = torch.stack([F.normalize(F.normalize(first[y == c], dim=1).mean(0), dim=0) for c in range(6)])
    assert torch.allclose(learn.logit_kd.means[0], want, atol=1e-4)
