"""Few-shot accuracy on the validation classes, and the weights of the best epoch."""
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from fastai.callback.core import CancelValidException
from fastai.callback.tracker import TrackerCallback
from torch.nn.parallel import DistributedDataParallel

from ..core.distributed import all_sum, without_heads
from ..core.errors import UserError
from ..data.episodes import indices_by_class
from ..data.loaders import classes_of, plain_images
from ..fewshot.embed import embed
from ..fewshot.evaluate import evaluate
from ..fewshot.inductive import mean_cosine
from .callbacks import ShowsMetrics, amp_dtype
from .ema import measured_network

__all__ = ['FewShotAccuracy', 'KeepBest']


SCALE = 10. # of the cosines in the loss of validation episodes


class FewShotAccuracy(ShowsMetrics):
    """Measure the accuracy (%) on seeded episodes of the validation classes after each epoch of a fit

    Also shows `valid_loss`: the cross-entropy of these episodes, with the softmax of ten times the mean cosine. The network has no outputs
    for the validation classes, so that a loss like the one of the training cannot be had. `classifier`, a function `(support, support_y,
    query) -> logits`, takes the place of both, and reads what the whole model gives for an image instead of its backbone.
    """
    order = ShowsMetrics.order + 1
    def __init__(self, n_way:int=5, k_shot:int=1, n_query:int=15, n_episodes:int=1000, seed:int=0, classifier:Callable|None=None):
        self.classifier = classifier
        self.episodes = dict(n_way=n_way, k_shot=k_shot, n_query=n_query, n_episodes=n_episodes, seed=seed)
        self.last = self.last_loss = float('nan') # the accuracy and the loss after the last epoch
    first = ('valid_loss',)
    def shown(self): return dict(valid_loss=lambda: self.last_loss, accuracy=lambda: self.last)
    def before_fit(self):
        "Raise UserError now instead of after the first epoch if the episodes cannot be drawn"
        super().before_fit()
        if hasattr(self.learn, 'gather_preds'): return # predictions need no episodes
        e = self.episodes
        indices_by_class(self.classes()[0], e['n_way'], e['k_shot'], e['n_query'], 'the validation set')
    @property
    def several(self): return isinstance(self.model, DistributedDataParallel)
    def classes(self):
        "Class codes (N) of the validation images, and the name of each code; UserError if the Learner has no validation images"
        if not len(self.dls.valid.dataset):
            raise UserError('this Learner has no validation images, as one that was loaded from a file: give it data by learn.dls = ...')
        return classes_of(self.dls.valid)
    def embed(self):
        "Features (N, D) of the validation images, by the network with its present weights or by their moving average, and class codes (N)"
        y = torch.from_numpy(self.classes()[0])
        net = measured_network(self.learn)
        if not self.classifier: net = without_heads(net)
        return embed(net, plain_images(self.dls.valid), amp_dtype(self.learn), distributed=self.several)[0],y
    def measure(self):
        "`Evaluation` on the episodes; `last_loss` is then their loss"
        h,y = self.embed()
        own = dict(classifier=self.classifier, scale=1.) if self.classifier else {}
        loss = EpisodesLoss(self.episodes['n_way'], self.episodes['n_query'], h.device, **own)
        found = evaluate(h, y, **self.episodes, classifier=dict(cosine=loss), distributed=self.several)['cosine']
        self.last_loss = loss.mean(self.several)
        return found
    def after_train(self):
        if not hasattr(self.learn, 'lr_finder'): self.last = self.measure().accuracy
    def before_validate(self):
        if self.learn.skips_validation: raise CancelValidException()


class EpisodesLoss:
    "A classifier of balanced episodes, which also adds up the cross-entropy of its queries, with `scale` times the logits"
    def __init__(self, n_way, n_query, device, classifier=mean_cosine, scale=SCALE):
        self.classifier,self.scale = classifier,scale
        self.y = torch.arange(n_way, device=device).repeat_interleave(n_query)
        self.total,self.n = torch.zeros((), device=device),0 # also in a process that has no episode to classify
    def __call__(self, support, support_y, query):
        logits = self.classifier(support, support_y, query)
        y = self.y.repeat(len(logits))
        self.total += F.cross_entropy(self.scale*logits.flatten(0, 1), y, reduction='sum')
        self.n += len(y)
        return logits
    def mean(self, several=False):
        "The mean cross-entropy, of `several` processes that classified a part each"
        total,n = self.total,self.n
        if several: total,n = all_sum(torch.stack([total, torch.full_like(total, n)])).tolist()
        return float(total)/n if n else math.nan


class KeepBest(TrackerCallback):
    "Keep the weights of the epoch with the best `monitor` in memory, and load them when training ends"
    order = TrackerCallback.order + 1
    def __init__(self, monitor:str='accuracy', **kwargs): super().__init__(monitor=monitor, **kwargs)
    def before_fit(self):
        super().before_fit()
        self.best_state,self.best_epoch = None,None
    def after_epoch(self):
        super().after_epoch()
        if self.new_best:
            self.best_epoch = self.epoch
            self.best_state = {k:v.detach().clone() for k,v in measured_network(self.learn).state_dict().items()}
    def after_fit(self):
        super().after_fit()
        if self.best_state: self.model.load_state_dict(self.best_state)
        self.best_state = None
