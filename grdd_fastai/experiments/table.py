"""Rows of settings to a table of accuracies: the program behind the recipes of the paper's experiments, read top to bottom."""
import datetime
import hashlib
import itertools
import json
import re
import sys
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from ..core.distributed import processes, ranks, say, shared
from ..core.errors import UserError
from ..core.storage import atomic_write, output_folder, user_path, write_json
from ..data.cache import few_shot_data
from ..data.episodes import check_episode
from ..fewshot.stats import compare
from ..models.create import check_backbone, external_weights
from ..runs.checkpoint import Stopped
from ..runs.provenance import command, device_name, git_commit, versions
from ..runs.run import default_out
from ..stages import check_settings, stage_two_settings
from .store import SPLITS, VALID, Study

__all__ = ['CL', 'EL', 'GR', 'Table', 'table']


# The three supervisions of Table 2. A row names the role whose architecture its network psi has, that of its teacher phi
# (its own stage one, where that is psi's role too), and what it changes of both stages' settings.
CL = dict(psi='student')
EL = dict(psi='student', stage_two={})
GR = dict(psi='student', phi='teacher', stage_two={})

FULL = dict(student='convnet4', teacher='resnet12', epochs=90, teacher_epochs=90, schedule='poly', lr=0.05,
            test_episodes=10_000)
DEMO = dict(student='convnet4', teacher='convnet4_128', epochs=3, teacher_epochs=3, schedule='one_cycle', lr=0.1,
            meta_epochs=1, episodes=30, test_episodes=1000)


class Table(NamedTuple):
    "What `table` made: tidy scores and paired differences, the networks of each (row, seed), and their `Study`"
    scored: pd.DataFrame
    pairs: pd.DataFrame
    nets: dict
    study: Study
    failed: list
    def path(self, name): return self.study.out/f'{name}_{self.scored.split.iloc[0]}.png'
    def check(self):
        "Raise UserError if a row failed; the other rows are written by then"
        if self.failed: raise UserError(f'{len(self.failed)} of the rows failed, {self.failed[0]}')


@processes()
def table(
    name, # of the experiment: names its files
    # row name -> row: see `CL`, `EL`, `GR`; `versus` names the rows it is compared with, `paper` the paper's accuracies by
    # (data set, phi, psi)
    rows,
    keep:str=None, # the rows wanted, separated by commas (all); those they are compared with come along
    data:str=None, # raw data set in any layout of data/README.md (none: fetch CIFAR-FS)
    out:str=None, # folder for networks, tables and figures; networks there are used again (runs/experiments; demo: runs/experiments-demo)
    results:str=None, # folder that takes a record of each row as well (the project's own: results)
    seeds:str='0', # training seeds, separated by commas
    stage_one_seed:int=None, # one stage one for all of them, so that they are stage two's alone (each seed its own)
    score:str='val', # classes to score: val chooses, novel is for the end
    shots:str='1', # shots to score, separated by commas
    student:str=None, # timm model (convnet4)
    teacher:str=None, # timm model (resnet12; demo: convnet4_128)
    # start both from timm's default weights for their names; a name with a tag, as resnet18.a1_in1k, has its weights anyway
    pretrained:bool=False,
    epochs:int=None, # of the student's stage one (90; demo: 3)
    teacher_epochs:int=None, # of the teacher's stage one (90; demo: 3)
    schedule:str=None, # of stage one: poly, step or one_cycle (poly; demo: one_cycle)
    lr:float=None, # of stage one (0.05; demo: 0.1)
    rotation:bool=True, # leave out stage one's rotation task (the demo does)
    classifier:str='linear', # of stage one, FC3: linear or cosine
    smoothing:float=0., # of stage one's category labels
    jitter:bool=True, # leave out both stages' colour jitter
    opt:str='sgd', # of stage one: sgd or muon
    bs:int=64, # images per batch of stage one, before rotation
    reading:str='best', # of stage two: best, muon or paper, see docs/readings.md
    meta_epochs:int=None, # of stage two (the reading's; demo: 1)
    meta_lr:float=None, # of stage two (the reading's)
    meta_opt:str=None, # of stage two: sgd or muon (the reading's)
    episodes:int=None, # per epoch of stage two (the reading's; demo: 30)
    test_episodes:int=None, # to score (10000; demo: 1000)
    cache:str=None, # folder for decoded images (none: ~/.cache/grdd_fastai)
    allow_large:bool=False, # also decode photos of 90 to 179 megapixels
    max_minutes:float=None, # stop after this long with everything saved; the same command goes on
    demo:bool=False, # small settings, and the embedded data set unless --data is given
):
    "Train what `rows` need and is not there yet, score it on the same episodes, and write CSVs and records: a `Table`"
    given,defaults = locals(),FULL | DEMO if demo else FULL
    s = given | {k:v for k,v in defaults.items() if given[k] is None}
    seeds,shots = numbers('seeds', seeds),numbers('shots', shots)
    order,rows = {k:i for i,k in enumerate(rows)},wanted(rows, keep)
    if score not in SPLITS: raise UserError(f'--score is {score}: it is one of {", ".join(SPLITS)}')
    for seed in seeds: check_settings(s | dict(seed=seed))
    for arch in {s['student'], s['teacher']}: check_backbone(arch, 32, pretrained)
    if out is None: out = default_out('experiments', demo)
    shared(lambda: writable(out, results))
    out = user_path(out, '--out')
    say(f'*** DEMO: small settings{"" if data else " on drawn characters"}; not a result about GRDD ***' if demo
        else f'{name}: {len(rows)} rows, seeds {seeds}')
    data = few_shot_data('demo' if demo and data is None else data, 32, cache, allow_large=allow_large)
    for split in (data.val, data.test):
        for shot in shots: check_episode(split, VALID['n_way'], shot, VALID['n_query'])

    logs = [out, *([results] if results else [])]
    study,nets,scores,failed,stop = Study(data, out, max_minutes, logs),{},{},[],None
    two = {alone:stage_two_settings(reading, alone, epochs=s['meta_epochs'], lr=meta_lr, episodes=s['episodes'], jitter=jitter,
                                    opt=meta_opt) for alone in (False, True)}
    common = dict(schedule=s['schedule'], lr=s['lr'], rotation=rotation and not demo, classifier=classifier, smoothing=smoothing,
                  jitter=jitter, opt=opt, bs=bs, pretrained=pretrained)
    roles = dict(student=dict(arch=s['student'], epochs=s['epochs'], **common),
                 teacher=dict(arch=s['teacher'], epochs=s['teacher_epochs'], **common))
    for seed,key in itertools.product(seeds, rows):
        try:
            nets[key, seed] = train(study, rows[key], roles, seed, two, seed if stage_one_seed is None else stage_one_seed)
            for shot in shots:
                scores[key, seed, shot] = study.score(nets[key, seed]['net'], score, shot, s['test_episodes'])
                say(f'{key}, seed {seed}, {shot}-shot: {scores[key, seed, shot]}')
        except Stopped as e:
            stop = e
            break
        except UserError as e: # a row that diverges leaves the others their turn
            failed.append(f'{key}, seed {seed}: {e}')
            say(f'failed: {failed[-1]}')

    records = {} # by file: where seeds share a stage one they share its record
    for (key,seed),made in nets.items():
        if (key, seed, shots[-1]) not in scores: continue
        r = record(name, key, rows[key], seed, stage_one_seed, score, shots, made, scores, data) | dict(order=order[key])
        records[r['file']] = r
    records = list(records.values())
    scored,pairs = frames(rows, records, scores)
    if records and ranks()[0] == 0:
        say(f'\n{scored.to_string(index=False)}\n')
        if len(pairs): say(pairs.to_string(index=False, float_format='{:.3g}'.format) + '\n')
        atomic_write(out/f'{name}_{score}.csv', scored.to_csv(index=False))
        atomic_write(out/f'{name}_{score}_pairs.csv', pairs.to_csv(index=False, float_format='%.5g'))
    for r in records if results and ranks()[0] == 0 else []: write_record(results, r)
    if stop: say(f'stopped ({stop}) at {key}, seed {seed}{stop.where}: the same command goes on')
    status = 'stopped' if stop else 'failed' if failed else 'finished'
    if ranks()[0] == 0:
        print(json.dumps(dict(experiment=name, csv=str(out/f'{name}_{score}.csv'), rows=len(scored), failed=failed, demo=demo,
                              status=status)))
    if stop and stop.code: sys.exit(stop.code)
    return Table(scored, pairs, nets, study, failed)


def train(study, row, roles, seed, two, start):
    "The networks of a row: the student's stage one (of seed `start`), its teacher's and its own"
    def one(role, seed): return study.global_net(**roles[role] | row.get('stage_one', {}) | dict(seed=seed))
    psi,phi = row['psi'],row.get('phi')
    student = one(psi, start)
    if 'stage_two' not in row: return dict(net=student)
    teacher = None
    if phi and roles[phi] == roles[psi]: teacher = one(phi, start + 1) if row.get('independent') else student
    elif phi: teacher = one(phi, 0) # one teacher for every seed
    return dict(student=student, teacher=teacher, net=study.meta_net(student, teacher, two[not phi] | row['stage_two'] | dict(seed=seed)))


# ---- what is asked for ------------------------------------------------------------------------------------------------

def numbers(name, text):
    try: return list(dict.fromkeys(int(v) for v in str(text).split(',')))
    except ValueError: raise UserError(f'--{name} is {text!r}: give whole numbers separated by commas, such as 0,1,2') from None

def wanted(rows, keep):
    "The rows of `keep` and those they are compared with, in the experiment's order"
    if keep is None: return rows
    keep = [k.strip() for k in keep.split(',')]
    if unknown := [k for k in keep if k not in rows]: raise UserError(f'no row {unknown[0]!r}: the rows are {", ".join(rows)}')
    keep += [other for k in keep for other in rows[k].get('versus', ())]
    return {k:row for k,row in rows.items() if k in keep}


# ---- what came of it --------------------------------------------------------------------------------------------------

def record(name, key, row, seed, start, split, shots, made, scores, data):
    "Everything a reported number needs to be had again, JSON-able"
    net = made['net']
    seed_of = net.settings['seed']
    def trained(t):
        began,card = t.read('settings.json'),t.read('net.json')
        return {k:began.get(k) for k in ('commit','device','torch_threads','versions')} | dict(
            run=t.folder.name, arch=card['arch'],
            initial_weights=external_weights(card['arch'], t.settings.get('pretrained', False)) or 'random',
            weights=card['sha256'], val_accuracy=round(card['val_accuracy'], 3),
            minutes=round(t.read('result.json')['seconds']/60, 1))
    networks = {k:trained(t) for k,t in made.items() if t}
    def difference(d): return dict(difference=round(d.mean, 3), ci95=round(d.ci95, 3), p=float(f'{d.p:.3g}'), clear=d.clear)
    versus = {other:{f'{shot}-shot':difference(scores[key, seed, shot] - scores[other, seed, shot]) for shot in shots}
              for other in row.get('versus', ()) if (other, seed, shots[-1]) in scores}
    phi,psi = networks['teacher']['arch'] if 'teacher' in networks else None,networks['net']['arch']
    same = [_no_seed(net.settings), data.fingerprint, *([] if start is None else [start])] # but for the seed
    same = hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()[:6]
    slug = re.sub('[^a-z0-9.=]+', '-', key.lower()).strip('-')
    return dict(
        file=f'{slug}-{same}-s{seed_of}-{split}.json', experiment=name, row=key, same=same, seed=seed_of, stage_one_seed=start, split=split,
        supervision='CL+GR' if phi else 'CL+EL' if 'student' in networks else 'CL', phi=phi, psi=psi,
        paper=row.get('paper', {}).get((data.name, phi, psi)),
        scores={f'{shot}-shot':dict(accuracy=round(e.accuracy, 3), ci95=round(e.ci95, 3), n=len(e.episodes), episodes=e.drawn)
                for shot in shots for e in [scores[key, seed, shot]]},
        versus=versus, settings=net.settings, networks=networks, data=dict(name=data.name, fingerprint=data.fingerprint),
        command=f'OMP_NUM_THREADS={networks["net"]["torch_threads"]} {command()}',
        scored=dict(commit=git_commit(), device=device_name(), versions=versions(), date=datetime.date.today().isoformat()))

def _no_seed(settings): return {k:_no_seed(v) if isinstance(v, dict) else v for k,v in settings.items() if k != 'seed'}

def write_record(folder, r):
    with output_folder(Path(folder).expanduser()/r['experiment'], '--results') as folder: write_json(folder/r['file'], r)

def writable(out, results):
    "Raise UserError before any work is done if one of the folders cannot be written; `results` may be None"
    with output_folder(out), output_folder(out if results is None else results, '--results'): pass

def frames(rows, records, scores):
    "Tidy DataFrames: a line per row, seed and shot; a line per comparison, seed and shot, and one over all seeds"
    scored = [dict(row=r['row'], supervision=r['supervision'], phi=r['phi'], psi=r['psi'], seed=r['seed'], split=r['split'],
                   shot=int(shot[:-5]),
                   accuracy=v['accuracy'], ci95=v['ci95'], n=v['n'], paper=(r['paper'] or {}).get(shot),
                   weights=r['networks']['net']['weights'][:8])
              for r in records for shot,v in r['scores'].items()]
    versus,pairs = {k:row.get('versus', ()) for k,row in rows.items()},[]
    for shot in sorted({shot for *_,shot in scores}):
        of = {k:{seed:e for (row,seed,s),e in scores.items() if (row, s) == (k, shot)} for k in rows}
        pairs.append(compare(of, versus).assign(shot=shot))
    return pd.DataFrame(scored),pd.concat(pairs) if pairs else pd.DataFrame()
