"""A classifier's name may have settings, and `tune` chooses settings on episodes."""
import itertools
import json
from functools import partial

import numpy as np
import pytest
import torch
from helpers import recipe

from grdd_fastai.core.errors import UserError
from grdd_fastai.fewshot.classifiers import CLASSIFIERS, get_classifier, register_classifier, split_names, with_base_mean
from grdd_fastai.fewshot.evaluate import evaluate
from grdd_fastai.fewshot.tune import FACTORS, tune
from grdd_fastai.models.create import create_backbone
from grdd_fastai.photos.classifier import FewShotClassifier

Y = np.repeat(np.arange(8), 20)

@pytest.fixture
def h(): return torch.eye(8)[Y] + .8*torch.randn(len(Y), 8, generator=torch.Generator().manual_seed(0))

@pytest.fixture
def peaked():
    "A classifier with known best settings: noise is added to the cosines unless a=6 and b=0.5; `c`, `tol` and `whether` change nothing"
    @register_classifier('peaked')
    def peaked(support, support_y, query, a=1.5, b=2., c=3, tol=1., whether=True):
        noise = abs(np.log(a/6)) + abs(np.log(b/.5))
        cosines = CLASSIFIERS['prototype_cosine'](support, support_y, query)
        return cosines + noise*torch.randn(cosines.shape, generator=torch.Generator().manual_seed(1))
    yield
    del CLASSIFIERS['peaked']


def test_settings_in_a_name_are_those_of_the_function(h):
    found = evaluate(h, Y, n_episodes=30, classifier=['tim_adm', 'tim_adm( scale = 2., steps=9 )'])
    plain,named = found.values()
    by_hand = evaluate(h, Y, n_episodes=30, classifier=lambda *e: CLASSIFIERS['tim_adm'](*e, scale=2., steps=9))
    assert np.array_equal(named.episodes, by_hand.episodes) and not np.array_equal(named.episodes, plain.episodes)
    assert named.classifier == 'tim_adm( scale = 2., steps=9 )'
    assert split_names('cosine, tim_adm(scale=2, steps=9),ridge') == ['cosine', 'tim_adm(scale=2, steps=9)', 'ridge']
    mean = with_base_mean(['simpleshot_cl2n'], lambda: h)['simpleshot_cl2n'].keywords['mean']
    assert torch.equal(mean, h.mean(0))

def test_a_photo_classifier_takes_settings_in_the_name():
    net,images = create_backbone('convnet4', 0, seed=0),np.random.default_rng(0).integers(0, 255, (8, 32, 32, 3), dtype=np.uint8)
    a,b = (FewShotClassifier(net, *how, **kw).fit(list(images[:4]), list('aabb'))
           for how,kw in ((['bd_cspn(scale=3.)'], {}), (['bd_cspn'], dict(scale=3.))))
    assert list(a.predict(list(images[4:]))) == list(b.predict(list(images[4:])))

@pytest.mark.parametrize('wrong, says', [
    ('tim_adm(scale)', 'is not understood'), ('tim_adm(scale=6', 'is not understood'), ('tim_adm(scale=6, scale=7)', 'is not understood'),
     ('tim_adm(scale=)', 'is not understood'), ('tim_adm(2=3)', 'is not understood'),
    ('tim_adm(scael=3)', "tim_adm has no setting 'scael'"), ('tim_adm(scale=-1)', 'scale is -1'),
    ('magic(a=1)', "unknown classifier 'magic'"), ("tim_adm(scale='x')", "scale is 'x'")])
def test_settings_that_cannot_be_are_a_sentence(wrong, says):
    with pytest.raises(UserError, match=says): get_classifier(wrong)

def test_tuning_finds_the_peak(h, peaked):
    "1.5 * 4 and 2 / 4 are the best values, and everything that was tried is in the table once"
    text,table = tune(h, Y, 'peaked', n_episodes=60)
    assert text == 'peaked(a=6, b=0.5)'
    best = table.set_index('classifier').accuracy[text]
    assert best == table.accuracy.max() == pytest.approx(evaluate(h, Y, n_episodes=60, classifier='prototype_cosine').accuracy)
    assert table.classifier.is_unique and table.classifier[0] == 'peaked(a=1.5, b=2)'

def test_tuning_ends_where_a_search_of_all_neighbours_finds_nothing_better(h):
    "Two settings of TIM are tuned, and then each is changed by each factor"
    how = dict(n_episodes=80, k_shot=1, seed=3)
    text,_ = tune(h, Y, 'tim_adm(steps=10)', only=['scale', 'marginal_weight'], rounds=9, **how)
    values = get_classifier(text).keywords
    assert values['steps'] == 10 and values.keys() == {'steps', 'scale', 'marginal_weight'}
    best = evaluate(h, Y, classifier=text, **how).accuracy
    for k,f in itertools.product(('scale', 'marginal_weight'), FACTORS):
        near = partial(CLASSIFIERS['tim_adm'], **values | {k:values[k]*f})
        assert evaluate(h, Y, classifier=near, **how).accuracy <= best

def test_what_cannot_be_tuned_is_a_sentence(h):
    with pytest.raises(UserError, match='cosine has no settings that can be tuned'): tune(h, Y, 'cosine')
    with pytest.raises(UserError, match='steps is no setting of tim_adm that can be tuned: these are scale, ce_weight, '):
        tune(h, Y, 'tim_adm', only=['steps'])

def test_the_recipe_says_how_to_score_what_it_chose(two_nets, faint, cache, tmp_path, capsys):
    net = str(two_nets/'student_cl')
    recipe('tune_classifiers')(net, data=str(faint), cache=str(cache), classifiers='tim_adm(steps=5)', shots='1', episodes=20, rounds=1,
                               mirror=True, out=str(tmp_path/'out'), results=str(tmp_path/'results'))
    said = capsys.readouterr()
    record = json.loads(next((tmp_path/'results').glob('tuned-*.json')).read_text())
    chosen = record['chosen'][0]['chosen']
    assert record['mirror'] and chosen in [t['classifier'] for t in record['tried']] and len(record['tried']) == 1 + 4*4
    assert f"--score novel --shots 1 --classifiers '{chosen}' --query-distribution balanced --mirror" in said.err
    recipe('evaluate_weights')(net, data=str(faint), cache=str(cache), score='novel', shots='1', classifiers=chosen, mirror=True,
                               test_episodes=20, out=str(tmp_path/'out'))
    assert json.loads(capsys.readouterr().out.splitlines()[-1])['rows'] == 1
