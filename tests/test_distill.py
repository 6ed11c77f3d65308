"""From a large network to a small one: the folder, the comparison with the teacher and with labels alone, and what cannot be."""
import json

import pytest
import torch
from helpers import recipe, says

from grdd_fastai.data.blocks import plain_dl
from grdd_fastai.data.cache import few_shot_data
from grdd_fastai.fewshot.embed import embed
from grdd_fastai.fewshot.evaluate import evaluate
from grdd_fastai.models.create import create_backbone, seeing
from grdd_fastai.models.pretrained import load_network, save_network
from grdd_fastai.photos.classifier import FewShotClassifier

SHORT = dict(meta_epochs=1, episodes=4, meta_way=4, meta_query=3, views=2, test_episodes=60)


@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
    "A folder with a teacher for images of 48 px with a normalisation of its own"
    folder = tmp_path_factory.mktemp('teacher')/'large'
    save_network(create_backbone('convnet4', 0, 48, seed=3), folder, 48, (.5,)*3, (.25,)*3)
    return folder

def test_the_small_network_and_its_comparison(csv_set, cache, tmp_path, teacher):
    common = dict(data=str(csv_set), cache=str(cache), out=str(tmp_path/'a'), **SHORT)
    r = recipe('distill')(teacher=str(teacher), baseline_epochs=1, **common)
    assert r == json.loads((tmp_path/'a'/'result.json').read_text()) and r['status'] == 'finished'
    data = few_shot_data(csv_set, 32, cache)
    nets = dict(student=load_network(tmp_path/'a'/'network'), teacher=seeing(load_network(teacher), 32, data.stats),
                labels=load_network(tmp_path/'a'/'student_cl'))
    for shot in (1, 5):
        scores = {k:evaluate(*embed(net, plain_dl(data)), 5, shot, 15, 60, classifier='simpleshot_l2n') for k,net in nets.items()}
        for k,e in scores.items():
            assert r[f'accuracy_{k}'][f'{shot}-shot']['accuracy'] == pytest.approx(e.accuracy, abs=1e-2), k
            if k != 'student':
                difference = r[f'student_minus_{k}'][f'{shot}-shot']['difference']
                assert difference == pytest.approx(scores['student'].accuracy - e.accuracy, abs=1e-2)
    assert r['costs']['teacher']['px'] == 48 and r['costs']['student']['million_parameters'] == pytest.approx(.113088, abs=1e-3)
    again = recipe('distill')(teacher=str(teacher), baseline_epochs=1, resume=True, **common)
    assert again == r

def test_the_network_classifies_photos(csv_set, cache, tmp_path, teacher):
    recipe('distill')(teacher=str(teacher), data=str(csv_set), cache=str(cache), out=str(tmp_path/'a'), **SHORT)
    data = few_shot_data(csv_set, 32, cache)
    few = FewShotClassifier(tmp_path/'a'/'network').fit(list(data.test.images[:4]), ['a', 'a', 'b', 'b'])
    with torch.no_grad(): h = embed(load_network(tmp_path/'a'/'network'), plain_dl(data))[0][:4]
    assert torch.allclose(few.support.cpu(), h.cpu(), atol=1e-3)

def test_without_labels_their_loss_is_not_there(csv_set, cache, tmp_path, teacher):
    for name,labels in (('with', True), ('without', False)):
        recipe('distill')(teacher=str(teacher), data=str(csv_set), cache=str(cache), out=str(tmp_path/name), labels=labels, **SHORT)
    with_labels,without = (json.loads((tmp_path/k/'settings.json').read_text())['settings']['stage_two'] for k in ('with', 'without'))
    assert (with_labels.pop('gamma'), without.pop('gamma')) == (1, 0) and with_labels == without
    a,b = (load_network(tmp_path/k/'network').state_dict() for k in ('with', 'without'))
    assert any(not torch.equal(a[k], b[k]) for k in a)

def test_what_cannot_be_is_a_sentence(csv_set, cache, tmp_path):
    def run(**kwargs): recipe('distill')(**dict(data=str(csv_set), cache=str(cache), out=str(tmp_path/'a')) | SHORT | kwargs)
    says(run, 'no teacher is given', 'convnet4_256.grdd_cifarfs')
    says(lambda: run(teacher='nothing_like_it'), 'unknown backbone')
    says(lambda: run(teacher='convnet4.grdd_cifarfs', student='nothing_like_it'), 'unknown backbone')
    says(lambda: run(teacher='convnet4.grdd_cifarfs', way=99), '99')
    assert not (tmp_path/'a'/'settings.json').exists()
