"""Fingerprint and rows of a data set are those of its pixels: equal in every layout, whatever the order and the names."""
import contextlib
import io

import layouts
import numpy as np
import pytest
from helpers import recipe
from layouts import LAYOUTS

from grdd_fastai.data.cache import few_shot_data
from grdd_fastai.data.class_lists import SPLITS
from grdd_fastai.data.order import find_duplicates, image_fingerprint, pixel_hashes, row_order


@pytest.fixture(scope='module')
def by_csvs(tmp_path_factory, cache): return few_shot_data(layouts.split_csvs(tmp_path_factory.mktemp('csvs')), px=12, cache=cache)

@pytest.mark.parametrize('name', LAYOUTS)
def test_every_layout_has_the_same_images_in_the_same_rows(name, by_csvs, tmp_path, cache):
    data = few_shot_data(LAYOUTS[name](tmp_path/'set'), px=12, cache=cache)
    assert data.image_fingerprint == by_csvs.image_fingerprint and data.stats == by_csvs.stats
    assert data.name == ('MINI' if name == 'pickles_without_names' else 'mini_imagenet')
    for s in SPLITS:
        one,two = getattr(data, s),getattr(by_csvs, s)
        assert (one.images[:] == two.images[:]).all() and (one.y == two.y).all()
        if name != 'pickles_without_names': assert one.vocab == two.vocab

def test_a_run_gives_the_same_numbers_in_every_layout(tmp_path, cache):
    words = dict(query=1, test_episodes=30, teacher='convnet4', student='convnet4', epochs=1, meta_epochs=1, episodes=2,
                 meta_query=1, bs=64, cache=str(cache))
    found = []
    for name in ('split_csvs', 'category_split_pickles', 'a_tar_for_each_class'):
        data,out = LAYOUTS[name](tmp_path/name),tmp_path/f'{name}-run'
        with contextlib.redirect_stdout(io.StringIO()): found.append(recipe('mini_5w1s')(data=str(data), out=str(out), **words))
    same = [{k:r[k] for k in ('accuracy', 'accuracy_cl', 'val_accuracy', 'image_fingerprint', 'weights')} for r in found]
    assert same[0] == same[1] == same[2]

def test_the_fingerprint_knows_pixels_and_classes_alone():
    rng = np.random.default_rng(0)
    images,y = rng.integers(0, 256, (12, 4, 4, 3), dtype=np.uint8),np.repeat(np.arange(3), 4)
    of = lambda x, y, s='train': image_fingerprint({s:pixel_hashes(x)}, {s:y})
    want = of(images, y)
    p = rng.permutation(12)
    assert of(images[p], y[p]) == want and of(images, 2 - y) == want # another order; other names of the classes
    moved = y.copy()
    moved[0] = 1
    other = images.copy()
    other[3, 0, 0, 0] ^= 1
    assert len({want, of(images, moved), of(other, y), of(images, y, 'val'), of(images[:-1], y[:-1])}) == 5

def test_rows_are_by_hash_whatever_the_classes():
    rng = np.random.default_rng(1)
    images,y = rng.integers(0, 256, (40, 2, 2, 3), dtype=np.uint8),rng.integers(0, 4, 40)
    hashes = pixel_hashes(images)
    for codes in (y, np.zeros(40, int)):
        rows = row_order(dict(train=hashes), dict(train=codes), 'unknown')['train']
        assert list(rows) == sorted(range(40), key=lambda i: hashes[i].tobytes())

def test_duplicates_as_a_loop_finds_them():
    rng = np.random.default_rng(2)
    hashes = {s:np.repeat(rng.integers(0, 9, (30, 1), dtype=np.uint8), 16, 1) for s in SPLITS}
    names = {s:[f'{s}{i}' for i in range(30)] for s in SPLITS}
    want,seen = [],{}
    for s in SPLITS:
        for h,f in zip(hashes[s], names[s]):
            if h.tobytes() in seen and seen[h.tobytes()][0] != s: want.append([s, f, *seen[h.tobytes()]])
            seen.setdefault(h.tobytes(), (s, f))
    assert find_duplicates(hashes, names) == want and len(want) > 20
