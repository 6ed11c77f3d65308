"""Stage one: what a step trains on, done again by hand."""
import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import Grab, fit, stage_one_learner
from naive import naive_cosine_logits, naive_stage_one_loss

from grdd_fastai.data.blocks import category_dls
from grdd_fastai.stage_one import rotate4, rotate_quarters


def test_rotate4_turns_each_image_counter_clockwise():
    x = torch.arange(2*1*3*3.).view(2, 1, 3, 3)
    for k,r in enumerate(rotate4(x).chunk(4)):
        for a,b in zip(x, r): assert (np.rot90(a[0].numpy(), k) == b[0].numpy()).all()

@pytest.mark.parametrize('n', [1, 3, 7, 8])
def test_each_quarter_of_a_batch_is_turned_by_its_angle(n):
    x = torch.arange(n*1*3*3.).view(n, 1, 3, 3)
    for i,r in enumerate(rotate_quarters(x)): assert (np.rot90(x[i, 0].numpy(), 4*i//n) == r[0].numpy()).all()

def test_a_step_with_one_rotation_of_each_image_by_hand(data):
    "L_c + 2 L_r image by image; the next callbacks see the batch's own images and labels"
    seen = []
    def count(pred, y):
        seen.append((len(pred), y.clone()))
        return 0.
    learn = stage_one_learner(data, rotations=1, rotation_weight=2., bs=50, cbs=Grab(), metrics=count, keep_best=False)
    ref = copy.deepcopy(learn.model).train()
    fit(learn, 1, .05)
    y = [b.as_subclass(torch.Tensor) for _,b in category_dls(data, bs=50, aug=None).train]
    x = learn.grab.x[0]
    p,r = ref(x)
    want = sum(-p.log_softmax(1)[i, y[0][i]] - 2*r.log_softmax(1)[i, 4*i//50] for i in range(50))/50
    assert len(x) == 50 and learn.grab.losses[0] == pytest.approx(want.item(), rel=1e-4)
    assert all(n == 50 and torch.equal(a.as_subclass(torch.Tensor), b) for (n,a),b in zip(seen, y, strict=True))

@pytest.mark.parametrize('rotation_from', ['logits', 'probabilities'])
def test_a_stage_one_step_is_equations_2_to_9(data, rotation_from):
    "Loss and SGD step with momentum and L2 decay, from the images alone, in plain torch"
    learn = stage_one_learner(data, rotation_from=rotation_from, cbs=Grab(), keep_best=False)
    fit(learn, 1, .05)
    ref,y = stage_one_learner(data, rotation_from=rotation_from).model.train(),[]
    dl = category_dls(data, bs=60, aug=None).train
    y = [b.clone() for _,b in dl]
    opt = torch.optim.SGD(ref.parameters(), .05, momentum=.9, weight_decay=5e-4)
    for step,x in enumerate(learn.grab.x):
        # the callback's images are the rotations of the loader's batch
        loss = naive_stage_one_loss(ref, x.chunk(4)[0], y[step], rotation_from)
        assert learn.grab.losses[step] == pytest.approx(loss.item(), rel=1e-4)
        opt.zero_grad()
        loss.backward()
        opt.step()
    for a,b in zip(learn.model.parameters(), ref.parameters()): assert torch.allclose(a, b, atol=2e-4)

def test_a_cosine_classifier_in_stage_one_by_hand(data):
    "Its loss from normalised features and weights; it trains, and the backbone is left without a classifier"
    learn = stage_one_learner(data, rotation=False, head='cosine', cbs=Grab(), keep_best=False)
    ref = copy.deepcopy(learn.model).train()
    fit(learn, 1, .05)
    h,(_,y),w = ref.backbone(learn.grab.x[0]),next(iter(category_dls(data, bs=60, aug=None).train)),ref.classifier.weight
    p = naive_cosine_logits(h, w)
    assert learn.grab.losses[0] == pytest.approx(F.cross_entropy(p, y.as_subclass(torch.Tensor)).item(), rel=1e-4)
    assert (learn.model.backbone.num_classes == 0 and not torch.equal(w, learn.model.classifier.weight)
            and learn.model.classifier.scale != 10)
    head = learn.splitter(learn.model)[1]
    assert {id(p) for p in head} == {id(p) for p in learn.model.classifier.parameters()}

def test_metrics_of_a_rotated_batch_are_of_its_own_images(data):
    seen = []
    def count(pred, y):
        seen.append((len(pred), len(y)))
        return 0.
    fit(stage_one_learner(data, metrics=count))
    assert set(seen) == {(60, 60)}

def test_both_losses_are_logged(data):
    learn = fit(stage_one_learner(data, cbs=Grab()))
    row = dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1]))
    assert (list(row) == ['train_loss','valid_loss','L_c','L_r','accuracy']
            and row['L_c'] + row['L_r'] == pytest.approx(np.mean(learn.grab.losses), rel=1e-5))

def test_without_rotation_it_is_plain_cross_entropy(data):
    learn = fit(stage_one_learner(data, rotation=False, cbs=Grab()))
    assert (len(learn.grab.x[0]) == 60 and learn.model.rotation_head is None
            and list(learn.recorder.metric_names[1:4]) == ['train_loss','valid_loss','accuracy'])
