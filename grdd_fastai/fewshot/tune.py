"""Choose the settings of a classifier on episodes of the validation classes."""
import inspect
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch

from ..core.errors import UserError
from .classifiers import get_classifier, split_settings, without_settings
from .evaluate import evaluate

__all__ = ['tune']


FACTORS = 1/4,1/2,2.,4. # by which a setting is changed


def tunable(classifier:str) -> dict:
    """The settings of a classifier that `tune` changes, with their values: positive real numbers, without counts and tolerances

    UserError for a classifier without such settings.
    """
    if not isinstance(classifier, str): raise UserError('the classifier is a function: give its name, see register_classifier')
    known = dict(list(inspect.signature(without_settings(get_classifier(classifier))).parameters.items())[3:])
    given = split_settings(classifier)[1]
    values = {k:p.default for k,p in known.items()} | given
    found = {k:float(v) for k,v in values.items() if isinstance(known[k].default, float) and v > 0 and not k.startswith('tol')}
    if not found: raise UserError(f'{classifier} has no settings that can be tuned: choose another classifier')
    return found

def with_values(classifier, values):
    "The classifier's text with these settings, such as 'tim_adm(scale=6)'"
    name,given = split_settings(classifier)
    settings = given | values
    return f'{name}({", ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v!r}" for k,v in settings.items())})'

def tune(
    h:torch.Tensor|np.ndarray, # features (N, D) of the validation classes
    y:torch.Tensor|np.ndarray|list, # their classes (N)
    classifier:str, # name of a classifier, with the settings to start from in parentheses, or without
    k_shot:int=1, # support images per class, on which the best settings depend
    n_episodes:int=2000, # number of episodes, the same for all settings
    only:Sequence|None=None, # names of the settings to change; None: all of `tunable`
    factors:Sequence=FACTORS, # by which a setting is changed
    rounds:int=2, # most rounds in which every setting is changed; the search ends earlier if a round improves nothing
    **kwargs # of `evaluate`, such as n_way, n_query, seed, query_distribution
) -> tuple[str, pd.DataFrame]:
    """(classifier with the settings of the highest accuracy, table of all that was tried)

    One setting after the other is multiplied by each of the `factors`, and the value with the highest mean accuracy stays. The text that is
    returned, such as 'tim_adm(scale=6, ce_weight=0.05)', can be given wherever a classifier's name can. Its accuracy on these episodes is
    biased upwards, because they chose it: choose on the validation classes, and report other classes. UserError for a classifier without
    settings that can be tuned.
    """
    start = tunable(classifier)
    if only is not None and (wrong := [k for k in only if k not in start]):
        raise UserError(f'{wrong[0]} is no setting of {classifier} that can be tuned: these are {", ".join(start) or "none"}')
    values = {k:v for k,v in start.items() if only is None or k in only}
    tried = {} # text -> accuracy and interval
    def accuracy(values):
        text = with_values(classifier, values)
        if text not in tried:
            try: e = evaluate(h, y, k_shot=k_shot, n_episodes=n_episodes, classifier=text, **kwargs)
            except UserError:
                if not tried: raise # already the settings to start from fail
                tried[text] = float('nan'),float('nan')
            else: tried[text] = e.accuracy,e.ci95
        return tried[text][0]
    best = accuracy(values)
    for _ in range(rounds):
        before = best
        for k in values:
            for v in [values[k]*f for f in factors]:
                found = accuracy(values | {k:v})
                if found > best: best,values = found,values | {k:v}
        if best == before: break
    table = pd.DataFrame([dict(classifier=text, accuracy=a, ci95=ci) for text,(a,ci) in tried.items()])
    return with_values(classifier, values),table
