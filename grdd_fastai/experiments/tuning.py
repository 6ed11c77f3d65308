"""Choose the settings of classifiers on the validation classes: the program behind recipes/tune_classifiers.py."""
import hashlib
import json
import shlex
from pathlib import Path
from typing import Annotated

import pandas as pd

from ..core.distributed import log
from ..core.storage import digest, user_path
from ..data.episodes import QUERY_SAMPLERS, check_episode
from ..fewshot.classifiers import split_names
from ..fewshot.embed import cached_features
from ..fewshot.tune import tunable, tune
from ..models.create import input_config
from ..models.pretrained import load_network
from ..runs.options import DataOptions
from ..runs.provenance import origin
from ..settings import between, checked, flag_name, from_flags, with_flags
from .score import write_scores
from .table import check_choice, check_writable, whole_numbers

__all__ = ['tune_classifiers']


SEED = 2 # of the episodes: neither those that choose the epoch of a training nor those of the scores on the validation classes


@checked
@with_flags(files=DataOptions)
def tune_classifiers(
    network:str, # network: a timm name with weights, a folder of a run or of recipes/publish.py, or a weights file of a run
    files=None, # the given `DataOptions`
    classifiers:str='tim_adm', # classifiers, separated by commas, with settings to start from as in 'tim_adm(scale=6)', or without
    shots:str='1,5', # support images per class, separated by commas; each number gets its own settings
    query_distribution:str='balanced', # queries per class: balanced, or dirichlet, which is uneven with the same sum
    mirror:bool=False, # average the features of each image with those of its mirror image
    episodes:Annotated[int, 'number of validation episodes on which all settings are compared', between(1, 10**8)]=2000,
    rounds:Annotated[int, 'most rounds in which every setting is changed', between(1, 100)]=2,
    px:int=None, # side of the images in pixels (as the network takes them)
    out:str='runs/evaluation', # folder for the record, and for a table of all settings that were tried
    results:str=None, # second folder for the record (in this project: results)
) -> dict:
    """Choose the settings of classifiers on the validation classes, and say the command that scores them on the novel classes

    Returns (classifier, shot) -> the classifier with its settings as text. UserError for a network, flags, data or folders that cannot be
    used.
    """
    files = from_flags(DataOptions(), files)
    check_choice('--query-distribution', query_distribution, QUERY_SAMPLERS)
    names,shots = split_names(classifiers),whole_numbers('shots', shots)
    for name in names: tunable(name) # an error before any work is done
    check_writable(out, results)
    out,results = user_path(out),results and user_path(results)
    net = load_network(network)
    if px is None: px = input_config(net)[0]
    data = files.load(px)
    for shot in shots: check_episode(data.val, 5, shot, 15 if query_distribution == 'balanced' else 75)
    h,y = cached_features(net, data, 'val', cache=files.cache, mirror=mirror)
    found,tables = {},[]
    for name in names:
        for shot in shots:
            text,table = tune(h, y, name, shot, episodes, rounds=rounds, seed=SEED, query_distribution=query_distribution)
            found[name, shot] = text
            tables.append(table.assign(shot=shot))
            at = table.set_index('classifier').accuracy
            log(f'{shot}-shot: {text}: {at[text]:.2f} % on the validation classes, {at.iloc[0]:.2f} % before')
    tables = pd.concat(tables, ignore_index=True)
    tried = tables.round(3).astype(object).where(tables.notna(), None) # a classifier that failed has no accuracy
    record = dict(network=Path(network).name, weights=digest(net.state_dict()), split='val', queries=query_distribution, mirror=mirror,
                  seed=SEED, episodes=episodes, px=px, chosen=[dict(classifier=k, shot=shot, chosen=v) for (k,shot),v in found.items()],
                  tried=tried.to_dict('records'), **origin(data))
    asked = [record[k] for k in ('weights', 'queries', 'mirror', 'seed', 'episodes', 'px')] + [names, shots, rounds, data.fingerprint]
    name = f'tuned-{record["network"]}-{hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:6]}'
    write_scores(out, results, name, tables, pd.DataFrame(), record)
    for shot in shots:
        texts = ','.join(text for (_,k),text in found.items() if k == shot)
        flags = dict(**files.identity(), cache=files.cache, px=px, score='novel', shots=shot, classifiers=texts,
                     query_distribution=query_distribution)
        words = [w for k,v in flags.items() if v is not None for w in (flag_name(k), str(v))]
        log('score them: ' + shlex.join(['python', 'recipes/evaluate_weights.py', network, *words, *(['--mirror'] if mirror else [])]))
    print(json.dumps(dict(record=str(out/f'{name}.json'), chosen=record['chosen'])))
    return found
