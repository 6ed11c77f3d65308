"""The cache: row i is CSV row i, in any format, rebuilt when the source changes, mapped rather than read."""
import os

import numpy as np
import pandas as pd
import pytest
from conftest import write_csv_set
from PIL import Image

from grdd_fastai.core.errors import UserError
from grdd_fastai.data.cache import few_shot_data
from grdd_fastai.data.images import decode
from grdd_fastai.data.layouts import SPLITS


def visible(folder): return [p for p in folder.iterdir() if not p.name.startswith('.')]


def test_row_i_is_csv_row_i(csv_set, data):
    for s in SPLITS:
        split,df = getattr(data, s),pd.read_csv(csv_set/f'{s}.csv')
        assert len(split) == len(df) and [split.vocab[y] for y in split.y] == list(df.label)
        for i in (0, 17, len(df)-1): assert (split.images[i] == np.asarray(Image.open(csv_set/'images'/df.filename[i]))).all()
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

@pytest.mark.parametrize('mode, suffix',
                         [('RGB','jpg'), ('L','png'), ('P','gif'), ('RGBA','webp'), ('CMYK','jpg'), ('1','bmp'), ('I;16','tiff')])
def test_any_format_becomes_rgb(tmp_path, mode, suffix):
    grey = np.full((20, 20), 200, np.uint8)
    im = Image.fromarray(grey.astype(np.uint16)*256) if mode == 'I;16' else Image.fromarray(grey).convert('RGB').convert(mode, dither=0)
    im.save(tmp_path/f'x.{suffix}')
    x = decode((tmp_path/f'x.{suffix}').read_bytes(), 16)
    assert x.shape == (16, 16, 3) and x.dtype == np.uint8 and abs(x.astype(int) - (255 if mode == '1' else 200)).max() <= 6

@pytest.mark.parametrize('a, mode', [(np.array([[0., .5], [1., 1.]]), 'F'), (np.array([[0, 128], [255, 255]]), 'I'),
                                     (np.array([[0, 32768], [65535, 65535]]), 'I')])
def test_deep_grey_levels_are_not_black(tmp_path, a, mode):
    Image.fromarray(a.astype(np.float32 if mode == 'F' else np.int32)).save(tmp_path/'x.tiff')
    assert np.abs(decode((tmp_path/'x.tiff').read_bytes(), 2)[..., 0].astype(int) - [[0, 128], [255, 255]]).max() <= 1

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

def test_two_processes_pack_once(csv_set, tmp_path):
    import subprocess
    import sys
    code = f"from grdd_fastai.data.cache import few_shot_data; few_shot_data({str(csv_set)!r}, px=16, cache={str(tmp_path/'c')!r})"
    ps = [subprocess.Popen([sys.executable, '-W', 'ignore', '-c', code], stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [p.communicate()[1] for p in ps]
    assert all(p.returncode == 0 for p in ps) and sum('packing' in s for s in said) == 1

def test_a_photo_is_upright_and_cropped_at_its_centre(tmp_path):
    a = np.zeros((30, 60, 3), np.uint8)
    a[:, :15],a[:, 45:],a[:15, 15:45] = 255,255,(200, 0, 0) # white margins to lose, a red upper half to keep
    exif = Image.Exif()
    exif[0x0112] = 3 # taken upside down
    Image.fromarray(a).rotate(180).save(tmp_path/'x.png', exif=exif)
    x = decode((tmp_path/'x.png').read_bytes(), 30)
    assert (x[:14] == (200, 0, 0)).all() and (x[16:] == 0).all()

def test_an_image_that_does_not_decode_is_named_and_leaves_nothing(tmp_path):
    root = write_csv_set(tmp_path/'set', (3, 3, 3), 4)
    (root/'images'/'val1'/'02.png').write_bytes((root/'images'/'val1'/'02.png').read_bytes()[:60])
    with pytest.raises(UserError, match=r'val row 8: images/val1/02\.png does not decode'):
        few_shot_data(root, px=16, cache=tmp_path/'cache')
    (root/'images'/'val1'/'02.png').write_text('not an image')
    with pytest.raises(UserError, match='it is no image that is known'): few_shot_data(root, px=16, cache=tmp_path/'cache')
    assert not [p for p in (tmp_path/'cache').iterdir() if p.is_dir()]

def test_a_cache_that_cannot_be_written_is_named(csv_set, tmp_path):
    (tmp_path/'file').write_text('')
    with pytest.raises(UserError, match='cache folder .* cannot be written'): few_shot_data(csv_set, cache=tmp_path/'file'/'cache')

def test_demo_is_deterministic_and_disjoint(tmp_path):
    a,b = (few_shot_data('demo', cache=tmp_path/n) for n in 'ab')
    assert a.fingerprint == b.fingerprint and len({*a.train.vocab, *a.val.vocab, *a.test.vocab}) == 64+16+20
    assert few_shot_data('demo', cache=tmp_path/'a', seed=1).fingerprint != a.fingerprint
