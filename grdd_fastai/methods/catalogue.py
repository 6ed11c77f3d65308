"""The methods that recipes/compare.py trains: how each is trained, a classifier like that of its paper, and what was published for it

A method of your own is a file and a line in `METHODS`: docs/extending.md shows it.
"""
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from ..core.errors import UserError
from ..distillation import WEIGHTS, Distill
from ..fewshot.classifiers import get_classifier
from ..runs.provenance import of_class
from ..settings import declared
from ..stage_two import episode_size
from .episodic import ANIL, EPISODE_SETTINGS, FEAT, MAML, EpisodicMethod, MatchingNet, MetaBaseline, ProtoNet, RelationNet
from .transfer import BornAgain, InvariantEquivariant, ManifoldMixup, RotationInvariance, TeacherLogits

__all__ = ['Method', 'Transfer', 'Episodic', 'Distilled', 'METHODS']


@dataclass(frozen=True, kw_only=True)
class Method:
    """What is common to all methods

    A subclass trains the network of a method by `train(lab, seed, shot)`, where `lab` is a `Comparison`. It gives the settings of such a
    training by `stage(lab)` and the number of images that it sees by `images(lab)`.
    """
    title: str # the name that the field uses
    source: str = '' # arXiv number of its paper
    classifier: str|None = 'cosine' # classifier that scores it; None: `EpisodicMethod.classify`
    support_views: int = 0 # number of augmented views in place of each support image, for this classifier
    published: dict = field(default_factory=dict) # data set -> published accuracies for one shot and five
    published_of: str = 'convnet4' # network that they belong to
    start: str|None = None # method whose network this one starts from
    teacher: str|None = None # method whose network is the teacher; 'given': the network that --teacher names
    length: float = 1. # images of the training, as a multiple of --images
    settings: dict = field(default_factory=dict) # settings that differ from those of the other methods of its kind
    per_shot = False # whether there is a network for each shot
    classifies = False # whether the trained network has a classifier of its own for episodes

    def check(self, lab):
        "Raise UserError if the line cannot be trained or scored"
        for other in (self.start, self.teacher):
            if other in (None, 'given'): continue
            if other not in lab.methods: raise UserError(f'{self.title} needs {other!r}, which is no method: give it a line, too')
            if lab.methods[other].per_shot and not self.per_shot:
                raise UserError(f'{self.title} starts from {other!r}, which has a network for each shot: take a method with one network')
        if self.teacher == 'given' and lab.teacher is None:
            raise UserError(f'{self.title} learns from a teacher: give --teacher a network with weights')
        if self.classifier: get_classifier(self.classifier)
        elif not self.classifies: raise UserError(f'{self.title} has no classifier: name one')
        if 'epochs' in self.settings: raise UserError(f'{self.title} sets epochs, which follow from --images: give it a length')
        self.stage(lab)
    def warn(self, name, lab):
        "A sentence if a training of whole epochs sees other than about the asked number of images, else None"
        seen,asked = self.images(lab),self.length*lab.images
        if abs(math.log(seen/asked)) > .2: return f'note: {name} sees {seen:,} images in whole epochs, in place of {asked:,.0f}'

    def before(self, lab, seed, shot):
        "The trained networks of `start` and `teacher`, each None if the method has none"
        return [name and (lab.teacher if name == 'given' else lab.network(name, seed, shot)) for name in (self.start, self.teacher)]


@dataclass(frozen=True, kw_only=True)
class Transfer(Method):
    "A classifier of the base classes, whose features are used for new ones; `terms` are callbacks of its loss, class -> settings"
    terms: dict = field(default_factory=dict)
    def stage(self, lab, seed=0):
        s = lab.one.but(**self.settings, seed=seed)
        return s.but(epochs=max(1, round(self.length*lab.images/(len(lab.data.train)*self.copies(s)))))
    def copies(self, s):
        "How many images count for one image of a batch: itself and its rotated copies"
        return max([4 if s.rotation and s.rotations == 4 else 1, *(getattr(term, 'copies', 1) for term in self.terms)])
    def check(self, lab):
        super().check(lab)
        for term,kw in self.terms.items():
            try: made = term(**kw)
            except TypeError as e: raise UserError(f'{term.__name__} of {self.title} cannot be made ({e}): mend its line') from None
            if getattr(made, 'needs_teacher', False) and not self.teacher:
                raise UserError(f'{term.__name__} of {self.title} needs a teacher: name one in its line')
    def images(self, lab, shot=1):
        s = self.stage(lab)
        return s.epochs*len(lab.data.train)*self.copies(s)
    def train(self, lab, seed, shot):
        start,teacher = self.before(lab, seed, shot)
        def cbs(): return [*([TeacherLogits(teacher.net)] if teacher else []), *(term(**kw) for term,kw in self.terms.items())]
        more = dict(terms={term.__name__:described(term, kw) for term,kw in self.terms.items()}) if self.terms else {}
        if teacher: more['teacher'] = teacher.settings
        return lab.store.stage_one_net(self.stage(lab, seed), start, cbs, **more)


def described(term, kw):
    "The settings of a term, and a checksum of its code if it is not the package's"
    own,*code = of_class(partial(term, **kw)).items()
    return own[1] | dict(code)


class OfEpisodes(Method):
    "What is common to methods whose batches are episodes"
    def images(self, lab, shot=1):
        s = self.stage(lab, shot=shot)
        return s.epochs*images_per_epoch(lab.data, s)
    def stage(self, lab, seed=0, shot=1):
        s = lab.two.but(seed=seed, **self.of_shot(shot) | self.settings)
        return s.but(epochs=max(1, round(self.length*lab.images/images_per_epoch(lab.data, s))))
    def of_shot(self, shot): return {}

def images_per_epoch(data, s):
    n_way,n_query = episode_size(data, s)
    return s.n_episodes*n_way*(s.k_shot + n_query)


@dataclass(frozen=True, kw_only=True)
class Episodic(OfEpisodes):
    """A method that trains on episodes, with a network for each shot

    An episode has 5 classes and 15 queries of each, and the learning rate is 0.01, unless `settings` say otherwise.
    """
    classifier: str|None = None
    make: Callable # `EpisodicMethod`, or a `partial` of one
    per_shot = classifies = True
    def check(self, lab):
        made = getattr(self.make, 'func', self.make)
        if not (isinstance(made, type) and issubclass(made, EpisodicMethod)):
            raise UserError(f'{self.title} is made by {self.make!r}: give a subclass of EpisodicMethod, or a partial of one')
        if self.teacher: raise UserError(f'{self.title} trains on episodes without a teacher: leave teacher out')
        if useless := next((k for k in self.settings if k not in EPISODE_SETTINGS), None):
            known = ', '.join(EPISODE_SETTINGS)
            raise UserError(f'the setting {useless} of {self.title} has no effect: those of an episodic method are {known}')
        super().check(lab)
    def of_shot(self, shot): return EPISODES | dict(k_shot=shot)
    def train(self, lab, seed, shot):
        start,_ = self.before(lab, seed, shot)
        return lab.store.episodic_net(self.make, lab.arch, self.stage(lab, seed, shot), start)


@dataclass(frozen=True, kw_only=True)
class Distilled(OfEpisodes):
    "Stage two from random weights, with a teacher's relatedness or another term; without a teacher, on labels alone"
    teacher: str|None = 'given'
    def check(self, lab):
        if self.start: raise UserError(f'{self.title} is trained from random weights: leave start out')
        if self.teacher is None and (useless := next((k for k in self.settings if k in declared(Distill)), None)):
            raise UserError(f'the setting {useless} of {self.title} has no effect without a teacher: leave it out')
        super().check(lab)
        if self.stage(lab).init != 'random': raise UserError(f'{self.title} is trained from random weights: leave init out')
    def train(self, lab, seed, shot):
        _,teacher = self.before(lab, seed, shot)
        return lab.store.stage_two_net(lab.arch, teacher, self.stage(lab, seed))


# ---- the methods ------------------------------------------------------------------------------------------------------

# One term takes the place of L_kl in GRDD's stage two. Episodes, optimiser, views and L_rt stay as they are. The papers of these terms also
# train with a cross-entropy of the base classes, which is left out here.
def only(weight): return {'kl_weight':0., weight:WEIGHTS[weight]}

RFS = dict(classifier='logistic', support_views=5) # the test of RFS, SKD and IER
EPISODES = dict(n_way=5, n_query=15, lr=.01)
WIDE = dict(n_way=20, n_query=5) # chosen on the validation classes; the programs of Meta-Baseline and FEAT have 5 classes
SKD = RFS | dict(source='2006.09785') # its angle has weight 1 and a cross-entropy here, and weight 2 and a binary one in its program
FROM_RFS = dict(start='rfs_simple', settings=WIDE | dict(lr=.005))
METHODS = {
    # a classifier of the base classes
    'baseline':      Transfer(title='Baseline', source='1904.04232', classifier='logistic(normalize=False)'),
    'baseline++':    Transfer(title='Baseline++', source='1904.04232', settings=dict(head='cosine')),
    'simpleshot':    Transfer(title='SimpleShot', source='1911.04623', classifier='simpleshot_cl2n'),
    'rfs_simple':    Transfer(title='RFS-simple', source='2003.11539', **RFS, published=dict(cifar_fs=(62.7, 78.7))),
    'rfs_distill':   Transfer(title='RFS-distill', source='2003.11539', **RFS, teacher='rfs_simple', terms={BornAgain:{}},
                              published=dict(cifar_fs=(63.8, 79.5))),
    # 32 images at four angles are as many as the others have in a step
    'skd0':          Transfer(title='SKD, generation 0', **SKD, settings=dict(rotation=True, bs=32)),
    'skd1':          Transfer(title='SKD, generation 1', **SKD, start='skd0', teacher='skd0', terms={RotationInvariance:{}},
                              settings=dict(lr=.002, bs=32)),
    # its paper trains a cosine classifier on the support, and reads the angle from the features
    's2m2':          Transfer(title='S2M2, mixup after rotation', source='1907.12087', classifier='logistic', start='skd0',
                              terms={ManifoldMixup:{}}, settings=dict(head='cosine')),
    'ier':           Transfer(title='IER, with rotations', source='2103.01315', **RFS, terms={InvariantEquivariant:{}}),
    'cl':            Transfer(title='CL, with a cosine head and label smoothing', settings=dict(head='cosine', smoothing=.1)),
    'cl_twice':      Transfer(title='CL, twice as long', settings=dict(head='cosine', smoothing=.1), length=2.),
    # episodes
    'protonet':      Episodic(title='ProtoNet', source='1703.05175', make=ProtoNet, settings=WIDE, published=dict(cifar_fs=(55.5, 72.0))),
    'matchingnet':   Episodic(title='MatchingNet', source='1606.04080', make=MatchingNet, settings=WIDE),
    'relationnet':   Episodic(title='RelationNet', source='1711.06025', make=RelationNet, published=dict(cifar_fs=(55.0, 69.3)),
                              published_of='convnet4_256'),
    'maml':          Episodic(title='MAML, first order', source='1703.03400', make=MAML),
    'anil':          Episodic(title='ANIL', source='1909.09157', make=ANIL),
    'meta_baseline': Episodic(title='Meta-Baseline', source='2003.04390', make=MetaBaseline, **FROM_RFS),
    'feat':          Episodic(title='FEAT', source='1812.03664', make=FEAT, **FROM_RFS),
    # they learn from a teacher, whose features of all augmented views are computed beforehand
    'labels':        Distilled(title='episodic labels alone', teacher=None),
    'grdd':          Distilled(title='GRDD, all pairs', source='2107.05583', settings=only('kl_weight')),
    'grdd_paper':    Distilled(title='GRDD, support and queries', source='2107.05583', settings=dict(pairs='episode')),
    'grdd_features': Distilled(title='GRDD, all pairs, and features', settings=dict(kl_weight=20., regression_weight=20.)),
    'kd':            Distilled(title='logit distillation, from means of classes', source='1503.02531', settings=only('kd_weight')),
    'fitnet':        Distilled(title='feature regression, as in FitNets', source='1412.6550', settings=only('regression_weight')),
    'crd':           Distilled(title='contrast, as in CRD', source='1910.10699', settings=only('crd_weight')),
    'rkd':           Distilled(title='RKD', source='1904.05068', settings=only('rkd_weight')),
    'similarity':    Distilled(title='similarity-preserving distillation', source='1907.09682', settings=only('similarity_weight')),
    'dkd':           Distilled(title='DKD', source='2203.08679', settings=only('dkd_weight')),
    'dist':          Distilled(title='DIST', source='2205.10536', settings=only('dist_weight')),
}
