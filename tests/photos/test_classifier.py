"""Test the predictions of a FewShotClassifier against features computed by hand, and its error messages."""
import os
import shutil

import numpy as np
import pandas as pd
import pytest
import timm
import torch
import torchvision
from helpers import posix, says, write_images
from naive import naive_logits_of_photos
from PIL import Image

from grdd_fastai.core.errors import UserError
from grdd_fastai.data.blocks import category_dls, episodic_dls
from grdd_fastai.data.cache import few_shot_data
from grdd_fastai.models.create import create_backbone, features
from grdd_fastai.photos.classifier import FewShotClassifier
from grdd_fastai.stage_one import global_learner
from grdd_fastai.stage_two import meta_learner


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    "Three folders, red, green and blue, of three images each, and a folder of other images in these colours"
    root = tmp_path_factory.mktemp('photos')
    for i,c in enumerate(('red','green','blue')):
        write_images(root/'few'/c, [f'{k}.png' for k in range(3)], 40, i, i/3)
        write_images(root/'more', [f'{c}{k}.png' for k in range(4)], 50, 10 + i, i/3)
    return root

@pytest.fixture(scope='module')
def net():
    torch.manual_seed(0)
    return timm.create_model('convnet4', num_classes=0)


@pytest.mark.parametrize('classifier', ['cosine', 'ridge', 'bd_cspn'])
def test_folders_of_photos_to_classes(photos, net, classifier):
    few,others = FewShotClassifier.from_folder(photos/'few', net, classifier),sorted((photos/'more').iterdir())
    assert few.vocab == ['blue','green','red'] and few.predict(others) == [f.stem[:-1] for f in others]

def test_logits_by_hand(photos, net):
    few = FewShotClassifier.from_folder(photos/'few', net, 'cosine')
    sigma = naive_logits_of_photos(net, [photos/'few'/c for c in few.vocab], photos/'more'/'red0.png')
    assert few.logits(photos/'more'/'red0.png').iloc[0].to_dict() == pytest.approx(sigma, abs=1e-2)

def test_paths_arrays_and_images_are_the_same(photos, net):
    few,path = FewShotClassifier.from_folder(photos/'few', net, bs=2),photos/'more'/'blue1.png'
    for image in (str(path), Image.open(path), np.array(Image.open(path)), [np.array(Image.open(path))]):
        assert few.logits(image).equals(few.logits(path))
    assert np.allclose(few.logits([path]*5), np.repeat(few.logits(path).to_numpy(), 5, 0), atol=1e-4)

def test_a_photo_is_turned_as_its_camera_says(photos, net, tmp_path):
    few,upright = FewShotClassifier.from_folder(photos/'few', net),Image.open(photos/'more'/'red2.png')
    exif = Image.Exif()
    exif[274] = 6 # turn a quarter clockwise to see it
    upright.rotate(90, expand=True).save(tmp_path/'phone.png', exif=exif)
    assert (np.allclose(few.logits(tmp_path/'phone.png'), few.logits(upright), atol=1e-5)
            and not np.allclose(few.logits(upright.rotate(90)), few.logits(upright), atol=1e-5))

def test_a_learners_network_gets_the_images_it_was_trained_on(csv_set, cache):
    "48 px and the data's mean and standard deviation, not those its architecture came with; the Learner and its network are the same"
    data = few_shot_data(csv_set, 48, cache)
    one = global_learner(category_dls(data, bs=40), 'convnet4', keep_best=False)
    two = meta_learner(episodic_dls(data, 3, 1, 4, 2), one.model.backbone, keep_best=False)
    for learn,net in ((one, one.model.backbone), (two, two.model)):
        assert net.pretrained_cfg['input_size'] == (3, 48, 48)
        for k,stat in zip(('mean', 'std'), data.stats): assert net.pretrained_cfg[k] == pytest.approx(stat, abs=1e-4)
        image,label = data.train.images[:6:3],['a', 'b']
        few,other = FewShotClassifier(learn).fit(list(image), label),FewShotClassifier(net).fit(list(image), label)
        x = ((torch.from_numpy(np.array(image)).movedim(-1, 1)/255 - torch.tensor(data.stats[0]).view(3, 1, 1))
             / torch.tensor(data.stats[1]).view(3, 1, 1))
        with torch.no_grad(): assert torch.allclose(few.support, net.eval()(x) if learn is two else features(net.eval(), x), atol=1e-4)
        assert torch.equal(few.support, other.support)

def test_a_fit_that_fails_changes_no_classifier(tmp_path):
    images = [np.full((9, 9, 3), v, np.uint8) for v in (0, 10, 240, 250)]
    few = FewShotClassifier(create_backbone('convnet4', 0)).fit(images, ['dark', 'dark', 'light', 'light'])
    says(lambda: few.fit([tmp_path/'gone.png']*2, ['x', 'y']), 'gone.png')
    assert few.vocab == ['dark', 'light'] and set(few.predict(images)) <= {'dark', 'light'}


# ---- what cannot be ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('call, sentence', [
    (lambda p, n: FewShotClassifier(n).predict(p/'more'/'red0.png'), 'no classes yet'),
    (lambda p, n: FewShotClassifier.from_folder(p/'nowhere', n), 'there is no folder'),
    (lambda p, n: FewShotClassifier.from_folder(p/'more', n), 'no folders of images'),
    (lambda p, n: FewShotClassifier(n).fit([p/'more'/'red0.png'], ['a', 'b']), '1 images and 2 labels'),
    (lambda p, n: FewShotClassifier(n).fit([p/'more'/'red0.png'], ['a']), 'at least two'),
    (lambda p, n: FewShotClassifier.from_folder(p/'few', n).predict([]), 'no image is given'),
    (lambda p, n: FewShotClassifier.from_folder(p/'few', n).predict(np.zeros((9, 9, 3))), 'is no image'),
    (lambda p, n: FewShotClassifier('nothing_like_it'), 'unknown backbone'),
    (lambda p, n: FewShotClassifier(n, 'x'), "unknown classifier 'x'")])
def test_what_cannot_be_gets_a_sentence(photos, net, call, sentence):
    with pytest.raises(UserError, match=sentence): call(photos, net)

@posix
@pytest.mark.parametrize('target', ['pipe', '/dev/zero', '/dev/urandom', 'nowhere', 'folder'])
def test_a_photo_that_is_none_gets_a_sentence(tmp_path, target):
    f = tmp_path/'photo.png'
    if target == 'pipe': os.mkfifo(f)
    elif target == 'folder': f.mkdir()
    else: f.symlink_to(target)
    net = create_backbone('convnet4', 0)
    why = 'photo.png is not there' if target == 'nowhere' else 'photo.png cannot be read as an image'
    says(lambda: FewShotClassifier(net).fit([f, f], ['a', 'b']), why)

@pytest.mark.parametrize('images', [torch.zeros(2, 4, 8, 8), torch.full((2, 3, 8, 8), 9.), [5, 5], None, 7])
def test_images_that_are_none(images): says(lambda: FewShotClassifier(create_backbone('convnet4', 0)).fit(images, ['a', 'b']))

@pytest.mark.parametrize('labels, says', [(['a', float('nan')], 'a label is missing'), (['a', None], 'a label is missing'),
                                          (['a', 3], 'some labels are text')])
def test_labels_that_are_none(photos, net, labels, says):
    with pytest.raises(UserError, match=says): FewShotClassifier(net).fit([photos/'more'/'red0.png']*2, labels)

@pytest.mark.parametrize('px', [0, -3, 10**6, 'x'])
def test_sides_that_cannot_be(net, px):
    with pytest.raises(UserError, match='px is'): FewShotClassifier(net, px=px)

def test_settings_of_the_classifier_are_checked_at_once(net):
    with pytest.raises(UserError, match="tim_adm has no setting 'tau'"): FewShotClassifier(net, 'tim_adm', tau=15.)
    FewShotClassifier(net, 'tim_adm', scale=10.)

@pytest.mark.parametrize('logits', [lambda s, y, q: torch.full((*q.shape[:2], 2), torch.nan), lambda s, y, q: q, lambda s, y, q: None])
def test_a_classifier_of_ones_own_on_photos(logits):
    images = [np.full((9, 9, 3), v, np.uint8) for v in (0, 240)]
    says(lambda: FewShotClassifier(create_backbone('convnet4', 0), logits).fit(images, ['a', 'b']).predict(images), 'the classifier gives')

def test_the_device_can_be_chosen():
    net = create_backbone('convnet4', 0, 16)
    assert next(FewShotClassifier(net, device='cpu').net.parameters()).device.type == 'cpu'
    says(lambda: FewShotClassifier(net, device='nonsense'), "the device 'nonsense'", 'cpu')


# ---- the support changes ----------------------------------------------------------------------------------------------

RNG = np.random.default_rng(0)
IMAGES = [RNG.integers(0, 256, (30, 30, 3), np.uint8) for _ in range(9)]
LABELS = list('aaabbbccc')

@pytest.mark.parametrize('classifier', ['cosine', 'ridge'])
def test_adding_and_removing_is_fitting_what_is_there_then(net, classifier):
    whole = FewShotClassifier(net, classifier).fit(IMAGES, LABELS)
    few = FewShotClassifier(net, classifier).partial_fit(IMAGES[3:8], LABELS[3:8]).add(IMAGES[:3], 'a').add(IMAGES[8], 'c')
    assert few.vocab == list('abc') and np.allclose(few.logits(IMAGES), whole.logits(IMAGES), atol=1e-5)
    few.remove('b')
    want = FewShotClassifier(net, classifier).fit(IMAGES[:3] + IMAGES[6:], list('aaaccc'))
    assert few.vocab == ['a', 'c'] and np.allclose(few.logits(IMAGES), want.logits(IMAGES), atol=1e-5)

def test_changes_that_cannot_be_change_nothing(net):
    few = FewShotClassifier(net).fit(IMAGES, LABELS)
    before = few.logits(IMAGES)
    says(lambda: few.remove('d'), "no class 'd'", 'a, b, c')
    says(lambda: few.add(IMAGES[0], 5), 'some labels are text')
    says(lambda: few.add('gone.png', 'a'), 'gone.png')
    says(lambda: FewShotClassifier(net).fit(IMAGES[:4], list('aabb')).remove('a'), 'at least two')
    assert few.logits(IMAGES).equals(before) and len(few.files) == 9

@pytest.mark.parametrize('classifier', ['cosine', 'prototype_cosine', 'simpleshot_l2n', 'ridge', 'logistic'])
def test_a_class_of_many_photos_is_not_favoured(classifier):
    "Twenty photos of one class instead of two do not change the predictions for photos of the other classes"
    torch.manual_seed(0)
    centre = torch.randn(3, 40)
    def of(c, n): return centre[c] + .3*torch.randn(n, 40)
    class Known(torch.nn.Module): # images hold their features
        pretrained_cfg = dict(input_size=(3, 1, 1), mean=(0.,)*3, std=(1.,)*3)
        def __init__(self):
            super().__init__()
            self.w,self.rows = torch.nn.Parameter(torch.zeros(1)),[]
        def forward(self, x): return torch.stack([self.rows.pop(0) if self.rows else torch.ones(40) for _ in x])
    few = FewShotClassifier(Known(), classifier)
    few.net.rows = list(torch.cat([of(0, 2), of(1, 2), of(2, 20)]))
    few.fit([IMAGES[0]]*24, ['a']*2 + ['b']*2 + ['c']*20)
    few.net.rows = list(torch.cat([of(0, 30), of(1, 30)]))
    assert few.predict([IMAGES[0]]*60) == ['a']*30 + ['b']*30


# ---- tables, scores and unreadable photos -----------------------------------------------------------------------------

def test_unreadable_photos_are_left_out_with_a_warning(photos, net, tmp_path):
    (tmp_path/'bad.png').write_bytes(b'no image')
    few = FewShotClassifier.from_folder(photos/'few', net)
    with pytest.warns(UserWarning, match=r'1 of 3 photos are left out: .*bad.png cannot be read'):
        assert few.predict([photos/'more'/'red0.png', tmp_path/'bad.png', photos/'more'/'blue0.png']) == ['red', None, 'blue']
    with pytest.warns(UserWarning): logits = few.logits([tmp_path/'bad.png', photos/'more'/'red0.png'])
    assert logits.iloc[0].isna().all() and logits.iloc[1].notna().all()
    files = sorted((photos/'few').rglob('*.png'))
    with pytest.warns(UserWarning, match='1 of 10'):
        again = FewShotClassifier(net).fit([*files, tmp_path/'bad.png'], [*(f.parent.name for f in files), 'red'])
    assert torch.equal(again.support, few.support) and again.files == few.files
    says(lambda: FewShotClassifier(net, errors='raise').fit([*files, tmp_path/'bad.png'], ['a']*5 + ['b']*5), 'bad.png')
    says(lambda: FewShotClassifier(net).fit([*files, tmp_path/'bad.png'], ['a']*5 + ['b']*4 + ['c']), "no photo of class 'c'")
    with pytest.warns(UserWarning, match='1 of 1'): assert few.predict(tmp_path/'bad.png') == [None]
    with pytest.warns(UserWarning, match='gone.png is not there'): assert few.embed(tmp_path/'gone.png').isnan().all()
    says(lambda: few.score(tmp_path/'bad.png', 'red'), 'none of the photos can be read')
    labels = ['a', 'a', 'b', 'c'] # bad.png is one of two photos of a, gone.png the only one of c
    with pytest.warns(UserWarning, match='2 of 4'):
        says(lambda: FewShotClassifier(net).fit([tmp_path/'bad.png', *files[:2], 'gone.png'], labels), "class 'c'", 'gone.png is not there')
    says(lambda: FewShotClassifier(net, errors='ignore'), "errors is 'ignore'")

def test_the_table_by_hand(photos, net, tmp_path):
    (tmp_path/'bad.png').write_bytes(b'no image')
    few = FewShotClassifier.from_folder(photos/'few', net)
    files = sorted((photos/'more').iterdir())
    with pytest.warns(UserWarning): table = few.predict_table([*files, tmp_path/'bad.png'])
    assert list(table.columns) == ['file', 'class', 'probability', 'runner_up', 'nearest', 'distance', 'problem']
    assert table.file.tolist() == [*map(str, files), str(tmp_path/'bad.png')] and table['class'].tolist()[:-1] == few.predict(files)
    last = table.iloc[-1]
    assert pd.isna(last['class']) and 'cannot be read' in last.problem and not any(table.problem[:-1])
    h = few.embed(files[0])[0]
    logits = few.logits(files[0]).iloc[0]
    best = min((1 - float(torch.cosine_similarity(h, s, dim=0)), f) for s,f in zip(few.support, few.files, strict=True)
               if f.split('/')[-2] == logits.idxmax())
    assert table.runner_up[0] == logits.nlargest(2).index[1] and table.distance[0] == pytest.approx(best[0], abs=1e-4)
    assert table.nearest[0] == best[1] and np.isnan(last.probability)
    assert np.allclose(table.probability[:-1], few.predict_proba(files).max(1))

def test_the_score_is_the_share_of_right_ones(photos, net):
    few = FewShotClassifier.from_folder(photos/'few', net)
    files = sorted((photos/'more').iterdir())
    truth = [f.stem[:-1] for f in files]
    assert few.score(photos/'more', truth) == 1 and few.score(files, ['red']*12) == pytest.approx(4/12)
    says(lambda: few.score(files, ['red']), '12 images and 1 labels')
    says(lambda: few.score(files, [3]*12), 'no label is one of the classes', 'blue, green, red')
    assert few.score(files[0], truth[0]) == 1 and few.score(files, np.array(truth)) == 1

@pytest.mark.parametrize('labels', [np.array([4, 4, 7]), torch.tensor([4, 4, 7]), pd.Series([4, 4, 7]), (4, 4, 7), iter([4, 4, 7])])
def test_labels_of_any_list(net, tmp_path, labels):
    few = FewShotClassifier(net).fit(IMAGES[:3], labels)
    assert few.vocab == [4, 7] and all(type(o) is int for o in few.vocab + few.predict(IMAGES))
    assert FewShotClassifier.load(few.save(tmp_path/'mine')).vocab == [4, 7]

def test_what_has_no_order_is_refused(net):
    few = FewShotClassifier(net).fit(IMAGES, LABELS)
    for wrong in ({'a.png', 'b.png'}, {'a.png':1}): says(lambda w=wrong: few.predict(w), 'has no order')
    says(lambda: few.fit(IMAGES[:2], {'a', 'b'}), 'has no order')

def test_the_network_of_a_classifier_is_its_own(net):
    "Neither further training nor train() changes its predictions"
    few = FewShotClassifier(net).fit(IMAGES, LABELS)
    before = few.logits(IMAGES)
    net.train()(torch.randn(4, 3, 32, 32))
    assert few.logits(IMAGES).equals(before) and not few.net.training
    net.eval()

def test_class_folders_without_photos_are_said(photos, net, tmp_path):
    shutil.copytree(photos/'few', tmp_path/'few')
    (tmp_path/'few'/'bird').mkdir()
    says(lambda: FewShotClassifier.from_folder(tmp_path/'few', net), 'bird holds no photos that can be read')
    (tmp_path/'few'/'bird'/'IMG_1.HEIC').write_bytes(b'x')
    with pytest.warns(UserWarning, match='1 photos .* such as bird/IMG_1.HEIC: convert them to JPEG'):
        says(lambda: FewShotClassifier.from_folder(tmp_path/'few', net), 'bird holds no photos')

def test_a_vision_transformer_by_its_name(monkeypatch):
    "It is built for the image size in its configuration; for a size that it cannot take, the error is one sentence"
    torch.manual_seed(0)
    monkeypatch.setattr('timm.models._builder.load_pretrained', lambda *args, **kwargs: None) # its weights would be downloaded
    few = FewShotClassifier('test_vit2.r160_in1k').fit(IMAGES, LABELS)
    assert few.px == 160 and few.support.shape == (9, 64)
    assert FewShotClassifier('test_vit2.r160_in1k', px=96).fit(IMAGES, LABELS).support.shape == (9, 64) # built for another side
    says(lambda: FewShotClassifier(few.net, px=100), 'makes no features of an image of 100 px') # a network that is there already

def test_a_large_pretrained_transformer(monkeypatch):
    "DINOv2 as timm describes it, with random weights: its side, its normalisation and its features, at its own side and at another"
    monkeypatch.setattr('timm.models._builder.load_pretrained', lambda *args, **kwargs: None) # its weights would be downloaded
    name = 'vit_small_patch14_dinov2.lvd142m'
    cfg = timm.get_pretrained_cfg(name)
    few = FewShotClassifier(name)
    assert few.px == cfg.input_size[-1] == 518 and few.stats == (list(cfg.mean), list(cfg.std)) and few.n_features == 384
    few = FewShotClassifier(name, px=70).fit(IMAGES[:4], ['a', 'a', 'b', 'b'])
    assert few.net.patch_embed.grid_size == (5, 5)
    x = few.transform(Image.fromarray(IMAGES[0]) if isinstance(IMAGES[0], np.ndarray) else IMAGES[0])
    with torch.no_grad(): h = few.net.forward_head(few.net.forward_features(x[None].to(few.device)), pre_logits=True)
    assert x.shape == (3, 70, 70) and torch.allclose(few.support[0], h[0], atol=1e-4)

def test_a_torchvision_model():
    net = torchvision.models.resnet18(num_classes=5)
    says(lambda: FewShotClassifier(net), 'does not say what images it takes')
    few = FewShotClassifier(net, px=64, stats=((.5,)*3, (.25,)*3)).fit(IMAGES, LABELS)
    assert few.support.shape == (9, 5) # its output, which is no features: take its last layer away
    net.fc = torch.nn.Identity()
    assert FewShotClassifier(net, px=64, stats=((.5,)*3, (.25,)*3)).fit(IMAGES, LABELS).support.shape == (9, 512)

def test_tables_of_files_and_classes(photos, net, tmp_path):
    files = sorted((photos/'few').rglob('*.png'))
    df = pd.DataFrame(dict(photo=[f.relative_to(photos) for f in files], kind=[f.parent.name for f in files]))
    want = FewShotClassifier.from_folder(photos/'few', net)
    few = FewShotClassifier.from_df(df, net, folder=photos, x='photo', y='kind')
    df.to_csv(photos/'few.csv', index=False)
    csv = FewShotClassifier.from_csv(photos/'few.csv', net, x='photo', y='kind')
    assert few.vocab == csv.vocab == want.vocab and torch.equal(few.support, want.support) and torch.equal(csv.support, want.support)
    says(lambda: FewShotClassifier.from_df(df, net), "no column 'filename'", 'photo, kind')
    says(lambda: FewShotClassifier.from_csv(tmp_path/'gone.csv', net), 'gone.csv cannot be read')
    says(lambda: FewShotClassifier.from_df(df.assign(photo=None), net, x='photo', y='kind'), '9 rows of the table have no file')

def test_hidden_folders_are_no_class(photos, net, tmp_path):
    shutil.copytree(photos/'few', tmp_path/'few')
    write_images(tmp_path/'few'/'.cache', ['x.png'], 20)
    assert FewShotClassifier.from_folder(tmp_path/'few', net).vocab == ['blue', 'green', 'red']
