"""How true is what a `FewShotClassifier` says of itself: the program behind recipes/trust.py."""
import itertools
import json
import re
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import torch
from sklearn.metrics import roc_auc_score

from ..core.distributed import log
from ..core.errors import UserError
from ..core.progress import with_progress
from ..core.storage import digest, output_folder, user_path, write_json
from ..fewshot.classifiers import get_classifier, split_names
from ..fewshot.embed import cached_features
from ..models.create import input_config
from ..models.pretrained import load_network
from ..photos.trust import AUTO, check_inductive, check_share, expected_accuracy, hold_out, similarity, softmax_scale, unknown_below
from ..runs.options import DataOptions
from ..runs.provenance import origin
from ..settings import between, checked, from_flags, positive, with_flags
from .store import SPLITS
from .table import check_choice, check_writable, whole_numbers

__all__ = ['measure_trust', 'calibration_error']


@checked
@with_flags(files=DataOptions)
def measure_trust(
    network:str, # a timm name with weights, a folder of a run or of recipes/publish.py, or a weights file of a run
    files=None, # the given `DataOptions`
    score:str='val', # classes to measure on: val, to choose settings, or novel, at the end
    ways:str='5', # classes of a support, separated by commas
    shots:str='2,5,20', # photos per class of a support, separated by commas
    classifiers:str=AUTO[0], # inductive classifiers, separated by commas
    unknown:Annotated[float, 'share of photos of known classes that may be called unknown', positive]=0.1,
    supports:Annotated[int, 'number of supports of each kind', between(1, 10**6)]=200,
    queries:Annotated[int, 'most new photos of each class that a support is measured on', between(1, 10**6)]=100,
    seed:int=0, # seed of the supports
    out:str='runs/trust', # folder for the record
    results:str=None, # second folder for the record (in this project: results)
) -> pd.DataFrame:
    """Draw supports of random classes and photos, and compare what they say of themselves with what new photos show

    Returns a DataFrame with a row for each classifier, way and shot. Its columns, in percent: `accuracy` of new photos and the one
    `expected`; `covered`, how often the 95% interval holds the accuracy; `width`, the mean width of the interval; `ece` and `ece_before`,
    the expected calibration error of the probabilities in 15 bins, and that of the softmax of the logits as they are; `lost`, the share of
    photos of known classes that is called unknown where `unknown` is asked for; `found`, the share of photos of other classes that is; and
    `auroc` of telling these apart. The last three are missing where there are too few photos.
    """
    check_choice('--score', score, SPLITS)
    check_writable(out, results)
    names = split_names(classifiers)
    for name in names: check_inductive(name)
    check_share('--unknown', unknown, 0.1)
    files = from_flags(DataOptions(), files)
    net = load_network(network)
    data = files.load(input_config(net)[0])
    h,y = cached_features(net, data, SPLITS[score], cache=files.cache)
    classes = len(torch.unique(y))
    rows = []
    for way,shot,name in itertools.product(whole_numbers('ways', ways), whole_numbers('shots', shots), names):
        if not 2 <= way < classes: raise UserError(f'--ways is {way}: give 2 to {classes - 1}, so that other classes are left')
        if shot < 2: raise UserError(f'--shots is {shot}: a photo can be held out only if its class has another')
        least = int(torch.bincount(y).min())
        if shot >= least: raise UserError(f'--shots is {shot}: a class has {least} photos, and new ones must be left, so give fewer')
        measured = row(h, y, get_classifier(name), way, shot, unknown, supports, queries, seed)
        rows.append(dict(classifier=name, way=way, shot=shot) | measured)
        log(', '.join(f'{k} {v:.1f}' if isinstance(v, float) else f'{k} {v}' for k,v in rows[-1].items()))
    record = dict(network=Path(network).name, weights=digest(net.state_dict()), split=score, unknown=unknown, supports=supports, seed=seed,
                  rows=rows, **origin(data))
    file = re.sub('[^a-z0-9.]+', '-', f'trust-{Path(network).name}-{data.name}-{score}'.lower()) + '.json'
    for folder in (out, results):
        if folder:
            with output_folder(user_path(folder)) as f: write_json(f/file, record)
    print(json.dumps(dict(record=str(user_path(out)/file), rows=len(rows))))
    return pd.DataFrame(rows)


def row(h, y, classifier, way, shot, unknown, supports, queries, seed):
    "Measure one row of the table: a dict of its columns, in percent"
    rng = np.random.default_rng(seed)
    found = [one_support(h, y, classifier, *draw(y.cpu().numpy(), way, shot, queries, rng), unknown)
             for _ in with_progress(range(supports))]
    accuracy,expected,low,high = np.array([o['accuracy'] for o in found]).T
    probability,before,right = (np.concatenate([o[k] for o in found]) for k in ('probability', 'before', 'right'))
    percent = dict(accuracy=accuracy.mean(), expected=expected.mean(), covered=((low <= accuracy) & (accuracy <= high)).mean(),
                   width=(high - low).mean(), ece=calibration_error(probability, right), ece_before=calibration_error(before, right))
    told = [o['unknown'] for o in found if o['unknown']]
    if told: percent |= dict(zip(('lost', 'found', 'auroc'), np.mean(told, 0)))
    return {k:round(100*float(v), 2) for k,v in percent.items()}

def draw(labels, way, shot, queries, rng):
    "Places of the support photos (way*shot), of new photos of their classes, and of photos of other classes; and the classes, in order"
    known = rng.choice(np.unique(labels), way, replace=False)
    each = [rng.permutation(np.flatnonzero(labels == c)) for c in known]
    others = np.flatnonzero(~np.isin(labels, known))
    return (np.concatenate([i[:shot] for i in each]), np.concatenate([i[shot:shot + queries] for i in each]),
            rng.choice(others, min(len(others), way*queries), replace=False), known)

def one_support(h, y, classifier, support, new, others, known, rate):
    "Compare what one support says of itself with new photos of its classes and with photos of other classes"
    place = {c:i for i,c in enumerate(known.tolist())}
    def own(rows): return torch.tensor([place[c] for c in y[rows].tolist()], device=h.device)
    s,s_y,new_y = h[support],own(support),own(new).cpu().numpy()
    held = hold_out(classifier, s, s_y)
    logits = classifier(s[None], s_y[None], h[new][None])[0].float().cpu()
    right = logits.argmax(1).numpy() == new_y
    similar,strange = (similarity(s[None], s_y[None], h[rows][None])[0] for rows in (new, others))
    try:
        limit = unknown_below(held, rate)
        told = (similar < limit).mean(),(strange < limit).mean(),roc_auc_score([1]*len(new) + [0]*len(others), [*similar, *strange])
    except UserError: told = None
    return dict(accuracy=(right.mean(), *expected_accuracy(held)), right=right, before=logits.softmax(1).amax(1).numpy(),
                probability=(softmax_scale(held)*logits).softmax(1).amax(1).numpy(), unknown=told)

def calibration_error(probability:np.ndarray, right:np.ndarray, bins:int=15) -> float:
    "Expected calibration error (arXiv 1706.04599) of the `probability` (N) of predictions that are `right` or not (N), in equal bins"
    at = np.clip(np.ceil(probability*bins) - 1, 0, bins - 1).astype(int)
    n,p,r = (np.bincount(at, w, bins) for w in (None, probability, right))
    return float(np.abs(p - r).sum()/n.sum())
