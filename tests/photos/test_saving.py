"""A classifier that is saved and loaded gives the same predictions; what does not fit is a sentence."""
import json
import shutil

import numpy as np
import pytest
import timm
import torch
from helpers import says

from grdd_fastai.core.storage import load_tensors, save_tensors
from grdd_fastai.models.create import create_backbone
from grdd_fastai.photos.classifier import FewShotClassifier

IMAGES = [np.random.default_rng(i).integers(0, 256, (40, 50, 3), np.uint8) for i in range(8)]
LABELS = ['a', 'a', 'b', 'b', 'c', 'c', 'c', 'c']


@pytest.mark.parametrize('labels', [LABELS, [ord(o) for o in LABELS]])
@pytest.mark.parametrize('network, classifier', [('convnet4.grdd_cifarfs', 'cosine'), ('own', 'tim_adm(scale=6)'), ('vit', 'ridge')])
def test_it_comes_back_the_same(tmp_path, network, classifier, labels):
    "By the name of the package's weights; a network of one's own beside it, also a foreign one with its crop and normalisation"
    net = dict(own=lambda: create_backbone('convnet4_128', 0, 20), vit=lambda: timm.create_model('test_vit', num_classes=3))
    torch.manual_seed(0)
    few = FewShotClassifier(net[network]() if network in net else network, classifier, mirror=True, bs=3).fit(IMAGES, labels)
    folder = few.save(tmp_path/'mine')
    shutil.move(folder, tmp_path/'elsewhere')
    again = FewShotClassifier.load(tmp_path/'elsewhere')
    assert again.vocab == few.vocab and again.logits(IMAGES).equals(few.logits(IMAGES)) and again.files == [None]*8
    assert (tmp_path/'elsewhere'/'network').exists() == (network in net)
    assert not [f for f in (tmp_path/'elsewhere').rglob('*') if f.is_file() and f.suffix not in ('.safetensors', '.json')]
    again.add(IMAGES[0], labels[0]).save(tmp_path/'third')
    assert len(FewShotClassifier.load(tmp_path/'third').support) == 9

def saved(folder): return FewShotClassifier().fit(IMAGES, LABELS).save(folder)

@pytest.mark.parametrize('change, word', [
    (dict(sha256='0'*64), 'other weights'), (dict(format=2), 'has format 2'), (dict(vocab=['a', 'b']), 'is damaged'),
    (dict(files=[None]), 'is damaged'), (dict(classifier='nothing'), 'unknown classifier'), (dict(px=0), 'px is 0'),
    (dict(network='nothing'), 'unknown backbone'), (dict(settings=dict(x=1)), "no setting 'x'"), (dict(stats=[1, 2]), 'stats is'),
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
