"""From networks and classifiers to a table of accuracies: the program behind recipes/evaluate_weights.py."""
import argparse
import hashlib
import itertools
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
from ..fewshot.classifiers import get_classifier, split_names, with_base_mean, without_settings
from ..fewshot.embed import cached_features
from ..fewshot.evaluate import evaluate
from ..fewshot.stats import compare
from ..models.create import input_config
from ..models.pretrained import load_network
from ..runs.options import DataOptions
from ..runs.provenance import git_commit, log_line, now, origin
from ..settings import at_least, between, checked, from_flags, with_flags
from .store import EPISODES_SEED, SPLITS
from .table import check_choice, check_writable, whole_numbers

__all__ = ['score_networks']


@checked
@with_flags(files=DataOptions)
def score_networks(
    *networks:str, # networks: timm names with weights, folders of runs or of recipes/publish.py, or weights files of runs
    files=None, # the given `DataOptions`
    score:str='val', # classes to score: val, to choose settings, or novel, at the end
    ways:str='5', # classes per episode, separated by commas
    shots:str='1,5', # support images per class, separated by commas
    queries:str='15', # query images per class, separated by commas
    # classifiers, separated by commas, with settings as in 'tim_adm(scale=6)', or all: cosine, prototype, simpleshot_l2n, logistic, ...
    classifiers:str='cosine',
    query_distribution:str='balanced', # queries per class: balanced, or dirichlet, which is uneven with the same sum
    support_views:Annotated[int, 'number of augmented views that replace each support image; 0 keeps the image itself', at_least(0)]=0,
    mirror:bool=False, # average the features of each image with those of its mirror image
    jitter:Annotated[bool, 'colour jitter of the views', dict(action=argparse.BooleanOptionalAction)]=True,
    test_episodes:Annotated[int, 'number of episodes of each kind', between(1, 10**8)]=10_000,
    seed:Annotated[int, 'seed of the episodes and views (novel: 0; val: 1, for other episodes than those that chose the epoch)',
                   between(0, 2**32 - 1)]=None,
    px:int=None, # side of the images in pixels (as the first network takes them)
    out:str='runs/evaluation', # folder for the table, the paired differences and the record, in files named by networks and settings
    results:str=None, # second folder for the record (in this project: results)
):
    """Score networks with classifiers on the same episodes, and write a table, paired differences and a record

    Returns the table and the paired differences from the first network as DataFrames. UserError for networks, flags, data or folders that
    cannot be used.
    """
    if not networks: raise UserError('no network is given: name one, such as convnet4.grdd_cifarfs')
    check_choice('--score', score, SPLITS)
    files = from_flags(DataOptions(), files)
    check_choice('--query-distribution', query_distribution, QUERY_SAMPLERS)
    names = split_names(classifiers)
    check_writable(out, results)
    out = user_path(out)
    results = results and user_path(results)
    split = SPLITS[score]
    if seed is None: seed = EPISODES_SEED[score]
    nets = {str(network):load_network(network) for network in networks}
    first = next(iter(nets))
    if px is None: px = input_config(nets[first])[0]
    for network,net in nets.items():
        if (side := input_config(net)[0]) != px: log(f'note: {network} is made for images of {side} px and gets {px}')
    data = files.load(px)
    kinds = list(itertools.product(*(whole_numbers(k, v) for k,v in dict(ways=ways, shots=shots, queries=queries).items())))
    for w,k,q in kinds: check_episode(getattr(data, split), w, k, q if query_distribution == 'balanced' else w*q)

    rows = []
    scores = {} # (way, shot, query, classifier) -> network -> `Evaluation`
    weights = {} # network -> checksum
    for network,net in nets.items():
        features = partial(cached_features, net, data, cache=files.cache, mirror=mirror)
        h,y = features(split)
        views = features(split, views=support_views, jitter=jitter, seed=seed)[0] if support_views else None
        with_means = with_base_mean(names, lambda features=features: features('train')[0])
        weights[network] = digest(net.state_dict())
        for w,k,q in kinds:
            for name,e in evaluate(h, y, w, k, q, test_episodes, seed, with_means, query_distribution, views).items():
                scores.setdefault((w, k, q, name), {})[network] = e
                rows.append(row(network, w, k, q, name, e))
                log(f'{network}, {w}-way {k}-shot, {e.classifier}: {e}')
                if score == 'novel': log_novel(out, results, network, weights[network], rows[-1], query_distribution, support_views, mirror)
    table = pd.DataFrame(rows)
    pairs = differences(scores, first)
    log('\n' + table.drop(columns='episodes').to_string(index=False))
    if len(pairs): log('\n' + pairs.to_string(index=False, float_format='{:.3g}'.format))

    record = dict(split=score, queries=query_distribution, support_views=support_views, mirror=mirror, jitter=jitter, seed=seed, px=px,
                  scores=rows, weights=weights, **origin(data))
    asked = [weights, data.fingerprint, score, kinds, names, query_distribution, support_views, jitter, seed, test_episodes]
    if mirror: asked.append('mirror')
    slug = re.sub('[^a-z0-9.]+', '-', '-'.join([*(Path(n).name for n in weights), score, query_distribution]).lower())[:100]
    name = f'inference-{slug}-{hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:6]}'
    write_scores(out, results, name, table, pairs, record)
    print(json.dumps(dict(csv=str(out/f'{name}.csv'), record=str(out/f'{name}.json'), rows=len(table))))
    return table,pairs


def row(network, way, shot, query, name, e):
    "The table's entries for the `Evaluation` `e` of a network with the classifier `name`"
    f = without_settings(get_classifier(name))
    return dict(network=network, way=way, shot=shot, query=query, classifier=name, accuracy=round(e.accuracy, 3), ci95=round(e.ci95, 3),
                n=len(e.episodes), transductive=f.transductive, balanced=f.balanced, episodes=e.episode_id)

def differences(scores, first):
    "Paired differences of the other networks from the network `first` as a DataFrame, for each kind of episode and classifier"
    pairs = []
    for (way,shot,query,name),by_network in scores.items():
        if len(by_network) < 2: continue
        versus = {network:[first] for network in list(by_network)[1:]}
        pairs.append(compare(by_network, versus).assign(way=way, shot=shot, query=query, classifier=name))
    return pd.concat(pairs, ignore_index=True) if pairs else pd.DataFrame()

def write_scores(out, results, name, table, pairs, record):
    "Write the table, the paired differences and the record to `out`, and the record to `results` too if that folder is given"
    with output_folder(out) as folder:
        atomic_write(folder/f'{name}.csv', table.to_csv(index=False))
        if len(pairs): atomic_write(folder/f'{name}_pairs.csv', pairs.to_csv(index=False, float_format='%.5g'))
        write_json(folder/f'{name}.json', record)
    if results:
        with output_folder(results, '--results') as folder: write_json(folder/f'{name}.json', record)

def log_novel(out, results, network, weights, row, queries, views, mirror):
    "Append a scoring of the novel classes to the log in `out`, and to the one in `results` if that folder is given"
    scoring = dict(time=now(), commit=git_commit(), what=Path(network).name, weights=weights[:16], way=row['way'], shot=row['shot'],
                   queries=queries, support_views=views, mirror=mirror, classifier=row['classifier'], accuracy=row['accuracy'],
                   ci95=row['ci95'], test_episodes=row['n'])
    for folder in [out, *([results] if results else [])]: log_line(folder/'novel_scorings.jsonl', scoring)
