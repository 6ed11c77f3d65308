"""What our backbones share: timm's model contract, their configurations, and the weights that come with the package."""
import json
from pathlib import Path
from typing import Optional

import torch
import torch.nn.functional as F
from timm.layers import SelectAdaptivePool2d
from timm.models import build_model_with_cfg
from timm.models._features import feature_take_indices
from torch import nn
from torch.utils.checkpoint import checkpoint

__all__ = ['FewShotBackbone']

WEIGHTS = Path(__file__).parent.with_name('weights') # the package's weights: one folder of recipes/publish.py for each arch.tag


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


def cfg(first_conv, pool_size, **kwargs):
    "timm's configuration of an architecture that has no pretrained weights"
    return dict(url='', num_classes=64, input_size=(3,32,32), pool_size=pool_size, fixed_input_size=False, crop_pct=1.,
                interpolation='bicubic', mean=(0.5071,0.4867,0.4408), std=(0.2675,0.2565,0.2761), license='apache-2.0',
                first_conv=first_conv, classifier='head', **kwargs)

def cfgs_of_weights(family):
    "timm's configurations of the package's weights for the architectures whose names begin with `family`, as their config.json has them"
    return {f.parent.name:json.loads(f.read_text())['pretrained_cfg'] | dict(num_classes=0, file=str(f.with_name('model.safetensors')))
            for f in sorted(WEIGHTS.glob(f'{family}*/config.json'))}

def create(cls, variant, pretrained, **kwargs):
    "The model of the class `cls`, built by timm"
    return build_model_with_cfg(cls, variant, pretrained, feature_cfg=dict(out_indices=(0,1,2,3), flatten_sequential=True), **kwargs)
