"""A `FewShotClassifier` as an ONNX file, and a small program that classifies photos with it and without PyTorch."""
import copy
import math
import shutil
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import nn

from ..core.errors import UserError, first_line
from ..core.storage import output_folder, write_json
from ..models.create import features
from .classifier import UNKNOWN, FewShotClassifier
from .trust import softmax_scale, unknown_below

__all__ = ['export_onnx']


PROGRAM = Path(__file__).parent/'predict_onnx.py'
TOLERANCE = 1e-3 # a classifier counts as linear if no logit differs by more than this share of the largest logit


class Exported(nn.Module):
    "Photos (N, 3, px, px) from 0 to 1 -> probabilities (N, C) and similarities (N), which are low for unknown photos"
    def __init__(self, few, weight, bias, normalize, scale):
        super().__init__()
        self.net,self.normalize,self.mirror = copy.deepcopy(few.net).cpu().eval(),normalize,few.mirror
        mean,std = few.stats
        Y = F.one_hot(few.support_y.cpu()).float()
        constants = dict(mean=torch.tensor(mean).view(1, 3, 1, 1), std=torch.tensor(std).view(1, 3, 1, 1), weight=weight*scale,
                         bias=bias*scale, means=(Y.T @ F.normalize(few.support.cpu(), dim=1))/Y.sum(0).unsqueeze(1))
        for k,v in constants.items(): self.register_buffer(k, v.float())
    def forward(self, photos):
        h = features(self.net, (photos - self.mean)/self.std, self.mirror)
        u = F.normalize(h, dim=1)
        logits = (u if self.normalize else h) @ self.weight.T + self.bias
        return logits.softmax(1),(u @ self.means.T).amax(1)


def export_onnx(few:FewShotClassifier, folder:str|Path) -> Path:
    """Write the classifier to `folder` as classifier.onnx, with classes.json and predict_onnx.py, which needs numpy, pillow and onnxruntime

        python predict_onnx.py photo.jpg ...

    The network and the classifier are one graph with the input `photos` (N, 3, px, px), from 0 to 1, and the outputs `probabilities` (N, C)
    and `similarity` (N). UserError for a classifier that is not linear in the features, a network that ONNX cannot hold, and for missing
    packages (`pip install 'grdd-fastai[onnx]'`).
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as e: raise UserError(f"{e.name} is not installed: pip install 'grdd-fastai[onnx]'") from None
    held = few.held_out() # a UserError without a support, and for a transductive classifier
    limit = None if few.unknown is None else unknown_below(held, few.unknown)
    net = Exported(few, *linear_form(few), softmax_scale(held)).eval()
    side = timm.data.resolve_model_data_config(few.net)
    if side['crop_mode'] == 'border': raise UserError("the network wants photos with a border (crop_mode='border'), which is not exported")
    about = dict(classes=[str(c) for c in few.vocab], px=few.px, resize=math.floor(few.px/side['crop_pct']),
                 squash=side['crop_mode'] == 'squash', interpolation=side['interpolation'], unknown=UNKNOWN, unknown_below=limit)
    with output_folder(folder) as folder:
        batch = torch.export.Dim('N', min=1, max=4096)
        try:
            torch.onnx.export(net, (torch.rand(2, 3, few.px, few.px),), folder/'classifier.onnx', dynamo=True, dynamic_shapes=({0:batch},),
                              external_data=False, input_names=['photos'], output_names=['probabilities', 'similarity'], verbose=False)
        except Exception as e: raise UserError(f'ONNX cannot hold the network ({first_line(e)}): take another one') from None
        write_json(folder/'classes.json', about)
        shutil.copyfile(PROGRAM, folder/PROGRAM.name)
    return folder


def linear_form(few):
    """(weight (C, D), bias (C), normalize): logits = weight @ h + bias, of normalised features h if `normalize`

    They are read off the logits of unit vectors; the logits of other features, apart from what all classes share, must agree. UserError if
    they do not.
    """
    s,y = few.support.cpu()[None],few.support_y.cpu()[None]
    D = s.shape[2]
    size = s.norm(dim=2).mean()
    def centred(q):
        logits = few._function(s, y, q[None])[0]
        return logits - logits.mean(1, keepdim=True)
    unit = size*torch.eye(D)
    plus,minus = centred(unit),centred(-unit)
    bias = ((plus + minus)/2).mean(0)
    q = torch.cat([s[0], size*torch.randn(32, D, generator=torch.Generator().manual_seed(0))/D**.5])
    want = centred(q)
    for normalize in (True, False):
        weight = ((plus - minus)/2).T/(1 if normalize else size)
        found = (F.normalize(q, dim=1) if normalize else q) @ weight.T + bias
        if (found - want).abs().max() <= TOLERANCE*want.abs().max(): return weight,bias,normalize
    name = few.chosen if isinstance(few.chosen, str) else 'the classifier'
    raise UserError(f'{name} is not linear in the features, which an export must be: take simpleshot_l2n, lda, ridge or logistic')
