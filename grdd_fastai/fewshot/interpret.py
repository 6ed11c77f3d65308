"""What a network gets right and wrong on episodes: by class, by image and by episode."""
from collections.abc import Callable
from functools import cached_property

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from ..core.errors import UserError
from ..data.episodes import QUERY_SAMPLERS
from ..plots import label
from .classifiers import get_classifier
from .evaluate import as_classes, as_features, classified

__all__ = ['EpisodeInterpretation']


RIGHT,WRONG,SUPPORT = '#009E73','#D55E00','#0072B2' # frames of images, in colours of Okabe and Ito


class EpisodeInterpretation:
    """Interpretation of a classifier on seeded episodes, as fastai's `ClassificationInterpretation` is of one on a validation set

    `EpisodeInterpretation.from_learner(learn)` takes the validation classes. `accuracy` has the accuracy of each episode, `classes` that of
    each class, and `images` that of each image as a query. The loss of a query is the difference between the logits of the best other
    class and of its own class: it is positive if the query is wrong. UserError for features or episodes that cannot be used.
    """
    @torch.no_grad()
    def __init__(self,
        h:torch.Tensor|np.ndarray, # features (N, D)
        y:torch.Tensor|np.ndarray|list, # classes (N), numbers from 0 if there is a `vocab`
        vocab:list|None=None, # name of each class; None: its number
        images:Callable|None=None, # function from a row to its image, an array of uint8 (H, W, 3), for the plots
        n_way:int=5, # C, classes per episode
        k_shot:int=1, # K, support images per class
        n_query:int=15, # query images per class
        n_episodes:int=2000, # number of episodes
        seed:int=0, # seed of the episodes, which are those of `evaluate`
        classifier:str|Callable='cosine', # name in `CLASSIFIERS` or function `(support, support_y, query) -> logits`
    ):
        self.h = as_features(h)
        self.y = as_classes(y, len(self.h)).numpy()
        names = y.tolist() if hasattr(y, 'tolist') else list(y)
        by_code = dict(zip(self.y.tolist(), names)) # `as_classes` numbers names in their sorted order
        self.vocab = list(vocab) if vocab is not None else [by_code.get(c, c) for c in range(self.y.max() + 1)]
        if len(self.vocab) <= self.y.max():
            raise UserError(f'the vocab has {len(self.vocab)} names, and there is a class {self.y.max()}: name all')
        self.image,self.n_way,self.k_shot = images,n_way,k_shot
        sampler = QUERY_SAMPLERS['balanced'](self.y, n_way, k_shot, n_query, n_episodes, seed)
        found = [[a.cpu().numpy() for a in (support, query, query_y, logits)] for _,support,query,query_y,_,logits in
                 classified(self.h, sampler, {0:get_classifier(classifier)}, n_way, {0:str(classifier)})]
        self.support,self.query,right,logits = (np.concatenate(a) for a in zip(*found)) # rows (E, NS) and (E, NQ); classes (E, NQ)
        self.candidates = self.y[self.support[:, ::k_shot]] # (E, C) classes of each episode
        self.predicted = np.take_along_axis(self.candidates, logits.argmax(-1), 1) # (E, NQ)
        own = np.take_along_axis(logits, right[..., None], -1)[..., 0]
        np.put_along_axis(logits, right[..., None], -np.inf, -1)
        self.loss = logits.max(-1) - own # (E, NQ) logit of the best other class minus that of the right class

    @classmethod
    def from_learner(cls, learn, **kwargs) -> 'EpisodeInterpretation':
        """Interpretation of a Learner of either stage on its validation classes

        Way, shot and queries are those of the Learner's accuracy; `kwargs` are further arguments of the class.
        """
        measured,dataset = learn.few_shot_accuracy,learn.dls.valid.dataset
        names = measured.classes()[1]
        h,codes = measured.embed()
        codes,y = np.unique(codes.numpy(), return_inverse=True)
        def image(row):
            x = dataset.tls[0][row]
            return x.movedim(0, -1).cpu().numpy() if isinstance(x, torch.Tensor) else np.asarray(x)
        episodes = {k:measured.episodes[k] for k in ('n_way', 'k_shot', 'n_query')}
        return cls(h, y, [names[c] for c in codes], image, **(episodes | kwargs))

    @cached_property
    def accuracy(self) -> np.ndarray:
        "Accuracy of each episode (E) in percent"
        return 100*(self.predicted == self.y[self.query]).mean(1)

    @cached_property
    def classes(self) -> pd.DataFrame:
        "A row for each class, the hardest first: number of queries, accuracy (%), and the class that it is most often confused with"
        confusion = self.confusion.to_numpy(copy=True)
        np.fill_diagonal(confusion, np.nan)
        y,right = self.y[self.query],self.predicted == self.y[self.query]
        n = np.bincount(y.ravel(), minlength=len(self.vocab))
        hits = np.bincount(y.ravel(), right.ravel(), len(self.vocab))
        with np.errstate(invalid='ignore'): accuracy = 100*hits/n
        confused = [None if np.isnan(row).all() or not np.nanmax(row) else self.vocab[np.nanargmax(row)] for row in confusion]
        table = pd.DataFrame(dict(queries=n, accuracy=accuracy, confused_with=pd.Series(confused, self.vocab, object)), index=self.vocab)
        return table.sort_values('accuracy')

    @cached_property
    def confusion(self) -> pd.DataFrame:
        """Of the queries of a class (row) in episodes that have the other class (column) too, the share that is taken for it

        The diagonal is the share of all queries of the class that is right. NaN for classes that never met.
        """
        C = len(self.vocab)
        y = self.y[self.query]
        taken,met = np.zeros((C, C)),np.zeros((C, C))
        np.add.at(taken, (y, self.predicted), 1)
        np.add.at(met, (y[..., None], self.candidates[:, None, :]), 1)
        with np.errstate(invalid='ignore'): return pd.DataFrame(taken/met, self.vocab, self.vocab)

    @cached_property
    def images(self) -> pd.DataFrame:
        "A row for each image that was a query: its row, class, how often, accuracy (%), mean loss, and what it is most often taken for"
        wide = pd.DataFrame(dict(row=self.query.ravel(), predicted=self.predicted.ravel(), loss=self.loss.ravel()))
        wide['right'] = wide.predicted.to_numpy() == self.y[wide.row]
        table = wide.groupby('row').agg(times=('right', 'size'), accuracy=('right', 'mean'), loss=('loss', 'mean')).reset_index()
        wrong = wide[~wide.right].groupby('row').predicted.agg(lambda p: p.value_counts().index[0]).to_dict()
        taken_for = pd.Series([self.vocab[wrong[r]] if r in wrong else None for r in table.row], dtype=object)
        return table.assign(accuracy=100*table.accuracy, label=[self.vocab[c] for c in self.y[table.row]],
                            taken_for=taken_for)

    def top_losses(self, k:int=9) -> pd.DataFrame:
        "The `k` images with the largest mean loss, the worst first, as in `images`"
        return self.images.nlargest(k, 'loss').reset_index(drop=True)

    def most_confused(self, k:int=10) -> pd.DataFrame:
        "The `k` pairs of classes that are most often confused: label, taken_for, and the `share` as in `confusion`"
        shares = self.confusion.to_numpy(copy=True)
        np.fill_diagonal(shares, np.nan)
        rows,columns = np.unravel_index(np.argsort(-np.nan_to_num(shares, nan=-1), axis=None)[:k], shares.shape)
        found = pd.DataFrame(dict(label=[self.vocab[i] for i in rows], taken_for=[self.vocab[i] for i in columns],
                                  share=shares[rows, columns]))
        return found[found.share > 0]

    def hardest(self, k:int=3) -> list[int]:
        "The numbers of the `k` episodes with the lowest accuracy, the hardest first"
        return np.argsort(self.accuracy, kind='stable')[:k].tolist()

    # ---- figures ------------------------------------------------------------------------------------------------------

    def plot_confusion_matrix(self, most:int=30) -> Figure:
        "Figure of `confusion` in percent, for at most `most` classes, the hardest ones"
        names = list(self.classes.index[:most])
        shares = 100*self.confusion.loc[names, names].to_numpy()
        side = 2.2 + .26*len(names)
        fig,ax = plt.subplots(figsize=(side + .6, side), layout='constrained')
        image = ax.imshow(shares, cmap='cividis', vmin=0, vmax=100)
        labels = [label(c) for c in names]
        ax.set(yticks=range(len(names)), yticklabels=labels, xlabel='taken for', ylabel='class')
        ax.set_xticks(range(len(names)), labels, rotation=90)
        ax.tick_params(labelsize=8)
        fig.colorbar(image, label='share of the queries where both classes are there, %', shrink=.8)
        return fig

    def plot_top_losses(self, k:int=9) -> Figure:
        "Figure of the `k` images with the largest mean loss, with their class and what they are taken for"
        worst = self.top_losses(k)
        columns = min(9, len(worst))
        fig,axes = plt.subplots(-(-len(worst)//columns), columns, figsize=(1.45*columns, 1.75*(-(-len(worst)//columns))), squeeze=False,
                                layout='constrained')
        for ax in axes.flat: ax.axis('off')
        for ax,r in zip(axes.flat, worst.itertuples()):
            self._show(ax, r.row)
            taken_for = '-' if r.taken_for is None else label(r.taken_for)
            ax.set_title(f'{label(r.label)}\nas {taken_for}\nright {r.accuracy:.0f}%', fontsize=8)
        return fig

    def plot_episode(self, episode:int=0, n_query:int=8) -> Figure:
        """Figure of an episode: a row for each class, with its support images framed in blue, and at most `n_query` of its queries

        A query has a green frame if it is right. If it is wrong, it has an orange frame, the class it is taken for, and in its corner the
        support image whose features are most related to its own (by cosine).
        """
        if not 0 <= episode < len(self.support) or n_query < 1:
            raise UserError(f'episode {episode} with {n_query} queries is asked for: there are episodes 0 to {len(self.support) - 1}')
        support = self.support[episode].reshape(self.n_way, self.k_shot)
        query = self.query[episode].reshape(self.n_way, -1)
        predicted = self.predicted[episode].reshape(query.shape)
        shown = min(n_query, query.shape[1])
        columns = self.k_shot + shown
        width,height = 1.1*columns + .5,1.3*self.n_way + .3
        fig,axes = plt.subplots(self.n_way, columns, figsize=(width, height), squeeze=False)
        fig.subplots_adjust(.4/width, .25/height, 1 - .05/width, 1 - .3/height, .06, .24) # constrained layout takes a second for 50 images
        u = F.normalize(self.h[torch.from_numpy(self.support[episode])].float(), dim=1)
        for i,row in enumerate(axes):
            row[0].set_ylabel(label(self.vocab[self.y[support[i, 0]]]), fontsize=9)
            for j,r in enumerate([*support[i], *query[i, :shown]]):
                ax = row[j]
                self._show(ax, r)
                if j < self.k_shot:
                    frame(ax, SUPPORT)
                    continue
                guess = predicted[i, j - self.k_shot]
                frame(ax, RIGHT if guess == self.y[r] else WRONG)
                if guess == self.y[r]: continue
                ax.set_xlabel(label(self.vocab[guess]), fontsize=8, color=WRONG, labelpad=2)
                nearest = self.support[episode][int((u @ F.normalize(self.h[r].float(), dim=0)).argmax())]
                corner = ax.inset_axes([.58, 0, .42, .42])
                self._show(corner, nearest)
                frame(corner, SUPPORT, 1.5)
        axes[0, 0].set_title('support', loc='left', fontsize=9)
        axes[0, self.k_shot].set_title(f'queries, {self.accuracy[episode]:.0f}% of all are right', loc='left', fontsize=9)
        return fig

    def _show(self, ax, row):
        if self.image is None: raise UserError('there are no images to draw: give images=, a function from a row to its image')
        ax.imshow(self.image(int(row)))
        ax.set(xticks=[], yticks=[])


def frame(ax, color, width=2.5):
    for side in ax.spines.values(): side.set(color=color, linewidth=width)
