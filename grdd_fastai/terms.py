"""Terms of stage two's loss that compare the student with its teachers in other ways than the paper's

A term of your own is a subclass of `DistillationTerm`: see docs/extending.md.
"""
import torch
import torch.nn.functional as F

from .core.errors import UserError
from .training.callbacks import LossTerm

__all__ = ['DistillationTerm', 'RelationalKD', 'SimilarityPreserving']


class DistillationTerm(LossTerm):
    """A term of stage two's loss that compares the student's features of a batch with the teachers'

    A subclass names its one part of the loss in `parts` and computes it in `loss`. It runs after `Teacher`, which it needs in the Learner.
    """
    weight = 1.
    by_episode = False # whether `loss` gets one episode at a time; the term is then their mean
    def __init__(self, weight:float=1.): self.weight = weight
    def before_fit(self):
        super().before_fit()
        if not hasattr(self.learn, 'teacher'):
            raise UserError(f'{type(self).__name__} needs a teacher: give meta_learner(..., teacher=)')
        if sum(cb.name == self.name for cb in self.learn.cbs) > 1:
            raise UserError(f'{type(self).__name__} is there twice: its weight and settings are those of meta_learner, or leave one out')
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
