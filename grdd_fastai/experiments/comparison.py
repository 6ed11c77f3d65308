"""Methods side by side, trained for equally many images and scored on the same episodes: the program behind recipes/compare.py."""
import itertools
from pathlib import Path
from typing import Annotated

import pandas as pd
import torch

from ..core.distributed import from_rank_zero, log, processes, rank_world
from ..core.errors import UserError
from ..core.own_file import module_of
from ..core.storage import digest, read_json, user_path
from ..data.episodes import check_episode
from ..fewshot.stats import compare
from ..methods.catalogue import METHODS, Episodic, Method
from ..methods.episodic import EpisodicMethod
from ..models.create import check_backbone
from ..models.pretrained import load_network
from ..plots import plot_costs, save_figure
from ..runs.checkpoint import Stopped
from ..runs.loggers import LogOptions
from ..runs.options import DataOptions
from ..runs.provenance import command, public_word
from ..runs.run import default_out
from ..settings import between, checked, from_flags, positive, with_flags
from ..stage_one import StageOne
from ..stage_two import PRESETS
from .report.methods import HOW, file_name
from .store import EPISODE, SPLITS, NetworkStore, Protocol, Trained, slug
from .table import (
    check_choice,
    check_writable,
    key_of,
    no_seed,
    of_difference,
    of_scores,
    of_scoring,
    of_training,
    print_end,
    whole_numbers,
    write_record,
    write_tables,
)

__all__ = ['compare_methods', 'Comparison', 'PROTOCOLS']


PROTOCOLS = { # name -> how the networks of all methods are scored; own: each method by its own classifier
    'own': None,
    'cosine': Protocol(),
    'prototype': Protocol('simpleshot_l2n'),
    'logistic': Protocol('logistic'),
    'views': Protocol('logistic', support_views=5),
    'transductive': Protocol('tim_adm'),
    'dirichlet': Protocol('alpha_tim', queries='dirichlet'),
}
ONE = StageOne(schedule='one_cycle', opt='muon', lr=.02, bs=128, rotation=False)
TWO = PRESETS['patient']
PAPER = dict(images=460_800, test_episodes=10_000)
DEMO = dict(images=20_480, test_episodes=1000, teacher='convnet4_256.grdd_cifarfs', two=dict(views=2, n_episodes=20))


class Comparison:
    """The networks of methods in one `NetworkStore`, each trained once

    `one` and `two` are the settings that all methods share, `images` is the number of images that each training sees, and `teacher` is the
    `Trained` network that teaches the methods whose teacher is 'given'.
    """
    def __init__(self, store, methods, arch, images, one=ONE, two=TWO, teacher=None):
        self.store,self.data,self.methods,self.arch,self.images,self.teacher = store,store.data,methods,arch,images,teacher
        self.one,self.two = one.but(arch=arch),two
        self.made = {}
    @property
    def teacher_name(self):
        "Name of the network that teaches the methods whose teacher is 'given', or None"
        return self.teacher and self.teacher.settings['network']
    def network(self, name, seed, shot):
        "The `Trained` network of a method, for its `shot` if the method has one for each"
        method = self.methods[name]
        key = name,seed,shot if method.per_shot else None
        if key not in self.made: self.made[key] = method.train(self, seed, shot)
        return self.made[key]
    def chain(self, name):
        "Names of the method and of all methods whose networks it starts from or learns from"
        m = self.methods[name]
        others = [other for other in (m.start, m.teacher) if other in self.methods and other != name]
        return list(dict.fromkeys([name, *(k for other in others for k in self.chain(other))]))
    def images_with_others(self, name, shot):
        "Images that the training sees, with those of the trainings that it needs"
        return sum(self.methods[k].images(self, shot) for k in self.chain(name))


@processes()
@checked
@with_flags(files=DataOptions, follow=LogOptions)
def compare_methods(
    # methods, separated by commas, or all; your own is given by its file, as in my_file.py:MyMethod
    methods:str='protonet,rfs_simple,skd0,grdd',
    files=None, # the given `DataOptions`
    arch:str='convnet4', # network of all methods, a timm model
    px:int=32, # side of the images in pixels
    teacher:str=None, # trained network that teaches the methods that need one (demo: convnet4_256.grdd_cifarfs)
    images:Annotated[int, 'images that each training sees, up to whole epochs, with each view and rotated copy (460800; demo: 20480)',
                     between(1, 10**10)]=None,
    seeds:str='0', # training seeds, separated by commas
    score:str='val', # classes to score: val, to choose settings, or novel, at the end
    shots:str='1,5', # shots to score, separated by commas
    # how to score, separated by commas: own (each method's classifier), cosine, prototype, logistic, views, transductive, dirichlet
    protocols:str='own',
    versus:str=None, # method that all others are compared with, which is trained, too (grdd if it is among them, else the first)
    test_episodes:Annotated[int, 'number of episodes to score (10000; demo: 1000)', between(2, 10**8)]=None,
    out:str=None, # folder for tables, figures and networks, which are used again (runs/compare; demo: runs/compare-demo)
    results:str=None, # folder for a record of each method and protocol (in this project: results)
    follow=None, # the given `LogOptions`
    max_minutes:Annotated[float, 'minutes after which the program stops with everything saved; the same command goes on', positive]=None,
    demo:bool=False, # small settings, on the embedded data set unless --data is given
    known=METHODS, # name -> method; not a flag
    name:str='compare', # name of the experiment, which begins its files and is in its records; not a flag
) -> dict:
    """Train the networks of the methods that do not exist yet, score them on the same episodes, and write CSVs and records

    Returns protocol -> DataFrame of the scores. If a method fails, the others go on. UserError for flags, data or folders that
    cannot be used.
    """
    names = list(known) if methods == 'all' else list(dict.fromkeys(k.strip() for k in methods.split(',')))
    names,known = with_files(names, known)
    for method in names: check_choice('--methods', method, known)
    protocols = [k.strip() for k in protocols.split(',')]
    for protocol in protocols: check_choice('--protocols', protocol, PROTOCOLS)
    if versus is None: versus = 'grdd' if 'grdd' in names else names[0]
    check_choice('--versus', versus, known)
    if versus not in names: names.append(versus)
    check_choice('--score', score, SPLITS)
    seeds,shots = whole_numbers('seeds', seeds),whole_numbers('shots', shots)
    for seed in seeds: from_flags(ONE, dict(seed=seed)) # an error for a seed that is out of bounds
    if '.' in arch: raise UserError(f'--arch is {arch}, which has trained weights: leave its tag out, since all begin with random ones')
    check_backbone(arch, px)
    if teacher is None and demo: teacher = DEMO['teacher']
    if teacher is not None: teacher = named_teacher(teacher)
    if out is None: out = default_out('compare', demo)
    from_rank_zero(lambda: check_writable(out, results))
    out,files = user_path(out, '--out'),from_flags(DataOptions(), files)
    files.warn_of_demo(demo)
    data = files.load(px, demo)
    most = EPISODE['n_query']*(EPISODE['n_way'] if any((p := PROTOCOLS[k]) and p.queries != 'balanced' for k in protocols) else 1)
    for split in (data.val, data.test):
        for shot in shots: check_episode(split, EPISODE['n_way'], shot, most)

    default = DEMO if demo else PAPER
    store = NetworkStore(data, out, max_minutes, logs=[out, *([results] if results else [])], cache=files.cache,
                         loggers=from_flags(LogOptions(), follow).loggers)
    lab = Comparison(store, known, arch, images or default['images'], ONE, TWO.but(**default.get('two', {})), teacher)
    chains = list(dict.fromkeys(k for method in names for k in lab.chain(method)))
    for method in chains: known[method].check(lab)
    for note in (known[method].warn(method, lab) for method in chains):
        if note: log(note)
    scores,failed,stop = train_and_score(lab, names, seeds, shots, {k:PROTOCOLS[k] for k in protocols}, score,
                                         test_episodes or default['test_episodes'])
    tables,first = {},rank_world()[0] == 0
    for protocol,found in scores.items() if first else ():
        if found: tables[protocol] = write(lab, name, protocol, found, versus, score, out, results)
    print_end(stop, failed, experiment=name, out=str(out), rows=sum(map(len, tables.values())), demo=demo)
    if failed: raise UserError(f'{len(failed)} of the methods failed, {failed[0]}')
    return tables


def with_files(names, known):
    """The names of the methods, and `known` with those that a name such as 'my_file.py:MyMethod' gives by its file

    It is a subclass of `EpisodicMethod`, or a line such as those of `METHODS`. UserError for anything else.
    """
    found,known = [],dict(known)
    for text in names:
        file,dot,name = text.rpartition('.py:')
        if dot:
            made = getattr(module_of(file + '.py'), name, None)
            if isinstance(made, type) and issubclass(made, EpisodicMethod): made = Episodic(title=name, make=made)
            if not isinstance(made, Method): raise UserError(f'{file}.py has no EpisodicMethod or method {name!r}: write it there')
            if name in known: raise UserError(f'there is a method {name!r} already: give the one in {file}.py another name')
            known[name] = made
        found.append(name if dot else text)
    return found,known

def named_teacher(teacher):
    "The `Trained` network with this name or path, whose settings are its name and its checksum. UserError if there is none"
    try: net = load_network(teacher)
    except UserError as e: raise UserError(f'--teacher is {teacher!r}, which cannot be used: {e}') from None
    return Trained(net, Path(public_word(teacher)), dict(network=Path(public_word(teacher)).name, weights=digest(net.state_dict())[:16]))

def own_protocol(method):
    "The `Protocol` of a method's own classifier"
    return Protocol(method.classifier, method.support_views)

def train_and_score(lab, names, seeds, shots, protocols, split, n_episodes):
    """Train each method with each seed, and score it by each of the `protocols` (name -> `Protocol`, None for the method's own)

    Returns name of a protocol -> (method, seed, shot) -> `Evaluation`, a sentence for each failure, and the `Stopped` that ended the work
    early, or None.
    """
    scores,failed = {k:{} for k in protocols},[]
    for seed,name in itertools.product(seeds, names):
        try:
            for shot,(k,p) in itertools.product(shots, protocols.items()):
                how = p or own_protocol(lab.methods[name])
                e = scores[k][name, seed, shot] = lab.store.score(lab.network(name, seed, shot), split, shot, n_episodes, how)
                log(f'{name}, seed {seed}, {shot}-shot, {k}: {e}')
        except Stopped as stop:
            stop.where = f' at {name}, seed {seed}{stop.where}'
            return scores,failed,stop
        except UserError as e: # the other methods go on
            failed.append(f'{name}, seed {seed}: {e}')
            log(f'failed: {failed[-1]}')
    return scores,failed,None


# ---- records and tables -----------------------------------------------------------------------------------------------

def write(lab, experiment, protocol, scores, versus, split, out, results):
    "Write the table, the paired differences, the figure and the records of one protocol; return the table as a DataFrame"
    shots = sorted({shot for *_,shot in scores})
    names = list(dict.fromkeys(name for name,*_ in scores))
    table,pairs = [],[]
    for shot in shots:
        by_method = {k:{seed:e for (name,seed,s),e in scores.items() if (name, s) == (k, shot)} for k in names}
        pairs.append(compare(by_method, {k:[versus] for k in names if k != versus and versus in by_method}).assign(shot=shot))
        table += [line(lab, name, seed, shot, protocol, e, split) for name,by_seed in by_method.items() for seed,e in by_seed.items()]
    table,pairs = pd.DataFrame(table),pd.concat(pairs)
    file = file_name(experiment, protocol, split, lab.images, lab.teacher_name)
    write_tables(out, file, table, pairs)
    title = f'{lab.data.name}, {lab.arch}, {protocol}: {HOW[protocol]}'
    save_figure(plot_costs(table, title), out/f'{file}.png')
    for name,seed in dict.fromkeys((name, seed) for name,seed,_ in scores) if results else ():
        r = method_record(lab, experiment, name, seed, protocol, scores, versus, split)
        write_record(results, with_other_shots(r, Path(results).expanduser()/experiment/r['file']))
    return table

def line(lab, name, seed, shot, protocol, e, split):
    "A line of the table of a protocol"
    m,t = lab.methods[name],lab.network(name, seed, shot)
    return dict(method=name, title=m.title, seed=seed, split=split, shot=shot, classifier=classifier(m, protocol), accuracy=e.accuracy,
                ci95=e.ci95, n=len(e.episodes), images=m.images(lab, shot), images_with_others=lab.images_with_others(name, shot),
                minutes=round(t.read('result.json')['seconds']/60, 1), parameters=parameters(t), teacher=teacher_of(lab, name),
                taught=m.teacher == 'given',
                published=dict(zip((1, 5), published(lab, m, protocol, split))).get(shot))

def parameters(trained):
    "Number of parameters of the method without a classifier of the base classes"
    head = trained.net.get_classifier()
    return count(trained.method or trained.net) - (count(head) if isinstance(head, torch.nn.Module) else 0)

def count(module): return sum(p.numel() for p in module.parameters())

def published(lab, method, protocol, split):
    "The published accuracies of a method, where ours are on the same classes, with the same network and by the method's own classifier"
    comparable = lab.arch == method.published_of and split == 'novel' and protocol == 'own'
    return method.published.get(lab.data.name, ()) if comparable else ()

def classifier(method, protocol):
    "The name of the classifier that scores a method by a protocol"
    p = PROTOCOLS[protocol] or own_protocol(method)
    if p.classifier: return p.classifier + (f', {p.support_views} views' if p.support_views else '')
    return "the method's own" + (', all queries together' if getattr(method.make, 'func', method.make).transductive else '')

def teacher_of(lab, name):
    teacher = lab.methods[name].teacher
    return lab.teacher_name if teacher == 'given' else teacher

def of_any_shot(settings):
    "The settings without the seed; those of an episodic method also without its shot and epochs"
    return {k:v for k,v in no_seed(settings).items() if 'method' not in settings or k not in ('shot', 'epochs')}

def with_other_shots(record, path):
    "The record with the scores of further shots from the record of the same network that the file at `path` holds, if there is one"
    old = read_json(path, {})
    def both(old, new): return {k:both(old[k], v) if isinstance(v, dict) and k in old else v for k,v in (old | new).items()}
    if old.get('same') != record['same']: return record
    by_shot = ('scores', 'versus', 'images', 'images_with_others', 'networks', 'settings', 'command', 'scored')
    return record | {k:both(old[k], record[k]) for k in by_shot if k in old}

def method_record(lab, experiment, name, seed, protocol, scores, versus, split):
    "The record of a method, a seed and a protocol: a dict for JSON with all that is needed to measure its numbers again"
    m = lab.methods[name]
    mine = {shot:e for (k,s,shot),e in scores.items() if (k, s) == (name, seed)}
    networks = {shot:lab.network(name, seed, shot) for shot in mine}
    first = next(iter(networks.values()))
    length = [m.length] if m.length != 1 else []
    same = key_of([of_any_shot(first.settings), lab.data.fingerprint, lab.images, lab.teacher_name, *length])
    def difference(shot):
        other = of_training(lab.network(versus, seed, shot))
        return of_difference(mine[shot] - scores[versus, seed, shot]) | dict(weights=other['weights'][:16])
    differences = {f'{shot}-shot':difference(shot) for shot in mine if name != versus and (versus, seed, shot) in scores}
    def by_shot(value): return {f'{shot}-shot':value for shot in mine}
    return dict(
        file=f'{slug(name)}-{protocol}-{same}-s{seed}-{split}.json', experiment=experiment, method=name, title=m.title,
        source=m.source, protocol=protocol, classifier=classifier(m, protocol), budget=lab.images,
        order=list(lab.methods).index(name), same=same, seed=seed, split=split, arch=lab.arch,
        teacher=teacher_of(lab, name), given=lab.teacher and lab.teacher.settings, published=published(lab, m, protocol, split),
        scores={f'{shot}-shot':of_scores(e) for shot,e in mine.items()},
        versus={versus:differences} if differences else {},
        images={f'{shot}-shot':m.images(lab, shot) for shot in mine},
        images_with_others={f'{shot}-shot':lab.images_with_others(name, shot) for shot in mine},
        settings={f'{shot}-shot':t.settings for shot,t in networks.items()} if m.per_shot else first.settings,
        networks={f'{shot}-shot':of_training(t) for shot,t in networks.items()} if m.per_shot else dict(net=of_training(first)),
        data=dict(name=lab.data.name, fingerprint=lab.data.fingerprint),
        command=by_shot(f'OMP_NUM_THREADS={of_training(first)["torch_threads"]} {command()}'), scored=by_shot(of_scoring()))
