"""Files that are whole or not there: JSON, tensors, arrays on disk, locks and output folders, whatever lies in the way."""
import os
import threading

import numpy as np
import pytest
import torch
from helpers import posix, says

from grdd_fastai.core import storage
from grdd_fastai.core.errors import UserError
from grdd_fastai.core.storage import atomic_write, filled_array, load_array, load_tensors, locked, output_folder, read_json, save_tensors

# ---- tensors ----------------------------------------------------------------------------------------------------------

def test_saving_is_the_same_bytes_each_time(tmp_path):
    t = dict(a=torch.randn(3, 4), b=torch.arange(5), c=torch.randn(2).bfloat16())
    for n in 'xy': save_tensors(tmp_path/n, t, dict(k=[1, 2.5], j='é'))
    assert (tmp_path/'x').read_bytes() == (tmp_path/'y').read_bytes()
    back,meta = load_tensors(tmp_path/'x')
    assert all(torch.equal(back[k], t[k]) and back[k].dtype == t[k].dtype for k in t) and meta == dict(k=[1, 2.5], j='é')

def test_every_flipped_bit_and_cut_of_a_checkpoint_is_noticed(tmp_path):
    path,rng = tmp_path/'x',np.random.default_rng(0)
    save_tensors(path, dict(a=torch.randn(8, 4), n=torch.arange(3)), dict(epoch=1))
    whole = path.read_bytes()
    for _ in range(60):
        b = bytearray(whole)
        b[rng.integers(len(b))] ^= 1 << int(rng.integers(8))
        path.write_bytes(b)
        try: tensors,meta = load_tensors(path)
        except UserError as e: assert 'damaged' in str(e)
        else: assert torch.equal(tensors['n'], torch.arange(3)) and meta == dict(epoch=1) # white space of the header
    for n in range(0, len(whole), 7):
        path.write_bytes(whole[:n])
        with pytest.raises(UserError, match='damaged'): load_tensors(path)

def test_a_full_disk_is_one_sentence_and_keeps_what_was_there(tmp_path, monkeypatch):
    save_tensors(tmp_path/'x', dict(a=torch.ones(2)), dict(n=1))
    def full(fd): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(UserError, match='No space left on device'): save_tensors(tmp_path/'x', dict(a=torch.zeros(2)), dict(n=2))
    tensors,meta = load_tensors(tmp_path/'x')
    assert meta == dict(n=1) and tensors['a'].tolist() == [1, 1] and [p.name for p in tmp_path.iterdir()] == ['x']


# ---- arrays -----------------------------------------------------------------------------------------------------------

def test_an_array_is_filled_on_disk_and_mapped(tmp_path):
    with filled_array(tmp_path/'a.npy', (5, 3), np.float32, dict(of='x')) as a:
        assert isinstance(a, np.memmap) and not (tmp_path/'a.npy').exists()
        a[:] = np.arange(15).reshape(5, 3)
    b,meta = load_array(tmp_path/'a.npy')
    assert isinstance(b, np.memmap) and meta == dict(of='x') and (b == np.arange(15).reshape(5, 3)).all()
    b[0] = 9 # in memory alone
    assert load_array(tmp_path/'a.npy')[0][0, 1] == 1 and {f.name for f in tmp_path.iterdir()} == {'a.npy', 'a.json'}

def test_one_that_is_not_filled_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), filled_array(tmp_path/'a.npy', (5, 3), np.float32, {}): raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize('damage', ['bit', 'short', 'json', 'none'])
def test_a_damaged_one_is_a_sentence(tmp_path, damage):
    with filled_array(path := tmp_path/'a.npy', (50, 3), np.float32, {}) as a: a[:] = 1
    content = bytearray(path.read_bytes())
    if damage == 'bit': content[-1] ^= 1
    if damage == 'short': content = content[:-8]
    path.write_bytes(content)
    if damage == 'json': path.with_suffix('.json').write_text('{')
    if damage == 'none': path.unlink()
    with pytest.raises(UserError, match='a.npy is not there, damaged or not ours'): load_array(path)

@pytest.mark.skipif(not hasattr(os, 'posix_fallocate'), reason='this system takes the room on the disk while it is written')
def test_a_full_disk_is_a_sentence(tmp_path, monkeypatch):
    def full(*_): raise OSError(28, 'No space left on device')
    monkeypatch.setattr('os.posix_fallocate', full)
    with pytest.raises(UserError, match='No space left'), filled_array(tmp_path/'a.npy', (5, 3), np.float32, {}): pass
    assert not list(tmp_path.iterdir())


# ---- JSON, names, locks and folders -----------------------------------------------------------------------------------

def test_json_of_any_shape(tmp_path):
    for text in ('[]', 'null', '5', '"x"', '{', '', '['*200_000, '{"a": NaN}', '{"a": 1', '\xff'):
        (tmp_path/'x.json').write_bytes(text.encode('latin1'))
        says(lambda: read_json(tmp_path/'x.json'), 'x.json is damaged')
    (tmp_path/'x.json').write_text('{"a": true}')
    says(lambda: read_json(tmp_path/'x.json', keys=dict(a=int)), 'a is missing or no int')
    assert read_json(tmp_path/'none.json', {}) == {} and read_json(tmp_path/'x.json', keys=dict(a=bool)) == dict(a=True)

@posix
def test_what_is_half_written_has_a_name_nobody_can_foretell(tmp_path, monkeypatch):
    seen,real = [],os.replace
    def replace(a, b):
        seen.append(os.path.basename(a))
        real(a, b)
    monkeypatch.setattr(os, 'replace', replace)
    (tmp_path/'precious').write_text('mine')
    (tmp_path/'.x.json.part').symlink_to('precious')
    for _ in range(2): atomic_write(tmp_path/'x.json', 'content')
    assert len(set(seen)) == 2 and (tmp_path/'precious').read_text() == 'mine' and (tmp_path/'x.json').read_text() == 'content'
    for name in ('.x.json.0123456789abcdef.part', '.mine.part', '.other.0123456789abcdef.part'): (tmp_path/name).write_text('half')
    storage.sweep(tmp_path, 'x.json')
    assert {f.name for f in tmp_path.iterdir()} == {'precious', 'x.json', '.x.json.part', '.mine.part', '.other.0123456789abcdef.part'}
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path/'x.json').stat().st_mode & 0o777 == 0o666 & ~umask

@posix
def test_a_lock_that_is_a_link_or_a_pipe_is_refused(tmp_path):
    (tmp_path/'precious').write_text('mine')
    (tmp_path/'a').symlink_to('precious')
    (tmp_path/'b').symlink_to('made')
    os.mkfifo(tmp_path/'c')
    for n in 'abc': says(lambda n=n: locked(tmp_path/n).__enter__(), 'remove it')
    assert (tmp_path/'precious').read_text() == 'mine' and not (tmp_path/'made').exists()

def test_what_was_made_for_nothing_goes_again(tmp_path):
    with pytest.raises(KeyError), output_folder(tmp_path/'a'/'b'/'c'): raise KeyError
    assert not list(tmp_path.iterdir())
    with output_folder(tmp_path/'a'/'b'/'c') as folder: (folder/'file').write_text('x')
    assert (tmp_path/'a'/'b'/'c'/'file').exists()

def test_folders_that_many_make_and_leave_at_once(tmp_path):
    "Some write and some find nothing to write: nobody's folder goes while another is in it"
    errors = []
    def work(i):
        try:
            for n in range(40):
                with output_folder(tmp_path/'a'/'b') as folder:
                    if (i + n) % 3 == 0:
                        atomic_write(folder/f'{i}-{n}', 'x')
                        (folder/f'{i}-{n}').unlink()
        except BaseException as e: errors.append(e)
    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert not errors and not [f for f in tmp_path.rglob('*') if f.is_file()]
