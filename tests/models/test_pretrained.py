"""Networks by name or path, and from strangers: read as they were saved, or refused with a sentence."""
import json
import os

import pytest
import torch
from helpers import ABOUT, ROOT, forged, posix, says

from grdd_fastai.core.errors import UserError
from grdd_fastai.experiments.publish import publish
from grdd_fastai.models.create import create_backbone, input_config
from grdd_fastai.models.pretrained import load_network, save_weights


def test_networks_load_by_every_name(two_nets, faint_data):
    x = torch.randn(2, 3, 32, 32)
    for name,seed,spelled in (('student_cl', 0, '{}'), ('student_grdd', 1, '{}'), ('student_grdd', 1, '{}.safetensors')):
        net = load_network(spelled.format(two_nets/name))
        was = create_backbone('convnet4', 6 if seed == 0 else 0, 32, seed).eval()
        with torch.no_grad(): assert torch.allclose(net.eval()(x), was.forward_head(was.forward_features(x), pre_logits=True), atol=1e-6)
        assert input_config(net) == (32, *faint_data.stats)
    assert torch.equal(load_network(two_nets).stages[0][0].weight, net.stages[0][0].weight) # the folder of a run: its student

@pytest.mark.parametrize('of, sentence', [('nothing_like_it', 'unknown backbone'), ('convnet4.nothing', 'has no pretrained weights'),
                                          ('resnet12', 'has no pretrained weights'), ('convnet4.untrained', 'has no pretrained weights'),
                                          (str(ROOT/'docs'), 'holds no network')])
def test_what_is_no_network_gets_a_sentence(of, sentence):
    with pytest.raises(UserError, match=sentence): load_network(of)

def test_a_network_that_is_no_convnet_loads_without_its_classifier(faint_data, tmp_path):
    save_weights(create_backbone('resnet18', 6, 32, 0), tmp_path/'student_cl', arch='resnet18', px=32, classes=faint_data.train.vocab,
                 stats=faint_data.stats)
    net,x = load_network(tmp_path/'student_cl').eval(),torch.randn(1, 3, 32, 32)
    was = create_backbone('resnet18', 6, 32, 0).eval()
    with torch.no_grad(): assert torch.equal(net(x), was.forward_head(was.forward_features(x), pre_logits=True))

def test_a_damaged_card_gets_a_sentence(two_nets, tmp_path):
    (tmp_path/'net.json').write_text('{"arch"')
    (tmp_path/'net.safetensors').write_bytes(b'')
    with pytest.raises(UserError, match='is damaged or no network'): load_network(tmp_path)


# ---- networks from strangers ------------------------------------------------------------------------------------------

def test_a_published_network_is_read_as_it_was(tmp_path):
    net = load_network(forged(tmp_path/'convnet4.mine')).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad(): assert torch.equal(net(x), create_backbone('convnet4', 0).eval()(x))
    assert net.pretrained_cfg['mean'] == (.5, .5, .5) and net.pretrained_cfg['input_size'] == (3, 32, 32)

@pytest.mark.parametrize('name', ['pytorch_model.bin', 'model.pth', 'weights.pt'])
def test_pickles_are_refused_before_they_are_opened(tmp_path, name):
    folder = forged(tmp_path/'convnet4.mine')
    (folder/'model.safetensors').unlink()
    class Evil:
        def __reduce__(self): return os.system, (f'touch {tmp_path}/marker',)
    torch.save(dict(a=Evil()), folder/name)
    says(lambda: load_network(folder), 'has no model.safetensors', name, 'safetensors')
    with pytest.raises(UserError) as e: load_network(folder)
    assert 'weights_only' not in str(e.value) and not (tmp_path/'marker').exists()

@pytest.mark.parametrize('cfg, change, word', [
    (dict(pretrained_strict=False), dict(pretrained_strict=False, model_args=dict(pretrained_strict=False)), 'pretrained_strict'),
    ({}, dict(model_args=dict(widths=[12000]*4)), 'widths'), ({}, dict(model_args=dict(widths=[4000]*4)), 'does not fit'),
    ({}, dict(model_args=dict(checkpoint_path='/etc/passwd')), 'checkpoint_path'),
    ({}, dict(model_args=dict(widths=[[[[1]]]])), 'widths'), ({}, dict(model_args=dict(nothing=1)), 'cannot be built'),
    ({}, dict(model_args=[1]), 'does not describe'),
    ({}, dict(architecture='resnet18'), 'does not fit'), ({}, dict(architecture='vit_giant_patch14_224'), 'does not fit'),
    ({}, dict(architecture=['x']), 'architecture'), ({}, dict(architecture='nothing_like_it'), 'unknown backbone'),
    (dict(input_size=[3, 100000, 100000]), {}, 'images of 100000 px'), (dict(input_size=[1, 32, 32]), {}, 'RGB'),
    (dict(input_size='x'), {}, 'does not describe'), (dict(std=[0, 1, 1]), {}, 'std'),
    (dict(mean=['a']*3), {}, 'mean'), (dict(crop_pct=9), {}, 'crop_pct'), ({}, dict(pretrained_cfg=5), 'does not describe')])
def test_forged_configs(tmp_path, cfg, change, word): says(lambda: load_network(forged(tmp_path/'convnet4.mine', change, **cfg)), word)

@pytest.mark.parametrize('args', [dict(architecture='vit_tiny_patch16_224', model_args=dict(depth=4096)),
                                  dict(architecture='resnet18', model_args=dict(layers=[4096]*4)),
                                  dict(architecture='convnext_tiny', model_args=dict(depths=[200]*4))])
def test_networks_that_would_take_minutes_to_build(tmp_path, args):
    says(lambda: load_network(forged(tmp_path/'convnet4.mine', args)), 'too large')

def test_weights_are_all_of_the_network_or_refused(tmp_path):
    state = create_backbone('convnet4', 0).state_dict()
    one = {'stages.0.0.weight':state['stages.0.0.weight']}
    says(lambda: load_network(forged(tmp_path/'a', tensors=one, pretrained_strict=False)), 'does not fit the network', 'is missing')
    says(lambda: load_network(forged(tmp_path/'b', tensors=state | dict(more=torch.ones(2)))), 'more is not a tensor of the network')
    says(lambda: load_network(forged(tmp_path/'c', tensors=state | {'stages.0.0.weight':torch.ones(2, 2)})), 'has the shape (2, 2)')
    (tmp_path/'c'/'model.safetensors').write_bytes(b'\xff'*100)
    says(lambda: load_network(tmp_path/'c'), 'is damaged')

@pytest.mark.parametrize('change',
                         [dict(px='x'), dict(px=10**5), dict(px=0), dict(px=True), dict(stats=[]), dict(stats=[[.5]*3, [0, 1, 1]]),
                          dict(stats=[[.5], [.2]]), dict(arch=5), dict(arch='x/y'), dict(sha256=5)])
@pytest.mark.parametrize('how', ['card', '[]', 'null', 'deep'])
def test_forged_cards(tmp_path, change, how):
    save_weights(create_backbone('convnet4', 0), tmp_path/'net', **dict(arch='convnet4', px=32, stats=[[.5]*3, [.2]*3]))
    card = json.loads((tmp_path/'net.json').read_text()) | change
    (tmp_path/'net.json').write_text(dict(card=json.dumps(card), deep='['*200_000 + ']'*200_000).get(how, how))
    says(lambda: load_network(tmp_path), str(tmp_path))

@posix
@pytest.mark.parametrize('name', ['net.json', 'net.safetensors', 'config.json', 'model.safetensors'])
def test_pipes_in_a_network(tmp_path, name):
    save_weights(create_backbone('convnet4', 0), tmp_path/'net', arch='convnet4', px=32, stats=[[.5]*3, [.2]*3])
    if name.startswith(('config', 'model')):
        publish(create_backbone('convnet4', 0), ABOUT, tmp_path)
        for f in ('net.json', 'net.safetensors'): (tmp_path/f).unlink()
    (tmp_path/name).unlink()
    os.mkfifo(tmp_path/name)
    says(lambda: load_network(tmp_path), str(tmp_path))
