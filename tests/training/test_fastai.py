"""At home in fastai: what a stock Learner does with fastai's callbacks and methods, ours do too, or say in one sentence why they cannot."""
import copy
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.hook import ActivationStats, summary  # noqa: F401  (gives Learners summary)
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.progress import CSVLogger, ShowGraphCallback
from fastai.callback.schedule import *
from fastai.callback.tensorboard import TensorBoardCallback
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback
from fastai.callback.training import GradientAccumulation, GradientClip, ShortEpochCallback
from fastai.data.block import CategoryBlock, DataBlock, TransformBlock
from fastai.data.transforms import ColReader, ColSplitter, Normalize
from fastai.interpret import ClassificationInterpretation, Interpretation
from fastai.learner import Learner, load_learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.vision.augment import Resize, aug_transforms
from fastai.vision.core import PILImage
from fastai.vision.data import ImageBlock
from helpers import VALID, fit, net, same_state, says, stage_one_learner, stage_two_learner
from naive import naive_embed
from PIL import Image

from grdd_fastai.all import EpisodeInterpretation, EpisodicDL, create_backbone, evaluate, few_shot_data, global_learner, meta_learner
from grdd_fastai.data.blocks import plain_dl
from grdd_fastai.data.episodes import sample_episodes
from grdd_fastai.data.loaders import classes_of, plain_images
from grdd_fastai.fewshot.embed import embed


def without_classifier(net):
    "The features of a network as a module, for `naive_embed`"
    net = copy.deepcopy(net)
    net.reset_classifier(0)
    return net

STAGES = dict(one=stage_one_learner, two=partial(stage_two_learner, teacher=net(0)))


@pytest.fixture(scope='module')
def table(csv_set, data):
    "One DataFrame of the whole data set, in the order in which it is packed, with absolute files"
    frames = [getattr(data, s).df.assign(split=s) for s in ('train', 'val', 'test')]
    df = pd.concat(frames, ignore_index=True)
    return df.assign(filename=[str(csv_set/'images'/f) for f in df.filename])

def block(**kwargs):
    return DataBlock(blocks=(ImageBlock, CategoryBlock), get_x=ColReader('filename'), get_y=ColReader('label'),
                     splitter=ColSplitter('is_valid'), item_tfms=Resize(16), batch_tfms=Normalize.from_stats((.5,)*3, (.3,)*3), **kwargs)

@pytest.fixture(scope='module')
def plain(table):
    "DataLoaders as a fastai user makes them, whose validation classes are not among the training classes"
    df = table[table.split != 'test']
    return block().dataloaders(df.assign(is_valid=df.split == 'val'), bs=30, num_workers=0)

@pytest.fixture(scope='module')
def stock(table):
    "A fastai Learner on the base classes, for comparison"
    df = table[table.split == 'train'].reset_index(drop=True)
    dls = block().dataloaders(df.assign(is_valid=df.index % 4 == 0), bs=30, num_workers=0)
    return lambda **kwargs: Learner(dls, create_backbone('convnet4', dls.c, 16), **kwargs)

@pytest.fixture(params=STAGES)
def make(request, data): return partial(STAGES[request.param], data)

CALLBACKS = dict(save=SaveModelCallback, early=EarlyStoppingCallback, plateau=ReduceLROnPlateau, csv=CSVLogger, graph=ShowGraphCallback,
                 accumulation=partial(GradientAccumulation, 120), clip=GradientClip, short=partial(ShortEpochCallback, .5),
                 stats=ActivationStats, fp16=MixedPrecision)

@pytest.mark.parametrize('callback', CALLBACKS)
def test_fastais_callbacks_with_their_defaults(callback, make, stock, tmp_path, capsys):
    for learn in (stock(path=tmp_path), make(path=tmp_path)):
        with learn.no_logging(): learn.fit(2, .01, cbs=CALLBACKS[callback]())
        assert learn.epoch == 1

def test_columns_are_those_of_fastai_and_the_stages_own(data):
    learn = fit(stage_one_learner(data, metrics=accuracy))
    assert list(learn.recorder.metric_names) == ['epoch', 'train_loss', 'valid_loss', 'train_accuracy', 'L_c', 'L_r', 'accuracy', 'time']
    assert len(learn.recorder.values[0]) == 6 and learn.metrics.attrgot('name') == ['train_accuracy']
    plt.close('all') # fastai draws into the axes that are there
    ax = learn.recorder.plot_loss(skip_start=0)
    assert ax.lines[1].get_ydata()[0] == learn.recorder.values[0][1]
    plt.close('all')

def test_valid_loss_is_the_cross_entropy_of_the_episodes(make, data):
    learn = fit(make())
    shown = dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1]))
    learn.validate()
    h,y = embed(getattr(learn.model, 'backbone', learn.model), plain_dl(data, 'val'))
    e = learn.few_shot_accuracy.episodes
    total = []
    for support,query in sample_episodes(y, **e):
        for s,q in zip(support, query):
            means = torch.stack([F.normalize(h[torch.from_numpy(rows)], dim=1).mean(0) for rows in s])
            cosines = F.normalize(h[torch.from_numpy(q.ravel())], dim=1) @ means.T
            total.append(F.cross_entropy(10*cosines, torch.arange(e['n_way']).repeat_interleave(e['n_query'])).item())
    assert learn.few_shot_accuracy.last_loss == pytest.approx(np.mean(total), abs=1e-4)
    assert shown['valid_loss'] == pytest.approx(np.mean(total), abs=.05)

METHODS = dict(summary=lambda learn, photo: learn.summary(), tta=lambda learn, photo: learn.tta(),
               get_preds=lambda learn, photo: learn.get_preds(), show=lambda learn, photo: learn.show_results(),
               test_dl=lambda learn, photo: learn.get_preds(dl=learn.dls.test_dl([photo, photo])),
               lr_find=lambda learn, photo: learn.lr_find(num_it=15, show_plot=False),
               one_cycle=lambda learn, photo: learn.fit_one_cycle(1, .01),
               flat_cos=lambda learn, photo: learn.fit_flat_cos(1, .01), graph=lambda learn, photo: learn.dls.show_batch(max_n=2))

@pytest.mark.parametrize('method', METHODS)
def test_methods_of_a_learner_before_any_fit(method, make, stock, csv_set):
    for learn in (stock(), make()):
        with learn.no_bar(), learn.no_logging(): METHODS[method](learn, csv_set/'images'/'val0'/'00.png')
    plt.close('all')

def test_predictions_come_in_order_and_once(data):
    learn = stage_one_learner(data, rotation=False)
    for idx,split in enumerate((data.train, data.val)):
        with learn.no_bar(): p,y = learn.get_preds(ds_idx=idx)
        codes = np.array([learn.dls.vocab.o2i[split.vocab[c]] for c in split.y])
        want = naive_embed(learn.model, torch.from_numpy(np.array(split.images)).movedim(-1, 1), data.stats).softmax(1)
        assert np.array_equal(y, codes) and torch.allclose(p, want, atol=1e-4)
    two = stage_two_learner(data)
    with two.no_bar(): h,y = two.get_preds()
    assert torch.allclose(h, embed(two.model, plain_dl(data, 'val'))[0].cpu(), atol=1e-4) and len(set(y.tolist())) == len(data.val.vocab)

def test_a_photo_in_any_form_has_one_prediction(data, csv_set):
    learn,file = stage_one_learner(data),csv_set/'images'/'train3'/'05.png'
    array = np.asarray(Image.open(file))
    forms = (file, str(file), Image.open(file), PILImage.create(file), array, torch.from_numpy(array.copy()).movedim(-1, 0))
    with learn.no_bar(): found = [learn.predict(o) for o in forms]
    row = data.train.df.filename.tolist().index('train3/05.png')
    with learn.no_bar(): want = learn.get_preds(ds_idx=0)[0][row]
    assert all(torch.allclose(p, want, atol=1e-5) and name == data.train.vocab[int(i)] and i == want.argmax() for name,i,p in found)
    for wrong in (csv_set/'gone.png', csv_set/'train.csv', 7):
        says(lambda wrong=wrong: learn.predict(wrong), 'cannot be read as an image', 'give a file')

def test_what_cannot_be_is_a_sentence(data, tmp_path):
    one,two = stage_one_learner(data),stage_two_learner(data)
    def quietly(learn, f):
        with learn.no_bar(), learn.no_logging(): return f(learn)
    for learn,f,*words in (
        (one, lambda learn: learn.fit(1, cbs=MixUp()), 'Rotation', 'rotation=False'),
        (two, lambda learn: learn.fit(1, cbs=CutMix()), 'leave it out'),
        (one, lambda learn: learn.fit(1, cbs=TensorBoardCallback(tmp_path)), 'tensor_board', 'log_preds=False'),
        (two, lambda learn: learn.fit(1, cbs=TensorBoardCallback(tmp_path)), 'log_preds=False'),
        (one, Interpretation.from_learner, 'no outputs for the validation classes', 'EpisodeInterpretation'),
        (one, ClassificationInterpretation.from_learner, 'EpisodeInterpretation'),
        (two, Interpretation.from_learner, 'EpisodeInterpretation'),
        (two, lambda learn: learn.predict('a.png'), 'FewShotClassifier(learn)')):
        says(lambda: quietly(learn, f), *words)  # noqa: B023
    says(lambda: stage_two_learner(data, loss_func=CrossEntropyLossFlat()), 'sum of terms', 'cbs=')
    says(lambda: stage_one_learner(data, loss_func=CrossEntropyLossFlat(), smoothing=.1), 'smoothing')
    one.export(tmp_path/'one.pkl')
    says(lambda: load_learner(tmp_path/'one.pkl').validate(), 'no validation images', 'learn.dls')

@pytest.mark.parametrize('make', STAGES.values(), ids=STAGES)
def test_tensorboard_follows_both_stages(data, tmp_path, make):
    "Its graph and its numbers; a stock optimiser has hyperparameters that are None"
    fit(make(data, cbs=TensorBoardCallback(tmp_path, log_preds=False)))
    assert [f for f in tmp_path.rglob('events*') if f.stat().st_size > 1000]

def test_what_mixes_images_works_without_rotation(data):
    for mix in (MixUp, CutMix): assert np.isfinite(fit(stage_one_learner(data, rotation=False, cbs=mix())).recorder.losses[-1])

def test_base_classes_can_be_interpreted(data):
    learn = fit(stage_one_learner(data, rotation=False))
    with learn.no_bar(): found = ClassificationInterpretation.from_learner(learn, ds_idx=0)
    assert found.confusion_matrix().sum() == len(data.train) and len(found.top_losses(3)[0]) == 3

def test_a_loss_of_ones_own(data):
    weighted = CrossEntropyLossFlat(weight=torch.tensor([1., 0, 0, 0, 0, 0]))
    a,b = (fit(stage_one_learner(data, rotation=False, loss_func=loss)) for loss in (weighted, None))
    assert not same_state(a.model.state_dict(), b.model.state_dict())
    same = fit(stage_one_learner(data, rotation=False, loss_func=CrossEntropyLossFlat()))
    assert same_state(same.model.state_dict(), b.model.state_dict())

def test_an_exported_learner_predicts(data, csv_set, tmp_path):
    learn,file = fit(stage_one_learner(data)),csv_set/'images'/'train1'/'00.png'
    learn.export(tmp_path/'one.pkl')
    weights = 4*sum(p.numel() for p in learn.model.parameters())
    assert (tmp_path/'one.pkl').stat().st_size < 2*weights + data.train.images.nbytes # with the optimiser's state, and without the images
    again = load_learner(tmp_path/'one.pkl')
    with learn.no_bar(), again.no_bar(): assert torch.allclose(learn.predict(file)[2], again.predict(file)[2], atol=1e-6)

def test_predictions_between_two_fits_change_nothing(make, csv_set):
    "Episodes, augmentation and dropout of a fit depend on the epochs of the fits before it alone"
    weights = []
    for between in (False, True):
        learn = fit(make())
        if between:
            with learn.no_bar(): learn.get_preds()
        weights.append(fit(learn).model.state_dict())
    assert same_state(*weights)

def test_the_loss_of_ones_own_needs_no_outputs_for_predictions(data):
    learn = stage_one_learner(data, rotation=False, loss_func=CrossEntropyLossFlat())
    with learn.no_bar(): p,y = learn.get_preds()
    assert p.shape == (len(data.val), 6) and y.min() == 6

def test_test_time_augmentation_of_classes_without_outputs(plain, data):
    "Without augmentation it gives the predictions themselves"
    learn = global_learner(plain, 'convnet4', rotation=False, valid=VALID, amp=False)
    with learn.no_bar(): (p,y),(want,_) = learn.tta(),learn.get_preds()
    assert torch.allclose(p, want, atol=1e-5) and y.min() == 6 and len(y) == len(plain.valid_ds)
    packed = stage_one_learner(data, rotation=False, loss_func=CrossEntropyLossFlat())
    with packed.no_bar(): says(packed.tta, 'no outputs for the validation classes')

def test_losses_of_plain_data_are_a_sentence(plain):
    learn = global_learner(plain, 'convnet4', valid=VALID, amp=False)
    with learn.no_bar(): says(lambda: Interpretation.from_learner(learn), 'no outputs for the validation classes')

def test_training_images_are_embedded_as_they_are(table, data):
    "fastai's augmentation is for training"
    df = table[table.split != 'test']
    augmented = DataBlock(blocks=(ImageBlock, CategoryBlock), get_x=ColReader('filename'), get_y=ColReader('label'), item_tfms=Resize(16),
                          splitter=ColSplitter('is_valid'), batch_tfms=aug_transforms(max_rotate=45, p_affine=1.))
    dls = augmented.dataloaders(df.assign(is_valid=df.split == 'val'), bs=30, num_workers=0)
    learn = global_learner(dls, 'convnet4', rotation=False, valid=VALID, amp=False)
    with learn.no_bar(): found = [plain_images(dls.train).one_batch()[0] for _ in range(2)]
    first = torch.from_numpy(data.train.images[0]/255).float().movedim(-1, 0)
    assert torch.equal(*found) and torch.allclose(found[0][0].cpu(), first, atol=1e-5)
    cfg = learn.model.backbone.pretrained_cfg
    assert cfg['mean'] == (0,)*3 and cfg['std'] == (1,)*3 # what the network takes

def test_labels_of_other_kinds(table):
    df = table[table.split != 'test'].assign(is_valid=lambda d: d.split == 'val')
    def codes(block, get_y): return classes_of(DataBlock(blocks=(ImageBlock, block), get_x=ColReader('filename'), get_y=get_y,
                                                         splitter=ColSplitter('is_valid')).dataloaders(df, num_workers=0).valid)[0]
    number = {c:i for i,c in enumerate(sorted(df.label.unique()))}
    want = df.label[df.is_valid].map(number).tolist()
    assert codes(TransformBlock, lambda r: number[r['label']]).tolist() == want
    assert codes(TransformBlock, lambda r: torch.tensor(number[r['label']])).tolist() == want
    for odd in (lambda r: .5, lambda r: [r['label']]): says(lambda odd=odd: codes(TransformBlock, odd), 'an image must have one class')

# ---- data as fastai users have it -------------------------------------------------------------------------------------

def test_plain_dataloaders_train_stage_one(plain, data):
    learn = fit(global_learner(plain, 'convnet4', valid=VALID, amp=False))
    assert learn.dls.c == len(data.train.vocab) and np.isfinite(learn.recorder.losses[-1])
    found = EpisodeInterpretation.from_learner(learn, n_episodes=200)
    h,codes = learn.few_shot_accuracy.embed()
    assert np.allclose(found.accuracy, evaluate(h, codes, **{**VALID, 'n_episodes':200}).episodes, atol=1e-4)
    assert sorted(found.vocab) == data.val.vocab and found.image(0).shape == (16, 16, 3)
    images = torch.from_numpy(np.array(data.val.images)).movedim(-1, 1)
    assert torch.allclose(h.cpu(), naive_embed(without_classifier(learn.model.backbone), images, ((.5,)*3, (.3,)*3)), atol=1e-3)
    with learn.no_bar(): p,y = learn.get_preds()
    assert len(p) == len(data.val) and y.min() == len(data.train.vocab) # their codes follow those of the base classes

def test_episodes_of_a_datablock_on_a_dataframe(table, data):
    df = table[table.split != 'test']
    dl_type = partial(EpisodicDL, n_way=3, k_shot=2, n_query=4, n_episodes=3)
    dls = block(dl_type=dl_type).dataloaders(df.assign(is_valid=df.split == 'val'), num_workers=0)
    x,y = dls.one_batch()
    assert x.shape == (18, 3, 16, 16) and (y.view(3, 6) == y.view(3, 6)[:, :1]).all() and len(set(y.tolist())) == 3
    learn = fit(meta_learner(dls, net(1), net(0), valid=VALID, amp=False))
    h,codes = learn.few_shot_accuracy.embed()
    assert learn.recorder.values[-1][-1] == learn.validate()[0] == evaluate(h, codes, **VALID).accuracy
    images = torch.from_numpy(np.array(data.val.images)).movedim(-1, 1)
    assert torch.allclose(h.cpu(), naive_embed(learn.model, images, ((.5,)*3, (.3,)*3)), atol=1e-3)

def test_dataframes_are_packed_as_the_same_csvs(table, data, cache, csv_set):
    whole = few_shot_data(table, 16, cache)
    apart = few_shot_data({s:table[table.split == s] for s in ('train', 'val', 'test')}, 16, cache)
    for s in ('train', 'val', 'test'):
        assert np.array_equal(getattr(whole, s).images, getattr(data, s).images) and np.array_equal(getattr(whole, s).y, getattr(data, s).y)
    assert whole.fingerprint == apart.fingerprint and whole.stats == data.stats
    named = few_shot_data(table.assign(split=table.split.replace('val', 'Validation')), 16, cache)
    assert named.fingerprint == whole.fingerprint

def test_dataframes_that_cannot_be_used(table, cache, tmp_path):
    def load(df): return lambda: few_shot_data(df, 16, cache)
    says(load({}), 'the DataFrame is empty')
    says(load(table.drop(columns='split')), "lacks the column 'split'", 'dict of DataFrames')
    says(load(table.assign(split='all')), "the split 'all'", 'train, val or test')
    says(load(table.assign(filename=table.filename + 'x')), 'is not there', 'column filename')
    says(load(table.assign(label=None)), 'empty cells')
    says(load(dict(train='a.csv')), 'a str', 'DataFrame')
    says(load(table.assign(split=['train', 'val', 'test']*(len(table)//3))), 'disjoint')
    says(load(pd.concat([table, table[:1]])), 'listed twice')
    assert Path(table.filename[0]).is_file()
