"""The frozen teachers of stage two, and the term of its loss that compares the student's relatedness with theirs (Eq. 10-12)."""
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F

from .core.device import amp, sent
from .core.distributed import backbone_of
from .core.errors import UserError
from .data.loaders import view_of
from .fewshot.embed import ViewFeatures, embed
from .losses import kl_relatedness, of_all_pairs, relatedness
from .models.create import features, seeing
from .settings import Settings, at_least, between, declared, flag, one_of, positive, recorded, with_settings
from .terms import (
    DIST,
    ClassTerm,
    ContrastiveKD,
    DecoupledKD,
    DistillationTerm,
    FeatureRegression,
    LogitKD,
    RelationalKD,
    SimilarityPreserving,
)
from .training.callbacks import Frozen, LossTerm, amp_dtype
from .training.learner import normalisation

__all__ = ['Distill', 'Teacher', 'RelatednessKL']


@dataclass(frozen=True, kw_only=True)
class Distill(Settings):
    "The settings of the distillation in stage two; the defaults did best on the validation classes (docs/method.md)"
    T: Annotated[float, 'temperature of the relatedness, of logits of the base classes and of contrast; it divides the cosines',
                 positive] = 0.1
    gamma: Annotated[float, 'weight of the regulariser L_rt', at_least(0)] = 1.
    kl_weight: Annotated[float, 'weight of the distillation loss L_kl', at_least(0)] = 5.
    rkd_weight: Annotated[float, 'weight of relational distillation (RKD), which compares distances and angles', at_least(0),
                          recorded(absent=0.)] = 0.
    similarity_weight: Annotated[float, 'weight of similarity-preserving distillation, which compares products of features', at_least(0),
                                 recorded(absent=0.)] = 0.
    regression_weight: Annotated[float, "weight of feature regression, a linear map of the student's features to the teacher's",
                                 at_least(0), recorded(absent=0.)] = 0.
    crd_weight: Annotated[float, "weight of contrast (CRD), which finds the teacher's vector of an image in the batch", at_least(0),
                          recorded(absent=0.)] = 0.
    kd_weight: Annotated[float, "weight of logit distillation, Hinton's, which compares probabilities of the base classes", at_least(0),
                         recorded(absent=0.)] = 0.
    dkd_weight: Annotated[float, 'weight of decoupled logit distillation (DKD)', at_least(0), recorded(absent=0.)] = 0.
    dist_weight: Annotated[float, 'weight of DIST, which compares correlations of the probabilities of the base classes', at_least(0),
                           recorded(absent=0.)] = 0.
    decouple: Annotated[bool, 'one softmax for each support image; without, one over the whole matrix'] = True
    T_squared: Annotated[bool, "multiply L_kl, and no other term, by T squared, as Hinton's distillation does",
                         recorded('hinton'), flag('t_squared')] = False
    reverse: Annotated[bool, 'KL(student || teacher) instead of the default KL(teacher || student)'] = False
    reduction: Annotated[str, "how the KL of an episode's groups are reduced: mean, or sum (Eq. 12)", one_of('mean', 'sum')] = 'mean'
    center: Annotated[bool, "subtract each episode's mean feature before the cosines"] = False
    pairs: Annotated[str, 'images that are compared: episode, the support images of an episode with its queries; or all, each image of an '
                     'episode with all others', one_of('episode', 'all'), recorded(absent='episode')] = 'episode'
    teacher_view: Annotated[str, "images that the teacher sees: same, the student's augmented ones; clean, images as they are, embedded "
                            'once; or views, a number of augmented views of each image, embedded once, which the student sees too',
                            one_of('same', 'clean', 'views')] = 'same'
    views: Annotated[int, 'number of augmented views of each image, for teacher_view=views', between(1, 200), recorded(absent=20)] = 20
    teacher_mirror: Annotated[bool, "average the teacher's features of each image with those of its mirror image",
                              recorded(absent=False)] = False
    teacher_output: Annotated[str, "the teacher's output whose cosines are compared: features (Eq. 10), logits or probabilities",
                              one_of('features', 'logits', 'probabilities'), recorded(absent='features')] = 'features'

    @property
    def n_views(self):
        "Augmented views of each image, or None without such a number"
        return self.views if self.teacher_view == 'views' else None


OF_RELATEDNESS = ('T', 'kl_weight', 'decouple', 'T_squared', 'reverse', 'reduction', 'center', 'pairs') # the settings of `RelatednessKL`


# name of the setting of a weight -> the term that it belongs to
TERMS = dict(rkd_weight=RelationalKD, similarity_weight=SimilarityPreserving, regression_weight=FeatureRegression,
             crd_weight=ContrastiveKD, kd_weight=LogitKD, dkd_weight=DecoupledKD, dist_weight=DIST)
# The recipes that compare the terms give each term this weight. It did best in short trainings (recipes/term_weights.py).
WEIGHTS = dict(kl_weight=80., rkd_weight=3.125, similarity_weight=3000., regression_weight=20., crd_weight=1., kd_weight=5., dkd_weight=1.,
               dist_weight=5.)


def distillation(teacher, s, teacher_features=None):
    "The callbacks that distil `teacher` by the settings `s` (`Distill`), the teacher first and then a callback for each term"
    weights = {term:getattr(s, k) for k,term in TERMS.items() if getattr(s, k)}
    others = [term(weight, s.T) if issubclass(term, ClassTerm | ContrastiveKD) else term(weight) for term,weight in weights.items()]
    return [Teacher(teacher, s.teacher_view, s.teacher_output, teacher_features, s.teacher_mirror),
            RelatednessKL(**{k:getattr(s, k) for k in OF_RELATEDNESS}), *others]


# ---- the teachers -----------------------------------------------------------------------------------------------------

class Teacher(Frozen):
    """One or several frozen networks, and the features they have of the batch

    The networks are outside the optimiser. Each sees images of the size and normalisation that its `pretrained_cfg` asks for.
    """
    order = LossTerm.order - 1
    def __init__(self,
        networks:torch.nn.Module|list, # a timm model or module, or a list of them
        view:str='same', # 'same', 'clean' or 'views' (see `Distill`)
        output:str='features', # 'features', 'logits' or 'probabilities'
        # features (N, D) of the clean base images where they are known, or `ViewFeatures`; a list for several networks; or a function
        # without arguments that returns one of these and is called when a fit begins
        teacher_features:torch.Tensor|ViewFeatures|list|Callable|None=None,
        mirror:bool=False, # average the features of each image with those of its mirror image
    ):
        for k,v in dict(teacher_view=view, teacher_output=output, teacher_mirror=mirror).items(): declared(Distill)[k].checked(v)
        self.networks,self.view,self.output,self.mirror = as_list(networks),view,output,mirror
        self.known,self.known_for,self.means = [],None,None
        self.to_come = teacher_features if callable(teacher_features) else None
        self.were,self.seeing = [],[] # networks with their modes and flags before the fit; networks that take the images of the loader
        for net in self.networks:
            if not isinstance(net, torch.nn.Module):
                raise UserError(f'the teacher is a {type(net).__name__}: give a network, such as create_backbone or load_network makes')
            if output != 'features' and not getattr(net, 'num_classes', 0):
                raise UserError(f"teacher_output={output!r} needs a teacher with its classifier: train it with head='linear'")
        if not self.to_come: self.know(teacher_features)

    def know(self, teacher_features):
        "Take the teachers' features; UserError unless they are of the right kind and number"
        self.known = as_list(teacher_features)
        if not self.known: return
        of_views = [isinstance(h, ViewFeatures) for h in self.known]
        if self.view == 'views' and not all(of_views):
            raise UserError("the teacher's features are not those of views: make them with known_features")
        if self.view != 'views' and any(of_views):
            raise UserError("the teacher's features are of views: give teacher_view='views' with them")
        if self.view == 'same':
            raise UserError("the teacher's features are of clean images: give teacher_view='clean' with them")
        if len(self.known) != len(self.networks):
            raise UserError(f'{len(self.known)} sets of features for {len(self.networks)} teachers: give one for each')

    def before_fit(self):
        super().before_fit()
        side = backbone_of(self.learn).pretrained_cfg['input_size'][-1]
        norm = normalisation(self.dls)
        stats = norm and [v.flatten().tolist() for v in (norm.mean, norm.std)]
        self.seeing = [seeing(net, side, stats).to(self.dls.device) for net in self.networks]
        self.rows_epoch = self.means = None
        if self.to_come:
            self.know(self.to_come())
            self.to_come = None
        if self.view == 'clean': self.embed_clean()
        if self.view == 'views': self.check_views()

    def embed_clean(self):
        "Features of all clean base images, unless they are known"
        train = self.dls.train
        what = tuple(id(net) for net in self.networks),id(train.dataset)
        if self.known_for == what: return
        if not self.known or self.known_for: self.known = self.clean_features()
        self.known,self.known_for = [h.to(self.dls.device) for h in self.known],what
        self.check_rows()

    def check_rows(self):
        "UserError unless the known features have a row for each base image"
        n = len(self.dls.train.dataset)
        for h in self.known:
            if len(h) != n: raise UserError(f"the teacher's features have {len(h)} rows for {n} base images: give a row for each")

    def check_views(self):
        "Raise UserError unless the training loader gives the same views of the images as those whose features are known"
        train = self.dls.train
        if not self.known: raise UserError("teacher_view='views' needs the teacher's features: give teacher_features=known_features(...)")
        for h in self.known:
            if h.mirror != self.mirror:
                raise UserError(f"the teacher's features have mirror={h.mirror} and teacher_mirror is {self.mirror}: give both the same")
            if h.views != train.views or not train.aug:
                raise UserError(f"the teacher's features are of {h.views} augmented views and the loader gives {train.views or 'others'}: "
                                f'make dls with episodic_dls(..., views={h.views})')
            if h.aug and h.aug != (getattr(train.aug, 'pad', None), getattr(train.aug, 'jitter', None)):
                raise UserError("the teacher's features are of images that were augmented otherwise: make dls with "
                                f'episodic_dls(..., aug=train_augmentation(px, jitter={h.aug[1]}))')
        self.check_rows()

    def class_means(self):
        """The mean of the features of each base class, at unit length, for each teacher: a list of (C, D) on the device

        They are of the first view if the features of views are known, and of clean images otherwise, which are embedded if necessary.
        """
        if self.means is not None: return self.means
        y = torch.as_tensor(np.asarray(self.dls.train.labels()), device=self.dls.device)
        if self.view == 'views':
            rows = np.arange(len(y))
            hs = [h.of(np.zeros_like(rows), rows) for h in self.known]
        else: hs = self.known if self.view == 'clean' else self.clean_features()
        def means(h):
            h = F.normalize(h.to(y.device), dim=1)
            return F.normalize(h.new_zeros(self.dls.c, h.shape[1]).index_add_(0, y, h), dim=1)
        self.means = [means(h) for h in hs]
        return self.means

    def clean_features(self):
        "Features of all clean base images by each teacher: a list of (N, D)"
        return [embed(net, self.dls.train.plain(), mirror=self.mirror)[0] for net in self.seeing]

    def before_batch(self): self.of_batch = None

    def features(self):
        "What each teacher makes of the batch's images: a list of (B, D) in float32"
        if self.of_batch is None: self.of_batch = self.compute()
        return self.of_batch

    @torch.no_grad()
    def compute(self):
        hs = dict(same=self.of_same_images, clean=self.of_clean_images, views=self.of_views)[self.view]()
        if self.output == 'features': return hs
        ps = [net.get_classifier()(h.float()) for net,h in zip(self.networks, hs)]
        return [p.softmax(1) for p in ps] if self.output == 'probabilities' else ps

    def of_same_images(self):
        with amp(self.dls.device, amp_dtype(self.learn)):
            return [features(net, self.xb[0], self.mirror).float() for net in self.seeing]

    def of_clean_images(self):
        rows = self.rows_of_batch()
        return [h[rows] for h in self.known]

    def of_views(self):
        rows = self.rows_of_batch()
        return [sent(h.of(view_of(rows, self.dl.epoch, h.views), rows), self.dls.device) for h in self.known]

    def rows_of_batch(self):
        "The rows of the batch's images: a tensor on the device of known features of clean images, or an array for those of views"
        if self.rows_epoch != self.dl.epoch: # draw the epoch's rows once more
            self.rows_epoch = self.dl.epoch
            self.rows = np.asarray(self.dl.get_idxs())
            if self.view == 'clean': self.rows = torch.as_tensor(self.rows, device=self.known[0].device)
        return self.rows[self.iter*self.dl.bs:][:len(self.xb[0])]

    def after_fit(self):
        super().after_fit()
        self.seeing = []
    def __getstate__(self): # an exported Learner brings no features
        return self.__dict__ | dict(known=[], known_for=None, to_come=None, means=None)


def as_list(o):
    "The list or tuple `o` as a list; None gives an empty list, any other object a list of one"
    return [] if o is None else list(o) if isinstance(o, list | tuple) else [o]

# ---- the term of the paper --------------------------------------------------------------------------------------------

class RelatednessKL(DistillationTerm):
    """L_kl (Eq. 12): the student's decoupled relatedness follows the teacher's, or the mean of several teachers'

    The keywords are settings of `Distill`.
    """
    parts = ('L_kl',)
    @with_settings(s=Distill, only=OF_RELATEDNESS)
    def __init__(self, s):
        self.s = s
        super().__init__(s.kl_weight * (s.T**2 if s.T_squared else 1))
    def relatedness(self, h):
        "The relatedness that is compared, from features h (B, D) of the batch: of support and query images, or of all pairs"
        if self.s.pairs == 'all': return of_all_pairs(self.learn.loss_func.episodes(h), self.s.center)
        return relatedness(*self.learn.loss_func.split(h), center=self.s.center)
    def loss(self, student:torch.Tensor, teachers:list) -> torch.Tensor:
        R_e = self.relatedness(student)
        R_g = torch.stack([self.relatedness(h) for h in teachers]).mean(0)
        return kl_relatedness(R_e, R_g, self.s.T, self.s.decouple, self.s.reverse, self.s.reduction)
