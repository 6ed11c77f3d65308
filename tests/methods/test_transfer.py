"""What other transfer methods add to stage one: each step by hand, from the formulas of the papers and their official code."""
import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import Grab, fit, says, stage_one_learner

from grdd_fastai.data.blocks import category_dls
from grdd_fastai.methods.transfer import BornAgain, InvariantEquivariant, ManifoldMixup, RotationInvariance, TeacherLogits, distillation_kl
from grdd_fastai.models.create import create_backbone


@pytest.fixture
def teacher(): return create_backbone('convnet4', 6, 16, seed=7)

def labels(data): return next(iter(category_dls(data, bs=60, aug=None).train))[1].as_subclass(torch.Tensor)

def official_kl(student, teacher, T):
    "DistillKL of the official code of RFS and SKD, image by image"
    total = 0.
    for s,t in zip(student, teacher):
        p,q = (t/T).exp()/(t/T).exp().sum(),(s/T).exp()/(s/T).exp().sum()
        total += sum(float(a)*(float(a.log()) - float(b.log())) for a,b in zip(p, q))
    return total*T**2/len(student)

def test_the_divergence_is_that_of_the_official_code():
    g = torch.Generator().manual_seed(0)
    student,teacher = (3*torch.randn(5, 7, generator=g) for _ in range(2))
    for T in (1., 4.): assert float(distillation_kl(student, teacher, T)) == pytest.approx(official_kl(student, teacher, T), rel=1e-4)

def test_a_born_again_step_by_hand(data, teacher):
    was = {k:v.clone() for k,v in teacher.state_dict().items()}
    learn = stage_one_learner(data, rotation=False, keep_best=False, cbs=[TeacherLogits(teacher), BornAgain(.25, .75, T=3.), Grab()])
    ref = copy.deepcopy(learn.model).train()
    fit(learn, 1, .05)
    x = learn.grab.x[0]
    with torch.no_grad(): p,t = ref(x),teacher.eval()(x)
    want = .75*float(F.cross_entropy(p, labels(data))) + .25*official_kl(p, t, 3.)
    assert learn.grab.losses[0] == pytest.approx(want, rel=1e-4)
    assert all(torch.equal(v, teacher.state_dict()[k]) for k,v in was.items()) # it learns nothing, and counts no batch
    assert all(p.requires_grad for p in teacher.parameters())

def test_a_step_of_the_second_generation_by_hand(data, teacher):
    "No label is used; the distance of the logits is that of the official code, as a mean over three angles in place of one"
    def same(pred, y): return float(len(pred) == len(y) == 60)
    cbs = [TeacherLogits(teacher), RotationInvariance(.3, T=2.), Grab()]
    learn = stage_one_learner(data, rotation=False, keep_best=False, cbs=cbs, metrics=same)
    ref = copy.deepcopy(learn.model).train()
    fit(learn, 1, .05)
    x = learn.grab.x[0][:60] # the first quarter is upright
    assert dict(zip(learn.recorder.metric_names, learn.recorder.log))['train_same'] == 1. # metrics see the batch's own images
    with torch.no_grad():
        p = ref(torch.cat([torch.rot90(x, k, (2, 3)) for k in range(4)]))
        t = teacher.eval()(x)
    distances = [sum(float((a - b).square().sum().sqrt()) for a,b in zip(p[60*k:60*k + 60], p[:60]))/60 for k in (1, 2, 3)]
    assert learn.grab.losses[0] == pytest.approx(official_kl(p[:60], t, 2.) + .3*sum(distances)/3, rel=1e-4)

@pytest.mark.parametrize('place', range(5))
def test_a_step_of_manifold_mixup_by_hand(data, place, monkeypatch):
    "The images (place 0) or the maps after a stage are mixed, and the losses with the same share"
    learn = stage_one_learner(data, rotation=False, keep_best=False, cbs=[ManifoldMixup(), Grab()])
    mix,before = learn.manifold_mixup,ManifoldMixup.before_batch
    def at_place(self):
        before(self)
        if self.chosen == 0: self.learn.xb = self.plain
        self.chosen = place
        if place == 0: self.learn.xb = self.mixed(self.xb[0]),
        if self.iter == 0: seen.append((self.share, self.other.clone(), self.plain[0].clone()))
    seen = []
    monkeypatch.setattr(ManifoldMixup, 'before_batch', at_place)
    ref = copy.deepcopy(learn.model).train()
    fit(learn, 1, .05)
    share,other,h = seen[0]
    net = ref.backbone
    with torch.no_grad():
        for i in range(5):
            if i == place: h = share*h + (1 - share)*h[other]
            if i < 4: h = net.stages[i](h)
        p = net.get_classifier()(net.forward_head(h, pre_logits=True))
    y = labels(data)
    want = share*float(F.cross_entropy(p, y)) + (1 - share)*float(F.cross_entropy(p, y[other]))
    assert learn.grab.losses[0] == pytest.approx(want, rel=1e-4) and 0 < share < 1 and mix.chosen is None
    assert not any(m._forward_hooks for m in learn.model.modules())

def test_a_step_of_ier_by_hand(data):
    "The loss image by image: the class, the angle, and the official contrast of each rotated image with the upright ones"
    def same(pred, y): return float(len(pred) == len(y) == 60)
    learn = stage_one_learner(data, rotation=False, keep_best=False, cbs=[InvariantEquivariant(.7, T=.5), Grab()], metrics=same)
    ref = copy.deepcopy(learn.model).train()
    fit(learn, 1, .05)
    assert dict(zip(learn.recorder.metric_names, learn.recorder.log))['train_same'] == 1.
    x,y = learn.grab.x[0][:60],labels(data)
    with torch.no_grad():
        turned = torch.cat([torch.rot90(x, k, (2, 3)) for k in range(4)])
        h = ref.backbone.forward_head(ref.backbone.forward_features(turned), pre_logits=True)
        p,heads = ref.backbone.get_classifier()(h),ref.heads['invariant_equivariant']
        r,z = heads['equivariant'](h),F.normalize(heads['invariant'](h), dim=1)
    L_ce = sum(-float(p[i].log_softmax(0)[y[i % 60]]) for i in range(240))/240
    L_eq = sum(-float(r[i].log_softmax(0)[i//60]) for i in range(240))/240
    L_inv = 0.
    for i in range(60, 240):
        like = [float(z[i] @ z[j]/.5) for j in range(60)]
        L_inv -= like[i % 60] - float(torch.tensor(like).logsumexp(0))
    assert learn.grab.losses[0] == pytest.approx(L_ce + .7*(L_eq + L_inv/180), rel=1e-4)
    heads = {id(q) for q in learn.splitter(learn.model)[1]}
    assert all(id(q) in heads for q in learn.model.heads.parameters()) # they are trained, and as heads
    assert not torch.equal(learn.model.heads['invariant_equivariant']['equivariant'][0].weight,
                           learn.grab.weights[0]['heads.invariant_equivariant.equivariant.0.weight'])
    assert not any(m._forward_pre_hooks for m in learn.model.modules())

def test_accuracy_is_measured_without_mixing(data):
    learn = stage_one_learner(data, rotation=False, keep_best=False, cbs=ManifoldMixup())
    fit(learn, 1, .05)
    assert learn.recorder.values[-1][-1] == pytest.approx(learn.validate()[0])

def test_what_cannot_be_is_a_sentence(data):
    says(lambda: TeacherLogits(create_backbone('convnet4', 0, 16)), 'classifier')
    says(lambda: TeacherLogits('rfs'), 'classifier')
    learn = stage_one_learner(data, rotation=False, cbs=ManifoldMixup())
    learn.model.backbone.feature_info = []
    says(lambda: fit(learn), 'feature_info')
    says(lambda: fit(stage_one_learner(data, rotation=False), cbs=InvariantEquivariant()), 'global_learner(..., cbs=)')
