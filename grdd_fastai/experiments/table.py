"""From rows of settings to a table of accuracies: the program behind the recipes of the paper's experiments."""
import datetime
import hashlib
import itertools
import json
import sys
from pathlib import Path
from typing import Annotated, NamedTuple

import pandas as pd

from ..core.distributed import from_rank_zero, log, processes, rank_world
from ..core.errors import UserError
from ..core.storage import atomic_write, output_folder, user_path, write_json
from ..data.episodes import check_episode
from ..fewshot.stats import compare
from ..models.create import check_backbone, pretrained_tag
from ..runs.checkpoint import Stopped
from ..runs.loggers import LogOptions
from ..runs.options import Compile, DataOptions
from ..runs.provenance import command, device_name, git_commit, versions
from ..runs.run import default_out
from ..settings import between, checked, from_flags, positive, with_flags
from ..stage_one import StageOne, TeacherEpochs
from ..stage_two import PRESETS, Preset, check_teacher, get_preset
from .store import EPISODE, SPLITS, NetworkStore, slug, supervision

__all__ = ['CL', 'EL', 'GR', 'Table', 'table']


# The three supervisions of Table 2. A row names the role, 'student' or 'teacher', whose architecture its network psi has, and the role of
# its teacher phi. If both have the same role, phi is psi's own stage one. If phi is another row, the teacher is that row's network of
# seed 0. `stage_one` and `stage_two` are settings that the row changes.
CL = dict(psi='student')
EL = dict(psi='student', stage_two={})
GR = dict(psi='student', phi='teacher', stage_two={})

PAPER = dict(student='convnet4', teacher='resnet12', one=StageOne(), two={}, test_episodes=10_000)
DEMO = dict(student='convnet4', teacher='convnet4_128', one=StageOne(epochs=3, schedule='one_cycle', lr=0.1, rotation=False, bs=64),
            two=dict(epochs=1, n_episodes=30), test_episodes=1000)


class Table(NamedTuple):
    "Scores and paired differences as DataFrames, networks by (row, seed), their `NetworkStore`, and a sentence for each row that failed"
    scored: pd.DataFrame
    pairs: pd.DataFrame
    nets: dict
    store: NetworkStore
    failed: list
    def path(self, name):
        "File of a figure with the name of an experiment"
        return self.store.out/f'{name}_{self.scored.split.iloc[0]}.png'
    def title(self, what):
        "The title of a figure: what it shows, the data set, the networks that were scored and their teachers"
        psi,phi = (' and '.join(sorted(set(self.scored[k].dropna()))) for k in ('psi', 'phi'))
        return f'{what}\n{self.store.data.name}, {psi}' + (f' from {phi}' if phi else '')
    def check(self):
        "Raise UserError if a row failed; the other rows have been written"
        if self.failed: raise UserError(f'{len(self.failed)} of the rows failed, {self.failed[0]}')


@processes()
@checked
@with_flags(files=DataOptions, one=dict(default=PAPER['one'], demo=DEMO['one']),
            two=PRESETS | dict(demo=PRESETS['best'].but(**DEMO['two'])), follow=LogOptions, but=('seed',))
def table(
    name, # name of the experiment, which names its files
    # row name -> row, such as `CL`, `EL` or `GR`; `versus` names the rows that it is compared with, `paper` holds the paper's accuracies
    # by (data set, phi, psi)
    all_rows,
    rows:str=None, # rows to make, separated by commas (all); the rows that they are compared with are made too
    files=None, # the given `DataOptions`
    out:str=None, # folder for tables, figures and networks, which are used again (runs/experiments; demo: runs/experiments-demo)
    results:str=None, # folder for a record of each row (in this project: results)
    seeds:str='0', # training seeds, separated by commas
    stage_one_seed:Annotated[int, 'one seed for stage one of all rows, so that the seeds differ in stage two alone (each seed has its own)',
                             between(0, 2**32 - 1)]=None,
    score:str='val', # classes to score: val, to choose settings, or novel, at the end
    shots:str='1', # shots to score, separated by commas
    student:str=None, # small network, a timm model (convnet4)
    teacher:str=None, # large network, a timm model (resnet12; demo: convnet4_128)
    one=None, # the given settings of `StageOne`
    teacher_epochs:TeacherEpochs=None,
    preset:Preset='best',
    two=None, # the given settings of `StageTwo`
    test_episodes:Annotated[int, 'number of episodes to score (10000; demo: 1000)', between(1, 10**8)]=None,
    compile:Compile=False,
    follow=None, # the given `LogOptions`
    max_minutes:Annotated[float, 'minutes after which the program stops with everything saved; the same command goes on', positive]=None,
    demo:bool=False, # small settings, on the embedded data set unless --data is given
):
    """Train the networks of the rows that do not exist yet, score them on the same episodes, and write CSVs and records

    Returns a `Table`. A row that fails leaves the others their turn. UserError for flags, data or folders that cannot be used.
    """
    default = DEMO if demo else PAPER
    files = from_flags(DataOptions(), files)
    base = from_flags(default['one'], one)
    student = default['student'] if student is None else student
    teacher = default['teacher'] if teacher is None else teacher
    roles = dict(student=base.but(arch=student), teacher=base.but(arch=teacher, epochs=teacher_epochs or base.epochs))
    stage_two = {alone:from_flags(get_preset(preset, alone).but(**default['two']), two) for alone in (False, True)}
    test_episodes = test_episodes or default['test_episodes']
    seeds,shots = whole_numbers('seeds', seeds),whole_numbers('shots', shots)
    for seed in seeds: from_flags(base, dict(seed=seed)) # an error for a seed that is out of bounds
    order = {k:i for i,k in enumerate(all_rows)}
    rows = selected_rows(all_rows, rows)
    check_choice('--score', score, SPLITS)
    for arch in {student, teacher}: check_backbone(arch, 32, base.pretrained)
    if out is None: out = default_out('experiments', demo)
    from_rank_zero(lambda: check_writable(out, results))
    out = user_path(out, '--out')
    files.warn_of_demo(demo)
    if not demo: log(f'{name}: {len(rows)} rows, seeds {seeds}')
    data = files.load(32, demo)
    for split in (data.val, data.test):
        for shot in shots: check_episode(split, EPISODE['n_way'], shot, EPISODE['n_query'])

    store = NetworkStore(data, out, max_minutes, logs=[out, *([results] if results else [])], compile=compile,
                         loggers=from_flags(LogOptions(), follow).loggers)
    nets,scores,failed,stop = train_and_score(store, rows, roles, stage_two, seeds, stage_one_seed, score, shots, test_episodes)
    records = {} # file -> record, because seeds that share a stage one share its record
    for (key,seed),made in nets.items():
        if (key, seed, shots[-1]) not in scores: continue
        r = record(name, key, rows[key], seed, stage_one_seed, score, shots, made, scores, data) | dict(order=order[key])
        records[r['file']] = r
    records = list(records.values())
    scored,pairs = to_dataframes(rows, records, scores)
    first = rank_world()[0] == 0
    if records and first: write_tables(out, f'{name}_{score}', scored, pairs)
    if results and first:
        for r in records: write_record(results, r)
    print_end(stop, failed, experiment=name, csv=str(out/f'{name}_{score}.csv'), rows=len(scored), demo=demo)
    return Table(scored, pairs, nets, store, failed)


def train_and_score(store, rows, roles, stage_two, seeds, stage_one_seed, split, shots, n_episodes):
    """Train and score every row with every seed

    Returns the networks by (row, seed), the `Evaluation`s by (row, seed, shot), a sentence for each failure, and the `Stopped` that ended
    the work early, or None.
    """
    nets,scores = {},{}
    failed = []
    for seed,key in itertools.product(seeds, rows):
        try:
            nets[key, seed] = train(store, rows[key], roles, seed, stage_two, seed if stage_one_seed is None else stage_one_seed)
            for shot in shots:
                scores[key, seed, shot] = store.score(nets[key, seed]['net'], split, shot, n_episodes)
                log(f'{key}, seed {seed}, {shot}-shot: {scores[key, seed, shot]}')
        except Stopped as stop:
            stop.where = f' at {key}, seed {seed}{stop.where}'
            return nets,scores,failed,stop
        except UserError as e: # a row that diverges leaves the others their turn
            failed.append(f'{key}, seed {seed}: {e}')
            log(f'failed: {failed[-1]}')
    return nets,scores,failed,None

def train(store, row, roles, seed, stage_two, start):
    """The `Trained` networks of a row: `net` and, for stage two, its `teacher`, and the `student` of stage one (with the seed `start`)

    A row with init='random' needs no student of stage one.
    """
    def one(role, seed): return store.stage_one_net(roles[role].but(**row.get('stage_one', {}) | dict(seed=seed)))
    psi,phi = row['psi'],row.get('phi')
    if 'stage_two' in row:
        two = stage_two[not phi].but(**row['stage_two'] | dict(seed=seed))
        if phi: check_teacher(roles[phi['psi'] if isinstance(phi, dict) else phi], two) # before anything is trained for the row
    if 'stage_two' not in row: return dict(net=one(psi, start))
    student = None if two.init == 'random' else one(psi, start)
    teacher = None
    if isinstance(phi, dict): teacher = train(store, phi, roles, 0, stage_two, 0)['net']
    elif phi and roles[phi] == roles[psi]: teacher = one(phi, start + 1) if row.get('independent') else student or one(phi, start)
    elif phi: teacher = one(phi, 0) # all seeds have the same teacher
    return dict(student=student, teacher=teacher, net=store.stage_two_net(student or roles[psi].arch, teacher, two))


# ---- flags ------------------------------------------------------------------------------------------------------------

def check_choice(flag, value, choices):
    "Raise UserError unless the value of the flag is one of the `choices`"
    if value in choices: return
    known = ', '.join(choices)
    raise UserError(f'{flag} is {value!r}: it is one of {known}')

def whole_numbers(name, text):
    "The whole numbers in a text that separates them by commas, each once; UserError, by the flag's `name`, for any other text"
    try: return list(dict.fromkeys(int(v) for v in str(text).split(',')))
    except ValueError: raise UserError(f'--{name} is {text!r}: give whole numbers separated by commas, such as 0,1,2') from None

def selected_rows(rows, names):
    """The rows that the text `names` lists and the rows that they are compared with, in the experiment's order

    UserError for a name of no row.
    """
    if names is None: return rows
    keep = [k.strip() for k in names.split(',')]
    if unknown := [k for k in keep if k not in rows]:
        known = ', '.join(rows)
        raise UserError(f'no row {unknown[0]!r}: the rows are {known}')
    keep += [other for k in keep for other in rows[k].get('versus', ())]
    return {k:row for k,row in rows.items() if k in keep}


# ---- records and tables -----------------------------------------------------------------------------------------------

def of_training(t):
    "How the `Trained` network was trained: a dict for JSON"
    began,card = t.read('settings.json'),t.read('net.json')
    return {k:began.get(k) for k in ('commit','device','torch_threads','versions')} | dict(
        run=t.folder.name, arch=card['arch'], initial_weights=pretrained_tag(card['arch'], t.settings.get('pretrained', False)) or 'random',
        weights=card['sha256'], val_accuracy=round(card['val_accuracy'], 3), minutes=round(t.read('result.json')['seconds']/60, 1))

def of_scores(e): return dict(accuracy=round(e.accuracy, 3), ci95=round(e.ci95, 3), n=len(e.episodes), episodes=e.episode_id)

def of_difference(d): return dict(difference=round(d.mean, 3), ci95=round(d.ci95, 3), p=float(f'{d.p:.3g}'), clear=d.clear)

def of_scoring():
    "How and when the scores were measured: a dict for JSON"
    return dict(commit=git_commit(), device=device_name(), versions=versions(), date=datetime.date.today().isoformat())

def record(name, key, row, seed, start, split, shots, made, scores, data):
    "A dict for JSON with all that is needed to get a row's numbers again"
    net = made['net']
    seed_of = net.settings['seed']
    networks = {k:of_training(t) for k,t in made.items() if t}
    versus = {other:{f'{shot}-shot':of_difference(scores[key, seed, shot] - scores[other, seed, shot]) for shot in shots}
              for other in row.get('versus', ()) if (other, seed, shots[-1]) in scores}
    phi = networks['teacher']['arch'] if 'teacher' in networks else None
    psi = networks['net']['arch']
    same = key_of([no_seed(net.settings), data.fingerprint, *([] if start is None else [start])])
    return dict(
        file=f'{slug(key)}-{same}-s{seed_of}-{split}.json', experiment=name, row=key, same=same, seed=seed_of, stage_one_seed=start,
        split=split, supervision=supervision(net.settings), phi=phi, psi=psi,
        paper=row.get('paper', {}).get((data.name, phi, psi)),
        scores={f'{shot}-shot':of_scores(scores[key, seed, shot]) for shot in shots},
        versus=versus, settings=net.settings, networks=networks, data=dict(name=data.name, fingerprint=data.fingerprint),
        command=f'OMP_NUM_THREADS={networks["net"]["torch_threads"]} {command()}', scored=of_scoring())

def key_of(settings):
    "Six characters that stand for the settings"
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:6]

def no_seed(settings):
    "The settings without any seed: records that share them differ in the seed only"
    return {k:no_seed(v) if isinstance(v, dict) else v for k,v in settings.items() if k != 'seed'}

def write_record(folder, r):
    "Write the record `r` as a JSON file in the experiment's folder in `folder`"
    with output_folder(Path(folder).expanduser()/r['experiment'], '--results') as folder: write_json(folder/r['file'], r)

def print_end(stop, failed, **about):
    """Print the JSON line that ends an experiment, `about` it and with its status, and exit if a signal stopped it

    `stop` is the `Stopped` that ended it early, or None; `failed` holds a sentence for each failure.
    """
    if stop: log(f'stopped ({stop}){stop.where}: the same command goes on')
    status = 'stopped' if stop else 'failed' if failed else 'finished'
    if rank_world()[0] == 0: print(json.dumps(about | dict(failed=failed, status=status)))
    if stop and stop.code: sys.exit(stop.code)

def check_writable(out, results):
    "Raise UserError before any work is done if one of the folders cannot be written; `results` may be None"
    with output_folder(out), output_folder(out if results is None else results, '--results'): pass

def to_dataframes(rows, records, scores):
    "Two tidy DataFrames: the scores, a line per row, seed and shot, and the lines of `compare` for each shot"
    scored = [dict(row=r['row'], supervision=r['supervision'], phi=r['phi'], psi=r['psi'], seed=r['seed'], split=r['split'],
                   shot=int(shot.removesuffix('-shot')), accuracy=v['accuracy'], ci95=v['ci95'], n=v['n'],
                   paper=(r['paper'] or {}).get(shot), weights=r['networks']['net']['weights'][:8])
              for r in records for shot,v in r['scores'].items()]
    versus = {k:row.get('versus', ()) for k,row in rows.items()}
    pairs = []
    for shot in sorted({shot for *_,shot in scores}):
        by_row = {k:{seed:e for (row,seed,s),e in scores.items() if (row, s) == (k, shot)} for k in rows}
        pairs.append(compare(by_row, versus).assign(shot=shot))
    return pd.DataFrame(scored),pd.concat(pairs) if pairs else pd.DataFrame()

def write_tables(out, name, scored, pairs):
    "Log the scores and the paired differences, and write them as CSV files with the `name` to the folder `out`"
    log(f'\n{scored.to_string(index=False)}\n')
    if len(pairs): log(pairs.to_string(index=False, float_format='{:.3g}'.format) + '\n')
    atomic_write(out/f'{name}.csv', scored.to_csv(index=False))
    atomic_write(out/f'{name}_pairs.csv', pairs.to_csv(index=False, float_format='%.5g'))
