"""Damaged, foreign and hostile files: each is refused with a sentence or does nothing, and none is used silently."""
import io
import json
import os
import pickle
import zipfile

import numpy as np
import pytest
from conftest import write_csv_set, write_images
from PIL import Image
from test_prepare import cifar_archive, zipped
from test_recipes import SMALL, recipe

from grdd_fastai.core.errors import UserError
from grdd_fastai.data.archives import ArrayUnpickler
from grdd_fastai.data.cache import few_shot_data
from grdd_fastai.data.sources import open_source, prepare

RNG = np.random.default_rng(0)

def mutations(whole, n):
    "`n` damaged copies: flipped bits, cuts, zeroed and doubled stretches"
    for i in range(n):
        b,at = bytearray(whole),int(RNG.integers(len(whole)))
        if   i%4 == 0: b[at] ^= 1 << int(RNG.integers(8))
        elif i%4 == 1: b = b[:at]
        elif i%4 == 2: b[at:at+20] = bytes(len(b[at:at+20]))
        else: b[at:at] = b[max(0, at-30):at]
        yield bytes(b)

def refused(f):
    "Whether `f` gave a one-sentence UserError; any other exception is a failure of the test"
    try: f()
    except UserError as e:
        assert '\n' not in str(e) and len(str(e)) > 20
        return True
    return False

@pytest.fixture
def root(tmp_path): return write_csv_set(tmp_path/'set', (3, 3, 3), 4, px=8)


def test_damaged_csvs(root):
    whole,n = (root/'train.csv').read_bytes(),0
    for b in mutations(whole, 60):
        (root/'train.csv').write_bytes(b)
        if refused(lambda: open_source(root)): n += 1
        else: # what is accepted is a CSV of images that are there, in classes of their own
            source = open_source(root)
            assert all((root/p).resolve().is_relative_to(root) and (root/p).is_file() for df in source.frames.values() for p in df.path)
    assert n > 30

def test_damaged_zips(root, tmp_path):
    path = zipped(root, tmp_path/'set.zip')
    whole,want,n = path.read_bytes(),few_shot_data(path, px=8, cache=tmp_path/'c').fingerprint,0
    for b in mutations(whole, 60):
        path.write_bytes(b)
        if refused(lambda: few_shot_data(path, px=8, cache=tmp_path/'c')): n += 1
        else: assert few_shot_data(path, px=8, cache=tmp_path/'c').fingerprint == want # the damage was in no file
    assert n > 20

def test_damaged_caches_are_never_used(root, tmp_path):
    data = few_shot_data(root, px=8, cache=tmp_path/'c')
    for name in ('train.npy','test.npy','val.csv','meta.json'):
        whole = (data.folder/name).read_bytes()
        for b in mutations(whole, 12):
            (data.folder/name).write_bytes(b)
            again = few_shot_data(root, px=8, cache=tmp_path/'c')
            assert again.fingerprint == data.fingerprint and again.stats == data.stats and (data.folder/name).read_bytes() == whole

def test_damaged_pickle_archives(tmp_path):
    path,_ = cifar_archive(tmp_path/'a.tar.gz', n=1, how='tar')
    whole,n = path.read_bytes(),0
    good = few_shot_data(path, px=4, cache=tmp_path/'c').fingerprint
    for b in mutations(whole, 24):
        path.write_bytes(b)
        if refused(lambda: few_shot_data(path, px=4, cache=tmp_path/'c')): n += 1
        else: assert few_shot_data(path, px=4, cache=tmp_path/'c').fingerprint == good
    assert n > 15

@pytest.mark.parametrize('call', [lambda m: (os.system, (f'touch {m}',)), lambda m: (eval, (f'open({str(m)!r}, "w")',)),
                                  lambda m: (exec, (f'open({str(m)!r}, "w")',)), lambda m: (open, (str(m), 'w')),
                                  lambda m: (__import__, ('antigravity',)), lambda m: (getattr, ('', 'join'))])
@pytest.mark.parametrize('how', ['bare', 'nested'])
def test_hostile_pickles_run_nothing(tmp_path, call, how):
    class Evil:
        def __reduce__(self): return call(tmp_path/'marker')
    for protocol in range(2, 6):
        raw = pickle.dumps(Evil() if how == 'bare' else {'data':[np.zeros(3), Evil()]}, protocol=protocol)
        with pytest.raises(UserError, match='refused to unpickle'): ArrayUnpickler(io.BytesIO(raw), encoding='latin1').load()
    assert not (tmp_path/'marker').exists()

def test_plain_pickles_load():
    x = {'a':np.arange(6).reshape(2, 3), 'b':[1, 2.5, 'x', None, True], 'c':np.float32(2)}
    for protocol in range(2, 6):
        y = ArrayUnpickler(io.BytesIO(pickle.dumps(x, protocol=protocol)), encoding='latin1').load()
        assert (y['a'] == x['a']).all() and y['b'] == x['b'] and y['c'] == 2

@pytest.mark.parametrize('name', ['../evil.png', '../../evil.png', 'a/../../../evil.png', '/evil.png', '/tmp/evil-grdd.png', '..\\evil.png',
                                  'C:\\evil.png'])
def test_zip_entries_that_climb_stay_inside(tmp_path, name):
    buf = io.BytesIO()
    Image.new('RGB', (4, 4)).save(buf, 'png')
    (tmp_path/'here').mkdir()
    with zipfile.ZipFile(tmp_path/'here'/'x.zip', 'w') as z:
        for i,s in enumerate('abc'):
            z.writestr(f'{s}/{i}.png', buf.getvalue())
        z.writestr(name, buf.getvalue())
    refused(lambda: prepare(tmp_path/'here'/'x.zip', tmp_path/'here'/'in'/'out'))
    outside = [p for p in tmp_path.rglob('*') if p.is_file() and not p.is_relative_to(tmp_path/'here'/'in') and p.name != 'x.zip']
    assert outside == [] and not os.path.exists('/evil.png') and not os.path.exists('/tmp/evil-grdd.png')

def test_bombs_are_refused(tmp_path):
    for s in ('a','b','c'): write_images(tmp_path/'set'/s, ['1.png'])
    path = zipped(tmp_path/'set', tmp_path/'x.zip')
    with zipfile.ZipFile(path, 'a', zipfile.ZIP_DEFLATED) as z, z.open('a/2.png', 'w', force_zip64=True) as f:
        for _ in range(300): f.write(bytes(2**20)) # 300 MiB in 300 KiB
    with pytest.raises(UserError, match='would unpack to 300 MiB'): few_shot_data(path, cache=tmp_path/'c')
    Image.fromarray(np.zeros((15_000, 15_000), np.uint8)).save(tmp_path/'set'/'a'/'1.png') # 225 million pixels in 200 KiB
    with pytest.raises(UserError, match='does not decode'): few_shot_data(tmp_path/'set', cache=tmp_path/'c')

def test_damaged_records_of_a_run(csv_set, cache, tmp_path):
    "Its JSON files and weights: refused, or what is read is what was written"
    out,main = tmp_path/'run',recipe('cifarfs_5w1s')
    kwargs = dict(out=str(out), resume=True, data=str(csv_set), cache=str(cache), **SMALL)
    want,n = main(**kwargs),0
    for name in ('settings.json','result.json'):
        whole = (out/name).read_bytes()
        for b in [*mutations(whole, 20), b'[]', b'5', b'{"settings": 5, "torch_threads": 1}']:
            (out/name).write_bytes(b)
            try: json.loads(b)
            except ValueError: assert refused(lambda: main(**kwargs))
            else: continue # still JSON: another run's, or a digit of a report
            n += 1
        (out/name).write_bytes(whole)
    assert n > 20 and main(**kwargs) == want
