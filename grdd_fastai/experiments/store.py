"""The networks of an experiment: each is trained once, in a run named by its settings, and all are scored on the same episodes."""
import copy
import hashlib
import json
import re
import sys
import time
from contextlib import redirect_stdout, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from ..core.distributed import log, rank_world
from ..core.errors import UserError
from ..core.storage import load_tensors, locked, read_json, save_tensors
from ..data.augment import train_augmentation
from ..data.blocks import default_bs, plain_dl
from ..distillation import TERMS
from ..fewshot.classifiers import with_base_mean
from ..fewshot.embed import embed
from ..fewshot.evaluate import evaluate
from ..fewshot.stats import Evaluation
from ..methods.episodic import EPISODE_SETTINGS, EpisodicMethod, episodic
from ..runs.provenance import device_name, git_commit, log_line, now, of_class
from ..runs.run import Run
from ..settings import declared
from ..stage_one import stage_one
from ..stage_two import StageTwo, known_features, stage_two

__all__ = ['NetworkStore', 'Trained', 'Protocol', 'supervision']


EPISODE = dict(n_way=5, k_shot=1, n_query=15) # validation episodes, which choose the epoch whose weights are kept
SPLITS = dict(val='val', novel='test') # name of the classes -> attribute of `FewShotData`
OF_EPISODES = {declared(StageTwo)[k].recorded for k in ('k_shot', 'epochs', 'seed', *EPISODE_SETTINGS)} # as records name them
EPISODES_SEED = dict(val=1, novel=0) # val: other episodes than those that choose the epoch; novel: the same as in other recipes


class Trained(NamedTuple):
    "A network, the folder of the run that made it, its settings as records name them, and the whole `EpisodicMethod` if it is of one"
    net: torch.nn.Module
    folder: Path
    settings: dict
    method: torch.nn.Module|None = None
    def read(self, name): return read_json(self.folder/name)


def supervision(settings):
    """What the recorded `settings` of a network train on, in the words of Table 2: CL, CL+EL or CL+GR; EL or GR from random weights

    Other terms of stage two have the names of their classes. For an episodic method it is the method's name.
    """
    if 'method' in settings: return settings['method']
    if 'student' not in settings: return 'CL'
    terms = ['GR'] if settings['teacher'] and settings['kl_weight'] else []
    terms += [term.__name__ for weight,term in TERMS.items() if settings.get(weight)]
    return '+'.join([*([] if settings.get('init') == 'random' else ['CL']), *(terms or ['EL'])])


def slug(name):
    "The name in small letters, with hyphens in place of other signs, for a file"
    return re.sub('[^a-z0-9.=]+', '-', name.lower()).strip('-')


class Protocol(NamedTuple):
    "How networks are scored: a classifier, None for a method's own, augmented views of the support images, and how the queries are drawn"
    classifier: str|None = 'cosine'
    support_views: int = 0
    queries: str = 'balanced'
    def recorded(self):
        "What differs from the cosine on the images themselves with balanced queries"
        usual = Protocol()
        changed = {k:v for k,v in self._asdict().items() if v != getattr(usual, k)}
        return changed | (dict(classifier='own') if self.classifier is None else {})
    def slug(self):
        "Part of a file name"
        return ''.join(f'-{slug(str(v))}' for v in self.recorded().values())


class NetworkStore:
    """Trained networks in the folder `out`, each in its own folder named by its settings and the data

    A call trains a network, goes on with its training, or loads it. `max_minutes` is the time for all networks together; when it is used
    up, `checkpoint.Stopped` is raised with everything saved. Several processes may work in one folder: each waits for the networks that
    another one trains. Each scoring of the novel classes is logged in the folders `logs`. With `compile` a network is trained compiled,
    which changes its last bits, but not the name of its folder. `loggers` follow the trainings (`logged`). `cache` is the folder for the
    features of teachers from elsewhere; the networks of the store keep theirs in their own folders.
    """
    def __init__(self, data, out, max_minutes=None, logs=None, compile=False, loggers=None, cache=None):
        self.data,self.cache = data,cache
        self.out = Path(out).expanduser()
        self.compile,self.loggers = compile,loggers
        self.end = None if max_minutes is None else time.monotonic() + 60*max_minutes
        self.embedded = None,{} # checksum of the network that was embedded last, and its features and classes by what was embedded
        if logs is None: logs = [self.out]
        self.logs = [] if rank_world()[0] else [Path(f).expanduser() for f in logs] # only the first process writes

    def folder(self, kind, arch, settings):
        "Folder of the network with the recorded `settings`"
        key = hashlib.sha256(json.dumps([settings, self.data.fingerprint], sort_keys=True).encode()).hexdigest()[:8]
        return self.out/f'{kind}-{arch}-s{settings["seed"]}-{key}'

    def train(self, kind, arch, settings, make):
        "Train the Learner by the fit function that `make(run)` returns with it; return the `Trained` network, recorded with the `settings`"
        folder = self.folder(kind, arch, settings)
        minutes = None if self.end is None else max(1e-9, (self.end - time.monotonic())/60)
        with redirect_stdout(sys.stderr), Run(folder, settings, resume=True, max_minutes=minutes, plan=['net'], wait=True,
                                             loggers=self.loggers) as run:
            if not run.result:
                log(f'{folder.name}: {json.dumps(settings)}')
                run.begin(self.data)
            learn,fit = make(run)
            net,val_accuracy = run.train('net', learn, fit, arch)
            if not run.result: run.finish(val_accuracy=round(val_accuracy, 3))
        return Trained(net, run.out, settings, learn.model if isinstance(learn.model, EpisodicMethod) else None)

    def stage_one_net(self, s, start=None, cbs=None, **more):
        """The `Trained` network of stage one (CL) with the settings `s` (`StageOne`)

        It starts from the `Trained` network `start`, if there is one. `cbs`, a function without arguments, makes further callbacks, which
        `more` describes in the recorded settings.
        """
        s = s.but(bs=s.bs or default_bs(self.data))
        def make(run): return stage_one(self.data, s, start and start.net, valid=EPISODE, compile=self.compile, cbs=cbs and cbs())
        return self.train('cl', s.arch, s.recorded() | (dict(start=start.settings) if start else {}) | more, make)

    def episodic_net(self, method, arch, s, start=None):
        """The `Trained` network of the episodic `method`, an `EpisodicMethod` or a `partial` of one, with the settings `s` (`StageTwo`)

        It starts from the `Trained` network `start`, or from random weights of `arch`.
        """
        name = getattr(method, 'func', method).__name__
        recorded = {k:v for k,v in s.recorded().items() if k in OF_EPISODES}
        settings = dict(method=name) | of_class(method) | recorded | dict(start=start.settings if start else dict(arch=arch))
        def make(run):
            net = copy.deepcopy(start.net) if start else arch
            if start and net.num_classes: net.reset_classifier(0)
            valid = EPISODE | dict(k_shot=s.k_shot)
            if getattr(method, 'func', method).transductive: valid['n_episodes'] = 100 # it trains a network for each
            return episodic(self.data, s, method, net, valid=valid, compile=self.compile)
        return self.train(name.lower(), arch, settings, make)

    def embed(self, net, split, view=None, seed=0):
        "Features and classes of a split, or of one augmented view of it, in float32 so that a score is the same on all devices"
        dl = plain_dl(self.data, split, aug=None if view is None else train_augmentation(self.data.px), seed=seed)
        if view is not None: dl.epoch = view - 1
        return embed(net.to(dl.device), dl)

    def stage_two_net(self, student, teacher, s):
        """The `Trained` network of stage two with the settings `s` (`StageTwo`), without a teacher on episodic labels alone

        It starts from a `Trained` student of stage one; with `s.init='random'` `student` is the name of its architecture.
        """
        if teacher is None: s = s.but(distill=None)
        start = dict(arch=student) if s.init == 'random' else student.settings
        settings = s.recorded() | dict(student=start, teacher=teacher and teacher.settings)
        arch = start['arch']
        def make(run):
            cache = teacher and (teacher.folder if teacher.folder.parent == self.out else self.cache)
            known = teacher and partial(known_features, teacher.net, self.data, s, cache, after_each=run.stop_if_due)
            net = student if s.init == 'random' else student.net
            return stage_two(self.data, s, net, teacher and teacher.net, known, valid=EPISODE, compile=self.compile)
        return self.train('gr' if teacher else 'el', arch, settings, make)

    def score(self, trained, split, shot=1, n=10_000, protocol=None):
        """`Evaluation` of a `Trained` network on `n` 5-way episodes of the classes `split`, 'val' or 'novel'

        `protocol` is a `Protocol`; None: the cosine. The accuracy is measured once and then read from its file. A scoring of the novel
        classes is written to each log.
        """
        protocol = protocol or Protocol()
        with locked(trained.folder/'.lock'):
            scored,about = self._scored(trained, split, shot, n, protocol)
        line = dict(what=trained.folder.name, shot=shot, accuracy=scored.accuracy, ci95=scored.ci95, test_episodes=n) | about
        for folder in self.logs if split == 'novel' else []: log_line(folder/'novel_scorings.jsonl', line | protocol.recorded())
        return scored

    def _scored(self, trained, split, shot, n, protocol):
        "The `Evaluation`, and a dict of the time, commit and device of its measurement"
        path = trained.folder/f'{split}_{shot}shot_{n}{protocol.slug()}.safetensors'
        weights = trained.read('net.json')['sha256']
        if path.exists():
            with suppress(UserError, KeyError): # a damaged score is measured again
                tensors,meta = load_tensors(path)
                if meta['weights'] == weights and 'about' in meta:
                    return Evaluation(tensors['episodes'].numpy(), meta['drawn']),meta['about']
        how = protocol.classifier or trained.method.classify
        net = trained.net if protocol.classifier else trained.method
        seed = EPISODES_SEED[split]
        def features(split, **kwargs):
            if self.embedded[0] != weights: self.embedded = weights,{}
            known,key = self.embedded[1],(protocol.classifier is None, split, *kwargs.items())
            if key not in known: known[key] = self.embed(net, SPLITS.get(split, split), **kwargs)
            return known[key] # other shots and protocols use the features again
        if isinstance(how, str): how = with_base_mean([how], lambda: features('train')[0])[how]
        views = protocol.support_views and torch.stack([features(split, view=v, seed=seed)[0] for v in range(protocol.support_views)])
        scored = evaluate(*features(split), EPISODE['n_way'], shot, EPISODE['n_query'], n, seed, how, protocol.queries,
                          views if protocol.support_views else None)
        scored.episode_id += f', {split} classes of {self.data.fingerprint[:8]}'
        about = dict(time=now(), commit=git_commit(), device=device_name())
        save_tensors(path, dict(episodes=torch.as_tensor(scored.episodes)), dict(weights=weights, drawn=scored.episode_id, about=about))
        return scored,about
