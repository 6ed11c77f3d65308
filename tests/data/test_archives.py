"""Folders, zips and tars: what is damaged or hostile is refused with a sentence or does nothing."""
import gzip
import io
import os
import tarfile
import zipfile

import numpy as np
import pytest
from helpers import mutations, no_hang, posix, refused, says, write_csv_set, write_images, zipped
from layouts import a_tar_for_each_class, encoded, tar_of
from PIL import Image

from grdd_fastai.core.errors import UserError
from grdd_fastai.data.archives import Tar
from grdd_fastai.data.cache import few_shot_data
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


# ---- tars -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('mode', ['w', 'w:gz', 'w:bz2', 'w:xz'])
def test_tars_that_climb_or_link_give_their_own_files_alone(tmp_path, mode):
    png = encoded(np.zeros((4, 4, 3), np.uint8))
    path = tar_of(tmp_path/'x.tar', {f'{c}/1.png':png for c in 'abc'} | {'../evil.png':png, '/evil.png':png, 'a/../../evil.png':png}, mode)
    with tarfile.open(tmp_path/'links.tar', 'w') as tar:
        for kind,name in ((tarfile.SYMTYPE, 'a/link.png'), (tarfile.LNKTYPE, 'a/hard.png'), (tarfile.FIFOTYPE, 'a/pipe.png'),
                          (tarfile.CHRTYPE, 'a/tty.png')):
            info = tarfile.TarInfo(name)
            info.type,info.linkname = kind,'/etc/passwd'
            tar.addfile(info)
    assert Tar(path).files == ['a/1.png', 'b/1.png', 'c/1.png'] and Tar(tmp_path/'links.tar').files == []
    with no_hang(): assert len(open_source(path).frames['train']) == 1
    assert not os.path.exists('/evil.png') and not (tmp_path.parent/'evil.png').exists()

@pytest.mark.parametrize('mode', ['w', 'w:gz'])
def test_damaged_tars(tmp_path, mode):
    rng = np.random.default_rng(0)
    members = {f'{c}/{i}.png':encoded(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)) for c in 'abc' for i in range(2)}
    whole,n = tar_of(tmp_path/'x.tar', members, mode).read_bytes(),0
    want = few_shot_data(tmp_path/'x.tar', px=6, cache=tmp_path/'c')
    for b in mutations(whole, 40):
        (tmp_path/'x.tar').write_bytes(b)
        if refused(lambda: few_shot_data(tmp_path/'x.tar', px=6, cache=tmp_path/'c')): n += 1
        elif mode == 'w:gz': assert few_shot_data(tmp_path/'x.tar', px=6, cache=tmp_path/'c').image_fingerprint == want.image_fingerprint
    assert n > (30 if mode == 'w:gz' else 5) # a plain tar has no checksum of its files; their own are left

def test_a_tar_that_unpacks_to_much_is_refused(tmp_path):
    with gzip.open(tmp_path/'x.tgz', 'w') as f:
        for _ in range(2**9): f.write(bytes(2**20)) # 512 MiB in 500 KiB
    says(lambda: open_source(tmp_path/'x.tgz'), 'x.tgz', 'unpacks to more than')

def test_a_hostile_tar_in_the_place_of_a_class(tmp_path):
    a_tar_for_each_class(tmp_path/'tars')
    some = sorted((tmp_path/'tars').iterdir())[3]
    for content,word in ((b'no tar at all', 'not a whole tar'), (some.read_bytes()[:1500], 'not a whole tar')):
        some.write_bytes(content)
        says(lambda: few_shot_data(tmp_path/'tars', px=4, cache=tmp_path/'c'), some.name, word)
