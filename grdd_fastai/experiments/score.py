"""Networks and classifiers to a table of accuracies: the program behind recipes/evaluate_weights.py, read top to bottom."""
import argparse
import hashlib
import json
import re
from functools import partial
from pathlib import Path
from typing import Annotated

import pandas as pd

from ..core.distributed import log
from ..core.errors import UserError
from ..core.storage import atomic_write, digest, output_folder, user_path, write_json
from ..data.episodes import QUERY_SAMPLERS, check_episode
from ..fewshot.classifiers import CLASSIFIERS, get_classifier, with_base_mean
from ..fewshot.embed import cached_features
from ..fewshot.evaluate import evaluate
from ..fewshot.stats import compare
from ..models.create import input_config
from ..models.pretrained import load_network
from ..runs.options import DataOptions
from ..runs.provenance import command, device_name, git_commit, log_line, now, versions
from ..settings import at_least, between, checked, from_flags, with_flags
from .store import EPISODES_SEED, SPLITS
from .table import numbers, writable

__all__ = ['score_networks']


@checked
@with_flags(files=DataOptions)
def score_networks(
    *networks:str, # timm names with weights, folders of runs or of recipes/publish.py, or weights of runs
    files=None, # the given `DataOptions`
    score:str='val', # classes to score: val, to choose by, or novel, at the end
    ways:str='5', # classes per episode, separated by commas
    shots:str='1,5', # support images per class, separated by commas
    queries:str='15', # query images per class, separated by commas
    # classifiers, separated by commas, or all: cosine, prototype, simpleshot_l2n, nearest_neighbour, ridge, logistic, tim_gd, tim_adm, ...
    classifiers:str='cosine',
    query_distribution:str='balanced', # balanced, or dirichlet: as many queries in all, unevenly over the classes
    support_views:Annotated[int, 'augmented views of each support image that take its place; 0 for the image as it is', at_least(0)]=0,
    jitter:Annotated[bool, "colour jitter of the views", dict(action=argparse.BooleanOptionalAction)]=True,
    test_episodes:Annotated[int, 'episodes of each kind', between(1, 10**8)]=10_000,
    seed:Annotated[int, 'seed of the episodes and views (novel: 0; val: 1, which does not give the episodes that chose an epoch)',
                   between(0, 2**32 - 1)]=None,
    px:int=None, # side of the images (the first network's)
    out:str='runs/evaluation', # folder for the table, the paired differences and the record, in files named by what was asked for
    results:str=None, # folder that takes the record as well (the project's own: results)
):
    "Score networks with classifiers on the same episodes: the table and the paired differences with the first network, as DataFrames"
    if not networks: raise UserError('no network is given: name one, such as convnet4.grdd_cifarfs')
    if score not in SPLITS: raise UserError(f'--score is {score}: it is one of {", ".join(SPLITS)}')
    files = from_flags(DataOptions(), files)
    if query_distribution not in QUERY_SAMPLERS:
        raise UserError(f'--query-distribution is {query_distribution}: it is one of {", ".join(QUERY_SAMPLERS)}')
    names = list(CLASSIFIERS) if classifiers == 'all' else classifiers.split(',')
    for name in names: get_classifier(name)
    writable(out, results)
    out = user_path(out)
    results = results and user_path(results)
    split = SPLITS[score]
    if seed is None: seed = EPISODES_SEED[score]
    nets = {str(of):load_network(of) for of in networks}
    if px is None: px = input_config(next(iter(nets.values())))[0]
    for of,net in nets.items():
        if (side := input_config(net)[0]) != px: log(f'note: {of} is made for images of {side} px and gets {px}')
    data = files.load(px)
    kinds = [(w, k, q) for w in numbers('ways', ways) for k in numbers('shots', shots) for q in numbers('queries', queries)]
    for w,k,q in kinds: check_episode(getattr(data, split), w, k, q if query_distribution == 'balanced' else w*q)

    rows,scores,weights = [],{},{}
    for of,net in nets.items():
        bank = partial(cached_features, net, data, cache=files.cache)
        (h,y),views = bank(split),bank(split, views=support_views, jitter=jitter, seed=seed)[0] if support_views else None
        using = with_base_mean(names, lambda bank=bank: bank('train')[0])
        weights[of] = digest(net.state_dict())
        for w,k,q in kinds:
            for name,e in evaluate(h, y, w, k, q, test_episodes, seed, using, query_distribution, views).items():
                scores.setdefault((w, k, q, name), {})[of],f = e,CLASSIFIERS[name]
                rows.append(dict(network=of, way=w, shot=k, query=q, classifier=name, accuracy=round(e.accuracy, 3), ci95=round(e.ci95, 3),
                                 n=len(e.episodes),
                                 transductive=f.transductive, balanced=f.balanced, episodes=e.episode_id))
                log(f'{of}, {w}-way {k}-shot, {e.classifier}: {e}')
                if score == 'novel': log_novel(out, results, of, weights[of], rows[-1], query_distribution, support_views)
    table,pairs = pd.DataFrame(rows),[]
    for (w,k,q,name),of in scores.items():
        if len(of) > 1:
            pairs.append(compare(of, {n:[next(iter(nets))] for n in list(of)[1:]}).assign(way=w, shot=k, query=q, classifier=name))
    pairs = pd.concat(pairs, ignore_index=True) if pairs else pd.DataFrame()

    log('\n' + table.drop(columns='episodes').to_string(index=False))
    if len(pairs): log('\n' + pairs.to_string(index=False, float_format='{:.3g}'.format))
    record = dict(split=score, queries=query_distribution, support_views=support_views, jitter=jitter, seed=seed, px=px, scores=rows,
                  weights=weights, data=dict(name=data.name, fingerprint=data.fingerprint),
                  command=command(), commit=git_commit(), device=device_name(), versions=versions(), time=now())
    asked = [weights, data.fingerprint, score, kinds, names, query_distribution, support_views, jitter, seed, test_episodes]
    slug = re.sub('[^a-z0-9.]+', '-', '-'.join([*(Path(n).name for n in weights), score, query_distribution]).lower())[:100]
    name = f'inference-{slug}-{hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:6]}'
    with output_folder(out) as out:
        atomic_write(out/f'{name}.csv', table.to_csv(index=False))
        if len(pairs): atomic_write(out/f'{name}_pairs.csv', pairs.to_csv(index=False, float_format='%.5g'))
        write_json(out/f'{name}.json', record)
    if results:
        with output_folder(results, '--results') as results: write_json(results/f'{name}.json', record)
    print(json.dumps(dict(csv=str(out/f'{name}.csv'), record=str(out/f'{name}.json'), rows=len(table))))
    return table,pairs


def log_novel(out, results, of, weights, row, queries, views):
    "A line in the log of every scoring of the novel classes"
    for folder in [out, *([results] if results else [])]:
        log_line(folder/'novel_scorings.jsonl', dict(time=now(), commit=git_commit(), what=Path(of).name, weights=weights[:16],
                                                     way=row['way'], shot=row['shot'], queries=queries,
                 support_views=views, classifier=row['classifier'], accuracy=row['accuracy'], ci95=row['ci95'], test_episodes=row['n']))
