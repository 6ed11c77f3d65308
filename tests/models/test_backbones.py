"""Every registered backbone against its paper's parameter count and feature size, and against timm's contract; shipped weights."""
import copy
import json
import re
from functools import partial

import numpy as np
import pytest
import timm
import torch
from fastai.callback.core import Callback
from helpers import fit, same_state, says, stage_one_learner
from naive import BACKBONES, PUBLISHED, dropped_squares, kept_share, published_convnet4, published_resnet12_block
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from timm.models import create_feature_extractor
from torch import nn

from grdd_fastai.data.blocks import plain_dl
from grdd_fastai.fewshot.embed import embed
from grdd_fastai.fewshot.evaluate import evaluate
from grdd_fastai.models.backbone import WEIGHTS
from grdd_fastai.models.resnet12 import ResNet12, ScheduledDropBlock
from grdd_fastai.stage_one import StageOne, stage_one

# ---- timm's contract --------------------------------------------------------------------------------------------------

def test_all_are_listed():
    assert set(BACKBONES) == {n for n in timm.list_models() if n.startswith(('convnet4', 'resnet12'))}

@pytest.mark.parametrize('name', BACKBONES)
def test_parameters_and_features(name):
    n_params,*sizes = BACKBONES[name]
    for px,size in zip((32, 84), sizes):
        net = timm.create_model(name, num_classes=0, img_size=px).eval()
        assert sum(p.numel() for p in net.parameters()) == n_params
        with torch.no_grad(): assert net(torch.randn(2, 3, px, px)).shape == (2, size) and net.num_features == size
    if name in PUBLISHED: assert n_params/1e6 == pytest.approx(PUBLISHED[name], rel=.005)

@pytest.mark.parametrize('name', BACKBONES)
def test_timm_contract(name):
    net = timm.create_model(name, num_classes=7, in_chans=1).eval()
    x = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        h = net.forward_head(net.forward_features(x), pre_logits=True)
        assert torch.equal(net.get_classifier()(h), net(x)) and net(x).shape == (2, 7)
        net.reset_classifier(0)
        assert torch.equal(net(x), h)
        net.reset_classifier(5)
        assert net(x).shape == (2, 5) and net.num_classes == 5
    cfg = net.pretrained_cfg
    for k in ('input_size','pool_size','mean','std','interpolation','crop_pct','first_conv','classifier'): assert cfg[k], k
    assert isinstance(net.get_submodule(cfg['classifier']), nn.Linear)
    for k in (cfg['first_conv'],) if isinstance(cfg['first_conv'], str) else cfg['first_conv']: assert net.get_submodule(k).in_channels == 1
    channels = [net.get_submodule(f['module'])(y).shape[1] for f,y in zip(net.feature_info, _stage_inputs(net, x))]
    assert [f['num_chs'] for f in net.feature_info] == channels

def _stage_inputs(net, x):
    for stage in net.stages:
        yield x
        x = stage(x)

@pytest.mark.parametrize('name', BACKBONES)
def test_torchscript_gives_the_same(name):
    net,x = timm.create_model(name, num_classes=5).eval(), torch.randn(2, 3, 32, 32)
    script = torch.jit.script(net)
    with torch.no_grad():
        assert torch.allclose(script(x), net(x), atol=1e-5)
        scripted,ours = (n.forward_head(n.forward_features(x), pre_logits=True) for n in (script, net))
        assert torch.allclose(scripted, ours, atol=1e-5)

@pytest.mark.parametrize('name', BACKBONES)
def test_intermediates_are_the_stages_outputs(name):
    net,x = timm.create_model(name).eval(), torch.randn(2, 3, 32, 32)
    maps = []
    for stage in net.stages: maps.append(stage(x if not maps else maps[-1]))
    last,all_maps = net.forward_intermediates(x)
    some = net.forward_intermediates(x, indices=[0, 2], stop_early=True, intermediates_only=True)
    assert torch.equal(last, maps[-1]) and all(map(torch.equal, all_maps, maps)) and all(map(torch.equal, some, [maps[0], maps[2]]))
    assert len(all_maps) == 4 and len(some) == 2
    with pytest.raises(ValueError, match='NCHW'): net.forward_intermediates(x, output_fmt='NLC')
    if name == 'convnet4_r2d2': return # its features need two stages
    assert net.prune_intermediate_layers([1]) == [1] and torch.equal(net(x), maps[1])

@pytest.mark.parametrize('name', BACKBONES)
def test_without_pooling_the_output_is_the_feature_map(name):
    for net in (timm.create_model(name), timm.create_model(name, num_classes=0, global_pool='')):
        net.eval().reset_classifier(0, '')
        out = net(x := torch.randn(2, 3, 32, 32))
        assert out.shape == (2, net.num_features, *net.pretrained_cfg['pool_size']) and torch.equal(out, net.forward_features(x))
    with pytest.raises(ValueError, match='a classifier needs pooled'): net.reset_classifier(5)
    net.reset_classifier(5, 'max')
    assert net(x).shape == (2, 5)

@pytest.mark.parametrize('name', BACKBONES)
def test_fx_extracts_features(name):
    net,x = timm.create_model(name, num_classes=5).eval(), torch.randn(2, 3, 32, 32)
    out = create_feature_extractor(net, ['head'])(x)
    assert torch.allclose(out['head'], net(x), atol=1e-5)

@pytest.mark.parametrize('train', [False, True])
@pytest.mark.parametrize('name', ['convnet4', 'convnet4_flat', 'convnet4_r2d2', 'resnet12_320'])
def test_export(name, train):
    net,x = timm.create_model(name, num_classes=5).train(train), torch.randn(2, 3, 32, 32)
    exported = torch.export.export(net, (x,)).module()
    if not train: assert torch.allclose(exported(x), net(x), atol=1e-5)

@pytest.mark.parametrize('name', ['convnet4', 'resnet12'])
def test_features_only_gives_the_stages(name):
    net = timm.create_model(name, features_only=True).eval()
    maps = net(torch.randn(1, 3, 32, 32))
    assert [m.shape[1] for m in maps] == net.feature_info.channels() and [32//m.shape[-1] for m in maps] == net.feature_info.reduction()

@pytest.mark.parametrize('name', BACKBONES)
def test_every_parameter_gets_a_gradient(name):
    net = timm.create_model(name, num_classes=3)
    net(torch.randn(4, 3, 32, 32)).sum().backward()
    assert all(p.grad is not None for p in net.parameters())


# ---- what they compute ------------------------------------------------------------------------------------------------

def test_pool_before_activation_is_the_same_function():
    "The published order, convolution, BatchNorm, ReLU, pool, rebuilt from the same layers; gradients too"
    net = timm.create_model('convnet4', num_classes=3)
    x = torch.randn(4, 3, 32, 32)
    grads = []
    for f in (net, partial(published_convnet4, net)):
        net.zero_grad()
        out = f(x)
        out.square().sum().backward()
        grads.append((out.detach(), net.stages[0][0].weight.grad.clone()))
    for a,b in zip(*grads): assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)

def test_resnet12_eval_is_the_published_block():
    "A block written out with functional calls, activation before the pool"
    net = timm.create_model('resnet12', num_classes=0).eval()
    b,x = net.stages[0],torch.randn(2, 3, 8, 8)
    assert torch.allclose(b(x), published_resnet12_block(b, x), atol=1e-5)

def test_gradient_checkpointing_changes_no_gradient():
    "Neither DropBlock's steps nor its masks: early in the ramp, two passes before the backward one"
    grads,steps = [],[]
    for on in (False, True):
        torch.manual_seed(0)
        net = ResNet12(widths=(4,8,8,8), num_classes=2, block_drop_rate=.3, drop_steps=10).train()
        net.set_grad_checkpointing(on)
        x = torch.randn(2, 8, 3, 32, 32)
        (net(x[0]).square().sum() + net(x[1]).square().sum()).backward()
        grads.append({k:p.grad for k,p in net.named_parameters()})
        steps.append(net.stages[2].drop.step.item())
    assert steps == [2, 2]
    for k,g in grads[0].items(): assert torch.allclose(g, grads[1][k], rtol=1e-4, atol=1e-5), k

def test_a_compiled_network_does_not_compile_again_at_every_step():
    net,graphs = ResNet12(widths=(4,4,4,4), num_classes=2).train(),[]
    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward
    compiled = torch.compile(net, backend=backend)
    x = torch.randn(2, 3, 32, 32)
    compiled(x)
    n = len(graphs)
    for _ in range(4): compiled(x)
    assert len(graphs) == n and net.stages[2].drop.step.item() == 5


# ---- DropBlock --------------------------------------------------------------------------------------------------------

def test_dropblock_schedule_climbs_survives_saving_and_rests_in_eval():
    net = ResNet12(widths=(4,4,4,4), num_classes=2, drop_steps=10)
    blocks = [m for m in net.modules() if isinstance(m, ScheduledDropBlock)]
    x = torch.randn(2, 3, 32, 32)
    for _ in range(4): net.train()(x)
    net.eval()(x)
    assert [b.step.item() for b in blocks] == [4, 4] and blocks[0].rate().item() == pytest.approx(.1*4/10)
    other = ResNet12(widths=(4,4,4,4), num_classes=2, drop_steps=10)
    other.load_state_dict(net.state_dict())
    other.train()(x)
    assert other.stages[3].drop.step.item() == 5 and other.stages[3].drop.rate().item() == pytest.approx(.05)

def test_dropblock_size_follows_the_image():
    assert [timm.create_model('resnet12', img_size=px).stages[2].drop.block_size for px in (32, 84)] == [2, 5]

@pytest.mark.parametrize('px', [32, 84])
@pytest.mark.parametrize('stage', [2, 3])
def test_dropblock_keeps_the_share_it_is_meant_to(px, stage):
    "At the end of the ramp 0.90 of every map, as the squares that can cover each place, counted one by one, foretell"
    drop,side = timm.create_model('resnet12', img_size=px).stages[stage].drop.train(),px >> (stage+1)
    drop.step.fill_(10**6)
    torch.manual_seed(0)
    kept = (drop(torch.ones(400, 64, side, side)) != 0).float().mean((0, 1))
    assert torch.allclose(kept, kept_share(.1, drop.block_size, side), atol=.012) and kept.mean().item() == pytest.approx(.9, abs=.01)

def test_dropblock_drops_whole_squares_and_keeps_the_mean():
    "Each square that is lost is marked by hand from its corner"
    drop = ScheduledDropBlock(.2, block_size=3, n_steps=1).train()
    torch.manual_seed(0)
    y = drop(torch.ones(64, 8, 8, 6))
    torch.manual_seed(0)
    corners = torch.rand(64, 8, 6, 4) < .2/9 * 48/24
    assert 0 < corners.sum() and torch.allclose(y, dropped_squares(corners, (64, 8, 8, 6), 3))
    assert y.mean().item() == pytest.approx(1, abs=1e-5)
    assert drop(torch.ones(2, 3, 1, 1)).isfinite().all() # a map smaller than a square

def test_dropblock_counts_on_after_weights_are_loaded(data):
    learn = stage_one_learner(data, arch='resnet12', rotation=False, bs=60, keep_best=False)
    drop,start = learn.model.backbone.stages[3].drop,copy.deepcopy(learn.model.state_dict())
    fit(learn, 1, .01)
    assert drop.step.item() == 2
    learn.model.load_state_dict(start)
    fit(learn, 1, .01)
    assert drop.step.item() == 2 and drop.rate().item() == pytest.approx(.1*2/40_000) and not same_state(start, learn.model.state_dict())

def test_dropblock_reaches_its_full_rate_in_a_part_of_the_steps(data):
    "2 epochs of 2 steps: at half of them after one epoch; a network without DropBlock takes no notice"
    learn,fit_it = stage_one(data, StageOne(arch='resnet12', epochs=2, bs=60, rotation=False, drop_ramp=.5), keep_best=False)
    rates = []
    class Rate(Callback):
        run_valid = False
        def after_batch(self): rates.extend(m.rate().item() for m in self.model.modules() if isinstance(m, ScheduledDropBlock))
    learn.add_cb(Rate())
    with learn.no_bar(), learn.no_logging(): fit_it(learn)
    assert rates == pytest.approx([.05, .05, .1, .1, .1, .1, .1, .1])
    stage_one(data, StageOne(arch='convnet4', drop_ramp=.5))

@pytest.mark.parametrize('wrong', [0., 1.5])
def test_a_ramp_that_cannot_be(wrong): says(lambda: StageOne(drop_ramp=wrong), 'drop_ramp is', 'above 0 and at most 1')


# ---- the package's weights --------------------------------------------------------------------------------------------

SHIPPED = sorted(p.parent.name for p in WEIGHTS.glob('*/config.json'))

@pytest.mark.parametrize('name', SHIPPED)
def test_shipped_weights_are_timms(name):
    "By the tag, as the architecture's default, for another number of classes and for grey images; listed; small"
    assert name in timm.list_pretrained() and (WEIGHTS/name/'model.safetensors').stat().st_size < 2e6
    a,b = (timm.create_model(n, pretrained=True).eval() for n in (name, name.partition('.')[0]))
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad(): assert torch.equal(a(x), b(x)) and a(x).shape == (2, a.num_features) and a.num_classes == 0
    five = timm.create_model(name, pretrained=True, num_classes=5).eval()
    with torch.no_grad(): assert torch.equal(five.forward_head(five.forward_features(x), pre_logits=True), a(x)) and five(x).shape == (2, 5)
    grey = timm.create_model(name, pretrained=True, in_chans=1).eval()
    with torch.no_grad(): assert torch.allclose(grey(x[:, :1]), a(x[:, :1].repeat(1, 3, 1, 1)), atol=1e-4)
    fresh = timm.create_model(name.partition('.')[0], num_classes=0)
    assert not torch.equal(fresh.stages[0][0].weight, a.stages[0][0].weight)

@pytest.mark.parametrize('name, widths, most', [('convnet4', [64, 64, 64, 64], 115_000), ('convnet4_256', [64, 96, 128, 256], 470_000)])
def test_shipped_networks_have_the_widths_of_their_names(name, widths, most):
    net = timm.create_model(f'{name}.grdd_cifarfs', pretrained=True)
    assert ([m.out_channels for m in net.modules() if isinstance(m, torch.nn.Conv2d)] == widths
            and sum(p.numel() for p in net.parameters()) <= most)

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
