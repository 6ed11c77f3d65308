"""Both stages as Learners: what a step trains on, done again by hand; what a fit leaves behind."""
import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.schedule import *  # noqa: F401
from fastai.callback.training import GradientAccumulation, GradientClip
from test_losses import naive_kl, naive_R, naive_softmax

from grdd_fastai.core.device import autocast_dtype
from grdd_fastai.core.errors import UserError
from grdd_fastai.data.blocks import category_dls, episodic_dls, plain_dl
from grdd_fastai.fewshot.embed import embed
from grdd_fastai.fewshot.evaluate import evaluate
from grdd_fastai.models.create import create_backbone
from grdd_fastai.stage_one import global_learner, rotate4
from grdd_fastai.stage_two import RelatednessDistiller, meta_learner
from grdd_fastai.training.callbacks import Autocast
from grdd_fastai.training.schedules import poly, step_down
from grdd_fastai.training.validation import FewShotAccuracy

VALID = dict(n_way=3, k_shot=1, n_query=5, n_episodes=20)

class Grab(Callback):
    "Keep every step's images, loss and the weights it started from"
    run_valid,order = False,1000
    def before_fit(self): self.x,self.losses,self.weights = [],[],[]
    def before_batch(self):
        self.x.append(self.xb[0].clone())
        self.weights.append(copy.deepcopy(self.model.state_dict()))
    def after_batch(self): self.losses.append(self.learn.loss.item())

class Stop(Callback):
    run_valid = False
    def after_batch(self): raise CancelFitException()

def fit(learn, n=1, lr=.05, f='fit', **kwargs):
    with learn.no_bar(), learn.no_logging(): getattr(learn, f)(n, lr, **kwargs)
    return learn

def stage_one(data, aug=None, arch='convnet4', bs=60, **kwargs):
    return global_learner(category_dls(data, bs=bs, aug=aug), arch, valid=VALID, **{**dict(amp=False), **kwargs})

def stage_two(data, teacher=None, student=None, n_episodes=2, per_step=1, aug=None, **kwargs):
    dls = episodic_dls(data, 3, 2, 4, n_episodes, per_step, aug=aug)
    return meta_learner(dls, student or net(1), teacher, valid=VALID, **{**dict(amp=False), **kwargs})

def net(seed, **kwargs): return create_backbone('convnet4', 0, 16, seed, **kwargs)

def same_state(a, b): return all(torch.equal(a[k], b[k]) for k in a)


# ---- stage one --------------------------------------------------------------------------------------------------------

def test_rotate4_turns_each_image_counter_clockwise():
    x = torch.arange(2*1*3*3.).view(2, 1, 3, 3)
    for k,r in enumerate(rotate4(x).chunk(4)):
        for a,b in zip(x, r): assert (np.rot90(a[0].numpy(), k) == b[0].numpy()).all()

@pytest.mark.parametrize('rotation_from', ['logits', 'probabilities'])
def test_a_stage_one_step_is_equations_2_to_9(data, rotation_from):
    "Loss and SGD step with momentum and L2 decay, from the images alone, in plain torch"
    learn = stage_one(data, rotation_from=rotation_from, cbs=Grab(), keep_best=False)
    fit(learn, 1, .05)
    ref,y = stage_one(data, rotation_from=rotation_from).model.train(),[]
    dl = category_dls(data, bs=60, aug=None).train
    y = [b.clone() for _,b in dl]
    opt = torch.optim.SGD(ref.parameters(), .05, momentum=.9, weight_decay=5e-4)
    for step,x in enumerate(learn.grab.x):
        # the callback's images are the rotations of the loader's batch
        images = x.chunk(4)[0]
        x = torch.cat([torch.rot90(images, k, (2, 3)) for k in range(4)])
        h = ref.backbone.forward_head(ref.backbone.forward_features(x), pre_logits=True)
        p = h @ ref.backbone.head.weight.T + ref.backbone.head.bias
        r = F.linear(p.softmax(1) if rotation_from == 'probabilities' else p, ref.rotation_head.weight, ref.rotation_head.bias)
        N = len(images)
        L_c = -sum(p.log_softmax(1)[k*N+i, y[step][i]] for k in range(4) for i in range(N)) / (4*N)
        L_r = -sum(r.log_softmax(1)[k*N+i, k] for k in range(4) for i in range(N)) / (4*N)
        assert learn.grab.losses[step] == pytest.approx((L_c + L_r).item(), rel=1e-4)
        opt.zero_grad()
        (L_c + L_r).backward()
        opt.step()
    for a,b in zip(learn.model.parameters(), ref.parameters()): assert torch.allclose(a, b, atol=2e-4)

def test_a_cosine_classifier_in_stage_one_by_hand(data):
    "Its loss from normalised features and weights; it trains, and the backbone is left without a classifier"
    learn = stage_one(data, rotation=False, classifier='cosine', cbs=Grab(), keep_best=False)
    ref = copy.deepcopy(learn.model).train()
    fit(learn, 1, .05)
    h,(_,y),w = ref.backbone(learn.grab.x[0]),next(iter(category_dls(data, bs=60, aug=None).train)),ref.classifier.weight
    p = torch.stack([torch.stack([10 * (a @ b) / (a.norm() * b.norm()) for b in w]) for a in h])
    assert learn.grab.losses[0] == pytest.approx(F.cross_entropy(p, y.as_subclass(torch.Tensor)).item(), rel=1e-4)
    assert (learn.model.backbone.num_classes == 0 and not torch.equal(w, learn.model.classifier.weight)
            and learn.model.classifier.scale != 10)
    head = learn.splitter(learn.model)[1]
    assert {id(p) for p in head} == {id(p) for p in learn.model.classifier.parameters()}

def without_norm(arch_or_net):
    "A ConvNet-4 whose images do not see each other: accumulated gradients can be those of the whole batch"
    net = create_backbone(arch_or_net, 6, 16) if isinstance(arch_or_net, str) else arch_or_net
    for block in net.stages: block[1] = torch.nn.Identity()
    return net

class Gradients(Callback):
    "The gradient of each optimiser step"
    order,run_valid = 1000,False
    def before_fit(self): self.grads,self.logged = [],[]
    def before_step(self): self.grads.append([p.grad.clone() for p in self.model.parameters()])
    def after_batch(self): self.logged.append(self.learn.loss.item())

@pytest.mark.parametrize('clip', [None, 1e-2])
@pytest.mark.parametrize('stage', ['one', 'two'])
def test_accumulated_gradients_are_those_of_one_large_batch(data, stage, clip):
    "All terms of the loss are scaled alike, and what is logged stays what it is"
    def learner(n, *cbs):
        cbs = [Gradients(), *cbs, *([GradientClip(clip)] if clip else [])]
        if stage == 'one': return stage_one(data, arch=without_norm('convnet4'), bs=120//n, keep_best=False, cbs=cbs)
        return stage_two(data, without_norm(net(2)), without_norm(net(1)), n_episodes=4, per_step=4//n, keep_best=False, cbs=cbs)
    images = 120 if stage == 'one' else 4*3*(2+4)
    whole,parts = fit(learner(1), 1, 1e-6),fit(learner(4, GradientAccumulation(images)), 1, 1e-6)
    assert len(whole.gradients.grads) == len(parts.gradients.grads) == 1
    for a,b in zip(whole.gradients.grads[0], parts.gradients.grads[0]):
        assert a.abs().max() > 0 and torch.allclose(a, b, rtol=1e-3, atol=1e-5*a.abs().max().item())
    assert whole.gradients.logged[0] == pytest.approx(np.mean(parts.gradients.logged), rel=1e-4)
    rows = [dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1])) for learn in (whole, parts)]
    for k in ('L_c', 'L_r') if stage == 'one' else ('L_kl', 'L_rt'): assert rows[0][k] == pytest.approx(rows[1][k], rel=1e-4)

def test_metrics_of_a_rotated_batch_are_of_its_own_images(data):
    seen = []
    def count(pred, y): seen.append((len(pred), len(y))); return 0.
    fit(stage_one(data, metrics=count))
    assert set(seen) == {(60, 60)}

def test_both_losses_are_logged(data):
    learn = fit(stage_one(data, cbs=Grab()))
    row = dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1]))
    assert (list(row) == ['train_loss','L_c','L_r','accuracy','time'][:4]
            and row['L_c'] + row['L_r'] == pytest.approx(np.mean(learn.grab.losses), rel=1e-5))

def test_without_rotation_it_is_plain_cross_entropy(data):
    learn = fit(stage_one(data, rotation=False, cbs=Grab()))
    assert (len(learn.grab.x[0]) == 60 and learn.model.rotation_head is None
            and list(learn.recorder.metric_names[1:3]) == ['train_loss','accuracy'])

def test_accuracy_shown_is_that_of_the_validation_classes(data):
    learn = fit(stage_one(data, keep_best=False))
    h,y = embed(learn.model.backbone, plain_dl(data, 'val'))
    assert learn.recorder.values[-1][-1] == pytest.approx(evaluate(h, y, **VALID).accuracy)

def test_best_epoch_on_validation_is_kept(data):
    learn,states,accs = stage_one(data),[],iter([30., 50., 40.])
    learn.few_shot_accuracy.measure = lambda: SimpleNamespace(accuracy=next(accs))
    class Keep(Callback):
        order = 200
        def after_epoch(self): states.append(copy.deepcopy(self.model.state_dict()))
    fit(learn, 3, .1, cbs=Keep())
    assert (learn.keep_best.best, learn.keep_best.best_epoch) == (50, 1)
    assert same_state(learn.model.state_dict(), states[1]) and not same_state(states[1], states[2])

def test_fit_one_cycle_lr_find_and_freeze_work(data):
    learn = stage_one(data, keep_best=False)
    before = copy.deepcopy(learn.model.state_dict())
    with learn.no_bar(): lr = learn.lr_find(num_it=10, show_plot=False).valley
    assert 0 < lr < 10 and same_state(before, learn.model.state_dict())
    learn.freeze()
    fit(learn, 1, .1, 'fit_one_cycle')
    now = learn.model.state_dict()
    assert torch.equal(before['backbone.stages.0.0.weight'], now['backbone.stages.0.0.weight'])
    assert (not torch.equal(before['backbone.head.weight'], now['backbone.head.weight'])
            and not torch.equal(before['rotation_head.weight'], now['rotation_head.weight']))
    learn.unfreeze()
    fit(learn, 1, .1, 'fit_one_cycle')
    assert not torch.equal(before['backbone.stages.0.0.weight'], learn.model.state_dict()['backbone.stages.0.0.weight'])
    assert max(learn.recorder.lrs) <= .1 and len(set(learn.recorder.lrs)) > 1

# ---- stage two --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('settings', [dict(), dict(T=4., gamma=.2, kl_weight=1., reduction='sum', teacher_view='clean'),
                                      dict(T=.1, decouple=False), dict(T=2., reverse=True, hinton=True, mean=False, reduction='sum'),
                                      dict(T=.5, gamma=0., kl_weight=3., reduction='mean', teacher_view='same'),
                                      dict(teacher_output='logits'), dict(teacher_output='probabilities', teacher_view='same')])
def test_a_stage_two_loss_is_equations_10_to_15(data, settings):
    "Loss of each step from the networks' features by loops; clean views are looked up in the packed images"
    keys = ('decouple','kl_weight','hinton','reverse','reduction','teacher_view','teacher_output')
    teacher = net(5) if settings.get('teacher_output', 'features') == 'features' else create_backbone('convnet4', 7, 16, 5)
    learn = stage_two(data, teacher, per_step=2, n_episodes=4, aug='default', cbs=Grab(), keep_best=False,
                      **{k:v for k,v in settings.items() if k not in keys},
                      distill={k:v for k,v in settings.items() if k in keys})
    fit(learn, 1, 1e-2)
    s,(way,shot,query) = {**dict(T=.1, gamma=1., decouple=True, kl_weight=5., hinton=False, reverse=False, reduction='mean',
                                 teacher_view='same', teacher_output='features', mean=True), **settings},(3, 2, 4)
    dl = episodic_dls(data, way, shot, query, 4, 2).train
    dl.epoch = 0
    rows,mean,std = np.array(dl.get_idxs()).reshape(2, -1),*(torch.tensor(v).view(3, 1, 1) for v in data.stats)
    for step,x in enumerate(learn.grab.x):
        student = net(1).train()
        student.load_state_dict(learn.grab.weights[step])
        clean = (torch.tensor(data.train.images[rows[step]]).permute(0, 3, 1, 2)/255 - mean)/std
        with torch.no_grad(): h_e,h_g = student(x),teacher.eval()(clean if s['teacher_view'] == 'clean' else x)
        if s['teacher_output'] == 'probabilities': h_g = torch.stack([torch.tensor(naive_softmax(z)) for z in h_g.tolist()])
        place = np.arange(len(x)).reshape(2, way, shot+query)
        S,Q = place[..., :shot].reshape(2, -1),place[..., shot:].reshape(2, -1)
        R_e,R_g = (naive_R(h[S], h[Q]) for h in (h_e, h_g))
        L_kl = naive_kl(R_e, R_g, s['T'], s['decouple'], s['reverse']) / (way*shot if s['reduction'] == 'mean' and s['decouple'] else 1)
        ce = []
        for R in R_e:
            for j in range(way*query):
                sigma = [sum(R[c*shot+k][j] for k in range(shot)) / (shot if s['mean'] else 1) for c in range(way)]
                ce.append(-np.log(naive_softmax([10*v for v in sigma])[j//query]))
        want = s['kl_weight']*(s['T']**2 if s['hinton'] else 1)*L_kl + s['gamma']*np.mean(ce)
        assert learn.grab.losses[step] == pytest.approx(want, rel=2e-3, abs=1e-5)

def test_episodic_labels_alone_is_el(data):
    learn = fit(stage_two(data, cbs=Grab()))
    assert list(learn.recorder.metric_names[1:3]) == ['train_loss','accuracy'] and not hasattr(learn, 'relatedness_distiller')

def test_teacher_is_frozen_outside_the_optimiser_and_given_back_as_it_was(data):
    teacher,student = net(5).train(),net(1)
    before,start = copy.deepcopy(teacher.state_dict()),copy.deepcopy(student.state_dict())
    learn = stage_two(data, teacher, student, distill=dict(teacher_view='same'))
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
    learn = stage_two(data, create_backbone('mobilenetv3_small_050', 5, 16), 'resnet10t')
    assert fit(learn).recorder.values[-1][-1] >= 0

def test_stage_two_fits_one_cycle(data): fit(stage_two(data, net(5)), 1, 1e-2, 'fit_one_cycle')

def test_stage_two_refuses_ordinary_batches(data):
    with pytest.raises(ValueError, match='episodic_dls'): meta_learner(category_dls(data), 'convnet4')

# ---- what a fit leaves behind -----------------------------------------------------------------------------------------

@pytest.mark.parametrize('stage', [lambda d: stage_one(d, amp=True), lambda d: stage_two(d, net(5), amp=True)])
@pytest.mark.parametrize('cbs', [None, Stop()])
def test_a_fit_leaves_no_trace(data, stage, cbs):
    learn = stage(data)
    loss_func,metrics,rng = learn.loss_func,list(learn.metrics),torch.get_rng_state()
    fit(learn, 1, cbs=cbs)
    assert learn.loss_func is loss_func and list(learn.metrics) == metrics and torch.equal(rng, torch.get_rng_state())
    assert not learn.model._forward_hooks and not learn.model._forward_pre_hooks and not torch.is_autocast_enabled('cpu')

def test_same_seed_same_weights_whatever_the_callers_random_state(data):
    def run(seed, caller):
        torch.manual_seed(caller)
        return fit(stage_one(data, arch='resnet12', seed=seed, aug='default', bs=30, rotation=False), 1).model.state_dict()
    a,b,c = run(0, 1),run(0, 2),run(1, 1)
    assert same_state(a, b) and not same_state(a, c)

def test_a_second_fit_sees_new_augmentations(data):
    learn = stage_one(data, aug='default', cbs=Grab(), keep_best=False, rotation=False)
    fit(learn)
    first = learn.grab.x
    fit(learn)
    assert not torch.equal(first[0].sort(0).values, learn.grab.x[0].sort(0).values)

@pytest.mark.skipif(autocast_dtype(torch.device('cpu')) is None, reason='this CPU does not compute in bfloat16')
def test_autocast_reaches_the_network_and_not_the_loss(data):
    learn,seen = stage_one(data, amp=True),[]
    learn.model.backbone.stages[0][0].register_forward_hook(lambda m, i, o: seen.append(o.dtype))
    class Look(Callback):
        order = Autocast.order+5
        def after_loss(self): seen.append((self.pred.dtype, self.learn.loss_grad.dtype))
    fit(learn, cbs=Look())
    assert torch.bfloat16 in seen and (torch.float32, torch.float32) in seen

def test_learners_use_no_name_of_their_learner_or_model(data):
    "fastai warns where a callback's attribute shadows the Learner's"
    import warnings
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        warnings.filterwarnings('ignore', category=UserWarning, message='.*lr_scheduler.*')
        fit(stage_one(data)), fit(stage_two(data, net(5)))

# ---- schedules, backbones ---------------------------------------------------------------------------------------------

def test_schedules_by_hand(data):
    assert poly(.1)(0) == .1 and poly(.1)(.5) == pytest.approx(.1*.5**.9) and poly(.1)(1) == 0
    assert [step_down(1)(e/15) for e in (0, 9, 10, 14)] == [1, 1, .1, .1]
    learn = stage_two(data, n_episodes=3)
    fit(learn, 3, .01, 'fit_step')
    assert np.allclose(learn.recorder.lrs, [.01]*6 + [.001]*3)
    learn = stage_one(data)
    fit(learn, 2, .05, 'fit_poly')
    assert np.allclose(learn.recorder.lrs, [.05*(1-i/4)**.9 for i in range(4)])

def test_unknown_backbone_is_one_sentence():
    with pytest.raises(UserError, match="unknown backbone 'convnet5'.*convnet4"): create_backbone('convnet5')

def test_backbone_seed():
    assert same_state(net(3).state_dict(), net(3).state_dict()) and not same_state(net(3).state_dict(), net(4).state_dict())

def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match='teacher_view'): RelatednessDistiller(net(0), teacher_view='dirty')

def test_few_shot_accuracy_is_silent_in_lr_find(data):
    learn,calls = stage_one(data),[]
    learn.few_shot_accuracy.measure = lambda: calls.append(1)
    with learn.no_bar(): learn.lr_find(num_it=4, show_plot=False)
    assert not calls and isinstance(learn.few_shot_accuracy, FewShotAccuracy)

# ---- what a review found ----------------------------------------------------------------------------------------------

class Interrupt(Callback):
    run_valid = False
    def after_batch(self): raise KeyboardInterrupt()

@pytest.mark.parametrize('stage', [lambda d, t: stage_one(d, amp=True), lambda d, t: stage_two(d, t, amp=True)])
def test_ctrl_c_leaves_no_trace_either(data, stage):
    teacher = net(5).train()
    learn,rng = stage(data, teacher),torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt): fit(learn, 1, cbs=Interrupt())
    assert not learn.model._forward_hooks and list(learn.metrics) == [] and torch.equal(rng, torch.get_rng_state())
    assert teacher.training and all(p.requires_grad for p in teacher.parameters())
    fit(learn)
    names = list(learn.recorder.metric_names)
    assert len(names) == len(set(names))

def test_validate_is_accuracy_on_the_validation_classes(data):
    learn = stage_one(data)
    h,y = embed(learn.model.backbone, plain_dl(data, 'val'))
    assert learn.validate()[0] == pytest.approx(evaluate(h, y, **VALID).accuracy)

def test_predictions_of_base_images_work(data):
    learn = fit(stage_one(data))
    with learn.no_bar(): p,y = learn.get_preds(dl=learn.dls.train.new(aug=None, shuffle=False, drop_last=False))
    assert p.shape == (120, 6) and torch.allclose(p.sum(1), torch.ones(120), atol=1e-4) and (y.numpy() == data.train.y).all()

def test_training_may_be_wider_than_validation(data):
    learn = meta_learner(episodic_dls(data, 6, 1, 3, 2), net(1), valid=dict(n_query=5, n_episodes=10))
    assert fit(learn).few_shot_accuracy.episodes['n_way'] == 5

def test_impossible_validation_is_an_error_before_training(data):
    learn = meta_learner(episodic_dls(data, 3, 1, 3, 2), net(1), valid=dict(n_way=7), cbs=Grab())
    with pytest.raises(UserError, match='validation set has 6 classes, too few for 7-way'): fit(learn)
    assert 'losses' not in vars(learn.grab)

def test_the_teachers_bank_follows_the_data(data, csv_set, cache):
    from grdd_fastai.data.cache import few_shot_data
    learn = fit(stage_two(data, net(5), distill=dict(teacher_view='clean')))
    old = learn.relatedness_distiller.bank.clone()
    learn.dls = episodic_dls(few_shot_data(csv_set, px=24, cache=cache), 3, 2, 4, 2, aug=None)
    assert not torch.equal(fit(learn).relatedness_distiller.bank, old)

def test_an_error_in_a_callback_stays_one_sentence(data):
    learn = stage_one(data)
    def diverged(): raise UserError('one sentence')
    learn.few_shot_accuracy.measure = diverged
    with pytest.raises(UserError) as e: fit(learn)
    assert str(e.value) == 'one sentence'

def test_the_defaults_are_the_best_readings():
    import inspect

    from grdd_fastai.stage_two import RelatednessDistiller
    from grdd_fastai.stages import DISTILL, READINGS
    learner,distiller = (inspect.signature(f).parameters for f in (meta_learner, RelatednessDistiller))
    assert {k:learner[k].default for k in ('T','gamma','scale','mean')} == {k:READINGS['best'][k] for k in ('T','gamma','scale','mean')}
    assert {k:distiller[k].default for k in ('T','gamma',*DISTILL)} == {k:READINGS['best'][k] for k in ('T','gamma',*DISTILL)}

def test_a_teacher_without_classifier_has_no_predictions(data):
    with pytest.raises(ValueError, match='needs a teacher with its classifier'):
        stage_two(data, net(5), distill=dict(teacher_output='logits'))
    with pytest.raises(ValueError, match='teacher_output is one of'): stage_two(data, net(5), distill=dict(teacher_output='softmax'))

@pytest.mark.parametrize('settings, says', [
    (dict(distill=dict(decuple=True)), "distill has no setting 'decuple': its settings are decouple, kl_weight"),
    (dict(T=-1.), 'the temperature T is -1.0'), (dict(T=float('nan')), 'the temperature T is nan'), (dict(gamma=-1.), 'gamma is -1.0'),
    (dict(scale=0.), 'the logit scale is 0.0'), (dict(distill=dict(kl_weight=-1.)), 'kl_weight is -1.0'),
    (dict(distill=dict(reduction='max')), "reduction is 'max'")])
def test_settings_of_stage_two_that_cannot_be(data, settings, says):
    with pytest.raises(UserError, match=says): stage_two(data, net(5), **settings)

def test_episodes_of_one_class_teach_nothing(data):
    with pytest.raises(UserError, match='an episode of 1 way: it must be a whole number, at least 2'): episodic_dls(data, 1, 1, 3, 2)
