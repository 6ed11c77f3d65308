"""Few-shot accuracy on the validation classes, and the weights of the best epoch."""
from fastai.callback.core import CancelValidException
from fastai.callback.tracker import TrackerCallback
from torch.nn.parallel import DistributedDataParallel

from ..core.distributed import without_heads
from ..data.episodes import indices_by_class
from ..fewshot.embed import embed
from ..fewshot.evaluate import evaluate
from .callbacks import ShowsMetrics, amp_dtype
from .ema import measured_network

__all__ = ['FewShotAccuracy', 'KeepBest']


class FewShotAccuracy(ShowsMetrics):
    """Measure the accuracy (%) on seeded episodes of the validation classes after each epoch of a fit

    A fit skips the validation loss, because the network has no outputs for the validation classes.
    """
    order = ShowsMetrics.order + 1
    def __init__(self, n_way:int=5, k_shot:int=1, n_query:int=15, n_episodes:int=1000, seed:int=0):
        self.episodes = dict(n_way=n_way, k_shot=k_shot, n_query=n_query, n_episodes=n_episodes, seed=seed)
        self.last = float('nan') # the accuracy after the last epoch
        self.fitting = False
    def shown(self): return dict(accuracy=lambda: self.last)
    def before_fit(self):
        "Raise UserError now instead of after the first epoch if the episodes cannot be drawn"
        super().before_fit()
        self.fitting = not hasattr(self.learn, 'gather_preds')
        e = self.episodes
        indices_by_class(self.dls.valid.labels(), e['n_way'], e['k_shot'], e['n_query'], 'the validation set')
    @property
    def several(self): return isinstance(self.model, DistributedDataParallel)
    def embed(self):
        "Features and class codes of the validation images, by the network with its present weights, or by their moving average"
        net = without_heads(measured_network(self.learn))
        return embed(net, self.dls.valid.plain(), amp_dtype(self.learn), distributed=self.several)
    def measure(self):
        "`Evaluation` on the episodes"
        return evaluate(*self.embed(), **self.episodes, distributed=self.several)
    def after_train(self):
        if not hasattr(self.learn, 'lr_finder'): self.last = self.measure().accuracy
    def before_validate(self):
        if self.fitting: raise CancelValidException()
    def after_fit(self):
        super().after_fit()
        self.fitting = False


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
