"""The learning-rate schedules of both stages."""
from fastai.callback.schedule import ParamScheduler
from fastai.learner import Learner
from fastcore.basics import patch
from fastcore.foundation import L

from ..core.errors import UserError
from .distributed import effective_step

__all__ = ['SCHEDULES', 'poly', 'step_down', 'fit_function']

SCHEDULES = ('poly', 'step', 'one_cycle') # for each, a Learner has a method fit_<name>


def poly(lr, power=0.9, warmup=0.):
    """Learning rate of stage one (section 4.1) as a function of `pos`, which goes from 0 to 1 over the training: lr * (1 - pos)^power

    In the first part `warmup` of the training the rate is multiplied by a factor that rises from 0 to 1. The paper has no warm-up.
    """
    return lambda pos: lr * (1 - pos)**power * (min(1., pos/warmup) if warmup else 1.)

def step_down(lr, last=1/3, factor=0.1):
    "Learning rate of stage two (section 4.1) as a function of `pos`: lr, and lr * factor in the part `last`, the last 5 of 15 epochs"
    return lambda pos: lr * (factor if pos >= 1 - last - 1e-9 else 1)

@patch
def fit_poly(self:Learner, n_epoch, lr=0.05, power=0.9, warmup=0., cbs=None, **kwargs):
    """Fit with the paper's 'poly' learning rate of stage one, which in the first `warmup` epochs rises from 0

    UserError if the warm-up is as long as the training.
    """
    if not 0 <= warmup < n_epoch: raise UserError(f'the warm-up has {warmup} of {n_epoch} epochs: it must be shorter than the training')
    self.fit(n_epoch, lr, cbs=L(ParamScheduler({'lr':poly(lr, power, warmup/n_epoch)})) + L(cbs), **kwargs)

@patch
def fit_step(self:Learner, n_epoch, lr=1e-3, last=1/3, factor=0.1, cbs=None, **kwargs):
    "Fit with the paper's stepped learning rate of stage two"
    self.fit(n_epoch, lr, cbs=L(ParamScheduler({'lr':step_down(lr, last, factor)})) + L(cbs), **kwargs)

def fit_function(s, step):
    """A function of the Learner that fits it with the settings `s` of a stage (epochs, schedule, lr)

    `step` is the number of images or episodes per step. If several processes make the step larger, the learning rate grows by the square
    root of the ratio (docs/distributed.md).
    """
    lr = s.lr * (effective_step(step)/step)**0.5
    how = dict(warmup=s.warmup) if getattr(s, 'warmup', 0) else {}
    return lambda learn: getattr(learn, f'fit_{s.schedule}')(s.epochs, lr, **how)
