"""The exponential moving average of a network's weights during a fit."""
from timm.utils import ModelEmaV3

from ..core.distributed import unwrapped
from .callbacks import UndoAfterFit

__all__ = ['EMA']


class EMA(UndoAfterFit):
    """Keep an exponential moving average (EMA) of the weights and of the batch norms' statistics

    After each step, average = d * average + (1 - d) * weights. The decay d rises from 0 to `decay` in the first steps (timm's `ModelEmaV3`
    with warm-up). The accuracy on the validation classes is that of the average, and the fit ends with the average as the network's
    weights: that of the best epoch with `KeepBest`, else the last one. The steps themselves are the same as without the EMA.
    """
    run_valid = False
    average = None # the averaged network during a fit
    def __init__(self, decay:float=0.999): self.decay = decay
    def before_fit(self):
        self.run = not hasattr(self.learn, 'lr_finder')
        if not self.run: return
        self.model_ema = ModelEmaV3(unwrapped(self.model), self.decay, use_warmup=True)
        self.average = self.model_ema.module
    def after_step(self): self.model_ema.update(unwrapped(self.model), self.epoch*self.n_iter + self.iter + 1)
    def after_fit(self):
        if self.average is not None and not hasattr(self.learn, 'keep_best'):
            unwrapped(self.model).load_state_dict(self.average.state_dict())
        self.average = self.model_ema = None
        self.run = True


def measured_network(learn):
    "The network that is evaluated: the moving average during a fit with `EMA`, otherwise the network that is trained"
    average = getattr(getattr(learn, 'ema', None), 'average', None)
    return unwrapped(learn.model) if average is None else average
