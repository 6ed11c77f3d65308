"""What other transfer methods add to stage one: a teacher's logits, rotated copies that keep their logits, mixed feature maps."""
import torch
import torch.nn.functional as F
from torch import nn

from ..core.device import amp
from ..core.distributed import unwrapped
from ..core.errors import UserError
from ..losses import relatedness
from ..stage_one import FeatureTerm, rotate4
from ..terms import kl
from ..training.callbacks import Frozen, LossTerm, amp_dtype

__all__ = ['TeacherLogits', 'BornAgain', 'RotationInvariance', 'ManifoldMixup', 'InvariantEquivariant']


class TeacherLogits(Frozen):
    "A frozen network with a classifier of the base classes; `logits(x)` are its logits (B, C) of images (B, 3, H, W), in float32"
    def __init__(self, net:nn.Module):
        if not getattr(net, 'num_classes', 0): raise UserError("the teacher has no classifier: train it with head='linear'")
        self.net,self.networks = net,[net]
    @torch.no_grad()
    def logits(self, x:torch.Tensor) -> torch.Tensor:
        with amp(self.dls.device, amp_dtype(self.learn)): return self.net(x).float()


def distillation_kl(student:torch.Tensor, teacher:torch.Tensor, T:float) -> torch.Tensor:
    "T squared times the mean over images of KL(teacher || student), from logits (B, C) that are divided by T (arXiv 1503.02531)"
    return T*T*kl(*((z.float()/T).log_softmax(1) for z in (student, teacher)))


class BornAgain(LossTerm):
    """RFS-distill: label_weight * L_ce + weight * L_kl, with a teacher of the same architecture (arXiv 2003.11539, section 3.3)

    L_kl is `distillation_kl`. The weights of one half each are those of the official script.
    """
    parts,needs_teacher = ('L_kl',),True
    def __init__(self, weight:float=.5, label_weight:float=.5, T:float=4.): self.weight,self.label_weight,self.T = weight,label_weight,T
    def after_loss(self):
        L_kl = distillation_kl(self.pred, self.learn.teacher_logits.logits(self.xb[0]), self.T)
        self.set_loss(self.label_weight*self.loss_grad + self.weight*L_kl, L_kl=L_kl)


class RotationInvariance(LossTerm):
    """SKD's generation 1, which learns from generation 0: L_kl + weight * L_2, without labels (arXiv 2006.09785, section 3.2)

    L_kl is `distillation_kl` of the upright images. L_2 is the mean distance between the logits of an image and those of its three rotated
    copies; the official program has one of the three angles. Weight and T are those of its command for CIFAR-FS.
    """
    parts,needs_teacher,copies = ('L_kl', 'L_2'),True,4
    def __init__(self, weight:float=.1, T:float=2.): self.weight,self.T = weight,T
    def before_batch(self):
        self.upright = self.xb
        self.learn.xb = rotate4(self.xb[0]),
    def after_pred(self):
        self.upright_pred,*self.rotated = self.pred.chunk(4)
        self.learn.pred = self.upright_pred # which the labels belong to
        self.learn.xb = self.upright
    def after_loss(self):
        L_kl = distillation_kl(self.pred, self.learn.teacher_logits.logits(self.xb[0]), self.T)
        L_2 = sum(torch.linalg.vector_norm((z - self.upright_pred).float(), dim=1).mean() for z in self.rotated)/3
        self.set_loss(L_kl + self.weight*L_2, L_kl=L_kl, L_2=L_2)


class ManifoldMixup(LossTerm):
    """Manifold mixup: the images or the feature maps after a stage are mixed with those of a shuffled batch, and so are the losses

    The share of an image is drawn from Beta(alpha, alpha) for a whole batch (arXiv 1806.05236; alpha = 2 in S2M2, arXiv 1907.12087, whose
    steps also have rotated images that are not mixed). The stages are those that timm's `feature_info` of the backbone names.
    """
    parts = ('L_mix',)
    def __init__(self, alpha:float=2.): self.alpha = alpha
    def before_fit(self):
        super().before_fit()
        net = unwrapped(self.model).backbone
        stages = [net.get_submodule(f['module']) for f in getattr(net, 'feature_info', []) if 'module' in f]
        if not stages: raise UserError(f'{type(net).__name__} has no feature_info: manifold mixup needs it to find the stages')
        self.chosen = None
        self.hooks = [m.register_forward_hook(lambda _m, _x, out, i=i: self.mixed(out) if self.chosen == i else None)
                      for i,m in enumerate(stages, 1)]
    def before_batch(self):
        self.share = float(torch.distributions.Beta(self.alpha, self.alpha).sample())
        self.chosen = int(torch.randint(len(self.hooks) + 1, ())) # 0: the images, i: the feature maps after stage i
        self.other = torch.randperm(len(self.xb[0])).to(self.xb[0].device)
        self.plain = self.xb
        if self.chosen == 0: self.learn.xb = self.mixed(self.xb[0]),
    def mixed(self, x): return self.share*x + (1 - self.share)*x[self.other]
    def after_pred(self): self.learn.xb = self.plain
    def after_loss(self):
        L_mix = self.share*self.loss_grad + (1 - self.share)*self.learn.loss_func(self.pred, self.yb[0][self.other])
        self.set_loss(L_mix, L_mix=L_mix)
    def after_train(self): self.chosen = None # nothing is mixed when accuracy is measured
    def after_fit(self):
        super().after_fit()
        for hook in self.hooks: hook.remove()


class InvariantEquivariant(FeatureTerm):
    """IER: L_ce + weight * (L_eq + L_inv) on each batch at four angles (arXiv 2103.01315, section 3)

    L_eq tells the angle from the features. L_inv brings the vectors of a rotated image and of the image itself together, against those of
    the other images of the batch: the cross-entropy of their cosines, divided by `T`. The paper has sixteen transformations, by rotation
    and aspect ratio, takes the other images from a memory of all images, and also compares an image with its own vector in that memory.
    """
    parts,copies = ('L_eq', 'L_inv'),4
    def __init__(self, weight:float=1., T:float=1., size:int=64): self.weight,self.T,self.size = weight,T,size
    def make_layers(self, n_features, n_classes):
        def head(n_out):
            hidden = [m for _ in range(2) for m in (nn.Linear(n_features, n_features), nn.BatchNorm1d(n_features), nn.ReLU())]
            return nn.Sequential(*hidden, nn.Linear(n_features, n_out))
        return nn.ModuleDict(dict(equivariant=head(4), invariant=head(self.size)))
    def before_batch(self):
        self.upright = self.xb,self.yb
        self.learn.xb,self.learn.yb = (rotate4(self.xb[0]),),(self.yb[0].repeat(4),)
    def after_loss(self):
        n = len(self.upright[1][0])
        angles = torch.arange(4, device=self.h.device).repeat_interleave(n)
        L_eq = F.cross_entropy(self.own_layers['equivariant'](self.h), angles)
        first,*rotated = self.own_layers['invariant'](self.h).chunk(4)
        same = torch.arange(n, device=self.h.device)
        L_inv = sum(F.cross_entropy(relatedness(z, first)/self.T, same) for z in rotated)/3
        self.set_loss(self.loss_grad + self.weight*(L_eq + L_inv), L_eq=L_eq, L_inv=L_inv)
        self.learn.xb,self.learn.yb = self.upright # other callbacks count and measure the batch's own images
        self.learn.pred = self.pred[:n]
