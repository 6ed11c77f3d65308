"""What is right and wrong on episodes, by class, image and episode, against `evaluate` and a loop over the queries."""
from collections import Counter, defaultdict

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from helpers import Y, all_episodes, fit, says, stage_one_learner
from matplotlib.colors import to_hex
from naive import naive_predictions

from grdd_fastai.fewshot.evaluate import evaluate
from grdd_fastai.fewshot.interpret import RIGHT, SUPPORT, WRONG, EpisodeInterpretation

NAMES = [f'class {i}' for i in range(8)]
EPISODES = dict(n_way=5, k_shot=2, n_query=4, n_episodes=60, seed=3)


@pytest.fixture
def h(): return torch.randn(len(Y), 6, generator=torch.Generator().manual_seed(0)) + torch.eye(8)[Y][:, :6]

@pytest.fixture
def found(h): return EpisodeInterpretation(h, Y, NAMES, lambda row: np.full((8, 8, 3), row % 256, np.uint8), **EPISODES)

@pytest.mark.parametrize('classifier', ['cosine', 'logistic', 'tim_adm(scale=10)'])
def test_episodes_are_those_of_evaluate(h, classifier):
    found = EpisodeInterpretation(h, Y, classifier=classifier, **EPISODES)
    assert np.allclose(found.accuracy, evaluate(h, Y, classifier=classifier, **EPISODES).episodes, atol=1e-4)
    assert found.hardest(60) == np.argsort(found.accuracy, kind='stable').tolist() and found.vocab == list(range(8))

def loop(h):
    "(row, class, predicted class, classes of the episode) of each query"
    for support,query in zip(*all_episodes(Y, 5, 2, 4, 60, seed=3)):
        classes = Y[support[:, 0]]
        for row,p in zip(query.ravel(), naive_predictions(h, support, query.ravel())): yield row,Y[row],classes[p],classes

def test_classes_and_confusion_are_the_loops(h, found):
    right,times,taken,met = Counter(),Counter(),Counter(),Counter()
    for _,y,p,classes in loop(h):
        times[y] += 1
        right[y] += y == p
        taken[y, p] += 1
        met.update((y, c) for c in classes)
    confusion,classes = found.confusion,found.classes
    for a in range(8):
        r = classes.loc[NAMES[a]]
        others = {b:taken[a, b]/met[a, b] for b in range(8) if b != a}
        assert r.queries == times[a] and r.accuracy == pytest.approx(100*right[a]/times[a])
        assert others[NAMES.index(r.confused_with)] == max(others.values())
        assert all(confusion.loc[NAMES[a], NAMES[b]] == pytest.approx(taken[a, b]/met[a, b]) for b in range(8))
    assert classes.accuracy.is_monotonic_increasing
    first = found.most_confused(1).iloc[0]
    largest = max(taken[a, b]/met[a, b] for a in range(8) for b in range(8) if a != b)
    assert first.share == largest == confusion.loc[first.label, first.taken_for]

def test_images_are_the_loops(h, found):
    guesses = defaultdict(list)
    for row,_,p,_ in loop(h): guesses[row].append(p)
    for r in found.images.itertuples():
        wrong = Counter(p for p in guesses[r.row] if p != Y[r.row])
        assert r.times == len(guesses[r.row]) and r.accuracy == pytest.approx(100*(1 - wrong.total()/r.times))
        assert r.label == NAMES[Y[r.row]]
        assert r.taken_for is None if not wrong else wrong[NAMES.index(r.taken_for)] == max(wrong.values())
    assert len(found.images) == len(guesses)
    worst = found.top_losses(5)
    assert worst.loss.tolist() == sorted(found.images.loss, reverse=True)[:5]
    assert ((found.loss > 0) == (found.predicted != Y[found.query])).all()

def test_perfect_features_confuse_nothing():
    found = EpisodeInterpretation(torch.eye(8)[Y], Y, **EPISODES)
    assert (found.accuracy == 100).all() and found.most_confused().empty and found.classes.confused_with.isna().all()
    assert found.images.taken_for.isna().all() and np.allclose(np.diag(found.confusion), 1)
    says(lambda: found.plot_episode(), 'no images', 'images=')

def colours(fig): return [to_hex(next(iter(ax.spines.values())).get_edgecolor()).upper() for ax in fig.axes]

def test_an_episode_is_drawn_with_its_mistakes(h, found):
    i = found.hardest()[0]
    fig = found.plot_episode(i, n_query=3)
    drawn = np.array(colours(fig)[:5*5]).reshape(5, 5)
    right = (found.predicted[i] == Y[found.query[i]]).reshape(5, 4)[:, :3]
    assert (drawn[:, :2] == SUPPORT).all() and (drawn[:, 2:] == np.where(right, RIGHT, WRONG)).all() and not right.all()
    assert [ax.get_ylabel() for ax in fig.axes[:25:5]] == [NAMES[c] for c in found.candidates[i]]
    assert f'{found.accuracy[i]:.0f}%' in fig.axes[2].get_title(loc='left')
    at = np.flatnonzero(~right.ravel())[0]
    ax = fig.axes[at//3*5 + 2 + at % 3]
    row,support = found.query[i].reshape(5, 4)[at//3, at % 3],found.support[i]
    nearest = max(support, key=lambda s: float(torch.cosine_similarity(h[row], h[s], dim=0)))
    assert ax.get_xlabel() == NAMES[found.predicted[i].reshape(5, 4)[at//3, at % 3]]
    assert ax.images[0].get_array()[0, 0, 0] == row % 256 and ax.child_axes[0].images[0].get_array()[0, 0, 0] == nearest % 256
    plt.close('all')

def test_the_other_figures(found):
    fig = found.plot_confusion_matrix(most=4)
    assert fig.axes[0].images[0].get_array().shape == (4, 4)
    assert [t.get_text() for t in fig.axes[0].get_yticklabels()] == list(found.classes.index[:4])
    titles = [ax.get_title() for ax in found.plot_top_losses(11).axes]
    assert len([t for t in titles if t]) == 11 and titles[0].split('\n')[0] == found.top_losses(1).label[0]
    plt.close('all')

def test_a_learner_is_interpreted_on_its_validation_classes(data):
    learn = stage_one_learner(data)
    fit(learn)
    found = EpisodeInterpretation.from_learner(learn, n_episodes=1000)
    assert found.accuracy.mean() == pytest.approx(learn.validate()[0], abs=1e-3) and found.vocab == data.val.vocab
    assert np.array_equal(found.image(3), data.val.images[3])
    plt.close('all')
    learn.show_results(max_n=2, seed=1, k_shot=3)
    fig, = map(plt.figure, plt.get_fignums())
    ways = learn.few_shot_accuracy.episodes['n_way']
    assert len([ax for ax in fig.axes if ax.get_ylabel()]) == ways and colours(fig)[:3] == [SUPPORT]*3
    plt.close('all')
