"""What a classifier finds in its own support photos: the accuracy to expect, wrong labels, photos that are there twice, weak classes."""
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch.nn.functional as F

from ..core.device import ieee_float32
from .trust import HeldOut, expected_accuracy, softmax_scale

__all__ = ['SupportCheck', 'check_support']


# Measured on the validation classes of CIFAR-FS, with 5, 10 and 16 classes of 5 and 10 photos of which one in twenty has a wrong label: two
# thirds to nine tenths of the photos that this names are wrong ones, a third to a half of all; and no two of 9,600 photos have this cosine.
SUSPECT = 0.02 # a held-out photo is a suspect if the probability of its label is at most this share of the predicted class's
SAME = 0.995 # two photos count as the same one if the cosine of their features is at least this


@dataclass(frozen=True)
class SupportCheck:
    """What `FewShotClassifier.check` finds; print it for a summary

    `accuracy`, `low` and `high` are the share of new photos that will be right, from 0 to 1, and its interval at `confidence`. They hold if
    the new photos are of these classes, each equally often, and taken like the `n_photos` of the support that could be held out.
    """
    accuracy: float
    low: float
    high: float
    confidence: float
    n_photos: int
    classes: pd.DataFrame # for each class: photos, right (share of its held-out photos), confused_with (the class that most others go to)
    confusion: pd.DataFrame # number of held-out photos by their label (rows) and predicted class (columns)
    suspects: pd.DataFrame # photos whose label is perhaps wrong, the worst first: file, label, looks_like, probability (of its own label)
    duplicates: pd.DataFrame # pairs of photos that are almost the same: file, label, other, other_label, cosine

    def __str__(self):
        alone = self.classes[self.classes.photos == 1].index
        n,measured = len(self.classes) - len(alone),'measured ' if len(alone) else ''
        of = f'they are of these {n} {measured}classes' if n > 1 else 'the classes were all as easy as the one that could be measured'
        lines = [f'Expect {self.accuracy:.0%} of new photos to be classified right ({self.low:.0%} to {self.high:.0%} with '
                 f'{self.confidence:.0%} confidence), if {of}, each equally often, and taken like these photos. '
                 f'{self.n_photos} photos were held out in turn to measure this.']
        if len(alone): lines.append(f'Not measured, because there is only one photo: {", ".join(map(str, alone))}.')
        weak = self.classes[(self.classes.right < self.accuracy - 0.2) & self.classes.confused_with.notna()].sort_values('right')
        lines += shortened([f'{name}: {r.right:.0%} right, most often taken for {r.confused_with}. More photos of both would help.'
                            for name,r in weak.iterrows()], 'classes with many errors')
        lines += shortened([f'{r.file} is labelled {r.label} and looks like {r.looks_like}.' for r in self.suspects.itertuples()],
                           'photos with a doubtful label, in check.suspects')
        lines += shortened([f'{r.file} ({r.label}) and {r.other} ({r.other_label}) are almost the same photo. Remove one of them: the '
                            'accuracy above is too high if a photo is there twice.' for r in self.duplicates.itertuples()],
                           'pairs of photos that are almost the same, in check.duplicates')
        return '\n'.join(lines)


def shortened(lines, what, n=5):
    "Return the lines if there are at most `n`; otherwise the first `n`, and a line that says how many more there are"
    return lines if len(lines) <= n else [*lines[:n], f'There are {len(lines) - n} more {what}.']

def check_support(held:HeldOut, h, y, vocab:list, names:list, confidence:float=0.95) -> SupportCheck:
    "Check a support with features `h` (N, D), classes `y` (N), class names `vocab`, and `names` of its photos"
    accuracy,low,high = expected_accuracy(held, confidence)
    probability = (held.logits*softmax_scale(held)).softmax(1).numpy()
    predicted = probability.argmax(1)
    labels = y.cpu().numpy()
    confusion = np.zeros((len(vocab), len(vocab)), int)
    np.add.at(confusion, (held.y, predicted), 1)
    wrong = confusion*(1 - np.eye(len(vocab), dtype=int))
    classes = pd.DataFrame(dict(
        photos=np.bincount(labels, minlength=len(vocab)),
        right=[held.right[held.y == c].mean() if (held.y == c).any() else np.nan for c in range(len(vocab))],
        confused_with=pd.Series([vocab[row.argmax()] if row.any() else None for row in wrong], vocab, object)), index=vocab)
    own = probability[np.arange(len(held.y)), held.y]
    share = own/probability.max(1)
    doubtful = [i for i in np.argsort(share) if share[i] <= SUSPECT and not held.right[i]]
    suspects = pd.DataFrame([dict(file=names[held.rows[i]], label=vocab[held.y[i]], looks_like=vocab[predicted[i]],
                                  probability=float(own[i])) for i in doubtful], columns=['file', 'label', 'looks_like', 'probability'])
    return SupportCheck(accuracy, low, high, confidence, len(held.rows), classes, pd.DataFrame(confusion, vocab, vocab), suspects,
                        duplicates_of(h, [vocab[i] for i in labels], names))

def duplicates_of(h, labels, names):
    "A DataFrame with the pairs of photos whose features have almost the same direction, the most similar first"
    u = F.normalize(h, dim=1)
    rows = []
    with ieee_float32():
        for i in range(len(u) - 1):
            cosines = u[i + 1:] @ u[i]
            rows += [dict(file=names[i], label=labels[i], other=names[j], other_label=labels[j], cosine=float(cosines[j - i - 1]))
                     for j in (i + 1 + (cosines >= SAME).nonzero()[:, 0]).tolist()]
    found = pd.DataFrame(rows, columns=['file', 'label', 'other', 'other_label', 'cosine'])
    return found.sort_values('cosine', ascending=False, ignore_index=True)
