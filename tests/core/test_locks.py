"""Locks and the cache folder: who waits, who is refused, and what is left behind."""
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from grdd_fastai.core.errors import UserError
from grdd_fastai.core.storage import Busy, default_cache, locked, output_folder

posix = pytest.mark.skipif(os.name != 'posix', reason='signals, pipes, links and modes of POSIX')

HOLDER = '''
import sys, time
from grdd_fastai.core.storage import locked
with locked(sys.argv[1]):
    print('held', flush=True)
    time.sleep(60)
'''

def holder(path):
    "Start a process that holds the lock `path`, and return it once it does"
    p = subprocess.Popen([sys.executable, '-c', HOLDER, str(path)], stdout=subprocess.PIPE, text=True)
    assert p.stdout.readline() == 'held\n'
    return p

def python(code, **env):
    "What `code` prints in a fresh process, with the environment variables `env` changed; None removes one"
    env = {k:v for k,v in {**os.environ, **env}.items() if v is not None}
    return subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True, check=True).stdout.strip()


# ---- locks ------------------------------------------------------------------------------------------------------------

def test_a_lock_of_another_process_is_busy_until_that_process_dies(tmp_path):
    p = holder(tmp_path/'.lock')
    try:
        with pytest.raises(Busy, match='^wait for it$'), locked(tmp_path/'.lock', 'wait for it'): pass
    finally:
        p.kill() # SIGKILL on POSIX: the holder gets no chance to release its lock
        p.wait()
    with locked(tmp_path/'.lock', 'wait for it'): pass

def test_a_lock_without_a_sentence_waits_for_its_holder(tmp_path):
    p = holder(tmp_path/'.lock')
    start = time.monotonic()
    threading.Timer(1., p.kill).start()
    with locked(tmp_path/'.lock'): waited = time.monotonic() - start
    p.wait()
    assert .9 < waited < 10

def test_threads_exclude_each_other(tmp_path):
    "No two of four threads are inside at once, and each gets its turn"
    inside,most = [],[]
    def work(i):
        for _ in range(5):
            with locked(tmp_path/'.lock'):
                inside.append(i)
                most.append(len(inside))
                time.sleep(.01)
                inside.remove(i)
    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads: t.start()
    for t in threads: t.join(60)
    assert most == [1]*20

@pytest.mark.parametrize('name', ['.lock', './.lock', pytest.param('link/.lock', marks=posix)])
def test_two_locks_of_one_process_exclude_each_other(tmp_path, name):
    "The same file by any path"
    if 'link' in name: (tmp_path/'link').symlink_to(tmp_path)
    with locked(tmp_path/'.lock'):
        with pytest.raises(Busy), locked(os.path.join(tmp_path, name), 'it is held'): pass
    with locked(os.path.join(tmp_path, name), 'it is held'): pass

def test_an_error_inside_passes_and_releases_the_lock(tmp_path):
    "An OSError of the body is not taken for one of the lock"
    with pytest.raises(FileNotFoundError), locked(tmp_path/'.lock'): raise FileNotFoundError('mine')
    with pytest.raises(TimeoutError, match='^mine$'), locked(tmp_path/'.lock', 'busy'): raise TimeoutError('mine')
    with locked(tmp_path/'.lock', 'busy'): pass

@posix
def test_a_lock_that_is_no_regular_file_is_refused(tmp_path):
    (tmp_path/'precious').write_text('mine')
    (tmp_path/'link').symlink_to('precious')
    (tmp_path/'dangling').symlink_to('made')
    (tmp_path/'folder').mkdir()
    os.mkfifo(tmp_path/'pipe')
    for name in ('link', 'dangling', 'folder', 'pipe'):
        for busy in (None, 'it is held'):
            with pytest.raises(UserError, match=f'{name} is .*remove it$') as e, locked(tmp_path/name, busy): pass
            assert not isinstance(e.value, Busy)
    assert (tmp_path/'precious').read_text() == 'mine' and not (tmp_path/'made').exists()

@posix
def test_a_link_that_takes_the_name_after_the_check_is_refused(tmp_path, monkeypatch):
    (tmp_path/'precious').write_text('mine')
    (tmp_path/'.lock').symlink_to('precious')
    monkeypatch.setattr('grdd_fastai.core.storage.check_lock', lambda path: None)
    with pytest.raises(UserError, match='cannot be written'), locked(tmp_path/'.lock'): pass
    assert (tmp_path/'precious').read_text() == 'mine'

def test_a_lock_in_no_folder_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match='gone cannot be written .*give another folder$'), locked(tmp_path/'gone'/'.lock'): pass
    (tmp_path/'file').write_text('')
    with pytest.raises(UserError, match='file cannot be written .*give another folder$'), locked(tmp_path/'file'/'.lock'): pass
    assert {f.name for f in tmp_path.iterdir()} == {'file'} # no folder is made

@posix
@pytest.mark.parametrize('busy', [None, 'it is held'])
def test_a_lock_in_a_folder_that_takes_no_files_is_a_sentence(tmp_path, busy):
    folder = tmp_path/'closed'
    folder.mkdir(mode=0o500)
    if os.access(folder, os.W_OK): folder = Path('/proc') # the superuser writes to the folder all the same
    if not folder.exists(): pytest.skip('there is no /proc')
    with pytest.raises(UserError, match=f'{folder} cannot be written') as e, locked(folder/'.lock', busy): pass
    assert not isinstance(e.value, Busy)

@posix
def test_a_lock_keeps_the_content_of_its_file_from_a_loser(tmp_path):
    (tmp_path/'.lock').touch()
    with locked(tmp_path/'.lock'):
        (tmp_path/'.lock').write_text('of the holder')
        with pytest.raises(Busy), locked(tmp_path/'.lock', 'busy'): pass
        assert (tmp_path/'.lock').read_text() == 'of the holder'

@posix
def test_a_forked_child_neither_releases_nor_keeps_a_lock(tmp_path):
    with locked(tmp_path/'.lock'):
        if not (pid := os.fork()): os._exit(0)
        os.waitpid(pid, 0)
        with pytest.raises(Busy), locked(tmp_path/'.lock', 'busy'): pass
    with locked(tmp_path/'.lock'):
        if not (pid := os.fork()):
            signal.pause()
            os._exit(0)
    try:
        with locked(tmp_path/'.lock', 'busy'): pass
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)

@posix
def test_a_signal_ends_the_wait_for_a_lock(tmp_path):
    "A handler that raises, as a recipe's does, ends it at once and leaves nothing held"
    def stop(*_): raise SystemExit(143)
    p = holder(tmp_path/'.lock')
    before = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, .3)
        with pytest.raises(SystemExit), locked(tmp_path/'.lock'): raise AssertionError('the lock is held twice')
    finally:
        signal.signal(signal.SIGALRM, before)
        p.kill()
        p.wait()
    with locked(tmp_path/'.lock', 'busy'): pass

def test_output_folder_leaves_nothing_of_an_unused_folder(tmp_path):
    "Neither the lock file nor the folders that were made stay; a folder that was there keeps all it had"
    with output_folder(tmp_path/'a'/'b') as folder, locked(folder/'.lock'): assert folder.is_dir()
    assert not list(tmp_path.iterdir())
    with output_folder(tmp_path/'used') as folder, locked(folder/'.lock'): (folder/'x').write_text('x')
    assert 'x' in {f.name for f in (tmp_path/'used').iterdir()} <= {'x', '.lock'}


# ---- the cache folder -------------------------------------------------------------------------------------------------

def test_the_cache_folder_is_the_systems():
    "On Linux it is the folder of XDG, which $XDG_CACHE_HOME moves"
    assert default_cache().name in ('grdd_fastai', 'Cache') and 'grdd_fastai' in default_cache().parts and default_cache().is_absolute()

@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='the folders of XDG')
def test_the_cache_folder_on_linux(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.delenv('XDG_CACHE_HOME', raising=False)
    assert default_cache() == tmp_path/'.cache'/'grdd_fastai'
    monkeypatch.setenv('XDG_CACHE_HOME', '') # an empty one counts as unset
    assert default_cache() == tmp_path/'.cache'/'grdd_fastai'
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'elsewhere'))
    assert default_cache() == tmp_path/'elsewhere'/'grdd_fastai' and not list(tmp_path.iterdir()) # it is named here and not made
