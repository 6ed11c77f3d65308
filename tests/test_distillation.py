"""The teachers and the terms that distil them: against losses computed by hand on the collected batches."""
import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.learner import load_learner
from helpers import like_data

from grdd_fastai.core.errors import UserError
from grdd_fastai.data.augment import BatchAugmentation
from grdd_fastai.data.blocks import category_dls, episodic_dls
from grdd_fastai.distillation import RelatednessKL, Teacher
from grdd_fastai.fewshot.embed import ViewFeatures, view_features
from grdd_fastai.losses import kl_relatedness, relatedness
from grdd_fastai.models.create import create_backbone
from grdd_fastai.stage_one import StageOne, global_learner
from grdd_fastai.stage_two import StageTwo, check_teacher, known_features, meta_learner
from grdd_fastai.terms import DistillationTerm


class Collect(Callback):
    "Keep each step's images, the student's features and the loss"
    order,run_valid = 100,False
    def before_fit(self): self.steps = []
    def after_loss(self): self.steps.append((self.xb[0].clone(), self.pred.detach().clone(), float(self.learn.loss)))


def teacher(data, arch='convnet4', seed=1, **kwargs): return like_data(create_backbone(arch, 0, 16, seed, **kwargs), data)

def fitted(data, teachers, cbs=None, **kwargs):
    "The Learner after two episodes, and what each step of it saw"
    dls = episodic_dls(data, 3, 1, 4, n_episodes=2)
    collect = Collect()
    learn = meta_learner(dls, create_backbone('convnet4', 0, 16, 0), teachers, cbs=[collect, *(cbs or [])], amp=False, keep_best=False,
                         valid=dict(n_way=3, n_query=4, n_episodes=5), **kwargs)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    return learn,collect.steps

def split(h): # one episode of 3-way 1-shot with 4 queries
    h = h.unflatten(0, (3, 5))
    return h[None, :, 0],h[None, :, 1:].flatten(1, 2)


def test_the_relatedness_of_several_teachers_is_the_mean_of_theirs(data):
    teachers = [teacher(data, seed=1), teacher(data, 'convnet4_128', seed=2)]
    learn,steps = fitted(data, teachers, gamma=0., T=.3, kl_weight=2.)
    for x,pred,loss in steps:
        with torch.no_grad(): R = [relatedness(*split(net.eval()(x.as_subclass(torch.Tensor)))) for net in teachers]
        want = 2*kl_relatedness(relatedness(*split(pred)), (R[0] + R[1])/2, .3, reduction='mean')
        assert loss == pytest.approx(float(want), rel=1e-4)
    alone = fitted(data, teachers[:1], gamma=0.)[1][0][2]
    assert alone != pytest.approx(fitted(data, teachers, gamma=0.)[1][0][2], rel=1e-3)

@pytest.mark.parametrize('settings', [dict(), dict(decouple=False, T=.3), dict(reverse=True), dict(center=True, reduction='sum')])
def test_all_pairs_are_each_image_with_every_other_one(data, settings):
    "By loops over the images; and the diagonal, an image with itself, is left out"
    net = teacher(data)
    _,steps = fitted(data, net, gamma=0., kl_weight=2., pairs='all', **settings)
    s = dict(T=.1, decouple=True, reverse=False, reduction='mean', center=False) | settings
    def groups(h):
        if s['center']: h = h - h.mean(0)
        R = [[float(F.cosine_similarity(h[i], h[j], dim=0))/s['T'] for j in range(len(h)) if j != i] for i in range(len(h))]
        return torch.tensor(R if s['decouple'] else [sum(R, [])]).log_softmax(1)
    for x,pred,loss in steps:
        with torch.no_grad(): log_g,log_e = groups(net.eval()(x.as_subclass(torch.Tensor))),groups(pred)
        p,q = (log_e, log_g) if s['reverse'] else (log_g, log_e)
        kl = [float(sum(a.exp()*(a - b))) for a,b in zip(p, q, strict=True)]
        assert loss == pytest.approx(2*(sum(kl) / (len(kl) if s['reduction'] == 'mean' else 1)), rel=1e-3)

def test_known_views_teach_what_the_teacher_would_on_the_batch(data, tmp_path):
    "The loss of each step against one of the teacher's forward pass on the very images that the student saw"
    net = teacher(data)
    known = view_features(net, data, 2, cache=tmp_path, amp=False)
    dls = episodic_dls(data, 3, 1, 4, n_episodes=4, views=2)
    collect = Collect()
    learn = meta_learner(dls, create_backbone('convnet4', 0, 16, 0), net, teacher_view='views', teacher_features=known, gamma=0.,
                         T=.3, cbs=collect, amp=False, keep_best=False, valid=dict(n_way=3, n_query=4, n_episodes=5))
    with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-3)
    losses = []
    for x,pred,loss in collect.steps:
        with torch.no_grad(): h = net.eval()(x.as_subclass(torch.Tensor))
        want = 5*kl_relatedness(relatedness(*split(pred)), relatedness(*split(h)), .3, reduction='mean')
        assert loss == pytest.approx(float(want), rel=2e-2)
        losses.append(loss)
    assert len(losses) == 8

@pytest.mark.parametrize('change, sentence', [
    (dict(views=3), "the teacher's features are of 2 augmented views and the loader gives 3: make dls with episodic_dls(..., views=2)"),
    (dict(views=None), "the teacher's features are of 2 augmented views and the loader gives others"),
    (dict(aug=None), "the teacher's features are of 2 augmented views and the loader gives 2"),
    (dict(known=None), "teacher_view='views' needs the teacher's features: give teacher_features=known_features(...)"),
    (dict(known=torch.zeros(120, 64)), "the teacher's features are not those of views"),
    (dict(view='same'), "the teacher's features are of views: give teacher_view='views' with them"),
    (dict(known=ViewFeatures([np.zeros((7, 64), np.float16)]*2)), "the teacher's features have 7 rows for 120 base images")])
def test_views_that_do_not_fit_are_one_sentence(data, change, sentence):
    given = dict(views=2, aug='default', view='views', known=ViewFeatures([np.zeros((120, 64), np.float16)]*2)) | change
    dls = episodic_dls(data, 3, 1, 4, n_episodes=2, views=given['views'], aug=given['aug'])
    with pytest.raises(UserError) as e:
        learn = meta_learner(dls, create_backbone('convnet4', 0, 16, 0), teacher(data), teacher_view=given['view'],
                             teacher_features=given['known'], amp=False, valid=dict(n_way=3, n_query=4, n_episodes=5))
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    assert sentence in str(e.value)

@pytest.mark.parametrize('two, sentence', [
    (dict(views=3), "views has no effect with teacher_view='same': leave it out"),
    (dict(teacher_view='views', augment='albumentations'), "teacher_view='views' needs the augmentation of batches: leave out augment=")])
def test_settings_of_views_that_cannot_be_met_are_said_before_anything_is_trained(data, two, sentence):
    with pytest.raises(UserError) as e: check_teacher(StageOne(), StageTwo().but(**two))
    assert sentence in str(e.value)
    with pytest.raises(UserError) as e: known_features(teacher(data), data, StageTwo().but(**two))
    assert sentence in str(e.value)

@pytest.mark.parametrize('change, sentence', [
    (dict(mirror=True), "the teacher's features have mirror=True and teacher_mirror is False: give both the same"),
    (dict(jitter=False), "the teacher's features are of images that were augmented otherwise: make dls with episodic_dls(..., aug=train_")])
def test_views_of_another_kind_are_one_sentence(data, tmp_path, change, sentence):
    net = teacher(data)
    known = view_features(net, data, 2, cache=tmp_path, **change)
    dls = episodic_dls(data, 3, 1, 4, n_episodes=2, views=2)
    learn = meta_learner(dls, create_backbone('convnet4', 0, 16, 0), net, teacher_view='views', teacher_features=known, amp=False,
                         valid=dict(n_way=3, n_query=4, n_episodes=5))
    with pytest.raises(UserError) as e, learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    assert sentence in str(e.value)

def test_known_features_are_those_of_a_teacher_that_wants_other_images(data, tmp_path):
    "By hand: back to [0, 1], normalised as the teacher wants, enlarged; of views, of clean images, of a Learner and of several teachers"
    net = teacher(data)
    mean,std = (.1, .2, .3),(.5, .6, .7)
    net.pretrained_cfg = net.pretrained_cfg | dict(input_size=(3, 24, 24), mean=mean, std=std)
    def by_hand(images): # uint8
        x = (images/255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
        with torch.no_grad(): return net.eval()(F.interpolate(x, (24, 24), mode='bicubic', antialias=True))
    images,rows = torch.tensor(data.train.images).permute(0, 3, 1, 2),np.arange(len(data.train))
    two = StageTwo().but(teacher_view='views', views=2)
    known = known_features(net, data, two, tmp_path, amp=False)
    for v in range(2):
        want = by_hand(BatchAugmentation(2)(images, 0, v, rows))
        assert torch.allclose(known.of(np.full(len(rows), v), rows), want, atol=3e-3*float(want.abs().max()))
    clean = known_features(net, data, StageTwo().but(teacher_view='clean'), tmp_path)
    assert torch.allclose(clean, by_hand(images), atol=1e-3) and net.training is False
    learn = global_learner(category_dls(data), net, rotation=False)
    of_learner,both = known_features(learn, data, two, tmp_path, amp=False),known_features((net, learn), data, two, tmp_path, amp=False)
    assert of_learner.shape == known.shape and [h.shape for h in both] == [known.shape]*2
    assert known_features(net, data, StageTwo()) is None and known_features([net], data, StageTwo()) is None

@pytest.mark.parametrize('view', ['same', 'clean'])
def test_a_mirrored_teacher_has_the_mean_of_both_features(data, view):
    net = teacher(data)
    learn,steps = fitted(data, net, gamma=0., T=.3, kl_weight=2., teacher_view=view, teacher_mirror=True)
    rows = np.array(learn.dls.train.get_idxs()).reshape(2, -1)
    mean,std = (torch.tensor(v).view(3, 1, 1) for v in data.stats)
    for r,(x,pred,loss) in zip(rows, steps, strict=True):
        x = x.as_subclass(torch.Tensor)
        if view == 'clean': x = (torch.tensor(data.train.images[r]).permute(0, 3, 1, 2)/255 - mean)/std
        with torch.no_grad(): h = (net.eval()(x) + net(x.flip(3)))/2
        want = 2*kl_relatedness(relatedness(*split(pred)), relatedness(*split(h)), .3, reduction='mean')
        assert loss == pytest.approx(float(want), rel=1e-3)

def test_a_list_of_one_teacher_is_that_teacher(data):
    a,b = (fitted(data, t)[1] for t in (teacher(data), [teacher(data)]))
    assert [s[2] for s in a] == [s[2] for s in b]

def test_each_teacher_sees_images_of_its_own_size_and_normalisation(data):
    "By hand: back to [0, 1], normalised as the teacher wants, enlarged"
    other = teacher(data)
    mean,std = (.1, .2, .3),(.5, .6, .7)
    other.pretrained_cfg = other.pretrained_cfg | dict(input_size=(3, 24, 24), mean=mean, std=std)
    _,steps = fitted(data, other, gamma=0., kl_weight=1., T=.3)
    column = lambda v: torch.tensor(v).view(1, 3, 1, 1)
    for x,pred,loss in steps:
        x = x.as_subclass(torch.Tensor)*column(data.stats[1]) + column(data.stats[0])
        x = F.interpolate((x - column(mean))/column(std), (24, 24), mode='bicubic', antialias=True)
        with torch.no_grad(): R = relatedness(*split(other.eval()(x)))
        assert loss == pytest.approx(float(kl_relatedness(relatedness(*split(pred)), R, .3, reduction='mean')), rel=1e-3)

def test_a_teacher_that_does_not_say_what_it_wants_sees_the_batch_as_it_is(data):
    plain = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten())
    plain.register_parameter('p', torch.nn.Parameter(torch.zeros(1)))
    _,steps = fitted(data, plain, gamma=0., kl_weight=1., T=.3)
    for x,pred,loss in steps:
        R = relatedness(*split(plain(x.as_subclass(torch.Tensor))))
        assert loss == pytest.approx(float(kl_relatedness(relatedness(*split(pred)), R, .3, reduction='mean')), rel=1e-4)


class FeatureRegression(DistillationTerm):
    "Mean squared difference of normalised features"
    parts = ('L_mse',)
    def loss(self, student, teachers): return F.mse_loss(F.normalize(student, dim=1), F.normalize(teachers[0], dim=1))

def test_a_term_of_ones_own_needs_no_change_of_the_package(data):
    "Given as a callback it is added to the loss and shown"
    net = teacher(data)
    learn,steps = fitted(data, net, cbs=[FeatureRegression(3.)], gamma=0., kl_weight=0.)
    for x,pred,loss in steps:
        with torch.no_grad(): h = net.eval()(x.as_subclass(torch.Tensor))
        assert loss == pytest.approx(3*float(F.mse_loss(F.normalize(pred, dim=1), F.normalize(h, dim=1))), rel=1e-4)
    names = list(learn.recorder.metric_names)
    assert 'L_mse' in names and float(learn.recorder.values[-1][names.index('L_mse') - 1]) > 0

def test_a_term_without_a_teacher_is_one_sentence(data):
    with pytest.raises(UserError, match='FeatureRegression needs a teacher'): fitted(data, None, cbs=[FeatureRegression()])

def test_the_teachers_are_left_as_they_were(data):
    "Mode and flags, one by one, also after an error"
    net = teacher(data).train()
    next(net.parameters()).requires_grad_(False)
    flags,before = [p.requires_grad for p in net.parameters()],copy.deepcopy(net.state_dict())
    fitted(data, net)
    class Fails(DistillationTerm):
        "Fails"
        parts = ('L_x',)
        def loss(self, student, teachers): raise RuntimeError('enough')
    with pytest.raises(RuntimeError, match='enough'): fitted(data, net, cbs=[Fails()])
    assert net.training and [p.requires_grad for p in net.parameters()] == flags
    assert all(torch.equal(v, before[k]) for k,v in net.state_dict().items())

def test_an_exported_learner_is_loaded_again(data, tmp_path):
    learn,_ = fitted(data, teacher(data))
    learn.remove_cb(learn.collect)
    learn.export(tmp_path/'learn.pkl')
    again = load_learner(tmp_path/'learn.pkl')
    assert all(torch.equal(a, b) for a,b in zip(again.model.state_dict().values(), learn.model.state_dict().values()))

def test_the_terms_of_a_batch_ask_the_teacher_once(data, monkeypatch):
    calls,compute = [],Teacher.compute
    monkeypatch.setattr(Teacher, 'compute', lambda self: calls.append(1) or compute(self))
    _,steps = fitted(data, teacher(data), cbs=[FeatureRegression()])
    assert len(calls) == len(steps) == 2

@pytest.mark.parametrize('wrong, says', [
    (dict(T=0), 'T is 0: it must be positive'), (dict(T='x'), "T is 'x'"), (dict(decouple=1), 'decouple is 1: it must be True or False'),
    (dict(reduction='max'), "reduction is 'max': it must be one of mean, sum"), (dict(gamma=-1), 'gamma is -1: it must be at least 0'),
    (dict(teacher_view='dirty'), "teacher_view is 'dirty'"), (dict(teacher_output='h'), "teacher_output is 'h'"),
    (dict(teacher_output='logits'), "teacher_output='logits' needs a teacher with its classifier"),
    (dict(teacher_features=torch.zeros(3, 4)), "the teacher's features are of clean images")])
def test_settings_that_do_not_fit_are_one_sentence(data, wrong, says):
    with pytest.raises(UserError, match=says): fitted(data, teacher(data), **wrong)

def test_a_setting_of_the_distillation_without_a_teacher_is_one_sentence(data):
    with pytest.raises(UserError, match='a setting of the distillation is given without a teacher'): fitted(data, None, T=1.)

def test_the_terms_keywords_are_settings():
    assert RelatednessKL(T=2., T_squared=True, kl_weight=3.).weight == 12. and RelatednessKL().s.T == .1
