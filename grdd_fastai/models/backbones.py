"""Few-shot backbones registered in timm: ConvNet-4 and ResNet-12 in the variants that papers use."""
import json
from pathlib import Path
from typing import Optional

import torch
import torch.nn.functional as F
from timm.layers import SelectAdaptivePool2d, register_notrace_module, to_2tuple
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import nn
from torch.utils.checkpoint import checkpoint

__all__ = ['ConvNet4', 'ScheduledDropBlock', 'ResNet12']


class FewShotBackbone(nn.Module):
    """The methods that timm expects of a model, for `stages` and a head; subclasses set `stages` and `feature_info`

    `global_pool` is one of timm's pooling types, `'flat'` for a flattened feature map, or `''` for an unchanged feature map.
    """

    def _make_head(self, in_chans, num_classes, global_pool, drop_rate, map_size):
        "Make pooling and classifier; `map_size` is the side of the last feature map, needed for `global_pool='flat'`"
        self.in_chans,self.drop_rate,self.map_size = in_chans,drop_rate,map_size
        self.grad_checkpointing = False
        self.reset_classifier(num_classes, global_pool)

    def _init_weights(self, nonlinearity, a=0.):
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, a=a, mode='fan_out', nonlinearity=nonlinearity)
                if m.bias is not None: nn.init.zeros_(m.bias)

    @torch.jit.ignore
    def group_matcher(self, coarse=False): return dict(stem=r'^stages\.0', blocks=r'^stages\.(\d+)')

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable=True): self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self): return self.head

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None):
        "Replace the classifier; with `num_classes=0` the output is the features h, or the last feature map if also `global_pool=''`"
        if global_pool is not None:
            flat = global_pool == 'flat'
            self.global_pool = nn.Flatten(1) if flat else SelectAdaptivePool2d(pool_type=global_pool, flatten=bool(global_pool))
            mult = self.map_size**2 if flat else self.global_pool.feat_mult() if global_pool else 1
            self.num_features = self.head_hidden_size = self._map_channels() * mult
            self.pooled = bool(global_pool)
        if num_classes > 0 and not self.pooled: raise ValueError("a classifier needs pooled or flattened features: give global_pool='avg'")
        self.num_classes = num_classes
        device = next(self.stages.parameters()).device
        self.head = nn.Linear(self.num_features, num_classes, device=device) if num_classes > 0 else nn.Identity()

    @torch.jit.ignore
    def _map_channels(self): return self.feature_info[-1]['num_chs']

    def forward_features(self, x):
        "Images (B, in_chans, H, W) -> last feature map (B, C, H', W')"
        if self.grad_checkpointing and not torch.jit.is_scripting(): return self._checkpointed(x)
        return self.stages(x)

    @torch.jit.ignore
    def _checkpointed(self, x):
        for stage in self.stages: x = checkpoint(stage, x, use_reentrant=False)
        return x

    def forward_head(self, x, pre_logits: bool = False):
        "Feature map -> features h (B, num_features), or logits (B, num_classes)"
        x = self.global_pool(x)
        x = F.dropout(x, p=self.drop_rate, training=self.training)
        return x if pre_logits else self.head(x)

    def forward(self, x): return self.forward_head(self.forward_features(x))

    @torch.jit.ignore
    def forward_intermediates(
        self,
        x, # images (B, in_chans, H, W)
        indices=None, # list of stages, or a number n for the last n stages; None: all stages
        norm=False, # no effect: there is no norm after the last stage
        stop_early=False, # whether the stages after the last wanted one are skipped
        output_fmt='NCHW', # only 'NCHW' is possible
        intermediates_only=False, # whether only the list is returned
    ):
        "The last feature map (B, C, H', W') and a list of the feature maps of the stages `indices`, as timm's backbones return them"
        if output_fmt != 'NCHW': raise ValueError(f"output_fmt is {output_fmt!r}: feature maps are 'NCHW'")
        wanted,last = feature_take_indices(len(self.stages), indices)
        maps = []
        for i,stage in enumerate(self.stages[:last+1] if stop_early else self.stages):
            x = stage(x)
            if i in wanted: maps.append(x)
        return maps if intermediates_only else (x, maps)

    @torch.jit.ignore
    def prune_intermediate_layers(self, indices=1, prune_norm=False, prune_head=True):
        "Remove the stages after the last of `indices` and, with `prune_head`, pooling and classifier; return the indices as a list"
        wanted,last = feature_take_indices(len(self.stages), indices)
        self.stages = self.stages[:last+1]
        self.feature_info = self.feature_info[:last+1]
        if prune_head: self.reset_classifier(0, '')
        return wanted


# ---- ConvNet-4 ------------------------------------------------------------------------------------------------------

def conv_block(n_in, n_out, pool=True, bias=True):
    "3x3 convolution, BatchNorm, ReLU and, with `pool`, a 2x2 max-pool; pooling before the ReLU gives the same result with less work"
    layers = [nn.Conv2d(n_in, n_out, 3, padding=1, bias=bias), nn.BatchNorm2d(n_out)]
    return nn.Sequential(*layers, *([nn.MaxPool2d(2)] if pool else []), nn.ReLU(inplace=True))


class ConvNet4(FewShotBackbone):
    "Four convolution blocks (`conv_block`); the first `n_pool` of them have a max-pool"
    def __init__(self, num_classes=64, in_chans=3, global_pool='avg', drop_rate=0., widths=(64,64,64,64), n_pool=3,
                 img_size=32):
        super().__init__()
        chs = (in_chans, *widths)
        self.stages = nn.Sequential(*[conv_block(chs[i], chs[i+1], pool=i < n_pool) for i in range(4)])
        self.feature_info = [dict(num_chs=w, reduction=2**min(i+1, n_pool), module=f'stages.{i}')
                             for i,w in enumerate(widths)]
        self._init_weights('relu')
        self._make_head(in_chans, num_classes, global_pool, drop_rate, to_2tuple(img_size)[0] // 2**n_pool)


class R2D2Net(FewShotBackbone):
    """The wide ConvNet-4 of R2-D2 (arXiv 1805.08136): 96-192-384-512 channels, LeakyReLU 0.1, no activation after block 4

    The features are the flattened feature maps of blocks 3 and 4, concatenated: 8192-d at 32 px.
    """
    def __init__(self, num_classes=64, in_chans=3, global_pool='flat', drop_rate=0., widths=(96,192,384,512), img_size=32):
        super().__init__()
        chs = (in_chans, *widths)
        self.img_size = to_2tuple(img_size)[0]
        def block(i, *tail): return nn.Sequential(
            nn.Conv2d(chs[i], chs[i+1], 3, padding=1), nn.BatchNorm2d(chs[i+1]), nn.MaxPool2d(2), *tail)
        act = lambda: nn.LeakyReLU(0.1)
        self.stages = nn.Sequential(block(0, act(), nn.Dropout(.1)), block(1, act(), nn.Dropout(.1)),
                                    block(2, act(), nn.Dropout(.3)), block(3, nn.Dropout(.3)))
        self.feature_info = [dict(num_chs=w, reduction=2**(i+1), module=f'stages.{i}') for i,w in enumerate(widths)]
        self._init_weights('leaky_relu', a=0.1)
        self._make_head(in_chans, num_classes, global_pool, drop_rate, 1)

    @torch.jit.ignore
    def _map_channels(self):
        third,fourth = (info['num_chs'] for info in self.feature_info[2:])
        return third*(self.img_size//8)**2 + fourth*(self.img_size//16)**2

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable=True):
        if enable: raise NotImplementedError('convnet4_r2d2 has no gradient checkpointing')

    @torch.jit.ignore
    def prune_intermediate_layers(self, indices=1, prune_norm=False, prune_head=True):
        if not prune_head: raise ValueError('the features of convnet4_r2d2 need all of its stages: give prune_head=True')
        wanted,last = feature_take_indices(len(self.stages), indices)
        self.reset_classifier(0, '')
        self.stages = self.stages[:last+1]
        return wanted

    def forward_features(self, x):
        "Images (B, in_chans, H, W) -> feature maps of blocks 3 and 4, flattened and concatenated (B, num_features, 1, 1)"
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x.flatten(1))
        return torch.cat(maps[-2:], 1).unsqueeze(-1).unsqueeze(-1)


# ---- ResNet-12 ------------------------------------------------------------------------------------------------------

@register_notrace_module
class ScheduledDropBlock(nn.Module):
    """DropBlock (arXiv 1810.12890) whose rate rises linearly from 0 to `drop_prob` over `n_steps` training batches

    Squares of side `block_size` in feature maps (B, C, H, W) are set to zero, and the maps are scaled up to keep their mean. The corner of
    a square is drawn from the (H-k+1) x (W-k+1) places where the square fits, so at rate p nearly a share of 1 - p is kept on small maps
    too. The buffer `step` counts the batches, and the rate is computed from it on the device.
    """
    def __init__(self, drop_prob=0.1, block_size=5, n_steps=40_000):
        super().__init__()
        self.drop_prob,self.block_size,self.n_steps = drop_prob,block_size,n_steps
        self.register_buffer('step', torch.zeros((), dtype=torch.long))

    def extra_repr(self): return f'drop_prob={self.drop_prob}, block_size={self.block_size}, n_steps={self.n_steps}'

    def rate(self):
        "The share of a feature map that is dropped at the present step, a scalar tensor"
        return self.drop_prob * (self.step/self.n_steps).clamp(max=1.)

    def forward(self, x):
        if not self.training or not self.drop_prob: return x
        self.step += 1
        B,C,H,W = x.shape
        k = min(self.block_size, H, W)
        places = H-k+1,W-k+1
        corners = torch.rand(B, C, *places, device=x.device) < self.rate() * (H*W) / (k*k*places[0]*places[1]) # rate gamma of section 3.2
        kept = 1 - F.max_pool2d(F.pad(corners.float(), [k-1]*4), k, stride=1) # each corner becomes a square
        return x * (kept * (kept.numel() / kept.sum().clamp(min=1))).to(x.dtype)


class ResNet12Block(nn.Module):
    "Three 3x3 convolutions with a 1x1 shortcut, LeakyReLU 0.1, a 2x2 max-pool, then the dropout module `drop`"
    def __init__(self, n_in, n_out, drop):
        super().__init__()
        chs = (n_in, n_out, n_out, n_out)
        for i in (1,2,3):
            setattr(self, f'conv{i}', nn.Conv2d(chs[i-1], chs[i], 3, padding=1, bias=False))
            setattr(self, f'bn{i}', nn.BatchNorm2d(chs[i]))
        self.downsample = nn.Sequential(nn.Conv2d(n_in, n_out, 1, bias=False), nn.BatchNorm2d(n_out))
        self.act = nn.LeakyReLU(0.1, inplace=True)
        self.pool = nn.MaxPool2d(2)
        self.drop = drop

    def forward(self, x):
        return self.drop(self.residual(x))

    def residual(self, x):
        "The output of the block before its dropout"
        out = self.act(self.bn1(self.conv1(x)))
        out = self.act(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out)) + self.downsample(x)
        return self.act(self.pool(out)) # pooling first gives the same result, and the activation has 4x less work


class ResNet12(FewShotBackbone):
    """The ResNet-12 of MetaOptNet (arXiv 1904.03758), RFS and SKD: four residual blocks, pooled to `widths[-1]` features

    `block_drop_rate` is the rate of dropout after blocks 1-2 and of DropBlock after blocks 3-4. `block_size` is that of DropBlock; by
    default it is 2 below 64 px and 5 from 64 px (`img_size`). DropBlock reaches its full rate after `drop_steps` batches.
    """
    def __init__(self, num_classes=64, in_chans=3, global_pool='avg', drop_rate=0., widths=(64,160,320,640),
                 block_drop_rate=0.1, block_size=None, drop_steps=40_000, img_size=32):
        super().__init__()
        img_size = to_2tuple(img_size)[0] # images are square
        if block_size is None: block_size = 2 if img_size < 64 else 5
        chs = (in_chans, *widths)
        drop = lambda i: (nn.Dropout(block_drop_rate) if i < 2 else
                          ScheduledDropBlock(block_drop_rate, block_size, drop_steps))
        self.stages = nn.Sequential(*[ResNet12Block(chs[i], chs[i+1], drop(i)) for i in range(4)])
        self.feature_info = [dict(num_chs=w, reduction=2**(i+1), module=f'stages.{i}') for i,w in enumerate(widths)]
        self._init_weights('leaky_relu', a=0.1)
        self._make_head(in_chans, num_classes, global_pool, drop_rate, img_size // 16)

    @torch.jit.ignore
    def _checkpointed(self, x):
        "Checkpoint each block without its dropout, which must not count or draw again when the backward pass computes the block again"
        for block in self.stages: x = block.drop(checkpoint(block.residual, x, use_reentrant=False))
        return x


# ---- registration ---------------------------------------------------------------------------------------------------

def _cfg(first_conv, pool_size, **kwargs):
    "timm's pretrained cfg of an architecture without weights"
    return dict(url='', num_classes=64, input_size=(3,32,32), pool_size=pool_size, fixed_input_size=False, crop_pct=1.,
                interpolation='bicubic', mean=(0.5071,0.4867,0.4408), std=(0.2675,0.2565,0.2761), license='apache-2.0',
                first_conv=first_conv, classifier='head', **kwargs)

WEIGHTS = Path(__file__).parent.with_name('weights') # the package's weights: one folder of recipes/publish.py for each arch.tag

def _weights():
    "name -> timm's pretrained cfg for each of the package's weights, read from their config.json"
    return {f.parent.name:json.loads(f.read_text())['pretrained_cfg'] | dict(num_classes=0, file=str(f.with_name('model.safetensors')))
            for f in sorted(WEIGHTS.glob('*/config.json'))}

_conv,_res = 'stages.0.0','stages.0.conv1'
default_cfgs = generate_default_cfgs(_weights() | {
    'convnet4.untrained':      _cfg(_conv, (4,4)),
    'convnet4_flat.untrained': _cfg(_conv, (2,2)),
    'convnet4_128.untrained':  _cfg(_conv, (4,4)),
    'convnet4_256.untrained':  _cfg(_conv, (4,4)),
    'convnet4_r2d2.untrained': _cfg(_conv, (1,1)),
    'resnet12.untrained':      _cfg((_res, 'stages.0.downsample.0'), (2,2)),
    'resnet12_512.untrained':  _cfg((_res, 'stages.0.downsample.0'), (2,2)),
    'resnet12_320.untrained':  _cfg((_res, 'stages.0.downsample.0'), (2,2)),
})

def _create(cls, variant, pretrained, **kwargs):
    return build_model_with_cfg(cls, variant, pretrained, feature_cfg=dict(out_indices=(0,1,2,3), flatten_sequential=True),
                                **kwargs)

@register_model
def convnet4(pretrained=False, **kwargs):
    "ConvNet-4 with 4 x 64 channels, max-pools in blocks 1-3 and global average pooling: 64-d (RFS, SKD)"
    return _create(ConvNet4, 'convnet4', pretrained, **kwargs)

@register_model
def convnet4_flat(pretrained=False, **kwargs):
    "ConvNet-4 with 4 x 64 channels, four max-pools and flattened features: 256-d at 32 px, 1600-d at 84 px (`img_size`)"
    return _create(ConvNet4, 'convnet4_flat', pretrained, **dict(dict(n_pool=4, global_pool='flat'), **kwargs))

@register_model
def convnet4_128(pretrained=False, **kwargs):
    "`convnet4` with 64-64-128-128 channels: 128-d"
    return _create(ConvNet4, 'convnet4_128', pretrained, **dict(dict(widths=(64,64,128,128)), **kwargs))

@register_model
def convnet4_256(pretrained=False, **kwargs):
    "`convnet4` with 64-96-128-256 channels: 256-d"
    return _create(ConvNet4, 'convnet4_256', pretrained, **dict(dict(widths=(64,96,128,256)), **kwargs))

@register_model
def convnet4_r2d2(pretrained=False, **kwargs):
    "R2-D2's ConvNet-4 with 96-192-384-512 channels and concatenated features: 8192-d at 32 px (`img_size`)"
    return _create(R2D2Net, 'convnet4_r2d2', pretrained, **kwargs)

@register_model
def resnet12(pretrained=False, **kwargs):
    "ResNet-12 with 64-160-320-640 channels: 12.42 M parameters, 640-d (MetaOptNet, RFS, SKD)"
    return _create(ResNet12, 'resnet12', pretrained, **kwargs)

@register_model
def resnet12_512(pretrained=False, **kwargs):
    "ResNet-12 with 64-128-256-512 channels: 8.0 M parameters, 512-d (Meta-Baseline)"
    return _create(ResNet12, 'resnet12_512', pretrained, **dict(dict(widths=(64,128,256,512)), **kwargs))

@register_model
def resnet12_320(pretrained=False, **kwargs):
    "ResNet-12 with 32-80-160-320 channels, half of those of `resnet12`: 3.11 M parameters, 320-d"
    return _create(ResNet12, 'resnet12_320', pretrained, **dict(dict(widths=(32,80,160,320)), **kwargs))
