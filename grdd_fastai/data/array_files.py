"""Files of arrays: .npy and .npz, of which the numbers stay in the file, and parquet files as Hugging Face writes them."""
import json
import math
import struct
import zipfile
from functools import lru_cache
from threading import Lock

import numpy as np

from ..core.errors import UserError, first_line
from .archives import unpacked
from .parts import IMAGES, LABELS, Part, class_names
from .pickles import FileArray, FileBytes

__all__ = ['read_npy', 'read_npz', 'read_parquet', 'ParquetImages']


MAX_ROWS = 10**7 # most images in parquet files


# ---- .npz and .npy ----------------------------------------------------------------------------------------------------

def read_npy(file, where, start=0):
    "The array that begins at the byte `start` of an open file, as a `FileArray`"
    try:
        file.seek(start)
        version = np.lib.format.read_magic(file)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape,fortran,dtype = header(file)
        at = file.tell()
        size = 0 if dtype.hasobject else math.prod(shape)*dtype.itemsize
        if file.seek(0, 2) < at + size: raise ValueError('it ends early')
    except Exception as e: raise UserError(f'{where} is not a whole array ({first_line(e)}): write it again by numpy') from None
    if dtype.kind not in 'biufSU' or not dtype.itemsize:
        raise UserError(f'{where} holds {dtype}, such as Python objects, and is refused: give numbers or texts')
    return FileArray(FileBytes(file, at, size, Lock()), dtype, shape, 'F' if fortran else 'C')

def read_npz(file, where):
    "The arrays of an .npz file by name, without single numbers and Python objects; compressed ones are unpacked into temporary files"
    try:
        with zipfile.ZipFile(file) as z:
            found = {}
            for info in z.infolist():
                inside = f'{where}, {info.filename}'
                with z.open(info) as member: # either way its checksum is tested
                    if stored := info.compress_type == zipfile.ZIP_STORED:
                        begin = member.read(2**12)
                        while member.read(2**20): pass
                    else: whole = unpacked(member, info.compress_size, inside)
                if b"'|O'" in (begin if stored else whole.read(2**12))[:128]: continue # an array of Python objects, as its header says
                if stored: # the array is read in place, behind the header of the member
                    file.seek(info.header_offset)
                    n_name,n_extra = struct.unpack('<26xHH', file.read(30))
                    array = read_npy(file, inside, info.header_offset + 30 + n_name + n_extra)
                else: array = read_npy(whole, inside)
                if array.shape: found[info.filename.removesuffix('.npy')] = array
            return found
    except UserError: raise
    except Exception as e: raise UserError(f'{where} is not a whole .npz file ({first_line(e)}): write it again by numpy') from None


# ---- parquet ----------------------------------------------------------------------------------------------------------

class ParquetImages:
    "Images of several parquet files by row; the row groups that were read last are kept"
    def __init__(self, files, column):
        self.files,self.column,self.lock = files,column,Lock()
        sizes = [(f, g, f.metadata.row_group(g).num_rows) for f in files for g in range(f.num_row_groups)]
        self.groups = [(f, g) for f,g,_ in sizes]
        self.ends = np.cumsum([n for *_,n in sizes])
        self.group = lru_cache(2)(self._group)
    def _group(self, i):
        f,g = self.groups[i]
        return f.read_row_group(g, columns=[self.column]).column(0)
    def __len__(self): return int(self.ends[-1]) if len(self.ends) else 0
    def __getitem__(self, row):
        i = int(np.searchsorted(self.ends, row, 'right'))
        with self.lock: return self.group(i)[row - (self.ends[i-1] if i else 0)].as_py()

def read_parquet(files, where):
    "The `Part` of parquet files, with Hugging Face's names of the classes if they have them"
    try:
        from pyarrow import parquet
    except ImportError: raise UserError(f"{where}: parquet files need pyarrow: pip install 'grdd_fastai[hub]'") from None
    try:
        opened = [parquet.ParquetFile(f) for f in files]
        schema = opened[0].schema_arrow
        image,label = (next((n for n in names if n in schema.names), None) for names in (('image', 'img', *IMAGES), LABELS))
        if image is None or label is None:
            raise UserError(f'{where} has the columns {", ".join(schema.names[:20])}: an image and a label were looked for')
        about = json.loads((schema.metadata or {}).get(b'huggingface', b'{}'))
        names = about.get('info', {}).get('features', {}).get(label, {}).get('names')
        if sum(f.metadata.num_rows for f in opened) > MAX_ROWS:
            raise UserError(f'{where} has more than {MAX_ROWS:,} rows: give a part of them')
        labels = [y for f in opened for y in f.read(columns=[label]).column(0).to_pylist()]
        known = dict(labels=labels) | (dict(names=names) if names else {})
        return Part(ParquetImages(opened, image), class_names(known, len(labels), where))
    except UserError: raise
    except Exception as e: raise UserError(f'{where} is not a whole parquet file ({first_line(e)}): fetch it again') from None
