"""The cache: each row has its image and its label, rebuilt when the source changes or a file is damaged, mapped rather than read."""
import json
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from helpers import mutations, says, write_csv_set
from PIL import Image

from grdd_fastai.core.errors import UserError
from grdd_fastai.data.cache import few_shot_data
from grdd_fastai.data.class_lists import SPLITS


def visible(folder): return [p for p in folder.iterdir() if not p.name.startswith('.')]


def test_each_row_has_its_image_and_its_label(csv_set, data):
    for s in SPLITS:
        split,df = getattr(data, s),pd.read_csv(csv_set/f'{s}.csv')
        assert sorted(split.df.filename) == sorted(df.filename) and [split.vocab[y] for y in split.y] == list(split.df.label)
        assert split.df.set_index('filename').label.to_dict() == df.set_index('filename').label.to_dict()
        for i in (0, 17, len(df)-1): assert (split.images[i] == np.asarray(Image.open(csv_set/'images'/split.df.filename[i]))).all()
        assert isinstance(split.images, np.memmap)

def test_stats_are_the_base_images_own(data):
    x = np.asarray(data.train.images) / 255
    assert np.allclose(data.stats, [x.mean((0, 1, 2)), x.std((0, 1, 2))], atol=1e-4)

def test_packed_once_and_again_when_anything_changes(tmp_path):
    root = write_csv_set(tmp_path/'set', (3, 3, 3), 4)
    pack = lambda: few_shot_data(root, px=16, cache=tmp_path/'cache')
    first = pack()
    made = os.stat(first.folder/'train.npy').st_mtime_ns
    assert os.stat(pack().folder/'train.npy').st_mtime_ns == made and pack().fingerprint == first.fingerprint
    Image.new('RGB', (16, 16), 'red').save(root/'images'/'train0'/'00.png') # an image
    second = pack()
    assert second.fingerprint != first.fingerprint and (second.train.images[0] == [255, 0, 0]).all()
    pd.read_csv(root/'train.csv')[1:].to_csv(root/'train.csv', index=False) # a row
    assert len(pack().train) == len(first.train) - 1
    assert {p.name for p in root.iterdir()} == {'images','train.csv','val.csv','test.csv'} # nothing is written to the source
    assert len(visible(tmp_path/'cache')) == 1 # and nothing stale is left behind

def test_fingerprint_is_of_the_content_not_of_the_place(tmp_path):
    a,b = (few_shot_data(write_csv_set(tmp_path/n, (3, 3, 3), 4), px=16, cache=tmp_path/'c') for n in 'ab')
    assert a.fingerprint == b.fingerprint and a.folder != b.folder

def test_the_seed_packs_again_only_what_it_splits(csv_set, tmp_path):
    few_shot_data(csv_set, px=16, cache=tmp_path/'c', seed=0), few_shot_data(csv_set, px=16, cache=tmp_path/'c', seed=1)
    assert len(visible(tmp_path/'c')) == 1

def test_the_cache_never_lies_in_the_source(csv_set):
    with pytest.raises(UserError, match='lies inside the data'): few_shot_data(csv_set, px=16, cache=csv_set/'cache')

@pytest.mark.parametrize('name', ['train.npy','val.npy','test.csv','meta.json'])
def test_a_damaged_cache_is_packed_anew(csv_set, tmp_path, capsys, name):
    first = few_shot_data(csv_set, px=16, cache=tmp_path/'c')
    b = bytearray((first.folder/name).read_bytes())
    b[-9] ^= 1
    (first.folder/name).write_bytes(b)
    second = few_shot_data(csv_set, px=16, cache=tmp_path/'c')
    assert 'packed anew' in capsys.readouterr().err or name == 'meta.json'
    assert (second.fingerprint == first.fingerprint
            and (np.asarray(second.train.images) == np.asarray(few_shot_data(csv_set, px=16, cache=tmp_path/'d').train.images)).all())
    (first.folder/name).unlink()
    assert few_shot_data(csv_set, px=16, cache=tmp_path/'c').fingerprint == first.fingerprint

def test_damaged_caches_are_never_used(tmp_path):
    root = write_csv_set(tmp_path/'set', (3, 3, 3), 4, px=8)
    data = few_shot_data(root, px=8, cache=tmp_path/'c')
    for name in ('train.npy','test.npy','val.csv','meta.json'):
        whole = (data.folder/name).read_bytes()
        for b in mutations(whole, 12):
            (data.folder/name).write_bytes(b)
            again = few_shot_data(root, px=8, cache=tmp_path/'c')
            assert again.fingerprint == data.fingerprint and again.stats == data.stats
            assert (now := (data.folder/name).read_bytes()) == whole or name == 'meta.json' and json.loads(now) == json.loads(whole)

def test_two_processes_pack_once(csv_set, tmp_path):
    code = f"from grdd_fastai.data.cache import few_shot_data; few_shot_data({str(csv_set)!r}, px=16, cache={str(tmp_path/'c')!r})"
    ps = [subprocess.Popen([sys.executable, '-W', 'ignore', '-c', code], stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [p.communicate()[1] for p in ps]
    assert all(p.returncode == 0 for p in ps) and sum('packing' in s for s in said) == 1

def test_an_image_that_does_not_decode_is_named_and_leaves_nothing(tmp_path):
    root = write_csv_set(tmp_path/'set', (3, 3, 3), 4)
    (root/'images'/'val1'/'02.png').write_bytes((root/'images'/'val1'/'02.png').read_bytes()[:60])
    with pytest.raises(UserError, match=r'val row 8: images/val1/02\.png does not decode'):
        few_shot_data(root, px=16, cache=tmp_path/'cache')
    (root/'images'/'val1'/'02.png').write_text('not an image')
    with pytest.raises(UserError, match='it has an unknown image format'): few_shot_data(root, px=16, cache=tmp_path/'cache')
    assert not [p for p in (tmp_path/'cache').iterdir() if p.is_dir()]

def test_a_cache_that_cannot_be_written_is_named(csv_set, tmp_path):
    (tmp_path/'file').write_text('')
    with pytest.raises(UserError, match='cache folder .* cannot be written'): few_shot_data(csv_set, cache=tmp_path/'file'/'cache')

@pytest.mark.parametrize('px', [0, -1, 100_000, 2.5, '32', None])
def test_sides_that_cannot_be(root, tmp_path, px): says(lambda: few_shot_data(root, px=px, cache=tmp_path/'c'), 'px must be from 1 to 1024')

@pytest.mark.parametrize('other', ['TRAIN0', 'train0 ', 'tra\u0131n0', '\uff54rain0'])
def test_classes_that_differ_in_spelling_alone_are_a_warning(root, tmp_path, other, capfd):
    text = (root/'val.csv').read_text().replace(',val0', f',"{other}"')
    (root/'val.csv').write_bytes(text.encode())
    capfd.readouterr()
    few_shot_data(root, px=8, cache=tmp_path/'c')
    said = capfd.readouterr().err
    if other == 'tra\u0131n0': assert 'differ in case' not in said # a dotless i is another letter
    else: assert f"the classes 'train0' (train) and {other!r} (val) differ in case, blanks or Unicode form alone" in said

def test_an_image_in_two_splits_is_a_warning_every_time(root, tmp_path, capfd):
    (root/'images'/'test1'/'03.png').write_bytes((root/'images'/'train2'/'01.png').read_bytes())
    for _ in range(2):
        capfd.readouterr()
        data = few_shot_data(root, px=8, cache=tmp_path/'c')
        assert '1 images are in two splits' in (said := capfd.readouterr().err) and 'test1/03.png (test) is train2/01.png (train)' in said
    assert data.duplicates == [['test', 'test1/03.png', 'train', 'train2/01.png']]
