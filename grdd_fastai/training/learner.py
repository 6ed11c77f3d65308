"""The Learner of both stages: what they have in common."""
import inspect
import os
from contextlib import contextmanager, suppress

import torch
from fastai.callback.core import CancelEpochException
from fastai.data.core import DataLoaders
from fastai.data.transforms import Normalize
from fastai.learner import Learner
from fastcore.foundation import L

from ..core.device import keep_freed_memory
from ..core.distributed import rank_world
from ..core.errors import UserError
from .callbacks import Autocast, LightRecorder, Seeded, UndoAfterFit
from .distributed import Distributed
from .optim import sgd
from .validation import FewShotAccuracy, KeepBest

__all__ = ['FewShotLearner', 'few_shot_learner', 'image_config']


class FewShotLearner(Learner):
    """A Learner whose next fit may begin at `first_epoch`, where a checkpoint left off

    Whatever ends a fit, Ctrl-C too, its callbacks undo what they changed. `validate` is accuracy on the validation classes.
    """
    first_epoch = 0
    def fit(self, *args, **kwargs):
        try: super().fit(*args, **kwargs)
        except BaseException: # fastai calls after_fit for its own Cancel exceptions only
            for cb in self.cbs.filter(lambda cb: isinstance(cb, UndoAfterFit)):
                with suppress(AttributeError): cb.after_fit() # one whose before_fit was not reached has nothing to undo
            raise
        finally: self.first_epoch = 0
    def validate(self, *args, **kwargs): return L([self.few_shot_accuracy.measure().accuracy])
    @contextmanager
    def distrib_ctx(self, sync_bn=True):
        "Fits inside train on all the processes joined by `processes`; fastai's by the same name cuts batches across episodes"
        if rank_world()[1] == 1:
            if int(os.environ.get('WORLD_SIZE', 1)) > 1:
                raise UserError('this is one of several processes that have not joined: put the program inside `with processes():`')
            yield self
            return
        with self.added_cbs(Distributed(sync_bn)): yield self
    def _do_fit(self):
        for epoch in range(self.first_epoch, self.n_epoch):
            self.epoch = epoch
            self._with_events(self._do_epoch, 'epoch', CancelEpochException)


def image_config(dls):
    "What the images of `dls` are, as timm's `pretrained_cfg` has it: their size and, where they are normalised, mean and std"
    cfg = dict(input_size=tuple(dls.one_batch()[0].shape[1:]), crop_pct=1.)
    norm = next((f for f in dls.train.after_batch.fs if isinstance(f, Normalize)), None)
    return cfg if norm is None else cfg | {k:tuple(v.flatten().tolist()) for k,v in dict(mean=norm.mean, std=norm.std).items()}

def check_dls(dls):
    if not isinstance(dls, DataLoaders):
        raise UserError(f'the data is a {type(dls).__name__}: make DataLoaders with category_dls or episodic_dls')

def few_shot_learner(
    dls, # DataLoaders of either stage
    model, # the network; where it has a `backbone`, that is what few-shot accuracy is measured on
    loss_func,
    stage_cbs, # callbacks of the stage
    seed=0, # seed of dropout, order and augmentation
    amp=True, # bfloat16, or float16 with scaled gradients, where the device has it
    keep_best=True, # end with the weights of the epoch that was best on the validation classes
    channels_last=True, # memory format of convolutions
    compile=False, # compile the network by torch.compile: True, or a dict of its options; slower on a CPU (benchmarks/README.md)
    valid=None, # episodes of the validation classes: n_way=5, k_shot=1, n_query=15, n_episodes=1000, seed=0
    opt_func=sgd, # fastai optimiser
    wd=5e-4, # weight decay
    cbs=None, # further callbacks
    **kwargs # of fastai's `Learner`
) -> FewShotLearner:
    "The Learner of either stage"
    if torch.device(dls.device).type == 'cpu': keep_freed_memory()
    net = getattr(model, 'backbone', model)
    net.pretrained_cfg = getattr(net, 'pretrained_cfg', {}) | image_config(dls) # it says what images the network takes from now on
    if channels_last: model.to(memory_format=torch.channels_last)
    if compile:
        for part in net.children(): part.compile(**(compile if isinstance(compile, dict) else {})) # in place: names and hooks stay
    valid = valid or {}
    known = list(inspect.signature(FewShotAccuracy).parameters)
    if wrong := next((k for k in valid if k not in known), None):
        raise UserError(f'valid has no setting {wrong!r}: its settings are {", ".join(known)}')
    cbs = [Seeded(seed), LightRecorder(), *([Autocast()] if amp else []), *stage_cbs, FewShotAccuracy(**valid),
           *([KeepBest()] if keep_best else []), *L(cbs)]
    learn = FewShotLearner(dls, model, loss_func=loss_func, opt_func=opt_func, wd=wd, cbs=cbs, **kwargs)
    learn.recorder.train_metrics,learn.recorder.valid_metrics = True,False # there is no validation loss
    return learn
