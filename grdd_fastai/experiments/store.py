"""Networks of an experiment: each trained once, in a run named by its settings, and scored on the very same episodes as all others."""
import hashlib
import json
import sys
import time
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import NamedTuple

import torch

from ..core.distributed import ranks
from ..core.errors import UserError
from ..core.storage import load_tensors, locked, read_json, save_tensors
from ..data.blocks import plain_dl
from ..fewshot.embed import embed, feature_bank
from ..fewshot.evaluate import evaluate
from ..fewshot.stats import Evaluation
from ..models.create import create_backbone
from ..runs.provenance import device_name, git_commit, log_line, now
from ..runs.run import Run
from ..stages import STAGE_ONE, stage_one, stage_two

__all__ = ['Trained', 'Study']


VALID = dict(n_way=5, k_shot=1, n_query=15) # episodes of the validation classes that choose the epoch kept
# settings that came after the first records: where they are as before they name nothing
YOUNGER = dict(pretrained=False, teacher_output='features', classifier='linear', smoothing=0., jitter=True, augment='albumentations',
               opt='sgd')
SPLITS = dict(val='val', novel='test')
# what CL+EL depends on
EPISODIC = ('way','shot','query','episodes','per_step','epochs','schedule','lr','scale','mean','init','seed','jitter','augment','opt')
EPISODES_SEED = dict(val=1, novel=0) # not the episodes that chose the epoch; those of the other recipes


def as_before(s): return {k:v for k,v in s.items() if YOUNGER.get(k) != v}


class Trained(NamedTuple):
    "A network, the folder of the run that made it, and the settings that name it"
    net: torch.nn.Module
    folder: Path
    settings: dict
    def read(self, name): return read_json(self.folder/name)


class Study:
    """Trainings under `out`, each in a folder named by its settings and the data: the same call goes on, or loads what is there

    `max_minutes` is the time for all of them together; `checkpoint.Stopped` when it is used up, with everything saved. Several processes
    may work in one folder: what one trains the others wait for. Each scoring of the novel classes is logged in the folders `logs`.
    """
    def __init__(self, data, out, max_minutes=None, logs=None):
        self.data,self.out,self.end = data,Path(out).expanduser(),None if max_minutes is None else time.monotonic() + 60*max_minutes
        self.embedded = None,None
        self.logs = [] if ranks()[0] else [self.out] if logs is None else [Path(f).expanduser() for f in logs]

    def folder(self, kind, arch, settings):
        key = hashlib.sha256(json.dumps([settings, self.data.fingerprint], sort_keys=True).encode()).hexdigest()[:8]
        return self.out/f'{kind}-{arch}-s{settings["seed"]}-{key}'

    def train(self, kind, arch, settings, make):
        "`Trained` by the Learner and the fit that `make()` returns"
        folder,minutes = self.folder(kind, arch, settings),None if self.end is None else max(1e-9, (self.end - time.monotonic())/60)
        with redirect_stdout(sys.stderr), Run(folder, settings, resume=True, max_minutes=minutes, plan=['net'], wait=True) as run:
            if not run.result:
                run.say(f'{folder.name}: {json.dumps(settings)}')
                run.begin(self.data)
            card = dict(classes=self.data.train.vocab, px=self.data.px, stats=self.data.stats, fingerprint=self.data.fingerprint,
                        settings=settings)
            net,val_accuracy = run.stage('net', *make(), arch=arch, **card)
            if not run.result: run.finish(val_accuracy=round(val_accuracy, 3))
        return Trained(net, run.out, settings)

    def global_net(self, **changes):
        "Stage one (CL): the backbone trained by `STAGE_ONE | changes`"
        s = STAGE_ONE | changes
        return self.train('cl', s['arch'], as_before(s), lambda: stage_one(self.data, s, valid=VALID))

    def bank(self, teacher):
        "The teacher's features of the clean base images (N, D), computed once and memory-mapped"
        return feature_bank(teacher.net, self.data, 'train', stats=self.data.stats, cache=teacher.folder)[0]

    def embed(self, net, split):
        "Features and classes of a split, in float32: a score is the same wherever it is taken"
        dl = plain_dl(self.data, split)
        return embed(net.to(dl.device), dl)

    def meta_net(self, student, teacher, s):
        "Stage two from a `Trained` student by the settings `s` of a reading: CL+EL where `teacher` is None, else CL+GR"
        s = as_before(s)
        full = (s if teacher else {k:v for k,v in s.items() if k in EPISODIC}) | dict(
            student=student.settings, teacher=teacher and teacher.settings)
        def make():
            start = student.net if s['init'] == 'cl' else create_backbone(student.settings['arch'], 0, self.data.px, s['seed'])
            bank = self.bank(teacher) if teacher and s['teacher_view'] == 'clean' else None
            return stage_two(self.data, YOUNGER | s, start, teacher and teacher.net, bank, valid=VALID)
        return self.train('gr' if teacher else 'el', student.settings['arch'], full, make)

    def score(self, trained, split, shot=1, n=10_000):
        "`Evaluation` on `n` 5-way episodes of the 'val' or 'novel' classes: measured once, then read; a novel one is in each log"
        with locked(trained.folder/'.lock'):
            scored,about = self._scored(trained, split, shot, n)
        line = dict(what=trained.folder.name, shot=shot, accuracy=scored.accuracy, ci95=scored.ci95, test_episodes=n) | about
        for folder in self.logs if split == 'novel' else []: log_line(folder/'novel_scorings.jsonl', line)
        return scored

    def _scored(self, trained, split, shot, n):
        "`Evaluation`, and when and by which commit it was made"
        path,weights = trained.folder/f'{split}_{shot}shot_{n}.safetensors',trained.read('net.json')['sha256']
        if path.exists():
            with suppress(UserError, KeyError): # a damaged or missing score is computed again
                tensors,meta = load_tensors(path)
                if meta['weights'] == weights and 'about' in meta:
                    return Evaluation(tensors['episodes'].numpy(), meta['drawn']),meta['about']
        if self.embedded[0] != (of := (weights, split)): # of the shot before, mostly
            self.embedded = of,self.embed(trained.net, SPLITS[split])
        scored = evaluate(*self.embedded[1], VALID['n_way'], shot, VALID['n_query'], n, EPISODES_SEED[split])
        scored.drawn += f', {split} classes of {self.data.fingerprint[:8]}'
        about = dict(time=now(), commit=git_commit(), device=device_name())
        save_tensors(path, dict(episodes=torch.as_tensor(scored.episodes)), dict(weights=weights, drawn=scored.drawn, about=about))
        return scored,about
