"""Statistics of accuracies over episodes: intervals, paired differences and several training seeds."""
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import ttest_1samp

from ..core.errors import UserError

__all__ = ['mean_ci95', 'Evaluation', 'Difference', 'over_seeds', 'compare']


def mean_ci95(x:np.ndarray|list) -> tuple[float, float]:
    "(mean, half-width of its 95% confidence interval: 1.96 standard errors); the half-width of a single value is NaN"
    x = np.asarray(x, dtype=np.float64)
    half_width = float(1.96 * x.std(ddof=1) / np.sqrt(len(x))) if len(x) > 1 else float('nan')
    return float(x.mean()),half_width


@dataclass
class Evaluation:
    "Accuracies of a classifier over episodes, in percent; `a - b` is the paired `Difference` of two evaluations"
    episodes: np.ndarray # accuracy of each episode
    episode_id: str|None = None # description of the episodes; only evaluations with the same description can be compared
    classifier: str = 'cosine' # name of the classifier and of other choices
    @property
    def accuracy(self): return mean_ci95(self.episodes)[0]
    @property
    def ci95(self): return mean_ci95(self.episodes)[1]
    def __sub__(self, other):
        "The paired `Difference`; UserError unless both evaluations are on the same episodes (of images with the same labels)"
        if self.episode_id != other.episode_id or len(self.episodes) != len(other.episodes):
            raise UserError(f'a difference needs the same episodes, not {self.episode_id} and {other.episode_id}: '
                            'evaluate both with the same data, way, shot, query, episodes and seed')
        return Difference(self.episodes - other.episodes)
    def __repr__(self): return f'{self.accuracy:.2f} ± {self.ci95:.2f} % ({len(self.episodes)} episodes)'


@dataclass
class Difference:
    """Difference of the accuracies of two models in each episode, in percentage points

    Interval and p-value are over episodes of these classes and images, for these weights. Other trainings of the same two models may
    differ by more; `over_seeds` compares trainings.
    """
    episodes: np.ndarray # difference in each episode
    @property
    def mean(self): return mean_ci95(self.episodes)[0]
    @property
    def ci95(self): return mean_ci95(self.episodes)[1]
    @property
    def p(self):
        "Two-sided p-value of the paired t-test; 1 if no episode differs"
        if not self.episodes.any(): return 1.
        return float(ttest_1samp(self.episodes, 0.).pvalue) if len(self.episodes) > 1 else float('nan')
    @property
    def clear(self):
        "1 if the interval lies above zero, -1 if it lies below zero, else 0"
        return int(np.sign(self.mean)) if abs(self.mean) > self.ci95 else 0
    def __repr__(self): return f'{self.mean:+.2f} ± {self.ci95:.2f} points (p = {self.p:.2g}, {len(self.episodes)} episodes)'


def over_seeds(
    differences:list, # a `Difference` for each training seed
) -> dict:
    "A dict: `mean` and standard deviation `sd` over seeds, number of `seeds`, `holds` (the `clear` of all seeds if they agree, else 0)"
    means = [d.mean for d in differences]
    clear = {d.clear for d in differences}
    sd = float(np.std(means, ddof=1)) if len(means) > 1 else float('nan')
    return dict(mean=float(np.mean(means)), sd=sd, seeds=len(means), holds=clear.pop() if len(clear) == 1 else 0)


def compare(
    scores:dict, # name -> `Evaluation` or {training seed: `Evaluation`}, all on the same episodes
    versus:dict|None=None, # name -> names that it is compared with; None: each is compared with all before it
) -> pd.DataFrame:
    """Paired differences as a DataFrame: a line per pair and seed and, for several seeds, a line with the seed 'all'

    Columns of a seed: `difference` in percentage points, its `ci95`, `p` of the paired t-test, and `clear` (1 or -1 if the interval
    excludes zero, else 0). The line 'all' has the mean, the standard deviation `sd`, and a `clear` that is not 0 only if all seeds agree.
    UserError for evaluations on different episodes.
    """
    scores = {k:v if isinstance(v, dict) else {0:v} for k,v in scores.items()}
    if versus is None: versus = {k:list(scores)[:i] for i,k in enumerate(scores)}
    lines = []
    for row,others in versus.items():
        for other in others:
            found = {seed:e - scores[other][seed] for seed,e in scores.get(row, {}).items() if seed in scores.get(other, {})}
            lines += [dict(row=row, versus=other, seed=seed, difference=d.mean, ci95=d.ci95, p=d.p, clear=d.clear)
                      for seed,d in found.items()]
            if len(found) < 2: continue
            over = over_seeds(list(found.values()))
            lines.append(dict(row=row, versus=other, seed='all', difference=over['mean'], sd=over['sd'], clear=over['holds']))
    return pd.DataFrame(lines, columns=['row','versus','seed','difference','ci95','p','sd','clear'])
