"""Every registered backbone against its paper's parameter count and feature size, and against timm's contract."""
import pytest
import timm
import torch
from timm.models import create_feature_extractor
from torch import nn

import grdd_fastai  # noqa: F401
from grdd_fastai.models.backbones import ResNet12, ScheduledDropBlock


# name: parameters without classifier (counted by hand from widths), features at 32 px, at 84 px
def conv4(*w, c=3): return sum(9*a*b + b + 2*b for a,b in zip((c, *w), w))
def res12(*w, c=3): return sum(9*(a*b + 2*b*b) + 6*b + a*b + 2*b for a,b in zip((c, *w), w))
BACKBONES = dict(
    convnet4=(conv4(64,64,64,64), 64, 64), convnet4_flat=(conv4(64,64,64,64), 256, 1600),
    convnet4_128=(conv4(64,64,128,128), 128, 128), convnet4_256=(conv4(64,96,128,256), 256, 256),
    convnet4_r2d2=(conv4(96,192,384,512), 8192, 384*100 + 512*25),
    resnet12=(res12(64,160,320,640), 640, 640), resnet12_512=(res12(64,128,256,512), 512, 512),
    resnet12_320=(res12(32,80,160,320), 320, 320))
PUBLISHED = dict(convnet4=.113, convnet4_128=.261, convnet4_256=.464, convnet4_r2d2=2.6, resnet12=12.42, resnet12_512=8.0) # millions

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

def test_pool_before_activation_is_the_same_function():
    "The published order, convolution, BatchNorm, ReLU, pool, rebuilt from the same layers; gradients too"
    net = timm.create_model('convnet4', num_classes=3)
    x = torch.randn(4, 3, 32, 32)
    def published(x):
        for i,stage in enumerate(net.stages):
            x = torch.relu(stage[1](stage[0](x)))
            if i < 3: x = nn.functional.max_pool2d(x, 2)
        return net.head(x.mean((2, 3)))
    grads = []
    for f in (net, published):
        net.zero_grad()
        out = f(x)
        out.square().sum().backward()
        grads.append((out.detach(), net.stages[0][0].weight.grad.clone()))
    for a,b in zip(*grads): assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)

def test_resnet12_eval_is_the_published_block():
    "A block written out with functional calls, activation before the pool"
    net = timm.create_model('resnet12', num_classes=0).eval()
    b,x = net.stages[0],torch.randn(2, 3, 8, 8)
    act = lambda x: nn.functional.leaky_relu(x, .1)
    y = act(b.bn3(b.conv3(act(b.bn2(b.conv2(act(b.bn1(b.conv1(x))))))))+ b.downsample[1](b.downsample[0](x)))
    assert torch.allclose(b(x), nn.functional.max_pool2d(y, 2), atol=1e-5)

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
    k,places = drop.block_size,range(side - drop.block_size + 1)
    gamma = .1/k**2 * side**2/len(places)**2
    def squares(i): return sum(p <= i < p + k for p in places)
    expected = torch.tensor([[(1 - gamma)**(squares(i)*squares(j)) for j in range(side)] for i in range(side)])
    assert torch.allclose(kept, expected, atol=.012) and kept.mean().item() == pytest.approx(.9, abs=.01)

def test_dropblock_drops_whole_squares_and_keeps_the_mean():
    "Each square that is lost is marked by hand from its corner"
    drop = ScheduledDropBlock(.2, block_size=3, n_steps=1).train()
    torch.manual_seed(0)
    y = drop(torch.ones(64, 8, 8, 6))
    torch.manual_seed(0)
    corners = torch.rand(64, 8, 6, 4) < .2/9 * 48/24
    expected = torch.ones(64, 8, 8, 6)
    for n,c,i,j in corners.nonzero().tolist(): expected[n, c, i:i+3, j:j+3] = 0
    assert 0 < corners.sum() and torch.allclose(y, expected * expected.numel()/expected.sum())
    assert y.mean().item() == pytest.approx(1, abs=1e-5)
    assert drop(torch.ones(2, 3, 1, 1)).isfinite().all() # a map smaller than a square

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
    def backend(graph, inputs): graphs.append(graph); return graph.forward
    compiled = torch.compile(net, backend=backend)
    x = torch.randn(2, 3, 32, 32)
    compiled(x)
    n = len(graphs)
    for _ in range(4): compiled(x)
    assert len(graphs) == n and net.stages[2].drop.step.item() == 5
