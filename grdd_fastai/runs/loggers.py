"""Loggers that follow the training of a run: fastai's callbacks for TensorBoard, Weights & Biases and a CSV table."""
import contextlib
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from fastai.callback.core import Callback
from fastai.learner import Recorder

from ..core.distributed import log, rank_world
from ..core.errors import UserError
from ..settings import Bound, Settings, flag

__all__ = ['LOGGERS', 'LogOptions', 'logged']


LOGGERS = ('tensorboard', 'wandb', 'csv')

def names_of(text): return [n for n in (text or '').replace(' ', '').split(',') if n]

@dataclass(frozen=True, kw_only=True)
class LogOptions(Settings):
    "The loggers that follow the trainings of a program"
    loggers: Annotated[str|None, 'also follow the training in tensorboard, wandb or csv, several separated by commas', flag('log'),
                       Bound(f'{", ".join(LOGGERS)}, separated by commas', lambda text: set(names_of(text)) <= set(LOGGERS))] = None


@contextlib.contextmanager
def logged(learn, text, folder, stage, settings):
    """A block in which the fits of `learn` are followed by the loggers in `text`, in the first of several processes

    TensorBoard writes to `folder`/tensorboard/`stage`. Weights & Biases has a run for each stage, which goes on when the stage is
    resumed; without a login it writes to `folder`/wandb, for `wandb sync`. UserError for a logger that is not installed.
    """
    names = names_of(text)
    if not names or rank_world()[0] > 0:
        yield
        return
    cbs = [MAKERS[n](Path(folder), stage, settings) for n in names]
    learn.add_cbs(cbs)
    try: yield
    finally:
        for cb in cbs: finish(cb) # also after a stop, at which fastai's callbacks close nothing
        learn.remove_cbs(cbs)


class EachStep(Callback):
    "What TensorBoard and Weights & Biases share: batches that a resumed fit skips are not logged, and the steps are counted on"
    order = Recorder.order + 1
    def before_train(self): self.learn.train_iter = self.epoch*len(self.dls.train)
    def after_batch(self):
        if self.training and self.iter >= self.learn.skip_batches.n: self.log_step()

def tensorboard(folder, stage, settings):
    from fastai.callback.tensorboard import TensorBoardCallback
    class TensorBoardScalars(EachStep, TensorBoardCallback):
        def log_step(self): TensorBoardCallback.after_batch(self)
    return TensorBoardScalars(folder/'tensorboard'/stage, trace_model=False, log_preds=False)

class WandbScalars(EachStep):
    "The loss and the learning rate of each step and the metrics of each epoch; the callback of fastai 2.8 fails with the fastcore of today"
    def __init__(self, run): self.run_of_wandb = run
    def log_step(self): self.run_of_wandb.log(dict(train_loss=float(self.smooth_loss), lr=self.opt.hypers[-1]['lr'], step=self.train_iter))
    def after_epoch(self):
        names = self.recorder.metric_names
        self.run_of_wandb.log(dict(epoch=self.epoch + 1) | {n:v for n,v in zip(names[2:-1], self.recorder.log[2:-1]) if v is not None})

def wandb(folder, stage, settings):
    import wandb
    known = os.environ.get('WANDB_MODE') or os.environ.get('WANDB_API_KEY') or wandb.api.api_key
    if not known: log(f'wandb has no login: it writes to {folder/"wandb"}, and `wandb sync` sends that')
    name = f'{folder.resolve().name}-{stage}'
    own = hashlib.sha256(str(folder.resolve()).encode(errors='surrogateescape')).hexdigest()[:8] # folders may have the same name
    run = wandb.init(project='grdd_fastai', name=name, id=f'{name}-{own}', resume='allow', dir=str(folder), config=settings,
                     mode=None if known else 'offline', settings=wandb.Settings(silent=True))
    return WandbScalars(run)

def csv(folder, stage, settings):
    from fastai.callback.progress import CSVLogger
    return CSVLogger((folder/f'log_{stage}.csv').resolve(), append=True)

def installed(name, make):
    "The maker of a logger, with a sentence for a package that is not there"
    def made(*args):
        try: return make(*args)
        except ImportError as e:
            raise UserError(f"the logger {name} needs a package that cannot be imported ({e}): pip install 'grdd_fastai[loggers]', "
                            f'or leave {name} out of --log') from None
    return made

MAKERS = {f.__name__:installed(f.__name__, f) for f in (tensorboard, wandb, csv)}

def finish(cb:Callback):
    "Close what a logger has open"
    if hasattr(cb, 'writer'): cb.writer.close()
    if getattr(getattr(cb, 'file', None), 'closed', True) is False: cb.file.close()
    if isinstance(cb, WandbScalars): cb.run_of_wandb.finish()
