"""Networks by name or path, features kept on disk, and the table made from them."""
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from conftest import ROOT
from test_recipes import recipe

import grdd_fastai  # noqa: F401
from grdd_fastai.core.errors import UserError
from grdd_fastai.data.augment import train_augmentation
from grdd_fastai.data.blocks import plain_dl
from grdd_fastai.data.cache import few_shot_data
from grdd_fastai.fewshot.embed import embed, feature_bank
from grdd_fastai.fewshot.evaluate import evaluate
from grdd_fastai.models.create import create_backbone, images_of
from grdd_fastai.models.pretrained import load_network, save_weights


@pytest.fixture(scope='module')
def faint_data(faint, cache): return few_shot_data(faint, 32, cache)

@pytest.fixture(scope='module')
def two(tmp_path_factory, faint_data):
    "Weights of a network with a classifier and of one without, as runs save them"
    out = tmp_path_factory.mktemp('nets')
    for name,n,seed in (('student_cl', 6, 0), ('student_grdd', 0, 1)):
        save_weights(create_backbone('convnet4', n, 32, seed), out/name, arch='convnet4', px=32, classes=faint_data.train.vocab,
                     stats=faint_data.stats)
    return out

def test_networks_load_by_every_name(two, faint_data):
    x = torch.randn(2, 3, 32, 32)
    for name,seed,spelled in (('student_cl', 0, '{}'), ('student_grdd', 1, '{}'), ('student_grdd', 1, '{}.safetensors')):
        net = load_network(spelled.format(two/name))
        was = create_backbone('convnet4', 6 if seed == 0 else 0, 32, seed).eval()
        with torch.no_grad(): assert torch.allclose(net.eval()(x), was.forward_head(was.forward_features(x), pre_logits=True), atol=1e-6)
        assert images_of(net) == (32, *faint_data.stats)
    assert torch.equal(load_network(two).stages[0][0].weight, net.stages[0][0].weight) # the folder of a run: its student

@pytest.mark.parametrize('of, sentence', [('nothing_like_it', 'unknown backbone'), ('convnet4.nothing', 'has no pretrained weights'),
                                          ('resnet12', 'has no pretrained weights'), ('convnet4.untrained', 'has no pretrained weights'),
                                          (str(ROOT/'docs'), 'holds no network')])
def test_what_is_no_network_gets_a_sentence(of, sentence):
    with pytest.raises(UserError, match=sentence): load_network(of)

def test_features_are_embedded_once(two, faint_data, cache, monkeypatch):
    net = load_network(two/'student_cl')
    h,y = feature_bank(net, faint_data, 'test', cache=cache)
    assert torch.allclose(h, embed(net, plain_dl(faint_data, 'test'))[0], atol=1e-5) and (y.numpy() == faint_data.test.y).all()
    monkeypatch.setattr('grdd_fastai.fewshot.embed.embed', lambda *_, **__: pytest.fail('embedded again'))
    assert torch.equal(feature_bank(net, faint_data, 'test', cache=cache)[0], h)
    other = load_network(two/'student_cl')
    other.pretrained_cfg = other.pretrained_cfg | dict(mean=(.5,.5,.5))
    for change in (dict(split='val'), dict(net=other), dict(views=2), dict(net=load_network(two/'student_grdd'))):
        with pytest.raises(pytest.fail.Exception): feature_bank(**dict(net=net, data=faint_data, split='test', cache=cache) | change)

def test_a_damaged_feature_file_is_made_again(two, faint_data, tmp_path):
    net = load_network(two/'student_cl')
    h = feature_bank(net, faint_data, 'test', cache=tmp_path)[0].clone() # not the file's own memory
    path, = (tmp_path/'features').glob('*.npy')
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)
    assert torch.equal(feature_bank(net, faint_data, 'test', cache=tmp_path)[0], h)

def test_views_are_training_augmentations_of_the_image(two, faint_data, tmp_path):
    net = load_network(two/'student_cl')
    clean,_ = feature_bank(net, faint_data, 'test', cache=tmp_path)
    a,b,other = (feature_bank(net, faint_data, 'test', views=n, seed=seed, cache=tmp_path)[0] for n,seed in ((2, 0), (3, 0), (2, 1)))
    assert a.shape == (2, *clean.shape) and torch.equal(a, b[:2]) and not torch.equal(a[0], a[1]) and not torch.equal(a, other)
    aug,images = train_augmentation(32),torch.from_numpy(np.array(faint_data.test.images)).movedim(-1, 1)
    mean,std = (torch.tensor(s).view(3, 1, 1) for s in faint_data.stats)
    for v in range(2): # by hand
        with torch.no_grad(): h = net.eval()((aug(images, 0, v, range(len(images)))/255 - mean) / std)
        assert torch.allclose(a[v], h, atol=1e-4)

def test_the_table_is_what_evaluate_gives(two, faint, faint_data, cache, tmp_path, capsys):
    nets = [str(two/'student_cl'), str(two/'student_grdd')]
    recipe('evaluate_weights')(*nets, data=str(faint), score='novel', ways='3,5', shots='1,2', queries='4',
                               classifiers='cosine,simpleshot_cl2n,tim_adm', test_episodes=50,
                               out=str(tmp_path/'out'), results=str(tmp_path/'results'), cache=str(cache))
    said = json.loads(capsys.readouterr().out)
    table,record = pd.read_csv(said['csv']),json.loads(Path(said['record']).read_text())
    assert (len(table) == 2*4*3 and said['rows'] == 24 and len(record['scores']) == 24 and record['command']
            and record['data']['fingerprint'] == faint_data.fingerprint)
    h = [embed(load_network(n), plain_dl(faint_data, 'test')) for n in nets]
    of = table.set_index(['network','way','shot','classifier']).accuracy
    for n,(x,y) in zip(nets, h): assert of[n, 3, 2, 'cosine'] == pytest.approx(evaluate(x, y, 3, 2, 4, 50).accuracy, abs=1e-3)
    pairs = pd.read_csv(said['csv'].replace('.csv', '_pairs.csv')).set_index(['way','shot','classifier'])
    assert (pairs.difference[5, 1, 'cosine']
            == pytest.approx(evaluate(*h[1], 5, 1, 4, 50).accuracy - evaluate(*h[0], 5, 1, 4, 50).accuracy, abs=1e-3))
    assert (len((tmp_path/'results'/'novel_scorings.jsonl').read_text().splitlines()) == 24
            and len(list((tmp_path/'results').glob('inference-*.json'))) == 1)

@pytest.mark.parametrize('wrong, sentence', [
    (dict(score='test'), '--score is test'), (dict(seed=-1), '--seed is -1'),
    (dict(out='/dev/null/x'), 'cannot be written'), (dict(classifiers='cosine,magic'), "unknown classifier 'magic'"),
    (dict(query_distribution='odd'), '--query-distribution is odd'), (dict(ways='7'), 'too few for 7-way'),
    (dict(shots='x'), "--shots is 'x'"), (dict(support_views=-1), '--support-views is -1')])
def test_wrong_settings_get_a_sentence(two, faint, cache, tmp_path, wrong, sentence):
    with pytest.raises(UserError, match=sentence):
        recipe('evaluate_weights')(str(two/'student_cl'), **dict(data=str(faint), cache=str(cache), out=str(tmp_path)) | wrong)

def test_a_network_that_is_no_convnet_loads_without_its_classifier(faint_data, tmp_path):
    save_weights(create_backbone('resnet18', 6, 32, 0), tmp_path/'student_cl', arch='resnet18', px=32, classes=faint_data.train.vocab,
                 stats=faint_data.stats)
    net,x = load_network(tmp_path/'student_cl').eval(),torch.randn(1, 3, 32, 32)
    was = create_backbone('resnet18', 6, 32, 0).eval()
    with torch.no_grad(): assert torch.equal(net(x), was.forward_head(was.forward_features(x), pre_logits=True))

def test_a_damaged_card_gets_a_sentence(two, tmp_path):
    (tmp_path/'net.json').write_text('{"arch"')
    (tmp_path/'net.safetensors').write_bytes(b'')
    with pytest.raises(UserError, match='is damaged or no network'): load_network(tmp_path)

def test_images_are_normalised_as_the_network_wants_them(faint_data, cache):
    "Its own mean and standard deviation, not the data's, by hand"
    net = timm.create_model('convnet4', num_classes=0)
    net.pretrained_cfg = net.pretrained_cfg | dict(mean=(.1, .2, .3), std=(.4, .5, .6))
    mean,std = (torch.tensor(v).view(3, 1, 1) for v in ((.1, .2, .3), (.4, .5, .6)))
    x = torch.from_numpy(np.array(faint_data.test.images)).movedim(-1, 1)/255
    with torch.no_grad(): h = net.eval()((x - mean) / std)
    assert torch.allclose(feature_bank(net, faint_data, 'test', cache=cache)[0], h, atol=1e-4)
