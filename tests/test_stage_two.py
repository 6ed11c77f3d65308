"""Stage two: the loss of a step done again by hand, the teacher left as it was, and settings that cannot be."""
import copy

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from helpers import Grab, fit, like_data, net, same_state, stage_two_learner
from naive import naive_stage_two_loss

from grdd_fastai.core.errors import UserError
from grdd_fastai.data.blocks import category_dls, episodic_dls, plain_dl
from grdd_fastai.data.cache import few_shot_data
from grdd_fastai.fewshot.embed import embed
from grdd_fastai.models.create import create_backbone
from grdd_fastai.stage_two import PRESETS, meta_learner, stage_two


@pytest.mark.parametrize('settings', [dict(), dict(T=4., gamma=.2, kl_weight=1., reduction='sum', teacher_view='clean'),
                                      dict(T=.1, decouple=False), dict(T=2., reverse=True, T_squared=True, mean=False, reduction='sum'),
                                      dict(T=.5, gamma=0., kl_weight=3., reduction='mean', teacher_view='same'),
                                      dict(teacher_output='logits'), dict(teacher_output='probabilities', teacher_view='same')])
def test_a_stage_two_loss_is_equations_10_to_15(data, settings):
    "Loss of each step from the networks' features by loops; clean views are looked up in the packed images"
    features = settings.get('teacher_output', 'features') == 'features'
    teacher = like_data(net(5) if features else create_backbone('convnet4', 7, 16, 5), data)
    learn = stage_two_learner(data, teacher, episodes_per_step=2, n_episodes=4, aug='default', cbs=Grab(), keep_best=False,
                      **settings)
    fit(learn, 1, 1e-2)
    s,(way,shot,query) = {**dict(T=.1, gamma=1., decouple=True, kl_weight=5., T_squared=False, reverse=False, reduction='mean',
                                 teacher_view='same', teacher_output='features', mean=True), **settings},(3, 2, 4)
    dl = episodic_dls(data, way, shot, query, 4, 2).train
    dl.epoch = 0
    rows,mean,std = np.array(dl.get_idxs()).reshape(2, -1),*(torch.tensor(v).view(3, 1, 1) for v in data.stats)
    for step,x in enumerate(learn.grab.x):
        student = net(1).train()
        student.load_state_dict(learn.grab.weights[step])
        clean = (torch.tensor(data.train.images[rows[step]]).permute(0, 3, 1, 2)/255 - mean)/std
        with torch.no_grad(): h_e,h_g = student(x),teacher.eval()(clean if s['teacher_view'] == 'clean' else x)
        want = naive_stage_two_loss(h_e, h_g, way, shot, query, **{k:v for k,v in s.items() if k != 'teacher_view'})
        assert learn.grab.losses[step] == pytest.approx(want, rel=2e-3, abs=1e-5)

def test_episodic_labels_alone_is_el(data):
    learn = fit(stage_two_learner(data, cbs=Grab()))
    assert list(learn.recorder.metric_names[1:4]) == ['train_loss','valid_loss','accuracy'] and not hasattr(learn, 'teacher')

def test_teacher_is_frozen_outside_the_optimiser_and_given_back_as_it_was(data):
    teacher,student = net(5).train(),net(1)
    before,start = copy.deepcopy(teacher.state_dict()),copy.deepcopy(student.state_dict())
    learn = stage_two_learner(data, teacher, student, teacher_view='same')
    seen = []
    class Look(Callback):
        def after_loss(self): seen.append((teacher.training, any(p.requires_grad for p in teacher.parameters())))
    fit(learn, 2, .01, cbs=Look())
    assert set(seen) == {(False, False)}
    assert teacher.training and all(p.requires_grad and p.grad is None for p in teacher.parameters())
    assert same_state(before, teacher.state_dict()) and same_state(start, student.state_dict()) # the student given is copied
    mine = {id(p) for g in learn.opt.opt.param_groups for p in g['params']}
    assert not mine & {id(p) for p in teacher.parameters()} and not same_state(start, learn.model.state_dict())

def test_teacher_and_student_may_be_any_timm_model(data):
    learn = stage_two_learner(data, create_backbone('mobilenetv3_small_050', 5, 16), 'resnet10t')
    assert fit(learn).recorder.values[-1][-1] >= 0

def test_stage_two_fits_one_cycle(data): fit(stage_two_learner(data, net(5)), 1, 1e-2, 'fit_one_cycle')

def test_the_teachers_features_follow_the_data(data, csv_set, cache):
    learn = fit(stage_two_learner(data, net(5), teacher_view='clean'))
    old = learn.teacher.known[0].clone()
    learn.dls = episodic_dls(few_shot_data(csv_set, px=24, cache=cache), 3, 2, 4, 2, aug=None)
    assert not torch.equal(fit(learn).teacher.known[0], old)

def test_features_that_are_known_change_nothing(data):
    "The teacher's features handed over, or embedded by the callback: the same losses"
    s = PRESETS['paper'].but(n_way=3, n_query=4, n_episodes=2, epochs=1)
    teacher,losses = like_data(create_backbone('convnet4_128', 0, 16, 1), data),[]
    for known in (None, embed(teacher, plain_dl(data, 'train'))[0]):
        learn,fit = stage_two(data, s, create_backbone('convnet4', 0, 16), teacher, known)
        with learn.no_bar(), learn.no_logging(): fit(learn)
        losses.append(learn.recorder.values[-1][0])
    assert losses[0] == losses[1]
    learn,fit = stage_two(data, s, create_backbone('convnet4', 0, 16), teacher, known[:5])
    with pytest.raises(ValueError, match='have 5 rows for 120 base images'), learn.no_bar(): fit(learn)

def test_from_random_weights_the_student_is_its_architecture_alone(data):
    s = PRESETS['best'].but(n_way=3, n_query=4, n_episodes=2, epochs=1, init='random', seed=3)
    learn,_ = stage_two(data, s, net(7), net(5))
    assert same_state(learn.model.state_dict(), create_backbone('convnet4', 0, 16, 3).state_dict())

def test_an_unknown_keyword_is_an_error(data):
    with pytest.raises(TypeError, match='decuple'): stage_two_learner(data, net(5), decuple=True)


# ---- what cannot be ---------------------------------------------------------------------------------------------------

def test_stage_two_refuses_ordinary_batches(data):
    with pytest.raises(ValueError, match='episodic_dls'): meta_learner(category_dls(data), 'convnet4')

def test_a_teacher_without_classifier_has_no_predictions(data):
    with pytest.raises(ValueError, match='needs a teacher with its classifier'):
        stage_two_learner(data, net(5), teacher_output='logits')
    with pytest.raises(ValueError, match='teacher_output is'): stage_two_learner(data, net(5), teacher_output='softmax')

@pytest.mark.parametrize('settings, says', [
    (dict(T=-1.), 'T is -1.0: it must be positive'), (dict(T=float('nan')), 'T is nan'), (dict(gamma=-1.), 'gamma is -1.0'),
    (dict(scale=0.), 'scale is 0.0'), (dict(kl_weight=-1.), 'kl_weight is -1.0'),
    (dict(reduction='max'), "reduction is 'max'")])
def test_settings_of_stage_two_that_cannot_be(data, settings, says):
    with pytest.raises(UserError, match=says): stage_two_learner(data, net(5), **settings)
