"""Experiments as rows of settings: stage-one networks trained once and shared, each training a run of its own."""
import hashlib
import json
import time
from pathlib import Path

from .data import category_dls
from .learners import global_learner
from .run import Run

__all__ = ['Study', 'STAGE_ONE']

# What decides a stage-one network; a row of an experiment changes some of it
STAGE_ONE = dict(arch='convnet4', epochs=90, schedule='poly', lr=0.05, rotation=True, rotation_from='logits', bs=64, seed=0)
VALID = dict(n_way=5, k_shot=1, n_query=15) # episodes of the validation classes that choose the epoch kept


class Study:
    """Trainings under one folder, each in one named by its settings and the data: the same call goes on, or loads what is there

    `max_minutes` is the time left to all of them together; `Stopped` when it is used up, everything saved.
    """
    def __init__(self, data, out, max_minutes=None):
        self.data,self.out,self.end = data,Path(out),None if max_minutes is None else time.monotonic() + 60*max_minutes

    def folder(self, name, settings):
        key = hashlib.sha256(json.dumps([settings, self.data.fingerprint], sort_keys=True).encode()).hexdigest()[:8]
        return self.out/f'{name}-s{settings["seed"]}-{key}'

    def train(self, name, settings, learner, fit, arch):
        "The network `learner()` comes to under `fit`, and its folder"
        folder,minutes = self.folder(name, settings),None if self.end is None else (self.end - time.monotonic())/60
        with Run(folder, settings, resume=True, max_minutes=minutes, plan=['net']) as run:
            run.begin(self.data)
            card = dict(classes=self.data.train.vocab, px=self.data.px, stats=self.data.stats, fingerprint=self.data.fingerprint)
            net,val_accuracy = run.stage('net', learner(), fit, arch=arch, settings=settings, **card)
            if not run.result: run.finish(val_accuracy=round(val_accuracy, 3))
        return net,folder

    def global_net(self, **changes):
        "Stage one: the trained backbone of `STAGE_ONE | changes`, and its folder"
        s = STAGE_ONE | changes
        def learner():
            return global_learner(category_dls(self.data, bs=s['bs'], seed=s['seed']), s['arch'], rotation=s['rotation'],
                                  rotation_from=s['rotation_from'], seed=s['seed'], valid=VALID)
        return self.train(s['arch'], s, learner, lambda learn: fit(learn, s['schedule'], s['epochs'], s['lr']), s['arch'])


def fit(learn, schedule, epochs, lr):
    "Fit by the name of a schedule: 'poly' and 'step' are the paper's of stage one and two"
    dict(poly=learn.fit_poly, step=learn.fit_step, one_cycle=learn.fit_one_cycle)[schedule](epochs, lr)
