"""ConvNet-4, four convolution blocks, in the variants that papers use (arXiv 1703.05175 and later), registered in timm."""
import torch
from timm.layers import to_2tuple
from timm.models import generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import nn

from .backbone import FewShotBackbone, cfg, cfgs_of_weights, create

__all__ = ['ConvNet4']


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


_conv = 'stages.0.0'
default_cfgs = generate_default_cfgs(cfgs_of_weights('convnet4') | {
    'convnet4.untrained':      cfg(_conv, (4,4)),
    'convnet4_flat.untrained': cfg(_conv, (2,2)),
    'convnet4_128.untrained':  cfg(_conv, (4,4)),
    'convnet4_256.untrained':  cfg(_conv, (4,4)),
    'convnet4_r2d2.untrained': cfg(_conv, (1,1)),
})

@register_model
def convnet4(pretrained=False, **kwargs):
    "ConvNet-4 with 4 x 64 channels, max-pools in blocks 1-3 and global average pooling: 64-d (RFS, SKD)"
    return create(ConvNet4, 'convnet4', pretrained, **kwargs)

@register_model
def convnet4_flat(pretrained=False, **kwargs):
    "ConvNet-4 with 4 x 64 channels, four max-pools and flattened features: 256-d at 32 px, 1600-d at 84 px (`img_size`)"
    return create(ConvNet4, 'convnet4_flat', pretrained, **dict(dict(n_pool=4, global_pool='flat'), **kwargs))

@register_model
def convnet4_128(pretrained=False, **kwargs):
    "`convnet4` with 64-64-128-128 channels: 128-d"
    return create(ConvNet4, 'convnet4_128', pretrained, **dict(dict(widths=(64,64,128,128)), **kwargs))

@register_model
def convnet4_256(pretrained=False, **kwargs):
    "`convnet4` with 64-96-128-256 channels: 256-d"
    return create(ConvNet4, 'convnet4_256', pretrained, **dict(dict(widths=(64,96,128,256)), **kwargs))

@register_model
def convnet4_r2d2(pretrained=False, **kwargs):
    "R2-D2's ConvNet-4 with 96-192-384-512 channels and concatenated features: 8192-d at 32 px (`img_size`)"
    return create(R2D2Net, 'convnet4_r2d2', pretrained, **kwargs)
