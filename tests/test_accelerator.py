"""What an accelerator is asked to do, without one: no step reads a number from it, sends it one or mixes its tensors with the host's"""
from functools import partial

import numpy as np
import pytest
import torch
from accelerator import DEVICE, accelerator
from fastai.callback.core import Callback, CancelFitException

from grdd_fastai.data.augment import BatchAugmentation
from grdd_fastai.data.loaders import PackedImage
from grdd_fastai.fewshot import evaluate as evaluation
from grdd_fastai.fewshot.classifiers import CLASSIFIERS, get_classifier
from grdd_fastai.models.create import create_backbone
from grdd_fastai.runs.checkpoint import Checkpoint, Deadline, SkipBatches, StopOnNaN
from grdd_fastai.stage_one import StageOne, stage_one
from grdd_fastai.stage_two import PRESETS, stage_two

VALID = dict(n_way=2, k_shot=1, n_query=2, n_episodes=4)
ONE = StageOne(arch='convnet4', epochs=1, bs=4, schedule='one_cycle')
TWO = PRESETS['best'].but(n_way=2, k_shot=1, n_query=2, n_episodes=8, epochs=1)
# what is trained, and how many operations a step may take: a tenth more than it took when this was written
STEPS = dict(global_learner=(ONE, 325), cosine_head=(ONE.but(head='cosine'), 370),
             resnet12=(ONE.but(arch='resnet12_320', opt='muon'), 1330), meta_learner=(TWO, 510),
             clean=(TWO.but(teacher_view='clean'), 495), labels_alone=(TWO.but(distill=None), 355), muon=(TWO.but(opt='muon'), 580))


class Watch(Callback):
    "Count the operations, reads and copies of the third to the fifth step, and end the fit"
    order = 1000
    run_valid = False
    def __init__(self, counts): self.counts = counts
    def after_batch(self):
        if self.iter == 1: self.counts.clear()
        if self.iter == 4: raise CancelFitException()

def student(seed=0):
    net = create_backbone('convnet4', 0, 16, seed)
    net.pretrained_cfg = {k:v for k,v in net.pretrained_cfg.items() if k not in ('mean', 'std')} # sees the images as they are
    return net

def learner(data, s):
    "(Learner, fit) of the settings `s` on the accelerator, without autocast"
    kwargs = dict(amp=False, valid=VALID)
    if isinstance(s, StageOne): learn,fit = stage_one(data, s, **kwargs)
    else:
        known = torch.zeros(len(data.train), 64, device=DEVICE) if s.distill and s.distill.teacher_view == 'clean' else None
        learn,fit = stage_two(data, s, student(), student(1) if s.distill else None, known, **kwargs)
    learn.dls.to(DEVICE)
    learn.model.to(DEVICE)
    return learn,fit

@pytest.mark.parametrize('case', STEPS)
def test_a_step_neither_reads_from_the_accelerator_nor_sends_to_it(data, tmp_path, monkeypatch, case):
    "With the callbacks of a run, which look for NaN and write checkpoints"
    s,most = STEPS[case]
    with accelerator(monkeypatch) as counts:
        learn,fit = learner(data, s)
        learn.add_cbs([SkipBatches(), StopOnNaN('net'), Checkpoint(tmp_path/'checkpoint', dict, Deadline()), Watch(counts)])
        with learn.no_bar(), learn.no_logging(): fit(learn)
    assert (counts.reads, counts.uploads, counts.downloads) == (0, 0, 0), counts.moved
    assert counts.operations/3 <= most

def test_an_epoch_reads_its_losses_and_its_accuracy_alone(data, monkeypatch):
    monkeypatch.setattr(evaluation, 'as_features', lambda h: h) # it refuses the device 'meta', which has no numbers
    monkeypatch.setattr(evaluation, 'as_classes', lambda y, n: torch.from_numpy(data.val.y))
    with accelerator(monkeypatch) as counts:
        learn,_ = learner(data, ONE.but(bs=8))
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 0.01)
        counts.clear() # the first epoch also sent the images
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 0.01)
    # read are the smoothed loss, L_c, L_r, the loss of the episodes and what `evaluate` reads; the scores of their one block come back
    # sent are the random numbers, rows and labels of both splits, the episodes, and the zero that the smoothed loss starts from
    assert counts.reads <= 11 and counts.downloads == 1 and counts.uploads <= 10, (counts.reads, counts.moved)
    assert len(learn.recorder.losses) == len(learn.dls.train) and all(isinstance(loss, float) for loss in learn.recorder.losses)

def test_augmentation_sends_its_random_numbers_and_reads_nothing(monkeypatch):
    aug,rows = BatchAugmentation(4),np.arange(6)
    with accelerator(monkeypatch) as counts:
        images = torch.zeros(6, 3, 16, 16, dtype=torch.uint8, device=DEVICE)
        assert aug(images, 0, 0, rows).device == DEVICE and (counts.reads, counts.uploads, counts.downloads) == (0, 2, 0)
        numbers = [t.to(DEVICE) for t in aug.numbers(0, 0, rows)]
        counts.clear()
        assert aug.apply(images, *numbers).device == DEVICE and (counts.reads, counts.uploads, counts.downloads) == (0, 0, 0)

FEW_STEPS = dict(tim_gd=dict(steps=5), alpha_tim=dict(steps=5), tim_adm=dict(steps=5), logistic=dict(max_iter=20),
                 pt_map=dict(steps=2, sinkhorn_steps=20))

@pytest.mark.filterwarnings('ignore:logistic_regression has not converged')
@pytest.mark.parametrize('name', CLASSIFIERS)
def test_every_classifier_stays_on_the_accelerator(monkeypatch, name):
    "Two classes, because every number that is read from this accelerator is 1, also the largest class"
    E,C,K,Q,D = 3,2,2,4,16
    with accelerator(monkeypatch) as counts:
        support,query = torch.zeros(E, C*K, D, device=DEVICE),torch.zeros(E, C*Q, D, device=DEVICE)
        support_y = torch.arange(C, device=DEVICE).repeat_interleave(K).expand(E, -1)
        f = get_classifier(name)
        if name == 'simpleshot_cl2n': f = partial(f, mean=torch.zeros(D, device=DEVICE))
        if name in FEW_STEPS: f = partial(f, **FEW_STEPS[name])
        counts.clear()
        logits = f(support, support_y, query)
    assert logits.device == DEVICE and logits.shape == (E, C*Q, C) and (counts.uploads, counts.downloads) == (0, 0)
    # the number of classes and whether all logits are finite; two of them also ask now and then whether they have converged
    assert counts.reads <= dict(logistic=4 + 20//5, pt_map=4 + 3*20//10).get(name, 4)

def test_evaluation_reads_the_scores_of_a_block_at_once(monkeypatch):
    monkeypatch.setattr(evaluation, 'as_features', lambda h: h)
    h,y = torch.zeros(60, 8, device=DEVICE),np.repeat(np.arange(6), 10)
    with accelerator(monkeypatch) as counts:
        evaluation.evaluate(h, y, n_way=2, k_shot=1, n_query=3, n_episodes=1000, classifier=['cosine', 'prototype'])
    assert counts.downloads == 2*2 and counts.uploads == 2*3 # two blocks of 500 episodes: the scores of two classifiers; three arrays
    assert counts.reads <= 4 + 2*2*3 # the scale of the features; each classifier's number of classes, and whether its logits are finite

def test_images_are_held_once_and_only_if_there_is_room(monkeypatch):
    class Images:
        crop = None
        def __init__(self, n): self.images = np.zeros((n, 4, 4, 3), np.uint8)
        def __len__(self): return len(self.images)
    splits = Images(5),Images(3)
    size = sum(s.images.nbytes for s in splits)
    with accelerator(monkeypatch) as counts:
        first,second,third = (PackedImage(*splits) for _ in range(3))
        first.hold(DEVICE, size - 1)
        assert first.resident is None and counts.uploads == 0
        first.hold(DEVICE, size)
        assert all(a.device == DEVICE for a in first.resident) and counts.uploads == 2
        second.hold(DEVICE, 0) # what is there already needs no room
        assert all(a is b for a,b in zip(first.resident, second.resident, strict=True)) and counts.uploads == 2
        del first,second
        third.hold(DEVICE, 0)
        assert third.resident is None # the copies went with their last loader
