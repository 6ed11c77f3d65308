"""The Learner of both stages, and what it needs of data and network."""
import inspect
import os
from contextlib import contextmanager, suppress

import numpy as np
import torch
from fastai.callback.core import CancelEpochException, event
from fastai.callback.mixup import MixHandler
from fastai.data.core import DataLoaders, Datasets, TfmdDL
from fastai.data.transforms import Normalize
from fastai.learner import Learner, Metric, ValueMetric, mk_metric
from fastai.losses import CrossEntropyLossFlat
from fastai.torch_core import TensorCategory
from fastcore.foundation import L

from ..core.device import fastest_convolutions, keep_freed_memory
from ..core.distributed import rank_world
from ..core.errors import UserError
from ..data.loaders import classes_of, plain_images
from ..fewshot.interpret import EpisodeInterpretation
from ..losses import EpisodicLoss
from .callbacks import Autocast, LightRecorder, Seeded, SmoothLoss, UndoAfterFit
from .distributed import Distributed
from .ema import EMA
from .optim import sgd
from .validation import FewShotAccuracy, KeepBest

__all__ = ['FewShotLearner', 'BaseClassLoss', 'few_shot_learner', 'image_config']


NO_OUTPUTS = ('the network has no outputs for the validation classes, and so no loss: give ds_idx=0 for the base classes, or take '
              'EpisodeInterpretation.from_learner(learn)')

class FewShotLearner(Learner):
    """A Learner whose next fit begins at the epoch `first_epoch`, so that a fit can go on from a checkpoint

    Its callbacks undo their changes whatever ends a fit, also Ctrl-C. `validate` returns the accuracy (%) on the validation classes.
    """
    first_epoch = 0
    skips_validation = False # True in an epoch of a fit, where `FewShotAccuracy` takes the place of fastai's validation
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
    @property
    def metrics(self): return self._metrics
    @metrics.setter
    def metrics(self, v): self._metrics = L(v).map(mk_metric).map(of_training)
    @property
    def has_classes(self):
        "Whether the network has outputs for the base classes, as in stage one; in stage two its outputs are features"
        return not isinstance(self.loss_func, EpisodicLoss)
    def get_preds(self, ds_idx=1, dl=None, with_input=False, with_loss=False, **kwargs):
        "As fastai's, but without `dl` each image of the data set once, in order and not augmented; in stage two the features of the images"
        of = self.dls[ds_idx] if dl is None else dl
        if with_loss and self.has_classes and len(getattr(getattr(of, 'dataset', None), 'tls', ())) > 1:
            codes = classes_of(of)[0]
            if len(codes) and codes.max() >= self.dls.c: raise UserError(NO_OUTPUTS)
        if dl is not None: return super().get_preds(ds_idx, dl, with_input=with_input, with_loss=with_loss, **kwargs)
        own = self.dls[ds_idx]
        packed = getattr(own, 'packed', None)
        labelled = self.has_classes and (ds_idx == 0 or (packed and isinstance(self.loss_func, BaseClassLoss))) # labels that the loss takes
        if not labelled or packed: dl = plain_images(own, own.bs, labels=labelled)
        found = list(super().get_preds(ds_idx, dl, with_input=with_input, with_loss=with_loss, **kwargs))
        if not labelled: found[1 + with_input] = TensorCategory(classes_of(own)[0])
        return tuple(found)
    def tta(self, ds_idx=1, dl=None, **kwargs):
        "As fastai's; images of a DataBlock whose classes have no outputs are read without their labels, and these are given back beside"
        own = self.dls[ds_idx] if dl is None else dl
        labelled = len(getattr(getattr(own, 'dataset', None), 'tls', ())) > 1
        codes = classes_of(own)[0] if labelled and self.has_classes else np.zeros(0, int)
        if isinstance(self.loss_func, BaseClassLoss) and getattr(own, 'packed', None) or not len(codes) or codes.max() < self.dls.c:
            return super().tta(ds_idx, dl, **kwargs)
        if getattr(own, 'packed', None): raise UserError(NO_OUTPUTS)
        images = own.new(Datasets(tls=own.dataset.tls[:1]), cls=TfmdDL, shuffle=False, drop_last=False)
        return super().tta(dl=images, **kwargs)[0],TensorCategory(codes)
    def predict(self, item, **kwargs):
        "As fastai's, among the base classes; UserError in stage two, whose network has no classes"
        if not self.has_classes:
            raise UserError('the network of stage two has no classes of its own: take FewShotClassifier(learn).fit(photos, labels)')
        return super().predict(item, **kwargs)
    def loss_not_reduced(self):
        if self.has_classes: return super().loss_not_reduced()
        raise UserError('the loss of an episode is not a sum over its images: take EpisodeInterpretation.from_learner(learn)')
    def _do_epoch(self):
        self.skips_validation = True
        try: super()._do_epoch()
        finally: self.skips_validation = False
    def _do_fit(self):
        check_mixing(self)
        check_logging(self)
        for epoch in range(self.first_epoch, self.n_epoch):
            self.epoch = epoch
            self._with_events(self._do_epoch, 'epoch', CancelEpochException)


class TrainMetric(Metric):
    "A metric of the training batches, under its name with `train_` before it: the network has no outputs for the validation classes"
    def __init__(self, metric:Metric): self.metric = metric
    def reset(self): self.metric.reset()
    def accumulate(self, learn): self.metric.accumulate(learn)
    @property
    def value(self): return self.metric.value
    @property
    def name(self): return f'train_{self.metric.name}'

def of_training(metric): return metric if isinstance(metric, ValueMetric | TrainMetric) else TrainMetric(metric)

class BaseClassLoss(CrossEntropyLossFlat):
    """Cross-entropy of the base classes; NaN for a batch with other classes, such as the validation classes, which have no outputs

    UserError if the loss of each image of such a batch is asked for.
    """
    def __call__(self, pred, y, **kwargs):
        if torch.is_grad_enabled() or (y < pred.shape[-1]).all(): return super().__call__(pred, y, **kwargs)
        if self.reduction == 'none': raise UserError(NO_OUTPUTS)
        return pred.new_full((), torch.nan)

def check_logging(learn):
    "Raise UserError if a logger of fastai would show predictions of validation images, whose classes the network has no outputs for"
    shows = next((cb.name for cb in learn.cbs if getattr(cb, 'log_preds', False)), None)
    if shows: raise UserError(f'{shows} shows predictions, and the network has no outputs for the validation classes: give log_preds=False')

def check_mixing(learn):
    "Raise UserError if the images of a batch would be mixed where their single classes or angles are needed"
    mixes = next((cb.name for cb in learn.cbs if isinstance(cb, MixHandler)), None)
    if mixes is None: return
    if hasattr(learn, 'rotation'):
        raise UserError(f'{mixes} mixes images, of which Rotation predicts the angle: give rotation=False, or leave it out')
    if not learn.has_classes:
        raise UserError(f'{mixes} mixes the images of an episode, of which the loss needs the single classes: leave it out in stage two')
    if not getattr(learn.loss_func, 'y_int', False):
        raise UserError(f'{mixes} needs a loss of fastai, which it can take apart: give loss_func=CrossEntropyLossFlat() or leave it out')

def normalisation(dls):
    "The `Normalize` transform of the batches of `dls`, or None"
    return next((f for f in dls.train.after_batch.fs if isinstance(f, Normalize)), None)

def image_config(dls):
    "The size of the images of `dls`, how they got it, and the mean and std of their normalisation, in the form of timm's `pretrained_cfg`"
    packed = getattr(dls.train, 'packed', None)
    cfg = dict(input_size=tuple(dls.one_batch()[0].shape[1:]), crop_pct=1.) | (packed.crop if packed else {})
    norm = normalisation(dls)
    if norm is None: return cfg | dict(mean=(0.,)*3, std=(1.,)*3) # numbers from 0 to 1 as they are
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
