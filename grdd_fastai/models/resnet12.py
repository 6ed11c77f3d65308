"""ResNet-12 with DropBlock (MetaOptNet, arXiv 1904.03758), in the widths that papers use, registered in timm."""
import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module, to_2tuple
from timm.models import generate_default_cfgs, register_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from .backbone import FewShotBackbone, cfg, cfgs_of_weights, create

__all__ = ['ResNet12', 'ScheduledDropBlock', 'set_drop_steps']


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


def set_drop_steps(net, n_steps):
    "Let each `ScheduledDropBlock` of a network reach its full rate after `n_steps` training batches"
    for m in net.modules():
        if isinstance(m, ScheduledDropBlock): m.n_steps = n_steps


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


_convs = ('stages.0.conv1', 'stages.0.downsample.0')
default_cfgs = generate_default_cfgs(cfgs_of_weights('resnet12') | {
    'resnet12.untrained':     cfg(_convs, (2,2)),
    'resnet12_512.untrained': cfg(_convs, (2,2)),
    'resnet12_320.untrained': cfg(_convs, (2,2)),
})

@register_model
def resnet12(pretrained=False, **kwargs):
    "ResNet-12 with 64-160-320-640 channels: 12.42 M parameters, 640-d (MetaOptNet, RFS, SKD)"
    return create(ResNet12, 'resnet12', pretrained, **kwargs)

@register_model
def resnet12_512(pretrained=False, **kwargs):
    "ResNet-12 with 64-128-256-512 channels: 8.0 M parameters, 512-d (Meta-Baseline)"
    return create(ResNet12, 'resnet12_512', pretrained, **dict(dict(widths=(64,128,256,512)), **kwargs))

@register_model
def resnet12_320(pretrained=False, **kwargs):
    "ResNet-12 with 32-80-160-320 channels, half of those of `resnet12`: 3.11 M parameters, 320-d"
    return create(ResNet12, 'resnet12_320', pretrained, **dict(dict(widths=(32,80,160,320)), **kwargs))
