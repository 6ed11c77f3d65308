"""Methods that train on episodes of base classes: how they classify the queries of an episode is what they are trained on and scored by

A method of your own is a subclass of `EpisodicMethod` with one function, `logits`.
"""
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from torch import nn
from torch.func import functional_call

from ..core.device import cpu_seed
from ..core.distributed import rank_world
from ..core.errors import UserError
from ..data.augment import train_augmentation
from ..data.blocks import episodic_dls
from ..data.cache import FewShotData
from ..data.episodes import EpisodicDL
from ..fewshot.classifiers import cosines, one_hot, prototypes, squared_distances
from ..losses import EpisodicLoss
from ..models.create import create_backbone, feature_size, features, input_config
from ..stage_two import StageTwo, episode_size
from ..training.learner import check_dls, few_shot_learner, image_config
from ..training.optim import OPTIMISERS
from ..training.schedules import fit_function

__all__ = ['EpisodicMethod', 'ProtoNet', 'MatchingNet', 'RelationNet', 'MetaBaseline', 'FEAT', 'ANIL', 'MAML', 'EPISODE_SETTINGS',
           'episodic', 'episodic_learner']


# the settings of `StageTwo` that an episodic method has, beside k_shot, epochs and seed
EPISODE_SETTINGS = ('n_way', 'n_query', 'n_episodes', 'episodes_per_step', 'schedule', 'lr', 'opt', 'jitter', 'augment')


class EpisodicMethod(nn.Module):
    """A backbone, and a method's own layers, which classify the queries of an episode by `logits`

    What it reads of an image is the output of `forward`: the features of the backbone, if a method does not say otherwise. Shapes: E
    episodes, NS support images, NQ queries, D features, C classes.
    """
    keeps_layers = True # a run keeps the method's own layers beside the backbone
    transductive = False # whether all queries of an episode are used together
    def __init__(self, backbone:nn.Module):
        super().__init__()
        self.backbone = backbone
    def forward(self, x): return features(self.backbone, x)
    def logits(self, support:torch.Tensor, support_y:torch.Tensor, query:torch.Tensor) -> torch.Tensor:
        "Features of the support (E, NS, D), its classes (E, NS) and features of the queries (E, NQ, D) -> logits (E, NQ, C)"
        raise NotImplementedError
    @torch.no_grad()
    def classify(self, support:torch.Tensor, support_y:torch.Tensor, query:torch.Tensor) -> torch.Tensor:
        "`logits` in eval mode: the classifier for `evaluate`"
        was_training = self.training
        try: return self.eval().logits(support, support_y, query)
        finally: self.train(was_training)
    def loss(self, logits:torch.Tensor, y:torch.Tensor) -> torch.Tensor:
        "The loss of the queries' logits (E, NQ, C) with their classes y (E, NQ): the cross-entropy, if a method has no other"
        return F.cross_entropy(logits.flatten(0, 1), y.flatten())


class ProtoNet(EpisodicMethod):
    "The nearest class mean: a logit is minus the squared distance to the mean of a class (arXiv 1703.05175, Eq. 1-2)"
    def logits(self, support, support_y, query): return -squared_distances(query, prototypes(support, support_y))


class MatchingNet(EpisodicMethod):
    """The classes of the support, by attention: the softmax of the cosines of a query with the support (arXiv 1606.04080, Eq. 1)

    `scale` multiplies the cosines; the paper has no such factor. Its full-context embeddings are left out, as in most later comparisons.
    """
    def __init__(self, backbone, scale:float=10.):
        super().__init__(backbone)
        self.scale = scale
    def logits(self, support, support_y, query):
        attention = (self.scale*cosines(query, support)).softmax(-1) # (E, NQ, NS)
        return (attention @ one_hot(support_y, support)).clamp_min(1e-8).log()


class RelationNet(EpisodicMethod):
    """A small network compares the feature maps of a query with the sum of those of a class (arXiv 1711.06025, Eq. 1-2)

    Its score, from 0 to 1, is trained to be 1 for the query's class and 0 for the others, by the squared error. The maps of small images
    are small: the convolutions pad them, and those too small for a pool are not pooled. `px` is the side of the images; None: that of the
    backbone's `pretrained_cfg`.
    """
    def __init__(self, backbone, px:int|None=None, hidden:int=8):
        super().__init__(backbone)
        px = px or input_config(backbone)[0]
        was_training = backbone.training
        with torch.no_grad(): self.maps = tuple(backbone.eval().forward_features(torch.zeros(1, 3, px, px)).shape[1:])
        backbone.train(was_training)
        if len(self.maps) != 3:
            what = type(backbone).__name__
            raise UserError(f'RelationNet compares feature maps, and {what} gives {self.maps}: choose a convolutional network')
        D,H,W = self.maps
        def block(n_in): return [nn.Conv2d(n_in, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU()]
        pools = [nn.MaxPool2d(2) if min(H, W) >= 2**(i + 1) else nn.Identity() for i in range(2)]
        with torch.no_grad():
            convs = nn.Sequential(*block(2*D), pools[0], *block(64), pools[1])
            n = convs.eval()(torch.zeros(1, 2*D, H, W)).numel()
        self.relation = nn.Sequential(convs.train(), nn.Flatten(), nn.Linear(n, hidden), nn.ReLU(), nn.Linear(hidden, 1), nn.Sigmoid())
    def forward(self, x): return self.backbone.forward_features(x).flatten(1)
    def logits(self, support, support_y, query):
        sums = (one_hot(support_y, support).mT @ support).unflatten(-1, self.maps) # (E, C, D, H, W)
        query = query.unflatten(-1, self.maps)
        (E,C),NQ = sums.shape[:2],query.shape[1]
        pairs = torch.cat([sums.unsqueeze(1).expand(-1, NQ, -1, -1, -1, -1), query.unsqueeze(2).expand(-1, -1, C, -1, -1, -1)], 3)
        return self.relation(pairs.flatten(0, 2)).view(E, NQ, C)
    def loss(self, logits, y): return (logits - F.one_hot(y, logits.shape[-1])).square().sum(-1).mean()


class MetaBaseline(EpisodicMethod):
    "The cosine with the class means, times a learnt scale, after stage one on all base classes (arXiv 2003.04390, Eq. 3)"
    def __init__(self, backbone, scale:float=10.):
        super().__init__(backbone)
        self.scale = nn.Parameter(torch.tensor(scale))
    def logits(self, support, support_y, query): return self.scale*cosines(query, prototypes(support, support_y))


class FEAT(EpisodicMethod):
    """The class means are adapted to one another by self-attention before queries are compared with them (arXiv 1812.03664, Eq. 4-6)

    Logits are minus the squared distances, divided by `temperature`. The paper's contrastive term of training, and the official program's
    dropout of the attention, are left out.
    """
    def __init__(self, backbone, temperature:float=64., drop:float=.5):
        super().__init__(backbone)
        D = feature_size(backbone)
        self.temperature = temperature
        self.q,self.k,self.v = (nn.Linear(D, D, bias=False) for _ in range(3))
        for layer in (self.q, self.k, self.v): nn.init.normal_(layer.weight, std=math.sqrt(1/D))
        self.out,self.drop,self.norm = nn.Linear(D, D),nn.Dropout(drop),nn.LayerNorm(D)
        nn.init.xavier_normal_(self.out.weight)
    def adapted(self, means):
        "Class means (E, C, D), each changed by its attention to the others"
        attention = (self.q(means) @ self.k(means).mT / math.sqrt(means.shape[-1])).softmax(-1) # (E, C, C)
        return self.norm(means + self.drop(self.out(attention @ self.v(means))))
    def logits(self, support, support_y, query):
        return -squared_distances(query, self.adapted(prototypes(support, support_y)))/self.temperature


def check_classes(method, support_y):
    "UserError unless the head of the method has as many outputs as the episodes have classes"
    found,there,name = int(support_y.max()) + 1,method.head.out_features,type(method).__name__
    if found != there: raise UserError(f'the head of {name} has {there} classes and an episode {found}: give {name}(n_way={found})')


class ANIL(EpisodicMethod):
    """A linear classifier takes a few steps of gradient descent on the support from a learnt beginning (arXiv 1909.09157)

    The gradient of the cross-entropy is written out, so that the training differentiates through the steps.
    """
    def __init__(self, backbone, n_way:int=5, steps:int=5, lr:float=.5):
        super().__init__(backbone)
        self.head,self.steps,self.lr = nn.Linear(feature_size(backbone), n_way),steps,lr
    def logits(self, support, support_y, query):
        E,NS,_ = support.shape
        check_classes(self, support_y)
        W,b = self.head.weight.expand(E, -1, -1),self.head.bias.expand(E, -1)
        Y = F.one_hot(support_y, W.shape[1]).float()
        for _ in range(self.steps):
            wrong = ((support @ W.mT + b.unsqueeze(1)).softmax(-1) - Y)/NS # (E, NS, C)
            W,b = W - self.lr*(wrong.mT @ support),b - self.lr*wrong.sum(1)
        return query @ W.mT + b.unsqueeze(1)


class MAML(EpisodicMethod):
    """The whole network takes a few steps of gradient descent on the support from a learnt beginning (arXiv 1703.03400), to first order

    It takes `steps` in training and `test_steps` in a test. What it reads of an image is the image itself. The support and the queries are
    each normalised by their own batch statistics, so the queries of an episode influence each other, as in the paper. The gradients of the
    inner steps are treated as constants (the paper's first-order approximation). UserError in a distributed run.
    """
    transductive = True
    def __init__(self, backbone, n_way:int=5, steps:int=5, test_steps:int=10, lr:float=.01):
        super().__init__(backbone)
        self.head,self.lr = nn.Linear(feature_size(backbone), n_way),lr
        self.steps,self.test_steps = steps,test_steps
    def forward(self, x): return x.flatten(1)
    def logits(self, support, support_y, query):
        check_classes(self, support_y)
        if rank_world()[1] > 1: raise UserError('MAML trains in one process, because it normalises each episode by itself: launch one')
        px = math.isqrt(support.shape[-1]//3)
        support,query = (x.unflatten(-1, (3, px, px)) for x in (support, query))
        return torch.stack([self.of_episode(*e) for e in zip(support, support_y, query, strict=True)])
    def of_episode(self, support, support_y, query):
        "Logits (NQ, C) of one episode, from images (NS, 3, H, W), classes (NS) and images (NQ, 3, H, W)"
        tracked = {} if self.training else {k:b.clone() for k,b in self.backbone.named_buffers()} # `classify` changes no statistics
        def outputs(x, W, b, theta): return F.linear(functional_call(self.backbone, (theta, tracked), (x,)), W, b)
        names = [k for k,_ in self.backbone.named_parameters()]
        norms = [m for m in self.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        were = [m.training for m in norms]
        params = [*self.head.parameters(), *self.backbone.parameters()]
        def with_params(x): return outputs(x, *params[:2], dict(zip(names, params[2:], strict=True)))
        for m in norms: m.train() # statistics of the batch
        try:
            with torch.enable_grad():
                for _ in range(self.steps if self.training else self.test_steps):
                    grads = torch.autograd.grad(F.cross_entropy(with_params(support), support_y), params)
                    params = [p - self.lr*g for p,g in zip(params, grads, strict=True)]
            return with_params(query)
        finally:
            for m,training in zip(norms, were, strict=True): m.train(training)


# ---- the Learner ------------------------------------------------------------------------------------------------------

class MethodLoss(EpisodicLoss):
    "The loss of a method on a batch of episodes from `EpisodicDL`"
    def __init__(self, method, n_way, k_shot, n_query):
        super().__init__(n_way, k_shot, n_query)
        self.of_method = [method] # in a list, so that its layers are not registered a second time
    def forward(self, h, y=None):
        method, = self.of_method
        support,query = self.split(h.float())
        support_y,query_y = self.split(self.classes(h))
        with torch.autocast(h.device.type, enabled=False): return method.loss(method.logits(support, support_y, query), query_y)


def episodic(
    data:FewShotData,
    s:StageTwo, # the settings; only k_shot, epochs, seed and those in `EPISODE_SETTINGS` are used
    make:Callable, # `EpisodicMethod`, or a function of a backbone that makes one
    backbone:str|nn.Module, # name of a timm model with random weights, or a network to start from, which is not copied
    **kwargs # of `episodic_learner`
) -> tuple[Learner, Callable]:
    """(Learner, fit) of an episodic method: `fit(learn)` trains `learn.model`

    An episode has as many classes and queries as there are, where the settings ask for more.
    """
    n_way,n_query = episode_size(data, s)
    dls = episodic_dls(data, n_way, s.k_shot, n_query, s.n_episodes, s.episodes_per_step,
                       aug=train_augmentation(data.px, s.jitter, s.augment), seed=s.seed)
    return episodic_learner(dls, make, backbone, s.seed, opt_func=OPTIMISERS[s.opt], **kwargs),fit_function(s, s.episodes_per_step)


def episodic_learner(
    dls:DataLoaders, # DataLoaders of `episodic_dls`
    method:Callable, # `EpisodicMethod`, or a function of a backbone that makes one, such as the class
    backbone:str|nn.Module='convnet4', # name of a timm model with random weights, or a network to start from, which is not copied
    seed:int=0, # seed of the weights
    valid:dict|None=None, # settings of the validation episodes: n_way, k_shot (both as in training), n_query=15, n_episodes=1000, seed=0
    **kwargs # of `few_shot_learner`, such as amp and cbs, and of fastai's `Learner`
) -> Learner:
    """Learner of an episodic method; `learn.model` is the `EpisodicMethod`, whose `classify` is a classifier for `evaluate`

    Its accuracy after each epoch is that of `classify` on episodes of the validation classes. UserError for data and methods that do not
    fit.
    """
    check_dls(dls)
    e = dls.train
    if not isinstance(e, EpisodicDL): raise UserError('an episodic method trains on episodes: make dls with episodic_dls')
    if isinstance(backbone, str): backbone = create_backbone(backbone, 0, dls.one_batch()[0].shape[-1], seed)
    if not isinstance(method, EpisodicMethod):
        backbone.pretrained_cfg = getattr(backbone, 'pretrained_cfg', {}) | image_config(dls)
        with cpu_seed(seed): method = method(backbone)
    if not isinstance(method, EpisodicMethod):
        raise UserError(f'the method is a {type(method).__name__}: give a subclass of EpisodicMethod, or a function that makes one')
    if kwargs.get('ema_decay'): raise UserError('the layers of an episodic method have no moving average: leave out ema_decay')
    valid = dict(n_way=e.n_way, k_shot=e.k_shot, classifier=method.classify) | (valid or {})
    return few_shot_learner(dls, method, MethodLoss(method, e.n_way, e.k_shot, e.n_query), [], seed=seed, valid=valid, **kwargs)
