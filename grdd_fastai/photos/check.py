"""What a classifier finds in its own support photos: the accuracy to expect, wrong labels, photos that are there twice, weak classes."""
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch.nn.functional as F

from ..core.device import ieee_float32
from .trust import HeldOut, expected_accuracy, softmax_scale

__all__ = ['SupportCheck', 'check_support']


# Measured on the validation classes of CIFAR-FS (docs/photos.md): with one label in twenty wrong, half to three quarters of the photos that
# this names are wrong ones, and it names as large a part of these; and no two of 9,600 photos have features of this cosine.
SUSPECT = 0.05 # largest probability of its own label with which a held-out photo is a suspect
SAME = 0.995 # cosine of the features from which two photos count as the same one


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
        percent = f'{self.accuracy:.0%} of new photos right ({self.low:.0%} to {self.high:.0%} with {self.confidence:.0%} confidence)'
        lines = [f'Expect {percent}, if they are of these {len(self.classes)} classes, each equally often, and taken like these photos. '
                 f'{self.n_photos} photos were held out in turn to measure this.']
        alone = self.classes[self.classes.photos == 1].index
        if len(alone): lines.append(f'Not measured, because there is only one photo: {", ".join(map(str, alone))}.')
        weak = self.classes[self.classes.right < self.accuracy - 0.2].sort_values('right')
        lines += [f'{name}: {r.right:.0%} right, often taken for {r.confused_with}. More photos of both would help.'
                  for name,r in weak.head(3).iterrows() if r.confused_with is not None]
        lines += [f'{r.file} is labelled {r.label} and looks like {r.looks_like}.' for r in self.suspects.head(5).itertuples()]
        lines += [f'{r.file} ({r.label}) and {r.other} ({r.other_label}) are almost the same photo.'
                  for r in self.duplicates.head(5).itertuples()]
        return '\n'.join(lines)


def check_support(held:HeldOut, h, y, vocab:list, names:list, confidence:float=0.95) -> SupportCheck:
    "The `SupportCheck` of a support with features `h` (N, D), classes `y` (N), class names `vocab`, and the `names` of its photos"
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
    doubtful = [i for i in np.argsort(own) if own[i] <= SUSPECT and not held.right[i]]
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
