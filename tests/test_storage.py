"""Memory-mapped arrays on disk: whole or not there."""
import numpy as np
import pytest

from grdd_fastai.core.errors import UserError
from grdd_fastai.core.storage import filled_array, load_array


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

def test_a_full_disk_is_a_sentence(tmp_path, monkeypatch):
    def full(*_): raise OSError(28, 'No space left on device')
    monkeypatch.setattr('os.posix_fallocate', full)
    with pytest.raises(UserError, match='No space left'), filled_array(tmp_path/'a.npy', (5, 3), np.float32, {}): pass
    assert not list(tmp_path.iterdir())
