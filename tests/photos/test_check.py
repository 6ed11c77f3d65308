"""Test what a FewShotClassifier finds in its own photos: wrong labels, photos that are there twice, weak classes, unknown photos."""
import numpy as np
import pandas as pd
import pytest
import torch
from helpers import says, write_images
from PIL import Image

from grdd_fastai.photos.classifier import UNKNOWN, FewShotClassifier
from grdd_fastai.photos.trust import hold_out, softmax_scale


def colours(n, hue, seed=0):
    "Images (n, 24, 24, 3) of noise around a colour"
    rng = np.random.default_rng([seed, *hue])
    return np.clip(np.array(hue) + rng.normal(0, 40, (n, 24, 24, 3)), 0, 255).astype(np.uint8)

RED,GREEN,BLUE,GREY = (200, 40, 40),(40, 200, 40),(40, 40, 200),(128, 128, 128)

@pytest.fixture(scope='module')
def few():
    "Ten photos of each of three colours, of which a green one is labelled blue and a red one is there twice"
    photos = [*colours(10, RED), *colours(10, GREEN), *colours(10, BLUE)]
    labels = ['red']*10 + ['green']*10 + ['blue']*10
    photos[29],labels[29] = colours(1, GREEN, 1)[0],'blue'
    photos[3] = photos[7]
    return FewShotClassifier().fit(photos, labels)


def test_the_check_finds_what_is_wrong(few):
    check = few.check()
    assert check.suspects.file.tolist() == ['photo 29'] and check.suspects.looks_like[0] == 'green' and check.suspects.label[0] == 'blue'
    assert check.duplicates[['file', 'other']].to_numpy().tolist() == [['photo 3', 'photo 7']] and check.duplicates.cosine[0] > .999
    assert check.confusion.to_numpy().tolist() == [[9, 1, 0], [0, 10, 0], [0, 0, 10]] and list(check.confusion) == few.vocab
    assert check.accuracy == pytest.approx((.9 + 1 + 1)/3, abs=2e-3) and check.low < check.accuracy < check.high and check.n_photos == 30
    assert check.classes.photos.tolist() == [10]*3 and check.classes.confused_with.tolist() == ['green', None, None]
    for wrong in (95, 1., 0, 'x'): says(lambda wrong=wrong: few.check(wrong), 'confidence is', 'such as 0.95')
    narrow = few.check(confidence=.5)
    assert check.low < narrow.low and narrow.high < check.high and narrow.accuracy == check.accuracy

def test_the_summary_is_plain_sentences(few):
    text = str(few.check())
    assert text.startswith('Expect 97% of new photos to be classified right (')
    assert 'with 95% confidence), if they are of these 3 classes' in text
    assert 'photo 29 is labelled blue and looks like green.' in text
    assert 'photo 3 (red) and photo 7 (red) are almost the same photo.' in text

def test_classes_of_one_photo_are_named():
    few = FewShotClassifier().fit([*colours(3, RED), *colours(3, GREEN), *colours(1, BLUE)], ['red']*3 + ['green']*3 + ['blue'])
    check = few.check()
    assert check.n_photos == 6 and np.isnan(check.classes.right['blue']) and 'only one photo: blue.' in str(check)
    assert 'these 2 measured classes' in str(check)

def test_a_weak_class_is_named():
    few = FewShotClassifier().fit([*colours(4, RED), *colours(4, RED, 5), *colours(4, BLUE)], ['a']*4 + ['b']*4 + ['c']*4)
    assert any(f'often taken for {o}. More photos of both would help.' in str(few.check()) for o in 'ab')

def test_files_have_their_names(tmp_path):
    for i,c in enumerate(('red', 'green')): write_images(tmp_path/'few'/c, [f'{k}.png' for k in range(3)], 30, i, i/3)
    Image.open(tmp_path/'few'/'red'/'0.png').save(tmp_path/'few'/'green'/'copy.png')
    check = FewShotClassifier.from_folder(tmp_path/'few').check()
    found = check.duplicates.iloc[0]
    assert {found.file, found.other} == {str(tmp_path/'few'/'red'/'0.png'), str(tmp_path/'few'/'green'/'copy.png')}

def test_probabilities_are_the_softmax_of_scaled_logits(few):
    photos = [*colours(2, RED, 3), *colours(2, GREY, 3)]
    p = few.predict_proba(photos)
    z = few.logits(photos).to_numpy()*softmax_scale(hold_out(few._function, few.support, few.support_y))
    assert np.allclose(p, np.exp(z)/np.exp(z).sum(1, keepdims=True), atol=1e-6) and list(p) == few.vocab
    assert p.max(1)[0] > p.max(1)[2] # a grey photo is less certain

def test_unknown_photos(few):
    strict = FewShotClassifier(unknown=.05).fit([*colours(10, RED), *colours(10, GREEN)], ['red']*10 + ['green']*10)
    blue,red = list(colours(4, BLUE, 2)),list(colours(4, RED, 2))
    assert strict.predict(blue) == [UNKNOWN]*4 and strict.predict(red).count('red') >= 3
    table = strict.predict_table([*blue, *red])
    assert table['class'].tolist() == strict.predict([*blue, *red]) and set(table.runner_up[:4]) <= {'red', 'green'}
    assert few.predict(blue) == ['blue']*4 # without unknown=, each photo has a class

def test_more_photos_change_what_is_known():
    "The photos that are held out are held out anew after `add`"
    few = FewShotClassifier().fit([*colours(3, RED), *colours(3, GREEN)], ['red']*3 + ['green']*3)
    before = few.check().n_photos
    assert few.add(list(colours(2, BLUE)), 'blue').check().n_photos == before + 2

def test_auto_chooses_by_held_out_photos(monkeypatch):
    from grdd_fastai.fewshot.classifiers import CLASSIFIERS
    photos,labels = [*colours(4, RED), *colours(4, GREEN)],['red']*4 + ['green']*4
    few = FewShotClassifier(classifier='auto').fit(photos, labels)
    assert few.chosen == 'simpleshot_l2n' and few.predict(photos) == labels
    monkeypatch.setitem(CLASSIFIERS, 'simpleshot_l2n', lambda s, y, q: torch.zeros(*q.shape[:2], 2))
    assert few.fit(photos, labels).chosen == 'lda'
    assert FewShotClassifier(classifier='auto').fit(photos[::4], labels[::4]).chosen == 'simpleshot_l2n' # one photo a class: no evidence

def test_auto_and_unknown_come_back_from_a_file(tmp_path):
    few = FewShotClassifier(classifier='auto', unknown=.1).fit([*colours(6, RED), *colours(6, GREEN)], [1]*6 + [2]*6)
    again = FewShotClassifier.load(few.save(tmp_path/'a'))
    photos = [*colours(3, RED, 4), *colours(3, BLUE, 4)]
    pd.testing.assert_frame_equal(again.predict_table(photos), few.predict_table(photos))
    assert again.chosen == few.chosen and again.unknown == .1 and str(again.check()) == str(few.check())

def test_what_cannot_be_known_is_a_sentence():
    one = FewShotClassifier().fit([*colours(1, RED), *colours(1, GREEN)], ['red', 'green'])
    for f in (one.check, lambda: one.predict_proba(colours(1, RED))): says(f, 'each class has one photo', 'add photos')
    assert one.predict_table(list(colours(2, RED))).probability.isna().all()
    photos,labels = [*colours(3, RED), *colours(3, GREEN)],['red']*3 + ['green']*3
    says(lambda: FewShotClassifier(unknown=.05).fit(photos, labels).predict(photos), 'needs 19 photos', 'there are 6', 'unknown=0.15')
    says(lambda: FewShotClassifier(unknown=.5).fit(photos, ['red']*3 + [UNKNOWN]*3), "called 'unknown'", 'another name')
    for classifier in ('tim_adm', 'soft_kmeans'):
        says(FewShotClassifier(classifier=classifier).fit(photos, labels).check, 'classifies photos together', 'simpleshot_l2n')
    for rate in (0, 1, -.1, 'x', True): says(lambda rate=rate: FewShotClassifier(unknown=rate), 'unknown is', 'such as 0.05')
    says(lambda: FewShotClassifier(classifier='auto', weight=2), "classifier='auto' takes no settings", "'weight'")
    says(FewShotClassifier().check, 'no classes yet')

def test_a_function_as_the_classifier_is_measured_too():
    "One that takes a single episode at a time gets a sentence instead of an error of torch"
    photos,labels = [*colours(3, RED), *colours(3, GREEN)],['red']*3 + ['green']*3
    def nearest(s, y, q): return torch.stack([(q @ s[:, y[0] == c].mT).amax(2) for c in (0, 1)], 2)
    assert FewShotClassifier(classifier=nearest).fit(photos, labels).check().n_photos == 6
    def one_episode(s, y, q): return nearest(s[:1], y[:1], q[:1])
    few = FewShotClassifier(classifier=one_episode).fit(photos, labels)
    assert len(few.predict(photos)) == 6
    says(few.check, 'the classifier gives', 'logits (E, NQ, C)')
    assert few.predict_table(photos).probability.isna().all()

def test_lda_needs_three_photos_of_a_class():
    photos,labels = [*colours(2, RED), *colours(2, GREEN)],['red']*2 + ['green']*2
    few = FewShotClassifier(classifier='lda').fit(photos, labels)
    says(lambda: few.predict_proba(photos), 'lda cannot be measured', 'simpleshot_l2n')
    assert few.predict(photos) == labels and few.predict_table(photos).probability.isna().all()
    assert FewShotClassifier(classifier='auto').fit(photos, labels).chosen != 'lda'
    more = FewShotClassifier(classifier='lda').fit([*photos, *colours(2, RED, 1)], [*labels, 'red', 'red'])
    assert more.predict_proba(photos).notna().all(None)

def test_the_runner_up_is_another_class():
    "Also where classes have the same logit"
    few = FewShotClassifier(classifier='nearest_neighbour').fit([*colours(2, RED), *colours(2, RED)], ['a', 'a', 'b', 'b'])
    table = few.predict_table(list(colours(2, RED)))
    assert (table['class'] != table.runner_up).all()

def test_what_unknown_lacks_is_said_before_photos_are_read(tmp_path):
    few = FewShotClassifier(unknown=.01).fit([*colours(3, RED), *colours(3, GREEN)], ['red']*3 + ['green']*3)
    for f in (few.predict, few.predict_table): says(lambda f=f: f(tmp_path/'gone.png'), 'needs 99 photos')
