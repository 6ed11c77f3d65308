"""Pickles read in place: nothing in them is run, and their arrays stay in the file until a row is asked for."""
import math
import pickle
import tempfile
from collections import OrderedDict, deque
from functools import lru_cache
from struct import unpack
from threading import Lock

import numpy as np

from ..core.errors import UserError, first_line

__all__ = ['FileArray', 'FileBytes', 'FileRows', 'Unpickler', 'read_pickle', 'unpickle']


LONG = 4096 # bytes; longer strings stay in the file
MAX_LINE = 2**20 # most bytes in a line of a pickle of protocol 0
BLOCK = 2**20 # bytes


class FileBytes:
    "A string of `size` bytes that begins at the byte `start` of an open file"
    __slots__ = ('file', 'start', 'size', 'lock')
    def __init__(self, file, start, size, lock): self.file,self.start,self.size,self.lock = file,start,size,lock
    def __len__(self): return self.size
    def read(self, at=0, n=None):
        "The `n` bytes from the byte `at` on, by default all that follow"
        n = self.size - at if n is None else n
        with self.lock: # all threads, and the unpickler, share one position in the file
            here = self.file.tell()
            self.file.seek(self.start + at)
            found = self.file.read(n)
            self.file.seek(here)
        if len(found) < n: raise EOFError('the file ends early')
        return found


class EncodedBytes(FileBytes):
    "Bytes that lie in the file as the UTF-8 of the text that has their numbers as characters; they are decoded when they are read"
    __slots__ = ('text',)
    def __init__(self, text):
        super().__init__(text.file, text.start, 0, text.lock)
        self.text = text
        self.size = len(self.read())
    def read(self, at=0, n=None): return self.text.read().decode().encode('latin1')[at:None if n is None else at + n]


class FileRows:
    "One-dimensional arrays of uint8 in an open file, by row, such as encoded images: `a[i]` gives the bytes of the i-th one"
    def __init__(self, arrays):
        strings = [a.bytes for a in arrays]
        self.kind = type(strings[0])
        if self.kind is EncodedBytes: strings = [s.text for s in strings]
        self.file,self.lock = strings[0].file,strings[0].lock
        self.places = np.array([(s.start, s.size) for s in strings], np.int64)
    @staticmethod
    def fits(arrays):
        "Whether a list holds such arrays alone"
        return all(type(a) is FileArray and a.dtype == np.uint8 and (a.ndim == 1 or a.shape[1:] == (1,))
                   and type(a.bytes) is type(arrays[0].bytes) and a.bytes.file is arrays[0].bytes.file for a in arrays)
    def __len__(self): return len(self.places)
    def __getitem__(self, i):
        found = FileBytes(self.file, *self.places[i].tolist(), self.lock)
        return found.read() if self.kind is FileBytes else EncodedBytes(found).read()


class FileArray:
    "An array of which the numbers are a `FileBytes`: `a[i]` reads row i alone, and `np.asarray(a)` reads everything"
    __slots__ = ('bytes', 'dtype', 'shape', 'order')
    def __init__(self, numbers, dtype, shape, order='C'): self.bytes,self.dtype,self.shape,self.order = numbers,dtype,shape,order
    @property
    def ndim(self): return len(self.shape)
    def __len__(self): return self.shape[0]
    def __getitem__(self, i):
        if self.order == 'F': return np.asarray(self)[i]
        if not 0 <= i < len(self): raise IndexError(i)
        size = math.prod(self.shape[1:])*self.dtype.itemsize
        return np.frombuffer(self.bytes.read(i*size, size), self.dtype).reshape(self.shape[1:])
    def __array__(self, dtype=None, copy=None):
        a = np.frombuffer(self.bytes.read(), self.dtype).reshape(self.shape, order=self.order)
        return a if dtype is None else a.astype(dtype)


# ---- what a pickle may hold besides lists, tuples, dicts, texts and numbers -------------------------------------------

class _Dtype:
    "Stands for a numpy dtype that is being unpickled"
    __slots__ = ('code', 'order')
    def __init__(self, code, *_):
        if not isinstance(code, str): raise ValueError('a kind of numbers that is no text')
        self.code,self.order = code,'|'
    def set_state(self, state): self.order = state[1]
    def dtype(self): return _dtype(self.code.lstrip('<>=|'), self.order if self.order in ('<', '>') else '=')

@lru_cache
def _dtype(code, order):
    dtype = np.dtype(code)
    if dtype.kind not in 'biufSU' or not dtype.itemsize:
        raise UserError(f'refused an array of {code!r}: an array may hold numbers or texts')
    return dtype.newbyteorder(order)

class _Array:
    "Stands for a numpy array that is being unpickled; its state makes it a real array or a `FileArray`"
    __slots__ = ('value',)
    def __init__(self, *_): self.value = None
    def set_state(self, state):
        *_,shape,dtype,is_fortran,numbers = state
        self.value = _array(numbers, dtype, shape, 'F' if is_fortran else 'C')

def _array(numbers, dtype, shape, order='C', *_):
    if dtype.code.startswith('O') and isinstance(numbers, list): return list(numbers) # texts, such as labels
    dtype,shape = dtype.dtype(),tuple(shape)
    if len(shape) > 8: raise ValueError(f'an array of {len(shape)} dimensions')
    if isinstance(numbers, str): numbers = numbers.encode('latin1') # a pickle of Python 2
    if any(type(n) is not int or not 0 <= n < 2**48 for n in shape) or math.prod(shape)*dtype.itemsize != len(numbers):
        raise ValueError(f'an array of shape {shape} has {len(numbers)} bytes')
    if isinstance(numbers, FileBytes): return FileArray(numbers, dtype, shape, order)
    return np.frombuffer(bytes(numbers), dtype).reshape(shape, order=order)

def _scalar(dtype, numbers): return _array(numbers, dtype, ()).item()

_LEAD = (b'\xc2', b'\xc3') # first bytes of the characters 128 to 255 in UTF-8
_NUMPY = ('numpy.core', 'numpy._core')
def _ordered(items=()):
    found = OrderedDict()
    for k,v in items: found[_as_key(k)] = v
    return found

def _as_key(k):
    "A key of a dict: a tuple could take for ever to be hashed"
    if isinstance(k, str | bytes | int | float | None): return k
    raise UserError(f'refused a {type(k).__name__} as the key of a dict: keys are texts and numbers')

_KNOWN = {('numpy', 'ndarray'):_Array, ('numpy', 'dtype'):_Dtype, ('collections', 'OrderedDict'):_ordered,
          **{(f'{m}.multiarray', '_reconstruct'):_Array for m in _NUMPY}, **{(f'{m}.multiarray', 'scalar'):_scalar for m in _NUMPY},
          **{(f'{m}.numeric', '_frombuffer'):_array for m in _NUMPY}}
_BYTES = [('_codecs', 'encode'), *((m, name) for m in ('builtins', '__builtin__') for name in ('bytes', 'bytearray'))]


# ---- the unpickler ----------------------------------------------------------------------------------------------------

class _File:
    "An open file of which the lines have a limit"
    def __init__(self, file): self.file,self.read = file,file.read
    def readline(self):
        line = self.file.readline(MAX_LINE)
        if len(line) == MAX_LINE: raise ValueError('a text is too long')
        return line


class Unpickler(pickle._Unpickler):
    """Loads lists, tuples, dicts, texts, numbers, bytes and arrays; UserError for anything else, which could otherwise run any code

    Python's own unpickler in Python is used, without the instructions that call or make other things, and with long strings left in
    the file. Texts of Python 2 are read as latin1.
    """
    names = ('MARK STOP POP POP_MARK DUP FLOAT INT BININT BININT1 LONG BININT2 NONE STRING SHORT_BINSTRING UNICODE '
             'APPEND EMPTY_DICT APPENDS LIST EMPTY_LIST TUPLE EMPTY_TUPLE '
             'BINFLOAT PROTO TUPLE1 TUPLE2 TUPLE3 NEWTRUE NEWFALSE LONG1 SHORT_BINBYTES SHORT_BINUNICODE GLOBAL STACK_GLOBAL').split()
    dispatch = {getattr(pickle, n)[0]:pickle._Unpickler.dispatch[getattr(pickle, n)[0]] for n in names}
    def __init__(self, file, frugal=True):
        super().__init__(_File(file), fix_imports=False, encoding='latin1')
        self.frugal = frugal
        self.file,self.lock = file,Lock()
        self.latest,self.n_remembered = deque(maxlen=8),0 # keys of the memo
        self.decoded = None # temporary file of long strings that are written as texts
    def find_class(self, module, name):
        if (found := _KNOWN.get((module, name))) is not None: return found
        if (module, name) in _BYTES: return self.as_bytes
        raise UserError(f'refused to unpickle {module}.{name}: only arrays, lists, dicts, texts and numbers are loaded')
    def long_string(self, size, decode):
        "Push a string of `size` bytes: itself, if it is short, or a `FileBytes`"
        if size < 0: raise ValueError('a string of a negative length')
        if size <= LONG:
            found = self.read(size)
            if len(found) < size: raise EOFError('it ends early')
            return self.append(decode(found))
        start = self.file.tell()
        if self.file.seek(0, 2) < start + size: raise EOFError('it ends early')
        self.file.seek(start + size)
        self.append(FileBytes(self.file, start, size, self.lock))
    def as_bytes(self, text=b'', encoding='latin1'):
        "Bytes that are written as a text, as in pickles of protocol 2"
        if isinstance(text, bytes): return text
        if encoding not in ('latin1', 'latin-1'): raise ValueError(f'bytes encoded by {encoding}')
        if isinstance(text, str): return text.encode('latin1')
        if len(text) <= BLOCK: return EncodedBytes(text)
        self.decoded = self.decoded or tempfile.TemporaryFile()  # noqa: SIM115 (it is open as long as the arrays are)
        start,rest = self.decoded.seek(0, 2),b''
        for at in range(0, len(text), BLOCK):
            block = rest + text.read(at, min(BLOCK, len(text) - at))
            cut = len(block) - (block[-1:] in _LEAD) # the two bytes of a character may lie in two blocks
            done,rest = block[:cut].decode().encode('latin1'),block[cut:]
            self.decoded.write(done)
        if rest: raise ValueError('a text ends early')
        return FileBytes(self.decoded, start, self.decoded.tell() - start, self.lock)
    def load_reduce(self):
        args = self.stack.pop()
        if self.stack[-1] is _Array: self.forget(args, args[1])
        self.stack[-1] = self.stack[-1](*args)
    def load_items(self, items):
        found = self.stack[-1]
        if not isinstance(found, dict): raise UserError(f'refused to set the items of a {type(found).__name__}')
        for k,v in zip(items[::2], items[1::2], strict=True): found[_as_key(k)] = v
    def load_setitem(self):
        v,k = self.stack.pop(),self.stack.pop()
        self.load_items([k, v])
    def load_dict(self):
        items = self.pop_mark()
        self.append({})
        self.load_items(items)
    def load_build(self):
        state = self.stack.pop()
        made = self.stack[-1]
        if not isinstance(made, _Array | _Dtype): raise UserError(f'refused to set the state of a {type(made).__name__}')
        made.set_state(state)
        if isinstance(made, _Array): self.forget(state, state[1], state[-1])
        if isinstance(made, _Array): self.stack[-1] = made.value
    def forget(self, *parts):
        """Take parts of an array that was just made out of the memo, where they would need much memory

        They are tuples and strings that numpy makes for this array alone, so that nothing else refers to them.
        """
        if not self.frugal: return
        for key in self.latest:
            found = self.memo.get(key)
            if isinstance(found, tuple | FileBytes) and any(found is part for part in parts): del self.memo[key]
    def remember(self, key):
        self.memo[key] = self.stack[-1]
        self.latest.append(key)
        self.n_remembered += 1
    def remembered(self, key):
        "Push an object of the memo, where an array still is what it was before its state was set"
        found = self.memo[key]
        self.append(found.value if isinstance(found, _Array) else found)

def _op(name, size, decode):
    def load(self): self.long_string(unpack(size, self.read({'<i':4, '<I':4, '<Q':8}[size]))[0], decode)
    Unpickler.dispatch[getattr(pickle, name)[0]] = load

_op('BINSTRING', '<i', lambda b: b.decode('latin1'))
for _name,_size in (('BINBYTES', '<I'), ('BINBYTES8', '<Q'), ('BYTEARRAY8', '<Q')): _op(_name, _size, bytes)
for _name,_size in (('BINUNICODE', '<I'), ('BINUNICODE8', '<Q')): _op(_name, _size, lambda b: b.decode('utf-8', 'surrogatepass'))
Unpickler.dispatch |= {pickle.SETITEM[0]:Unpickler.load_setitem, pickle.DICT[0]:Unpickler.load_dict,
                       pickle.SETITEMS[0]:lambda self: self.load_items(self.pop_mark()),
                       pickle.REDUCE[0]:Unpickler.load_reduce, pickle.BUILD[0]:Unpickler.load_build,
                       pickle.GET[0]:lambda self: self.remembered(int(self.readline()[:-1])),
                       pickle.BINGET[0]:lambda self: self.remembered(self.read(1)[0]),
                       pickle.LONG_BINGET[0]:lambda self: self.remembered(unpack('<I', self.read(4))[0]),
                       pickle.PUT[0]:lambda self: self.remember(int(self.readline()[:-1])),
                       pickle.BINPUT[0]:lambda self: self.remember(self.read(1)[0]),
                       pickle.LONG_BINPUT[0]:lambda self: self.remember(unpack('<I', self.read(4))[0]),
                       pickle.MEMOIZE[0]:lambda self: self.remember(self.n_remembered),
                       pickle.FRAME[0]:lambda self: self.read(8)} # the file is read through its own buffer, not frame by frame


def unpickle(file, where):
    "What the pickle in an open file holds; `where` names it in the UserError of one that is damaged or refused"
    start = file.tell()
    try:
        try: return Unpickler(file).load()
        except KeyError: # something refers to what was forgotten
            file.seek(start)
            return Unpickler(file, frugal=False).load()
    except UserError as e: raise UserError(f'{where}: {e}') from None
    except KeyError: raise UserError(f'{where} is damaged, or uses an instruction of pickles that is refused: give it as .npz') from None
    except Exception as e: raise UserError(f'{where} is not a whole pickle of arrays ({first_line(e)}): fetch it again') from None

def read_pickle(path):
    "What the pickle at `path` holds; the file stays open as long as its arrays are used"
    return unpickle(open(path, 'rb'), path)  # noqa: SIM115
