"""The Learner of both stages, and what it needs of data and network."""
import inspect
import os
from contextlib import contextmanager, suppress

import torch
from fastai.callback.core import CancelEpochException, event
from fastai.data.core import DataLoaders
from fastai.data.transforms import Normalize
from fastai.learner import Learner
from fastcore.foundation import L

from ..core.device import fastest_convolutions, keep_freed_memory
from ..core.distributed import rank_world
from ..core.errors import UserError
from ..fewshot.interpret import EpisodeInterpretation
from .callbacks import Autocast, LightRecorder, Seeded, SmoothLoss, UndoAfterFit
from .distributed import Distributed
from .ema import EMA
from .optim import sgd
from .validation import FewShotAccuracy, KeepBest

__all__ = ['FewShotLearner', 'few_shot_learner', 'image_config']


class FewShotLearner(Learner):
    """A Learner whose next fit begins at the epoch `first_epoch`, so that a fit can go on from a checkpoint

    Its callbacks undo their changes whatever ends a fit, also Ctrl-C. `validate` returns the accuracy (%) on the validation classes.
    """
    first_epoch = 0
    def fit(self, *args, **kwargs):
        try:
            with fastest_convolutions(): super().fit(*args, **kwargs)
        except BaseException: # fastai calls after_fit for its own Cancel exceptions only
            for cb in self.cbs.filter(lambda cb: isinstance(cb, UndoAfterFit)):
                with suppress(AttributeError): cb.after_fit() # a callback whose before_fit was not reached has nothing to undo
            raise
        finally: self.first_epoch = 0
    def _call_one(self, event_name):
        "Call the callbacks that define the event; fastai calls all of them, which costs time in every step"
        if not hasattr(event, event_name): raise Exception(f'there is no event {event_name}')
        for cb in self.cbs.sorted('order'):
            if event_name in vars(cb) or hasattr(type(cb), event_name) or event_name == 'after_fit': cb(event_name)
    def show_results(self, max_n:int=8, seed:int=0, **kwargs):
        """Draw an episode of the validation classes: which queries are right, and what the others are taken for

        At most `max_n` queries of each class are drawn; `seed` gives another episode, and `kwargs` are those of `EpisodeInterpretation`.
        """
        EpisodeInterpretation.from_learner(self, n_episodes=1, seed=seed, **kwargs).plot_episode(n_query=max_n)
    def validate(self, *args, **kwargs): return L([self.few_shot_accuracy.measure().accuracy])
    @contextmanager
    def distrib_ctx(self, sync_bn=True):
        """A context in which fits train on all processes that `processes` joined; with one process it changes nothing

        fastai's method of the same name may cut a batch inside an episode. UserError if the launched processes have not joined.
        """
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


def normalisation(dls):
    "The `Normalize` transform of the batches of `dls`, or None"
    return next((f for f in dls.train.after_batch.fs if isinstance(f, Normalize)), None)

def image_config(dls):
    "The size of the images of `dls` and, if they are normalised, their mean and std, in the form of timm's `pretrained_cfg`"
    cfg = dict(input_size=tuple(dls.one_batch()[0].shape[1:]), crop_pct=1.)
    norm = normalisation(dls)
    if norm is None: return cfg
    return cfg | {k:tuple(v.flatten().tolist()) for k,v in dict(mean=norm.mean, std=norm.std).items()}

def check_dls(dls):
    "Raise UserError unless `dls` are fastai DataLoaders"
    if not isinstance(dls, DataLoaders):
        raise UserError(f'the data is a {type(dls).__name__}: make DataLoaders with category_dls or episodic_dls')

def few_shot_learner(
    dls, # DataLoaders of either stage
    model, # network; if it has a `backbone`, few-shot accuracy is measured on that
    loss_func, # loss of a batch
    stage_cbs, # callbacks of the stage
    seed=0, # seed of dropout, order and augmentation
    amp=True, # compute in bfloat16, or in float16 with scaled gradients, if the device supports it
    keep_best=True, # at the end, load the weights of the epoch with the best accuracy on the validation classes
    channels_last=True, # channels_last memory format of the convolutions
    compile=False, # compile the network with torch.compile: True or a dict of its options; slower on a CPU (benchmarks/README.md)
    ema_decay=0., # decay of a moving average of the weights (`EMA`), which is measured and kept; 0: the weights themselves
    valid=None, # dict of the settings of the validation episodes: n_way=5, k_shot=1, n_query=15, n_episodes=1000, seed=0
    opt_func=sgd, # fastai optimiser
    wd=5e-4, # weight decay
    cbs=None, # further callbacks
    **kwargs # keywords of fastai's `Learner`
) -> FewShotLearner:
    "The `FewShotLearner` of either stage; UserError for an unknown setting in `valid`"
    if torch.device(dls.device).type == 'cpu': keep_freed_memory()
    net = getattr(model, 'backbone', model)
    net.pretrained_cfg = getattr(net, 'pretrained_cfg', {}) | image_config(dls) # records the images that the network takes from now on
    if channels_last: model.to(memory_format=torch.channels_last)
    if compile:
        for part in net.children(): part.compile(**(compile if isinstance(compile, dict) else {})) # in place, so that names and hooks stay
    valid = valid or {}
    known = list(inspect.signature(FewShotAccuracy).parameters)
    if wrong := next((k for k in valid if k not in known), None):
        names = ', '.join(known)
        raise UserError(f'valid has no setting {wrong!r}: its settings are {names}')
    cbs = [Seeded(seed), LightRecorder(), *([Autocast()] if amp else []), *stage_cbs, FewShotAccuracy(**valid),
           *([EMA(ema_decay)] if ema_decay else []), *([KeepBest()] if keep_best else []), *L(cbs)]
    learn = FewShotLearner(dls, model, loss_func=loss_func, opt_func=opt_func, wd=wd, cbs=cbs, **kwargs)
    learn.recorder.smooth_loss = SmoothLoss(learn.recorder.smooth_loss.beta)
    learn.recorder.train_metrics = True
    learn.recorder.valid_metrics = False # there is no validation loss
    return learn
