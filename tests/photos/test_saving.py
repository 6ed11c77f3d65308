"""Test that a saved and loaded classifier gives the same predictions, and the error messages for damaged files."""
import json
import shutil

import numpy as np
import pytest
import timm
import torch
from helpers import says, write_images

from grdd_fastai.core.storage import load_tensors, save_tensors
from grdd_fastai.models.create import create_backbone
from grdd_fastai.photos.classifier import FewShotClassifier

IMAGES = [np.random.default_rng(i).integers(0, 256, (40, 50, 3), np.uint8) for i in range(8)]
LABELS = ['a', 'a', 'b', 'b', 'c', 'c', 'c', 'c']


@pytest.mark.parametrize('labels', [LABELS, [ord(o) for o in LABELS]])
@pytest.mark.parametrize('network, classifier', [('convnet4.grdd_cifarfs', 'cosine'), ('own', 'tim_adm(scale=6)'), ('vit', 'ridge')])
def test_it_comes_back_the_same(tmp_path, network, classifier, labels):
    "The package's weights are saved by name; other networks are saved with the classifier, with their crop and normalisation"
    net = dict(own=lambda: create_backbone('convnet4_128', 0, 20), vit=lambda: timm.create_model('test_vit', num_classes=3))
    torch.manual_seed(0)
    few = FewShotClassifier(net[network]() if network in net else network, classifier, mirror=True, bs=3).fit(IMAGES, labels)
    folder = few.save(tmp_path/'mine')
    shutil.move(folder, tmp_path/'elsewhere')
    again = FewShotClassifier.load(tmp_path/'elsewhere')
    assert again.vocab == few.vocab and again.logits(IMAGES).equals(few.logits(IMAGES)) and again.files == [None]*8
    assert bool(list((tmp_path/'elsewhere').glob('network-*'))) == (network in net)
    assert not [f for f in (tmp_path/'elsewhere').rglob('*') if f.is_file() and f.suffix not in ('.safetensors', '.json')]
    again.add(IMAGES[0], labels[0]).save(tmp_path/'third')
    assert len(FewShotClassifier.load(tmp_path/'third').support) == 9

def test_the_crop_of_a_network_comes_back(tmp_path):
    "The images are not square, so that squashing and cropping give different results"
    net = create_backbone('convnet4', 0, 20, seed=3)
    net.pretrained_cfg = net.pretrained_cfg | dict(crop_mode='squash', crop_pct=.8, interpolation='bilinear')
    few = FewShotClassifier(net).fit(IMAGES, LABELS)
    again = FewShotClassifier.load(few.save(tmp_path/'mine'))
    assert again.logits(IMAGES).equals(few.logits(IMAGES))
    net.pretrained_cfg = net.pretrained_cfg | dict(crop_mode='center')
    assert not FewShotClassifier(net).fit(IMAGES, LABELS).logits(IMAGES).equals(few.logits(IMAGES))

def saved(folder): return FewShotClassifier().fit(IMAGES, LABELS).save(folder)

@pytest.mark.parametrize('change, word', [
    (dict(sha256='0'*64), 'other weights'), (dict(format=3), 'has format 3'), (dict(vocab=['a', 'b']), 'is damaged'),
    (dict(chosen='ridge'), 'is damaged'), (dict(unknown=2), 'unknown is 2'), (dict(unknown='x'), 'is damaged'),
    (dict(files=[None]), 'is damaged'), (dict(classifier='nothing', chosen='nothing'), 'unknown classifier'), (dict(px=0), 'px is 0'),
    (dict(network='nothing'), 'is damaged'), (dict(network='/etc'), 'is damaged'), (dict(bs=10**9), 'is damaged'),
    (dict(settings=dict(device='cpu')), 'is damaged'), (dict(settings=dict(x=1)), "no setting 'x'"), (dict(stats=[1, 2]), 'stats is'),
    (dict(network=3), 'is damaged')])
def test_forged_files_are_a_sentence(tmp_path, change, word):
    path = saved(tmp_path/'a')/'classifier.safetensors'
    tensors,meta = load_tensors(path)
    save_tensors(path, tensors, meta | change)
    says(lambda: FewShotClassifier.load(tmp_path/'a'), word)

@pytest.mark.parametrize('change', [dict(h=torch.full((8, 64), torch.nan)), dict(y=torch.zeros(8, dtype=torch.long)),
                                    dict(h=torch.zeros(3, 64))])
def test_forged_tensors_are_a_sentence(tmp_path, change):
    path = saved(tmp_path/'a')/'classifier.safetensors'
    tensors,meta = load_tensors(path)
    save_tensors(path, tensors | change, meta)
    says(lambda: FewShotClassifier.load(tmp_path/'a'), 'is damaged')

def test_a_save_that_fails_leaves_the_classifier_that_was_there(tmp_path):
    "A save that succeeds removes the network of the classifier that it replaces"
    own = FewShotClassifier(create_backbone('convnet4', 0, 20, seed=3)).fit(IMAGES, LABELS)
    own.save(tmp_path/'a')
    bad = FewShotClassifier(classifier='tim_adm', scale=6.).fit(IMAGES, LABELS)
    bad.settings = dict(scale=torch.tensor(6.))
    says(lambda: bad.save(tmp_path/'a'), 'a setting of the classifier cannot be written')
    assert FewShotClassifier.load(tmp_path/'a').logits(IMAGES).equals(own.logits(IMAGES))
    saved(tmp_path/'a')
    assert [f.name for f in (tmp_path/'a').iterdir()] == ['classifier.safetensors']

def test_a_saved_folder_tells_nothing_of_this_machine(tmp_path):
    write_images(tmp_path/'few'/'cat', ['1.png', '2.png'], 20)
    write_images(tmp_path/'few'/'dog', ['1.png'], 20)
    folder = FewShotClassifier.from_folder(tmp_path/'few').save(tmp_path/'mine')
    assert FewShotClassifier.load(folder).files == ['cat/1.png', 'cat/2.png', 'dog/1.png']
    assert not any(str(tmp_path).encode() in f.read_bytes() for f in folder.rglob('*') if f.is_file())

def test_a_large_bs_can_be_saved(tmp_path):
    "It is reduced, because `load` refuses files that ask for a larger one"
    few = FewShotClassifier(bs=10**6).fit(IMAGES, LABELS)
    again = FewShotClassifier.load(few.save(tmp_path/'a'))
    assert again.bs < few.bs and again.predict(IMAGES) == few.predict(IMAGES)

def test_what_cannot_be_saved_or_loaded_is_a_sentence(tmp_path):
    says(lambda: FewShotClassifier().save(tmp_path/'a'), 'no classes yet')
    says(lambda: FewShotClassifier(classifier=lambda s, y, q: q[..., :3]).fit(IMAGES, LABELS).save(tmp_path/'a'), 'is a function')
    says(lambda: FewShotClassifier().fit(IMAGES, [(o, 1) for o in LABELS]).save(tmp_path/'a'), "('a', 1) is a tuple")
    says(lambda: FewShotClassifier.load(tmp_path/'nowhere'), 'holds no classifier.safetensors')
    (tmp_path/'b').mkdir()
    (tmp_path/'b'/'classifier.safetensors').write_bytes(b'x'*100)
    says(lambda: FewShotClassifier.load(tmp_path/'b'), 'is damaged or not ours')
    says(lambda: saved(tmp_path/'b'/'classifier.safetensors'), 'cannot be written')

def test_a_network_that_timm_cannot_make_is_not_saved_in_silence(tmp_path):
    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv,self.pretrained_cfg = torch.nn.Conv2d(3, 4, 3),dict(input_size=(3, 8, 8), mean=(.5,)*3, std=(.5,)*3)
        def forward(self, x): return self.conv(x).mean((2, 3))
    says(lambda: FewShotClassifier(Own()).fit(IMAGES, LABELS).save(tmp_path/'a'), 'cannot be saved', 'no timm model')
    assert not (tmp_path/'a').exists() or json.dumps([f.name for f in (tmp_path/'a').iterdir()]) == '[]'
