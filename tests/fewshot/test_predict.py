"""A few images a class to predictions: those of the features by hand, and a sentence for what cannot be."""
import os

import numpy as np
import pytest
import timm
import torch
from helpers import posix, says, write_images
from naive import naive_logits_of_photos
from PIL import Image

from grdd_fastai.core.errors import UserError
from grdd_fastai.data.blocks import category_dls, episodic_dls
from grdd_fastai.data.cache import few_shot_data
from grdd_fastai.fewshot.predict import FewShotClassifier
from grdd_fastai.models.create import create_backbone, features
from grdd_fastai.stage_one import global_learner
from grdd_fastai.stage_two import meta_learner


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    "Folders red, green and blue of three images each, and others of the same colours"
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
    few = FewShotClassifier.from_folder(photos/'few', net)
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
    (lambda p, n: FewShotClassifier.from_folder(p/'few', n).predict(p/'x.png'), 'cannot be read as an image'),
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
    says(lambda: FewShotClassifier(net).fit([f, f], ['a', 'b']), 'photo.png cannot be read as an image')

@pytest.mark.parametrize('images', [torch.zeros(2, 3, 8, 8), [5, 5], None, 7])
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
