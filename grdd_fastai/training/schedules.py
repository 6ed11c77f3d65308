"""The learning-rate schedules that the paper trains with."""
from fastai.callback.schedule import ParamScheduler
from fastai.learner import Learner
from fastcore.basics import patch
from fastcore.foundation import L

__all__ = ['poly', 'step_down']


def poly(lr, power=0.9):
    "lr * (1 - pos)^power over training, pos from 0 to 1 (section 4.1)"
    return lambda pos: lr * (1 - pos)**power

def step_down(lr, last=1/3, factor=0.1):
    "lr, times `factor` for the `last` part of training (section 4.1: the last 5 of 15 epochs)"
    return lambda pos: lr * (factor if pos >= 1 - last - 1e-9 else 1)

@patch
def fit_poly(self:Learner, n_epoch, lr=0.05, power=0.9, cbs=None, **kwargs):
    "Fit with the paper's 'poly' rate of stage one"
    self.fit(n_epoch, lr, cbs=L(ParamScheduler({'lr':poly(lr, power)})) + L(cbs), **kwargs)

@patch
def fit_step(self:Learner, n_epoch, lr=1e-3, last=1/3, factor=0.1, cbs=None, **kwargs):
    "Fit with the paper's stepped rate of stage two"
    self.fit(n_epoch, lr, cbs=L(ParamScheduler({'lr':step_down(lr, last, factor)})) + L(cbs), **kwargs)
