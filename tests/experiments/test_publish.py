"""Published weights: timm loads them, their card says what an evaluation gives, and nothing of others is replaced."""
import json
import threading
from types import SimpleNamespace

import pytest
import timm
import torch
from helpers import ABOUT, NO_FOLDER, TABLE, recipe, says
from timm.data import resolve_model_data_config

from grdd_fastai.core.errors import UserError
from grdd_fastai.data.blocks import plain_dl
from grdd_fastai.data.cache import few_shot_data
from grdd_fastai.experiments import publish as publishing
from grdd_fastai.experiments.publish import load_trained, publish
from grdd_fastai.experiments.table import CL, EL, table
from grdd_fastai.fewshot.embed import embed
from grdd_fastai.fewshot.evaluate import evaluate
from grdd_fastai.models.create import create_backbone
from grdd_fastai.runs.provenance import command


@pytest.fixture(scope='module')
def trained(faint, cache, tmp_path_factory):
    "Folders of a CL and a CL+EL network; the set they were trained on"
    out = tmp_path_factory.mktemp('runs')
    made = table('a', {'CL':CL, 'CL+EL':EL}, out=out, data=str(faint), cache=str(cache), **TABLE)
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

def test_a_push_that_hangs_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(publishing, 'HfApi', lambda **_: SimpleNamespace(create_repo=lambda *_, **__: threading.Event().wait()))
    says(lambda: publishing.push(tmp_path, 'me/mine', minutes=.01), 'me/mine was not pushed (no answer in 0.01 minutes)')

def test_cards_have_no_paths_of_a_machine(tmp_path):
    about = ABOUT | dict(trained=ABOUT['trained'] | dict(command=command(ABOUT['trained']['command'].split()[1:])))
    publish(create_backbone('convnet4', 0), about, tmp_path/'convnet4.mine')
    for f in (tmp_path/'convnet4.mine').glob('*[dn]'): assert str(tmp_path) not in f.read_text() and 'alice' not in f.read_text(), f

def test_publish_replaces_nothing_that_is_not_its_own(tmp_path):
    (tmp_path/'mine').mkdir()
    (tmp_path/'mine'/'README.md').write_text('mine')
    says(lambda: publish(create_backbone('convnet4', 0), ABOUT, tmp_path/'mine'), 'holds README.md of something else')
    assert (tmp_path/'mine'/'README.md').read_text() == 'mine'
    publish(create_backbone('convnet4', 0), ABOUT | dict(sha256='a'), tmp_path/'other')
    says(lambda: publish(create_backbone('convnet4', 0), ABOUT | dict(sha256='b'), tmp_path/'other'), 'of something else')
    publish(create_backbone('convnet4', 0), ABOUT | dict(sha256='a'), tmp_path/'other')

def test_publish_says_what_it_cannot_write_before_it_scores(tmp_path):
    says(lambda: recipe('publish')(run=str(tmp_path), results=NO_FOLDER), '--results')
