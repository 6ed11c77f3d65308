"""Networks and classifiers to a table of accuracies: the program behind recipes/evaluate_weights.py, read top to bottom."""
import hashlib
import json
import re
from functools import partial
from pathlib import Path

import pandas as pd

from ..core.distributed import say
from ..core.errors import UserError
from ..core.storage import atomic_write, digest, output_folder, user_path, write_json
from ..data.cache import few_shot_data
from ..data.episodes import QUERIES, check_episode
from ..fewshot.classifiers import CLASSIFIERS, get_classifier, with_base_mean
from ..fewshot.embed import feature_bank
from ..fewshot.evaluate import evaluate
from ..fewshot.stats import compare
from ..models.create import images_of
from ..models.pretrained import load_network
from ..runs.provenance import command, device_name, git_commit, log_line, now, versions
from ..stages import check_settings
from .store import EPISODES_SEED, SPLITS
from .table import numbers, writable

__all__ = ['score_networks']


def score_networks(
    *networks:str, # timm names with weights, folders of runs or of recipes/publish.py, or weights of runs
    data:str=None, # raw data set in any layout of data/README.md (none: fetch CIFAR-FS)
    score:str='val', # classes to score: val chooses, novel is for the end
    ways:str='5', # classes an episode, separated by commas
    shots:str='1,5', # support images a class, separated by commas
    queries:str='15', # query images a class, separated by commas
    # separated by commas, or all: cosine, centroid, simpleshot_l2n, neighbour, ridge, logistic, tim_gd, tim_adm, ...
    classifiers:str='cosine',
    query_distribution:str='balanced', # or dirichlet: as many queries in all, unevenly over the classes
    support_views:int=0, # of each support image, augmented as in training, to be the support in its place (0: the image as it is)
    jitter:bool=True, # leave out the views' colour jitter
    test_episodes:int=10_000, # of each kind
    seed:int=None, # of the episodes and views (novel: 0, val: 1, which are not those that chose an epoch)
    px:int=None, # side of the images (the first network's)
    out:str='runs/evaluation', # folder for the table, the paired differences and the record, in files named by what was asked for
    results:str=None, # folder that takes the record, too (the project's own: results)
    cache:str=None, # folder for decoded images and features (none: ~/.cache/grdd_fastai)
    allow_large:bool=False, # also decode photos of 90 to 179 megapixels
):
    "Score networks with classifiers on the same episodes: the table and the paired differences with the first network, as DataFrames"
    if not networks: raise UserError('no network is given: name one, such as convnet4.grdd_cifarfs')
    if score not in SPLITS: raise UserError(f'--score is {score}: it is one of {", ".join(SPLITS)}')
    check_settings(dict(seed=seed, test_episodes=test_episodes))
    if query_distribution not in QUERIES:
        raise UserError(f'--query-distribution is {query_distribution}: it is one of {", ".join(QUERIES)}')
    if support_views < 0: raise UserError(f'--support-views is {support_views}: it must be at least 0')
    names = list(CLASSIFIERS) if classifiers == 'all' else classifiers.split(',')
    for name in names: get_classifier(name)
    writable(out, results)
    out,results,seed,split = user_path(out),results and user_path(results),EPISODES_SEED[score] if seed is None else seed,SPLITS[score]
    nets = {str(of):load_network(of) for of in networks}
    if px is None: px = images_of(next(iter(nets.values())))[0]
    for of,net in nets.items():
        if (side := images_of(net)[0]) != px: say(f'note: {of} is made for images of {side} px and gets {px}')
    data = few_shot_data(data, px, cache, allow_large=allow_large)
    kinds = [(w, k, q) for w in numbers('ways', ways) for k in numbers('shots', shots) for q in numbers('queries', queries)]
    for w,k,q in kinds: check_episode(getattr(data, split), w, k, q if query_distribution == 'balanced' else w*q)

    rows,scores,weights = [],{},{}
    for of,net in nets.items():
        bank = partial(feature_bank, net, data, cache=cache)
        (h,y),views = bank(split),bank(split, views=support_views, jitter=jitter, seed=seed)[0] if support_views else None
        using = with_base_mean(names, lambda bank=bank: bank('train')[0])
        weights[of] = digest(net.state_dict())
        for w,k,q in kinds:
            for name,e in evaluate(h, y, w, k, q, test_episodes, seed, using, query_distribution, views).items():
                scores.setdefault((w, k, q, name), {})[of],f = e,CLASSIFIERS[name]
                rows.append(dict(network=of, way=w, shot=k, query=q, classifier=name, accuracy=round(e.accuracy, 3), ci95=round(e.ci95, 3),
                                 n=len(e.episodes),
                                 transductive=f.transductive, balanced=f.balanced, episodes=e.drawn))
                say(f'{of}, {w}-way {k}-shot, {e.classifier}: {e}')
                if score == 'novel': log_novel(out, results, of, weights[of], rows[-1], query_distribution, support_views)
    table,pairs = pd.DataFrame(rows),[]
    for (w,k,q,name),of in scores.items():
        if len(of) > 1:
            pairs.append(compare(of, {n:[next(iter(nets))] for n in list(of)[1:]}).assign(way=w, shot=k, query=q, classifier=name))
    pairs = pd.concat(pairs, ignore_index=True) if pairs else pd.DataFrame()

    say('\n' + table.drop(columns='episodes').to_string(index=False))
    if len(pairs): say('\n' + pairs.to_string(index=False, float_format='{:.3g}'.format))
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
