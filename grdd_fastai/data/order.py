"""The order of a data set's rows, and its fingerprint, come from its pixels: the same images give the same numbers in any layout."""
import hashlib
from functools import lru_cache
from pathlib import Path

import numpy as np

__all__ = ['pixel_hashes', 'row_order', 'image_fingerprint', 'find_duplicates']


# data sets whose rows have an order of their own, in which results are published: fingerprint of the images and name of the file in data/
KNOWN = {'f46285a8dab8efc3d48ed8298e1e0482808cfb243f4e98f1b03a788c78bc4351':'cifar_fs_order.npy'} # CIFAR-FS at 32 px


def pixel_hashes(images):
    "A hash of 16 bytes for each of the images (N, H, W, 3), as uint8 (N, 16)"
    return np.stack([np.frombuffer(hashlib.blake2b(np.ascontiguousarray(im), digest_size=16).digest(), np.uint8) for im in images])

def _by_hash(hashes):
    "Rows (N) in the order of their hashes"
    words = hashes.view('>u8').reshape(len(hashes), 2)
    return np.lexsort((words[:, 1], words[:, 0]))

def _by_class(hashes, y):
    "Rows (N) of a split by class, and in a class by hash; the classes are in the order of their least hashes, whatever their names"
    rows = _by_hash(hashes)
    least = {}
    for i,c in enumerate(y[rows]): least.setdefault(c, i)
    return rows[np.argsort([least[c] for c in y[rows]], kind='stable')]

def image_fingerprint(hashes, codes):
    """SHA-256 of the images of the splits and of which are of one class, whatever the order and the names of images and classes

    `hashes` holds uint8 (N, 16) and `codes` class codes (N) for each split.
    """
    h = hashlib.sha256()
    for s in hashes:
        rows = _by_class(hashes[s], codes[s])
        ends = np.append(np.flatnonzero(np.diff(codes[s][rows])), len(rows) - 1)
        h.update(f'{s} {len(rows)} {ends.tolist()}'.encode())
        h.update(np.ascontiguousarray(hashes[s][rows]))
    return h.hexdigest()

def row_order(hashes, codes, fingerprint):
    """Rows (N) of each split in their order, that of their hashes, which depends on neither files nor classes

    Images of a data set that is `KNOWN` have the order of its official files instead: by class, and in a class by name.
    """
    if fingerprint not in KNOWN: return {s:_by_hash(hashes[s]) for s in hashes}
    place,start,order = _known_places(KNOWN[fingerprint]),0,{}
    for s in hashes:
        rows = _by_class(hashes[s], codes[s])
        order[s] = rows[np.lexsort((place[start:start+len(rows)], codes[s][rows]))]
        start += len(rows)
    return order

@lru_cache
def _known_places(name):
    "Position in its class of each image of the known data set `name`, by split, class and pixels"
    here = Path(__file__).parent.parent # the package
    return np.load(next(p for p in (here/'class_lists'/name, here.parent/'data'/name) if p.exists()))

def find_duplicates(hashes, filenames):
    "Images with the same pixels in two splits: a list of [split, filename, earlier split, filename]"
    names = list(hashes)
    split = np.repeat(np.arange(len(names)), [len(hashes[s]) for s in names])
    files = np.concatenate([np.asarray(filenames[s], object) for s in names])
    whole = np.ascontiguousarray(np.concatenate(list(hashes.values()))).view('V16').reshape(-1)
    _,first,of = np.unique(whole, return_index=True, return_inverse=True)
    earlier = first[of.reshape(-1)]
    return [[names[split[i]], files[i], names[split[j]], files[j]] for i in np.flatnonzero(split[earlier] < split) for j in [earlier[i]]]
