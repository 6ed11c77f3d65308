"""The unpickler: what Python's own would load, in place, and nothing that could run."""
import io
import os
import pickle
import subprocess
import sys
from collections import OrderedDict

import numpy as np
import pytest
from helpers import ROOT, mutations, no_hang, refused, says

from grdd_fastai.data.pickles import FileArray, read_pickle, unpickle

PROTOCOLS = range(6)
rng = np.random.default_rng(0)
BIG = rng.integers(0, 256, (50, 20, 20, 3), dtype=np.uint8)
OBJECTS = dict(a=np.arange(6).reshape(2, 3), big=BIG, fortran=np.asfortranarray(BIG), b=[1, 2.5, 'x', None, True, 2**70],
               c=np.float32(2), many=[np.int64(3)]*3, texts=np.array(['a', 'bc']), ordered=OrderedDict(a=1), long=b'\xff\x00'*5000,
               longer=bytes(range(256))*2**13, empty=b'', array=bytearray(b'xy'), unicode='ä',
               big_endian=np.arange(3, dtype='>i4'), rows=[BIG[i] for i in range(3)], pair=(1, (2, 3)),
               flag=np.bool_(True), file=np.frombuffer(b'\xff'*9000, np.uint8))

def same(mine, want):
    if isinstance(want, np.ndarray):
        native = [a.dtype.newbyteorder('=') for a in (mine, want)]
        return native[0] == native[1] and mine.shape == want.shape and (np.asarray(mine) == want).all()
    if isinstance(want, list | tuple): return len(mine) == len(want) and all(map(same, mine, want))
    if isinstance(want, bytes | bytearray): return (mine.read() if hasattr(mine, 'read') else mine) == bytes(want)
    return mine == want

@pytest.mark.parametrize('protocol', PROTOCOLS)
@pytest.mark.parametrize('key', OBJECTS)
def test_objects_load_as_pythons_own_unpickler_loads_them(protocol, key):
    raw = pickle.dumps({key:OBJECTS[key], 'twice':OBJECTS[key]}, protocol=protocol)
    if len(raw) > 2**19 and protocol == 0: pytest.skip('a text of protocol 0 may have a million bytes')
    found = unpickle(io.BytesIO(raw), 'x')
    assert same(found[key], pickle.loads(raw)[key]) and same(found['twice'], OBJECTS[key])

@pytest.mark.parametrize('protocol', range(2, 6))
def test_rows_are_read_from_the_file(tmp_path, protocol):
    (tmp_path/'x.pkl').write_bytes(pickle.dumps(dict(data=BIG, fortran=np.asfortranarray(BIG), rows=list(BIG)), protocol=protocol))
    found = read_pickle(tmp_path/'x.pkl')
    for key in found:
        for i in (0, 7, 49): assert (found[key][i] == BIG[i]).all()
    assert isinstance(found['data'], FileArray)
    with pytest.raises(IndexError): found['data'][50]

@pytest.mark.parametrize('protocol', [2, 4])
def test_a_large_array_takes_no_memory(tmp_path, protocol):
    (tmp_path/'x.pkl').write_bytes(pickle.dumps(dict(data=np.zeros((400_000, 1000), np.uint8)), protocol=protocol))
    code = f'''
import resource
from grdd_fastai.data.pickles import read_pickle
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = read_pickle({str(tmp_path/'x.pkl')!r})
sum(int(found['data'][i].sum()) for i in range(0, 400_000, 400))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
'''
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert int(done.stdout) < 60*1024 # kilobytes, of 390 MiB

@pytest.mark.parametrize('call', [lambda m: (os.system, (f'touch {m}',)), lambda m: (eval, (f'open({str(m)!r}, "w")',)),
                                  lambda m: (exec, (f'open({str(m)!r}, "w")',)), lambda m: (open, (str(m), 'w')),
                                  lambda m: (__import__, ('antigravity',)), lambda m: (getattr, ('', 'join'))])
@pytest.mark.parametrize('how', ['bare', 'nested'])
def test_hostile_pickles_run_nothing(tmp_path, call, how):
    class Evil:
        def __reduce__(self): return call(tmp_path/'marker')
    for protocol in PROTOCOLS:
        raw = pickle.dumps(Evil() if how == 'bare' else {'data':[np.zeros(3), Evil()]}, protocol=protocol)
        says(lambda raw=raw: unpickle(io.BytesIO(raw), 'x.pkl'), 'x.pkl: refused to unpickle')
    assert not (tmp_path/'marker').exists()

OBJECT = np.array([{'a':1}], object)

def nested(n): # tuples of the same tuple twice: to be hashed or written out, it takes 2**n steps
    o = ('x',)
    for _ in range(n): o = (o, o)
    return o
DEEP = pickle.dumps(nested(60), protocol=2)[2:-1] # without its beginning and end
HOSTILE = dict(
    deep_key=b'}' + DEEP + b'K\x01s.', deep_keys=b'}(' + DEEP + b'K\x01u.', deep_dict=b'(' + DEEP + b'K\x01d.',
    deep_set=b'\x80\x04\x8f(' + DEEP + b'\x90.', frozen=b'\x80\x04(' + DEEP + b'\x91.',
    deep_ordered=b'ccollections\nOrderedDict\n((' + DEEP + b'K\x01l' + b'ltR.', deep_dtype=b'cnumpy\ndtype\n(' + DEEP + b'tR.',
    negative=b'T\xff\xff\xff\xff.',
    huge_shape=(b'\x80\x03cnumpy.core.numeric\n_frombuffer\n(C\x01xcnumpy\ndtype\n(X\x02\x00\x00\x00u1tR('
                + b'\x8a\x09' + b'\xff'*8 + b'\x7ftX\x01\x00\x00\x00CtR.'),
    state_of_a_function=b'cnumpy.core.multiarray\n_reconstruct\n}(S"__defaults__"\nNub.',
    state_of_a_list=b'](S"x"\nNtb.',
    new_object=b'\x80\x02cnumpy\nndarray\n)\x81.',
    old_instance=b'(inumpy\nndarray\n.',
    extension=b'\x80\x02\x82\x01.',
    persistent=b'Pdata\n.',
    out_of_band=b'\x80\x05\x97.',
    huge_string=b'\x80\x04\x8e' + (2**62).to_bytes(8, 'little') + b'x.',
    huge_number=b'\x80\x02\x8b\xff\xff\xff\x7f1.',
    huge_line=b'S"' + b'x'*2**21 + b'"\n.',
    called_text=b'S"x"\n)R.',
    missing_memo=b'h\x05.',
    unknown=b'\xfe.', empty=b'', stop=b'.')

@pytest.mark.parametrize('name', HOSTILE)
def test_other_instructions_are_one_sentence(name):
    with no_hang(): says(lambda: unpickle(io.BytesIO(HOSTILE[name]), 'x.pkl'), 'x.pkl')

def test_arrays_of_objects_and_of_false_shapes_are_refused():
    for protocol in range(2, 6): # plain objects are a list of them, and others are refused one by one
        assert unpickle(io.BytesIO(pickle.dumps(OBJECT, protocol=protocol)), 'x.pkl') == [{'a':1}]
        raw = pickle.dumps(np.zeros(2, [('a', 'i4'), ('b', 'f8')]), protocol=protocol)
        says(lambda raw=raw: unpickle(io.BytesIO(raw), 'x.pkl'), 'x.pkl')
    raw = pickle.dumps(np.zeros(7777, np.uint8), protocol=4)
    at = raw.index((7777).to_bytes(2, 'little')) # its shape
    says(lambda: unpickle(io.BytesIO(raw[:at] + b'\xff\xff' + raw[at+2:]), 'x.pkl'), 'x.pkl')

def test_damaged_pickles_are_refused_or_data():
    raw = pickle.dumps(dict(data=BIG[:3], labels=[0, 1, 2]), protocol=4)
    n = sum(refused(lambda b=b: unpickle(io.BytesIO(b), 'x.pkl')) for b in mutations(raw, 200))
    assert 20 < n < 200
    assert not [f for f in os.listdir('.') if f.startswith('marker')]
