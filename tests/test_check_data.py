"""The data check: each fault that was put in is found, and nothing else; lists of what is sound leave the faults out."""
import json

import numpy as np
import pandas as pd
import pytest
from helpers import ROOT, says, shell, write_csv_set, write_images
from PIL import Image, ImageEnhance

from grdd_fastai.check_data import NEAR, check_data, near_duplicates
from grdd_fastai.data.cache import few_shot_data
from grdd_fastai.data.class_lists import SPLITS, class_list


def sound(root): return write_csv_set(root, (5, 5, 5), 20, px=16)

def kinds(found): return {f.kind:len(f.images) for f in found.findings}

def photo(seed, px=48):
    "A smooth picture of its own, which a network tells from others"
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize((px, px), Image.Resampling.BICUBIC)

def photos(root, n=6):
    "Class folders of smooth pictures in three splits"
    seed = 0
    for s in SPLITS:
        for c in range(5):
            for i in range(n):
                (root/s/f'{s}{c}').mkdir(parents=True, exist_ok=True)
                photo(seed := seed + 1).save(root/s/f'{s}{c}'/f'{i}.png')
    return root

def test_a_sound_set_has_no_finding(tmp_path):
    found = check_data(sound(tmp_path/'set'), px=16)
    assert found.ok and not kinds(found) and found.n_images == dict(train=100, val=100, test=100) and found.class_list is None
    data = few_shot_data(tmp_path/'set', px=16, cache=tmp_path/'c')
    assert found.image_fingerprint == data.image_fingerprint and np.allclose([found.mean, found.std], data.stats, atol=2e-4)

def test_each_fault_is_found_and_left_out(tmp_path):
    root = photos(tmp_path/'set')
    (root/'train'/'train0'/'0.png').write_bytes(b'no image')
    (root/'train'/'train1'/'1.png').write_bytes((root/'train'/'train1'/'1.png').read_bytes()[:200])
    Image.new('RGB', (48, 48), 'navy').save(root/'val'/'val0'/'0.png')
    photo(1000, 20).save(root/'val'/'val1'/'0.png')
    Image.open(root/'train'/'train2'/'0.png').save(root/'test'/'test3'/'5.bmp') # the same pixels in another format
    Image.open(root/'train'/'train2'/'1.png').save(root/'train'/'train2'/'copy.png')
    Image.open(root/'train'/'train3'/'1.png').save(root/'train'/'train4'/'other.png')
    ImageEnhance.Brightness(Image.open(root/'train'/'train3'/'2.png')).enhance(.97).save(root/'train'/'train3'/'near.png')
    Image.open(root/'val'/'val4'/'2.png').save(root/'test'/'test4'/'near.jpg', quality=95)
    found = check_data(root, px=32, shot=1, query=4)
    assert kinds(found) == {'unreadable':2, 'constant':1, 'small':1, 'copies across splits':1, 'copies of another class of the split':1,
                            'copies within a class':1, 'near copies across splits':1, 'near copies within a class':1}
    assert not found.ok and found.modes['RGB'] == 90 + 5 - 2 and found.sizes['20 x 20'] == 1
    by_kind = {f.kind:f.images for f in found.findings}
    assert by_kind['near copies across splits'] == [['test', 'test/test4/near.jpg', 'val', 'val/val4/2.png']]
    # the lists leave out what is serious and copies; the novel classes keep their images
    lists = found.fix(tmp_path/'lists')
    kept = {s:set(pd.read_csv(lists/f'{s}.csv').filename) for s in SPLITS}
    assert 'test/test3/5.bmp' in kept['test'] and not {'train/train2/0.png', 'train/train2/copy.png', 'train/train4/other.png',
                                                       'train/train0/0.png', 'train/train1/1.png'} & kept['train']
    assert 'val/val0/0.png' not in kept['val'] and 'train/train2/1.png' in kept['train']
    again = check_data(root, px=32, shot=1, query=4, split=lists)
    assert again.ok and set(kinds(again)) == {'small', 'near copies across splits', 'near copies within a class'}
    data = few_shot_data(root, px=32, cache=tmp_path/'c', split=lists)
    assert not data.duplicates and {s:len(getattr(data, s)) for s in SPLITS} == {s:len(kept[s]) for s in SPLITS}

def test_classes_too_small_for_the_episodes(tmp_path):
    root = photos(tmp_path/'set', n=3)
    found = check_data(root, px=32, way=6, shot=2, query=2)
    assert kinds(found) == {'few classes':0, 'small classes':5} and 'episodes need 6' in str(found) and len(found.findings) == 5
    assert check_data(root, px=32, way=5, shot=1, query=2).ok

@pytest.mark.parametrize('order, ok', [((0, 1, 2), True), ((2, 1, 0), False)])
def test_swapped_channels_of_a_known_data_set(tmp_path, order, ok):
    rng = np.random.default_rng(0)
    for c in class_list('mini_imagenet').label:
        (tmp_path/'set'/c).mkdir(parents=True)
        for i in range(2):
            im = (np.array([.47, .45, .40])*255 + rng.normal(0, 60, (8, 8, 3))).clip(0, 255).astype(np.uint8)
            Image.fromarray(im[..., order]).save(tmp_path/'set'/c/f'{i}.png')
    found = check_data(tmp_path/'set', px=8, shot=1, query=1)
    assert found.class_list == 'mini_imagenet' and found.ok == ok and ('red and blue look swapped' in str(found)) != ok

def test_near_duplicates_as_all_pairs_tell_them():
    rng = np.random.default_rng(0)
    h = rng.normal(size=(3000, 64)).astype(np.float32)
    for i in range(0, 600, 3): h[i+1] = h[i] + rng.normal(size=64)*rng.uniform(0, .5)
    z = h - h.mean(0)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    want = {(i, j) for i,j in zip(*np.nonzero(np.triu(z @ z.T, 1) >= NEAR))}
    found = set(near_duplicates(h))
    assert found <= want and len(found) >= .99*len(want) and len(want) > 50
    assert near_duplicates(np.ones((1, 4))) == [] and len(near_duplicates(np.zeros((9, 4)))) == 0

def test_the_recipe_says_it_by_its_exit_code(tmp_path):
    photos(tmp_path/'set')
    words = ['--data', tmp_path/'set', '--shot', 1, '--query', 4, '--json', tmp_path/'x.json']
    done = shell(ROOT/'recipes'/'check_data.py', *words)
    assert done.returncode == 0 and 'nothing serious was found' in done.stdout and json.loads((tmp_path/'x.json').read_text())['ok']
    (tmp_path/'set'/'val'/'val0'/'0.png').write_text('')
    done = shell(ROOT/'recipes'/'check_data.py', *words, '--fix', tmp_path/'lists')
    assert done.returncode == 1 and '! 1 images cannot be read' in done.stdout and (tmp_path/'lists'/'val.csv').exists()
    done = shell(ROOT/'recipes'/'check_data.py', '--data', tmp_path/'nowhere')
    assert done.returncode == 1 and 'no such file' in done.stderr.splitlines()[-1]

def test_what_cannot_be_checked_is_one_sentence(tmp_path):
    write_images(tmp_path/'a', ['1.png'])
    says(lambda: check_data(tmp_path), 'at least 3 are needed')
    says(lambda: check_data(photos(tmp_path/'b'), px=32, resize='stretch'), 'resize')

def test_the_real_cifar_fs_has_copies_across_its_splits(real_zip, monkeypatch):
    "15 images with the same pixels; the cache counts them in another way. Near copies take minutes and are left out"
    monkeypatch.setattr('grdd_fastai.check_data.near_duplicates', lambda h: [])
    found = check_data(real_zip)
    real = few_shot_data(real_zip)
    by_kind = kinds(found)
    assert by_kind['copies across splits'] == len(real.duplicates) and found.known_as == 'cifar_fs' and found.class_list == 'cifar_fs'
