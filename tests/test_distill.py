"""From a large network to a small one: the folder, the comparison with the teacher and with labels alone, and what cannot be."""
import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import recipe, same_state, says

from grdd_fastai.data.blocks import plain_dl
from grdd_fastai.data.cache import few_shot_data
from grdd_fastai.distill import without_classes
from grdd_fastai.experiments.report.markdown import accuracy_text
from grdd_fastai.experiments.report.photos import distill_table
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
    again = recipe('distill')(teacher=str(teacher), baseline_epochs=1, resume=True, results=str(tmp_path/'results'), **common)
    record, = (tmp_path/'results').iterdir()
    kept = json.loads(record.read_text())
    assert again == r and str(tmp_path) not in record.read_text()
    assert str(teacher) not in record.read_text() and {k:v for k,v in kept.items() if k in r} == r | dict(teacher=teacher.name)
    assert record.name.startswith(f'distill-convnet4-{data.name}-') and kept['data']['fingerprint'] == data.fingerprint
    row = distill_table(tmp_path/'results').splitlines()[-1]
    assert all(accuracy_text(r[f'accuracy_{k}'][shot]) in row for k in nets for shot in ('1-shot', '5-shot')) and record.name in row

def test_the_network_classifies_photos(csv_set, cache, tmp_path, teacher):
    recipe('distill')(teacher=str(teacher), data=str(csv_set), cache=str(cache), out=str(tmp_path/'a'), **SHORT)
    data = few_shot_data(csv_set, 32, cache)
    few = FewShotClassifier(tmp_path/'a'/'network').fit(list(data.test.images[:4]), ['a', 'a', 'b', 'b'])
    with torch.no_grad(): h = embed(load_network(tmp_path/'a'/'network'), plain_dl(data))[0][:4]
    assert torch.allclose(few.support.cpu(), h.cpu(), atol=1e-3)

def test_without_labels_nothing_depends_on_them(csv_set, cache, tmp_path, teacher):
    "All base images in one folder of a name that says nothing give the same network as the same images in their classes"
    one = tmp_path/'one'
    shutil.copytree(csv_set, one)
    base = pd.read_csv(one/'train.csv')
    base.assign(label='photos').to_csv(one/'train.csv', index=False)
    for name,data in (('classes', csv_set), ('one folder', one)):
        recipe('distill')(teacher=str(teacher), data=str(data), cache=str(cache), out=str(tmp_path/name), unlabeled=True, **SHORT)
    a,b = (load_network(tmp_path/k/'network').state_dict() for k in ('classes', 'one folder'))
    assert same_state(a, b)
    two = json.loads((tmp_path/'classes'/'settings.json').read_text())['settings']['stage_two']
    header = (tmp_path/'classes'/'history_student_grdd.csv').read_text().splitlines()[0]
    assert two['gamma'] == 0 and 'L_kl' in header

def test_random_groups_are_of_equal_size(data):
    free = without_classes(data, 7, seed=1)
    n = np.bincount(free.train.y)
    assert len(n) == len(free.train.vocab) == 7 and n.max() - n.min() <= 1 and len(data.train.vocab) == 6
    assert free.train.images is data.train.images and not np.array_equal(free.train.y, without_classes(data, 7, seed=2).train.y)

def test_what_cannot_be_is_a_sentence(csv_set, cache, tmp_path):
    def run(**kwargs): recipe('distill')(**dict(data=str(csv_set), cache=str(cache), out=str(tmp_path/'a')) | SHORT | kwargs)
    says(run, 'no teacher is given', 'convnet4_256.grdd_cifarfs')
    says(lambda: run(teacher='nothing_like_it'), 'unknown backbone')
    says(lambda: run(teacher='convnet4.grdd_cifarfs', student='nothing_like_it'), 'unknown backbone')
    says(lambda: run(teacher='convnet4.grdd_cifarfs', way=99), '99')
    says(lambda: run(teacher='convnet4.grdd_cifarfs', unlabeled=True, gamma=.5), '--gamma', '--unlabeled')
    says(lambda: run(teacher='convnet4.grdd_cifarfs', unlabeled=True, baseline_epochs=2), '--baseline-epochs', '--unlabeled')
    assert not (tmp_path/'a'/'settings.json').exists()
