"""Published weights: timm loads them, and they are as accurate as their card says."""
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from test_recipes import recipe
from test_study import SMALL
from timm.data import create_transform, resolve_model_data_config

import grdd_fastai  # noqa: F401
from grdd_fastai.core.errors import UserError
from grdd_fastai.data.blocks import plain_dl
from grdd_fastai.data.cache import few_shot_data
from grdd_fastai.experiments import publish as publishing
from grdd_fastai.experiments.publish import load_trained
from grdd_fastai.experiments.table import CL, EL, table
from grdd_fastai.fewshot.embed import embed
from grdd_fastai.fewshot.evaluate import evaluate
from grdd_fastai.models.backbones import WEIGHTS

SHIPPED = sorted(p.parent.name for p in WEIGHTS.glob('*/config.json'))


# ---- publishing -------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def trained(faint, cache, tmp_path_factory):
    "Folders of a CL and a CL+EL network; the set they were trained on"
    out = tmp_path_factory.mktemp('runs')
    made = table('a', {'CL':CL, 'CL+EL':EL}, out=out, data=str(faint), cache=str(cache), **SMALL)
    return {k:made.nets[k, 0]['net'] for k in ('CL','CL+EL')},dict(data=str(faint), cache=str(cache), test_episodes=60)

@pytest.mark.parametrize('which', ['CL', 'CL+EL'])
def test_timm_loads_what_is_published_as_it_was(trained, which, tmp_path):
    nets,given = trained
    recipe('publish')(run=str(nets[which].folder), out=str(tmp_path/'convnet4.mine'), **given)
    net,x = timm.create_model(f'local-dir:{tmp_path/"convnet4.mine"}', pretrained=True).eval(),torch.randn(3, 3, 32, 32)
    was = nets[which].net.eval()
    with torch.no_grad(): assert torch.allclose(net(x), was.forward_head(was.forward_features(x), pre_logits=True), atol=1e-5)
    stats = json.loads((nets[which].folder/'data.json').read_text())['stats']
    cfg = resolve_model_data_config(net)
    assert [list(cfg['mean']), list(cfg['std'])] == stats and cfg['input_size'] == (3, 32, 32) and cfg['crop_pct'] == 1

def test_the_card_says_what_an_evaluation_gives(trained, faint, cache, tmp_path):
    nets,given = trained
    run = nets['CL+EL']
    recipe('publish')(run=str(run.folder), out=str(tmp_path/'convnet4.mine'), results=str(tmp_path/'results'), **given)
    card,said = (tmp_path/'convnet4.mine'/'README.md').read_text(),json.loads((tmp_path/'convnet4.mine'/'measured.json').read_text())
    data = few_shot_data(faint, 32, cache)
    for shot in (1, 5):
        e = evaluate(*embed(run.net, plain_dl(data, 'test')), 5, shot, 15, 60)
        assert said['scores']['novel'][f'{shot}-shot']['accuracy'] == pytest.approx(e.accuracy, abs=1e-3)
        assert f'{e.accuracy:.2f} ± {e.ci95:.2f}' in card.split('| novel |')[1].splitlines()[0]
    assert (said['supervision'] == 'CL+EL' and '(113,088 parameters, 64 features)' in card
            and f'commit `{said["trained"]["commit"]}`' in card)
    logged = [json.loads(line) for line in (tmp_path/'results'/'novel_scorings.jsonl').read_text().splitlines()]
    assert sorted(o['shot'] for o in logged) == [1, 5]

def test_a_folder_that_is_no_training_and_other_data_are_refused(trained, tmp_path):
    with pytest.raises(UserError, match='holds no finished training'): load_trained(tmp_path)
    with pytest.raises(UserError, match='trained on other data'): load_trained(trained[0]['CL'].folder, 'f'*64)

def test_the_hub_gets_the_whole_folder(trained, tmp_path, monkeypatch):
    nets,given = trained
    pushed = {}
    api = SimpleNamespace(create_repo=lambda hub, exist_ok: pushed.update(made=hub),
                          upload_folder=lambda repo_id, folder_path, allow_patterns, commit_message:
                          pushed.update({repo_id:sorted(p.name for p in folder_path.iterdir() if p.name in allow_patterns)}))
    monkeypatch.setattr(publishing, 'HfApi', lambda **_: api)
    (tmp_path/'convnet4.mine').mkdir()
    (tmp_path/'convnet4.mine'/'private.txt').write_text('mine')
    recipe('publish')(run=str(nets['CL'].folder), out=str(tmp_path/'convnet4.mine'), hub='me/mine', **given)
    assert pushed == {'made':'me/mine', 'me/mine':['README.md','config.json','measured.json','model.safetensors']}
    assert "create_model('hf-hub:me/mine'" in (tmp_path/'convnet4.mine'/'README.md').read_text()
    def refused(hub, exist_ok): raise OSError('401 Unauthorized\nmore')
    monkeypatch.setattr(api, 'create_repo', refused)
    with pytest.raises(UserError, match=r'me/mine was not pushed \(401 Unauthorized\): log in'): publishing.push(tmp_path, 'me/mine')


# ---- the package's weights --------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', SHIPPED)
def test_shipped_weights_are_timms(name):
    "By the tag, as the architecture's default, for another number of classes and for grey images; listed; small"
    assert name in timm.list_pretrained() and (WEIGHTS/name/'model.safetensors').stat().st_size < 1e6
    a,b = (timm.create_model(n, pretrained=True).eval() for n in (name, name.partition('.')[0]))
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad(): assert torch.equal(a(x), b(x)) and a(x).shape == (2, a.num_features) and a.num_classes == 0
    five = timm.create_model(name, pretrained=True, num_classes=5).eval()
    with torch.no_grad(): assert torch.equal(five.forward_head(five.forward_features(x), pre_logits=True), a(x)) and five(x).shape == (2, 5)
    grey = timm.create_model(name, pretrained=True, in_chans=1).eval()
    with torch.no_grad(): assert torch.allclose(grey(x[:, :1]), a(x[:, :1].repeat(1, 3, 1, 1)), atol=1e-4)
    fresh = timm.create_model(name.partition('.')[0], num_classes=0)
    assert not torch.equal(fresh.stages[0][0].weight, a.stages[0][0].weight)

def test_shipped_convnet4_is_4_x_64():
    net = timm.create_model('convnet4.grdd_cifarfs', pretrained=True)
    assert ([m.out_channels for m in net.modules() if isinstance(m, torch.nn.Conv2d)] == [64]*4
            and sum(p.numel() for p in net.parameters()) <= 115_000)

def test_a_wrong_tag_is_an_error():
    with pytest.raises(RuntimeError, match='tag'): timm.create_model('convnet4.grdd_nothing', pretrained=True)

@pytest.mark.parametrize('name', SHIPPED)
@pytest.mark.parametrize('how', ['our loader', pytest.param("timm's transform", marks=pytest.mark.slow)])
def test_shipped_weights_are_as_accurate_as_their_card_says(name, how, real):
    "The first 2,000 novel episodes of the recorded ones, of the real CIFAR-FS, within 0.05 points"
    said = json.loads((WEIGHTS/name/'measured.json').read_text())
    net = timm.create_model(name, pretrained=True).eval()
    if how == 'our loader': h,y = embed(net, plain_dl(real, 'test'))
    else:
        transform = create_transform(**resolve_model_data_config(net))
        with torch.no_grad():
            h = torch.cat([net(torch.stack([transform(Image.fromarray(im)) for im in part]))
                           for part in np.array_split(real.test.images, 40)])
        y = torch.as_tensor(real.test.y)
    assert real.fingerprint == said['fingerprint'] and len(y) == 12_000
    for shot in (1, 5):
        recorded = said['scores']['novel'][f'{shot}-shot']
        assert evaluate(h, y, 5, shot, 15, recorded['first']['n']).accuracy == pytest.approx(recorded['first']['accuracy'], abs=.05)
        card = (WEIGHTS/name/'README.md').read_text()
        assert re.search(rf'\| novel \|.*{recorded["accuracy"]:.2f} ± {recorded["ci95"]:.2f}', card)
