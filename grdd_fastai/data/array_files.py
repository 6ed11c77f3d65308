"""Files of arrays: .npy and .npz, of which the numbers stay in the file, and parquet files as Hugging Face writes them."""
import json
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


# ---- .npz and .npy ----------------------------------------------------------------------------------------------------

def read_npy(file, where, start=0):
    "The array that begins at the byte `start` of an open file, as a `FileArray`"
    try:
        file.seek(start)
        version = np.lib.format.read_magic(file)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape,fortran,dtype = header(file)
        at = file.tell()
        size = int(np.prod(shape, dtype=object))*dtype.itemsize
        if file.seek(0, 2) < at + size: raise ValueError('it ends early')
    except Exception as e: raise UserError(f'{where} is not a whole array ({first_line(e)}): write it again by numpy') from None
    if dtype.kind not in 'biufSU': raise UserError(f'{where}: refused an array of {dtype}: an array may hold numbers or texts')
    if dtype.itemsize and shape: return FileArray(FileBytes(file, at, size, Lock()), dtype, shape, 'F' if fortran else 'C')
    raise UserError(f'{where} is an array without numbers')

def read_npz(file, where):
    "The arrays of an .npz file by name; those that are compressed are unpacked into temporary files"
    try:
        with zipfile.ZipFile(file) as z:
            found = {}
            for info in z.infolist():
                inside = f'{where}, {info.filename}'
                if info.compress_type == zipfile.ZIP_STORED:
                    file.seek(info.header_offset)
                    n_name,n_extra = struct.unpack('<26xHH', file.read(30))
                    found[info.filename.removesuffix('.npy')] = read_npy(file, inside, info.header_offset + 30 + n_name + n_extra)
                else:
                    with z.open(info) as member: whole = unpacked(member, info.compress_size, inside)
                    found[info.filename.removesuffix('.npy')] = read_npy(whole, inside)
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
        labels = [y for f in opened for y in f.read(columns=[label]).column(0).to_pylist()]
        known = dict(labels=labels) | (dict(names=names) if names else {})
        return Part(ParquetImages(opened, image), class_names(known, len(labels), where))
    except UserError: raise
    except Exception as e: raise UserError(f'{where} is not a whole parquet file ({first_line(e)}): fetch it again') from None
