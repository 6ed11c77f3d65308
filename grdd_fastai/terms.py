"""Terms of stage two's loss that compare the student with its teachers in other ways than the paper's

A term of your own is a subclass of `DistillationTerm`: see docs/extending.md.
"""
import torch
import torch.nn.functional as F
from torch import nn

from .core.distributed import unwrapped
from .core.errors import UserError
from .losses import relatedness
from .training.callbacks import LossTerm

__all__ = ['DistillationTerm', 'RelationalKD', 'SimilarityPreserving', 'FeatureRegression', 'ContrastiveKD',
           'ClassTerm', 'LogitKD', 'DecoupledKD', 'DIST']


class DistillationTerm(LossTerm):
    """A term of stage two's loss that compares the student's features of a batch with the teachers'

    A subclass names its one part of the loss in `parts` and computes it in `loss`. It runs after `Teacher`, which it needs in the Learner.
    A term that trains layers of its own beside the student returns them in `make_layers` and finds them in `own_layers`.
    """
    weight = 1.
    by_episode = False # whether `loss` gets one episode at a time; the term is then their mean
    own_layers = None # the term's layers in the Learner's model, during and after a fit
    def __init__(self, weight:float=1.): self.weight = weight
    def make_layers(self, n_features:int, of_teachers:list, n_classes:int) -> nn.Module|None:
        """Make the layers that are trained beside the student; None for a term without layers. A recipe does not save them.

        `n_features` is the size of the student's features, `of_teachers` is the size of each teacher's, `n_classes` is that of the base
        classes.
        """
        return None
    @classmethod
    def trains_layers(cls):
        "Whether this class of terms makes layers"
        return cls.make_layers is not DistillationTerm.make_layers
    def before_fit(self):
        super().before_fit()
        if not hasattr(self.learn, 'teacher'):
            raise UserError(f'{type(self).__name__} needs a teacher: give meta_learner(..., teacher=)')
        if sum(cb.name == self.name for cb in self.learn.cbs) > 1:
            raise UserError(f'{type(self).__name__} is there twice: its weight and settings are those of meta_learner, or leave one out')
        heads = getattr(unwrapped(self.model), 'heads', {})
        self.own_layers = heads[self.name] if self.name in heads else None
        if self.own_layers is None and self.trains_layers():
            raise UserError(f'{type(self).__name__} trains layers of its own: give it when the Learner is made, meta_learner(..., cbs=)')
        if self.own_layers is not None and self.learn.teacher.output != 'features':
            raise UserError(f"{type(self).__name__} compares features: give teacher_output='features' with it")
    def loss(self, student:torch.Tensor, teachers:list) -> torch.Tensor:
        """The term, a scalar: `student` are features (B, D), `teachers` a list of features (B, D'), both in float32

        `self.learn.loss_func.split` takes them apart into support and query of each episode.
        """
        raise NotImplementedError
    def after_loss(self):
        part, = self.parts
        student,*teachers = [h.float() for h in (self.pred, *self.learn.teacher.features())]
        if self.by_episode:
            episodes = list(zip(*map(self.learn.loss_func.episodes, (student, *teachers)), strict=True))
            value = sum(self.loss(h, others) for h,*others in episodes) / len(episodes)
        else: value = self.loss(student, teachers)
        self.add_loss(self.weight, **{part:value})


class RelationalKD(DistillationTerm):
    """L_rkd: the distances between the images of an episode and the angles at them follow the teacher's, or the mean over several teachers

    It is RKD-DA (arXiv 1904.05068). Distances are divided by their mean, and angles weigh twice as much as distances.
    """
    parts,by_episode = ('L_rkd',),True
    def loss(self, student:torch.Tensor, teachers:list) -> torch.Tensor:
        mine,found = relations(student),[relations(h) for h in teachers]
        return sum(F.smooth_l1_loss(mine[0], d) + 2*F.smooth_l1_loss(mine[1], angle) for d,angle in found) / len(found)

def relations(h):
    "Of features (B, D): the distances (B, B) over their mean, and the cosines (B, B, B) of the angles at each image between any two others"
    differences = h - h.unsqueeze(1)
    d = torch.linalg.vector_norm(differences, dim=-1)
    B = len(h)
    directions = F.normalize(differences, dim=-1)
    return d / (d.sum() / (B*(B - 1))),directions @ directions.mT


class SimilarityPreserving(DistillationTerm):
    """L_sp: the products of the features of any two images of an episode follow the teacher's, or the mean over several teachers

    The rows of the matrix of products have unit length (arXiv 1907.09682).
    """
    parts,by_episode = ('L_sp',),True
    def loss(self, student:torch.Tensor, teachers:list) -> torch.Tensor:
        def G(h): return F.normalize(h @ h.mT, dim=1)
        mine = G(student)
        return sum((mine - G(h)).square().mean() for h in teachers) / len(teachers)


class FeatureRegression(DistillationTerm):
    """L_fr: a linear layer turns the student's features into the teacher's, or a layer for each of several teachers

    It is the hint of FitNets (arXiv 1412.6550), but at the features instead of a layer in the middle, and both sides have unit length. The
    term is the mean squared distance of an image's two vectors, 2 - 2 cos.
    """
    parts = ('L_fr',)
    def make_layers(self, n_features, of_teachers, n_classes): return nn.ModuleList(nn.Linear(n_features, n) for n in of_teachers)
    def loss(self, student:torch.Tensor, teachers:list) -> torch.Tensor:
        pairs = [(F.normalize(layer(student), dim=1), F.normalize(h, dim=1)) for layer,h in zip(self.own_layers, teachers, strict=True)]
        return sum((mine - h).square().sum(1).mean() for mine,h in pairs) / len(pairs)


class ContrastiveKD(DistillationTerm):
    """L_crd: of all images of the batch, the student's vector of an image finds the teacher's vector of the same image

    It is the cross-entropy of the cosines, divided by the temperature `T`, of vectors of `size` numbers that linear layers make of both
    sides' features, or the mean over several teachers. CRD (arXiv 1910.10699) draws the other images from a memory of all images, without
    those of the same class, and tells pairs apart one by one, in both directions.
    """
    parts = ('L_crd',)
    def __init__(self, weight:float=1., T:float=0.1, size:int=128):
        super().__init__(weight)
        self.T,self.size = T,size
    def make_layers(self, n_features, of_teachers, n_classes):
        return nn.ModuleList(nn.ModuleList(nn.Linear(n, self.size) for n in (n_features, n_teacher)) for n_teacher in of_teachers)
    def loss(self, student:torch.Tensor, teachers:list) -> torch.Tensor:
        same = torch.arange(len(student), device=student.device)
        found = [relatedness(mine(student), its(h))/self.T for (mine,its),h in zip(self.own_layers, teachers, strict=True)]
        return sum(F.cross_entropy(z, same) for z in found) / len(found)


# ---- terms of the base classes ----------------------------------------------------------------------------------------

class ClassTerm(DistillationTerm):
    """A term that compares the student's logits of the base classes with the teacher's, or with the mean of several teachers'

    A logit is the cosine of the features with a vector of the class, divided by the temperature `T`. The student's vectors are trained
    beside it. The teacher's are the mean features of the classes, so that a network without a classifier can teach, too. A subclass
    computes the term in `of_logits`. Unlike in Hinton's distillation and DKD, the term is not multiplied by T squared.
    """
    def __init__(self, weight:float=1., T:float=0.1):
        super().__init__(weight)
        self.T = T
    def make_layers(self, n_features, of_teachers, n_classes): return nn.Linear(n_features, n_classes, bias=False)
    @property
    def means(self): return self.learn.teacher.class_means()
    def before_fit(self):
        super().before_fit()
        self.learn.teacher.class_means() # computed now, and not within the first step
    def loss(self, student:torch.Tensor, teachers:list) -> torch.Tensor:
        z_g = torch.stack([relatedness(h, means) for h,means in zip(teachers, self.means, strict=True)]).mean(0)
        return self.of_logits(relatedness(student, self.own_layers.weight)/self.T, z_g/self.T, self.yb[0].as_subclass(torch.Tensor))
    def of_logits(self, student:torch.Tensor, teacher:torch.Tensor, y:torch.Tensor) -> torch.Tensor:
        "The term, a scalar, from logits (B, C) of the student and the teacher, and the classes y (B)"
        raise NotImplementedError

def kl(student, teacher):
    "Mean over the rows of KL(teacher || student), from log-probabilities (B, C)"
    return F.kl_div(student, teacher, reduction='batchmean', log_target=True)


class LogitKD(ClassTerm):
    "L_kd: the student's probabilities of the base classes follow the teacher's, as in Hinton's distillation (arXiv 1503.02531)"
    parts = ('L_kd',)
    def of_logits(self, student, teacher, y): return kl(student.log_softmax(1), teacher.log_softmax(1))


class DecoupledKD(ClassTerm):
    """L_dkd: decoupled knowledge distillation (DKD, arXiv 2203.08679)

    It is the KL of the two probabilities (target, any other class), plus `beta` times the KL among the other classes. In plain logit
    distillation this factor is 1 minus the teacher's probability of the target. Unlike in DKD's code, the weight is
    the same from the first step on.
    """
    parts = ('L_dkd',)
    def __init__(self, weight:float=1., T:float=0.1, beta:float=8.):
        super().__init__(weight, T)
        self.beta = beta
    def of_logits(self, student, teacher, y):
        target = y.unsqueeze(1)
        others = torch.arange(student.shape[1] - 1, device=y.device).expand(len(y), -1)
        others = others + (others >= target) # the other classes of each image
        def parts(z):
            rest = z.gather(1, others)
            either = torch.cat([z.gather(1, target), rest.logsumexp(1, keepdim=True)], 1)
            return either.log_softmax(1),rest.log_softmax(1)
        return sum(weight*kl(mine, its) for weight,mine,its in zip((1., self.beta), parts(student), parts(teacher)))


class DIST(ClassTerm):
    """L_dist: the student's probabilities correlate with the teacher's, within each image and within each class (DIST, arXiv 2205.10536)

    It is 1 minus the mean Pearson correlation of the rows, plus the same of the columns, of the probabilities (B, C). A column has the
    images of one step; in a distributed fit, those of one process.
    """
    parts = ('L_dist',)
    def of_logits(self, student, teacher, y):
        p,q = student.softmax(1),teacher.softmax(1)
        return 2 - pearson(p, q).mean() - pearson(p.T, q.T).mean()

def pearson(a, b):
    "Pearson correlation of each row of a (N, M) with that of b"
    return F.cosine_similarity(a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True), dim=1)
