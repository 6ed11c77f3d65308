"""The networks of an experiment: each is trained once, in a run named by its settings, and all are scored on the same episodes."""
import hashlib
import json
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
from ..data.blocks import default_bs, plain_dl
from ..fewshot.embed import embed
from ..fewshot.evaluate import evaluate
from ..fewshot.stats import Evaluation
from ..runs.provenance import device_name, git_commit, log_line, now
from ..runs.run import Run
from ..stage_one import stage_one
from ..stage_two import known_features, stage_two

__all__ = ['NetworkStore', 'Trained', 'supervision']


EPISODE = dict(n_way=5, k_shot=1, n_query=15) # validation episodes, which choose the epoch whose weights are kept
SPLITS = dict(val='val', novel='test') # name of the classes -> attribute of `FewShotData`
EPISODES_SEED = dict(val=1, novel=0) # val: other episodes than those that choose the epoch; novel: the same as in other recipes


class Trained(NamedTuple):
    "A network, the folder of the run that made it, and its settings as records name them"
    net: torch.nn.Module
    folder: Path
    settings: dict
    def read(self, name): return read_json(self.folder/name)


def supervision(settings):
    "What the recorded `settings` of a network train on, in the words of Table 2: CL, CL+EL or CL+GR; EL or GR from random weights"
    if 'student' not in settings: return 'CL'
    return ('' if settings.get('init') == 'random' else 'CL+') + ('GR' if settings['teacher'] else 'EL')


class NetworkStore:
    """Trained networks in the folder `out`, each in its own folder named by its settings and the data

    A call trains a network, goes on with its training, or loads it. `max_minutes` is the time for all networks together; when it is used
    up, `checkpoint.Stopped` is raised with everything saved. Several processes may work in one folder: each waits for the networks that
    another one trains. Each scoring of the novel classes is logged in the folders `logs`. With `compile` a network is trained compiled,
    which changes its last bits, but not the name of its folder. `loggers` follow the trainings (`logged`).
    """
    def __init__(self, data, out, max_minutes=None, logs=None, compile=False, loggers=None):
        self.data = data
        self.out = Path(out).expanduser()
        self.compile,self.loggers = compile,loggers
        self.end = None if max_minutes is None else time.monotonic() + 60*max_minutes
        self.embedded = None,None # what was embedded last, and its features and classes
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
            net,val_accuracy = run.train('net', *make(run), arch)
            if not run.result: run.finish(val_accuracy=round(val_accuracy, 3))
        return Trained(net, run.out, settings)

    def stage_one_net(self, s):
        "The `Trained` network of stage one (CL) with the settings `s` (`StageOne`)"
        s = s.but(bs=s.bs or default_bs(self.data))
        return self.train('cl', s.arch, s.recorded(), lambda run: stage_one(self.data, s, valid=EPISODE, compile=self.compile))

    def embed(self, net, split):
        "Features and classes of a split, in float32 so that a score is the same on all devices"
        dl = plain_dl(self.data, split)
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
            known = teacher and partial(known_features, teacher.net, self.data, s, self.out/teacher.folder.name,
                                       after_each=run.stop_if_due)
            net = student if s.init == 'random' else student.net
            return stage_two(self.data, s, net, teacher and teacher.net, known, valid=EPISODE, compile=self.compile)
        return self.train('gr' if teacher else 'el', arch, settings, make)

    def score(self, trained, split, shot=1, n=10_000):
        """`Evaluation` of a `Trained` network on `n` 5-way episodes of the classes `split`, 'val' or 'novel'

        It is measured once and then read from its file. A scoring of the novel classes is written to each log.
        """
        with locked(trained.folder/'.lock'):
            scored,about = self._scored(trained, split, shot, n)
        line = dict(what=trained.folder.name, shot=shot, accuracy=scored.accuracy, ci95=scored.ci95, test_episodes=n) | about
        for folder in self.logs if split == 'novel' else []: log_line(folder/'novel_scorings.jsonl', line)
        return scored

    def _scored(self, trained, split, shot, n):
        "The `Evaluation`, and a dict of the time, commit and device of its measurement"
        path = trained.folder/f'{split}_{shot}shot_{n}.safetensors'
        weights = trained.read('net.json')['sha256']
        if path.exists():
            with suppress(UserError, KeyError): # a damaged score is measured again
                tensors,meta = load_tensors(path)
                if meta['weights'] == weights and 'about' in meta:
                    return Evaluation(tensors['episodes'].numpy(), meta['drawn']),meta['about']
        key = weights,split
        if self.embedded[0] != key: self.embedded = key,self.embed(trained.net, SPLITS[split]) # the next shot uses the features again
        scored = evaluate(*self.embedded[1], EPISODE['n_way'], shot, EPISODE['n_query'], n, EPISODES_SEED[split])
        scored.episode_id += f', {split} classes of {self.data.fingerprint[:8]}'
        about = dict(time=now(), commit=git_commit(), device=device_name())
        save_tensors(path, dict(episodes=torch.as_tensor(scored.episodes)), dict(weights=weights, drawn=scored.episode_id, about=about))
        return scored,about
