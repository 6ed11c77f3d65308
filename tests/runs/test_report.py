"""The page of a run: what it says is what the run's files say, and it needs nothing beside it."""
import csv
import json
import re

import numpy as np
import pytest
import torch
from helpers import laid_out, net, recipe, settings
from naive import naive_embed

from grdd_fastai.core.html import text
from grdd_fastai.data.cache import few_shot_data
from grdd_fastai.fewshot.interpret import EpisodeInterpretation
from grdd_fastai.models.pretrained import load_network
from grdd_fastai.runs.report import PAPER_ACCURACY, embed_rows, plot_history, summary

RESULT = dict(student='convnet4', teacher='resnet12', classifier='cosine', accuracy=69.021, ci95=.226, accuracy_cl=60., ci95_cl=.2,
              gain=9.02, ci95_gain=.15, val_accuracy=62., val_accuracy_cl=55., test_episodes=10_000, epochs=90, meta_epochs=15,
              others=dict(ridge=dict(accuracy=70., ci95=.2, accuracy_cl=61.)))
EPISODE = dict(n_way=5, k_shot=1, n_query=15)


def named(name): return type('Data', (), dict(name=name))

def test_the_page_of_a_finished_run(finished_run, csv_set, cache):
    page,result = (finished_run/'report.html').read_text(),json.loads((finished_run/'result.json').read_text())
    command = json.loads((finished_run/'settings.json').read_text())['command']
    assert f'{result["accuracy"]:.2f} ± {result["ci95"]:.2f} %' in page and f'{result["gain"]:+.2f}' in page and text(command) in page
    assert page.count('<img') == len(re.findall(r'<img src="data:image/png;base64,', page)) == len(list(finished_run.glob('history_*'))) + 5
    assert not re.findall(r'(?:src|href)="(?!data:|#)[^"]*"|url\(|@import|<script', page)
    data = few_shot_data(csv_set, 32, cache)
    h = naive_embed(load_network(finished_run), torch.from_numpy(np.array(data.test.images)).movedim(-1, 1), data.stats)
    classes = EpisodeInterpretation(h, data.test.y, data.test.vocab, n_way=result['way'], k_shot=result['shot'],
                                    n_query=result['query']).classes
    shown = dict(re.findall(r'<td>(test\d)</td><td>([\d.]+)</td>', page))
    assert len(shown) == 6 and all(abs(float(shown[c]) - r.accuracy) < 1.5 for c,r in classes.iterrows())

@pytest.mark.parametrize('name, episode, change, says', [
    ('cifar_fs', {}, {}, '69.3 ± 0.9 % for convnet4'), ('cifar_fs', dict(k_shot=5), {}, '84.7 ± 0.6'),
    ('mini_imagenet', {}, dict(student='resnet12'), '67.5 ± 0.8'), ('cifar_fs', dict(n_way=20), {}, None), ('birds', {}, {}, None),
    ('cifar_fs', {}, dict(student='resnet10t'), None)])
def test_the_paper_is_named_where_it_can_be_compared(name, episode, change, says):
    page = ''.join(summary(RESULT | change, named(name), EPISODE | episode))
    assert '69.02 ± 0.23 %' in page and 'ridge: 70.00 ± 0.20 %' in page
    assert says in page if says else 'The paper' not in page

def test_a_demo_says_so():
    assert 'This is the demo' in ''.join(summary(RESULT, named('demo'), EPISODE)) and ('demo', 'convnet4') not in PAPER_ACCURACY

def test_histories_are_drawn_as_they_are(finished_run):
    file = finished_run/'history_student_cl.csv'
    rows = list(csv.DictReader(file.open()))
    left,right = plot_history(file).axes
    lines = {line.get_label():line.get_ydata() for line in left.lines}
    assert lines.keys() == {'train_loss', 'valid_loss', 'L_c', 'L_r'}
    assert all(np.allclose(lines[k], [float(r[k]) for r in rows]) for k in lines)
    assert np.allclose(right.lines[0].get_ydata(), [float(r['accuracy']) for r in rows])
    assert list(right.lines[0].get_xdata()) == [int(r['epoch']) + 1 for r in rows]

def test_some_images_are_embedded_as_in_an_evaluation(data):
    rows = np.array([5, 0, 7])
    want = naive_embed(net(0), torch.from_numpy(data.val.images[rows]).movedim(-1, 1), data.stats)
    assert torch.allclose(embed_rows(net(0), data, rows), want, atol=1e-4)

def test_overwrite_removes_the_page_of_the_old_run(finished, tmp_path, csv_set, cache):
    out = laid_out(finished, tmp_path/'run')
    recipe('cifarfs_5w1s')(out=str(out), overwrite=True, max_minutes=1e-9, **settings(csv_set, cache))
    assert not (out/'report.html').exists()
