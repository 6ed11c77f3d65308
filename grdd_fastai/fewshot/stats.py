"""What accuracies over episodes say: intervals, paired differences, several training seeds."""
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import ttest_1samp

from ..core.errors import UserError

__all__ = ['mean_ci95', 'Evaluation', 'Difference', 'over_seeds', 'compare']


def mean_ci95(x):
    "Mean and half-width of its 95% confidence interval, 1.96 standard errors"
    x = np.asarray(x, dtype=np.float64)
    return float(x.mean()),float(1.96 * x.std(ddof=1) / np.sqrt(len(x))) if len(x) > 1 else float('nan')


@dataclass
class Evaluation:
    "Accuracy of each episode, in percent"
    episodes: np.ndarray
    drawn: str = None # names the episodes: two evaluations can be compared where it is the same
    classifier: str = 'cosine' # and what else was chosen
    @property
    def accuracy(self): return mean_ci95(self.episodes)[0]
    @property
    def ci95(self): return mean_ci95(self.episodes)[1]
    def __sub__(self, other):
        "`Difference`, paired: both on the very same episodes (of images with the same labels), or a UserError"
        if self.drawn != other.drawn or len(self.episodes) != len(other.episodes): raise UserError(
            f'a difference needs the same episodes, not {self.drawn} and {other.drawn}: evaluate both with the same data, way, shot, '
            'query, episodes and seed')
        return Difference(self.episodes - other.episodes)
    def __repr__(self): return f'{self.accuracy:.2f} ± {self.ci95:.2f} % ({len(self.episodes)} episodes)'


@dataclass
class Difference:
    """Difference of two models' accuracies in each episode, in points

    Interval and p-value are over episodes drawn from these classes and images, for these weights: other trainings of the same
    two models may differ by more, which `over_seeds` tells.
    """
    episodes: np.ndarray
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
        "1 or -1 where the interval lies above or below zero, else 0"
        return int(np.sign(self.mean)) if abs(self.mean) > self.ci95 else 0
    def __repr__(self): return f'{self.mean:+.2f} ± {self.ci95:.2f} points (p = {self.p:.2g}, {len(self.episodes)} episodes)'


def over_seeds(
    differences, # a `Difference` for each training seed
):
    "Mean of the differences, their standard deviation over seeds, and `holds`: 1 or -1 if every seed's is clear and of that sign, else 0"
    means,clear = [d.mean for d in differences],{d.clear for d in differences}
    sd = float(np.std(means, ddof=1)) if len(means) > 1 else float('nan')
    return dict(mean=float(np.mean(means)), sd=sd, seeds=len(means), holds=clear.pop() if len(clear) == 1 else 0)


def compare(
    scores, # name -> `Evaluation`, or {training seed: `Evaluation`}, all on the same episodes
    versus=None, # name -> names it is compared with; None compares each with all before it
):
    """Paired differences as a DataFrame: a line per pair and seed and, over several seeds, one of seed 'all'

    `difference` in points, its `ci95`, `p` (paired t-test) and `clear`: 1 or -1 where the interval excludes zero. Over seeds the
    mean, the standard deviation `sd`, and `clear` only if the order holds in every seed.
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
