"""Folders, zips and pickled archives: what is damaged or hostile is refused with a sentence or does nothing."""
import io
import os
import pickle
import zipfile

import numpy as np
import pytest
from helpers import cifar_archive, classes, list_classes, mutations, no_hang, posix, refused, write_csv_set, write_images, zipped
from PIL import Image

from grdd_fastai.core.errors import UserError
from grdd_fastai.data.archives import ArrayUnpickler
from grdd_fastai.data.cache import few_shot_data
from grdd_fastai.data.layouts import SPLITS
from grdd_fastai.data.sources import open_source, prepare

# ---- folders ----------------------------------------------------------------------------------------------------------

@posix
def test_pipes_devices_and_links_that_lead_out_are_left_out_and_said(folders, tmp_path, capfd):
    n = {s:len(df) for s,df in open_source(folders).frames.items()}
    outside = tmp_path/'secret.png'
    Image.new('RGB', (8, 8)).save(outside)
    a = folders/'train'/'train0'
    os.mkfifo(a/'pipe.png')
    for name,target in (('zero.png', '/dev/zero'), ('random.png', '/dev/urandom'), ('passwd.png', '/etc/passwd'), ('gone.png', 'nowhere'),
                        ('out.png', outside), ('self.png', 'self.png')):
        (a/name).symlink_to(target)
    (a/'inside.png').symlink_to('../train1/00.png') # a link that stays inside is a file
    (folders/'train'/'loop').symlink_to('..')
    with no_hang():
        capfd.readouterr()
        source = open_source(folders)
        assert {s:len(df) for s,df in source.frames.items()} == n | dict(train=n['train'] + 1)
        said = capfd.readouterr().err
        assert '8 links that lead out of the folder, nowhere or in a circle, pipes and devices are left out, train/loop the first' in said
        out = prepare(folders, tmp_path/'prepared')
    assert not any(f.is_symlink() for f in out.rglob('*')) and b'root:' not in b''.join(f.read_bytes() for f in out.rglob('*.png'))

@posix
def test_links_that_multiply_come_to_an_end(folders):
    a = folders/'train'/'train0'
    for i in range(24):
        (folders/f'd{i}').mkdir()
        if i:
            for name in 'xy': (folders/f'd{i-1}'/name).symlink_to(f'../d{i}')
    (a/'deep').mkdir()
    with no_hang(): assert len(open_source(folders).frames['train']) == 18
    deep = folders/'train'/'deep'
    for _ in range(300): deep = deep/'d'
    deep.mkdir(parents=True)
    with no_hang(): open_source(folders)


# ---- zips -------------------------------------------------------------------------------------------------------------

def test_damaged_zips(tmp_path):
    root = write_csv_set(tmp_path/'set', (3, 3, 3), 4, px=8)
    path = zipped(root, tmp_path/'set.zip')
    whole,want,n = path.read_bytes(),few_shot_data(path, px=8, cache=tmp_path/'c').fingerprint,0
    for b in mutations(whole, 60): # also an entry without a name
        path.write_bytes(b)
        if refused(lambda: few_shot_data(path, px=8, cache=tmp_path/'c')): n += 1
        else: assert few_shot_data(path, px=8, cache=tmp_path/'c').fingerprint == want # the damage was in no file
    assert n > 20

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


# ---- CIFAR-100's pickles ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('how', ['folder', 'tar'])
def test_torchvision_archive(tmp_path, how):
    path,parts = cifar_archive(tmp_path/'a', how=how)
    source = open_source(path)
    assert classes(source) == list_classes('cifar_fs') and [len(source.frames[s]) for s in SPLITS] == [192, 48, 60]
    row = source.frames['train'].iloc[0]
    image = np.asarray(Image.open(io.BytesIO(source.read(row.path))))
    of_class = np.array(parts['test']['fine_labels']) == parts['meta']['fine_label_names'].index(row.label)
    assert (image == parts['test']['data'][of_class][0].reshape(3, 32, 32).transpose(1, 2, 0)).all()

def test_a_zipped_archive_is_read(tmp_path):
    path,_ = cifar_archive(tmp_path/'a')
    assert open_source(zipped(path, tmp_path/'a.zip')).name == 'cifar_fs'

def test_a_broken_download_is_one_sentence(tmp_path):
    path,_ = cifar_archive(tmp_path/'a.tar.gz', how='tar')
    whole = path.read_bytes()
    for n in (len(whole)//2, len(whole)*3//4, 100):
        path.write_bytes(whole[:n])
        with pytest.raises(UserError, match='fetch it again|neither a folder'): open_source(path)

def test_damaged_pickle_archives(tmp_path):
    path,_ = cifar_archive(tmp_path/'a.tar.gz', n=1, how='tar')
    whole,n = path.read_bytes(),0
    good = few_shot_data(path, px=4, cache=tmp_path/'c').fingerprint
    for b in mutations(whole, 24):
        path.write_bytes(b)
        if refused(lambda: few_shot_data(path, px=4, cache=tmp_path/'c')): n += 1
        else: assert few_shot_data(path, px=4, cache=tmp_path/'c').fingerprint == good
    assert n > 15

class Evil:
    def __init__(self, marker): self.marker = marker
    def __reduce__(self): return os.system, (f'touch {self.marker}',)

def test_a_hostile_pickle_is_refused_and_does_nothing(tmp_path):
    path,_ = cifar_archive(tmp_path/'a', evil=Evil(tmp_path/'marker'))
    with pytest.raises(UserError, match='refused to unpickle'): open_source(path)
    assert not (tmp_path/'marker').exists()

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
