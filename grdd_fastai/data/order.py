"""The order of a data set's rows, and its fingerprint, come from its pixels: the same images give the same numbers in any layout."""
import hashlib
from functools import lru_cache

import numpy as np

from .class_lists import list_file

__all__ = ['pixel_hashes', 'row_order', 'image_fingerprint', 'find_duplicates']


# data sets whose rows have an order of their own, in which results are published: fingerprint of the images and name of the file in data/
KNOWN = {'5eebb672e15558b75e33b731be8fadb65a7189408419ab8d9dfef58229bb0952':'cifar_fs_order.npy'} # CIFAR-FS at 32 px


def pixel_hashes(images):
    "A hash of 16 bytes for each of the images (N, H, W, 3), as uint8 (N, 16)"
    return np.stack([np.frombuffer(hashlib.blake2b(np.ascontiguousarray(im), digest_size=16).digest(), np.uint8) for im in images])

def _by_hash(hashes, then=None):
    "Rows (N) in the order of their hashes, and equal ones in that of the numbers `then` (N)"
    words = np.ascontiguousarray(hashes).view('>u8').reshape(len(hashes), 2)
    return np.lexsort((*([] if then is None else [then]), words[:, 1], words[:, 0]))

def _digests(hashes, y):
    "SHA-256 of each class of a split, from the hashes of its images in their order: a dict by class code"
    rows = _by_hash(hashes)
    rows = rows[np.argsort(y[rows], kind='stable')]
    codes,starts = np.unique(y[rows], return_index=True)
    parts = np.split(np.ascontiguousarray(hashes[rows]), starts[1:])
    return {c:hashlib.sha256(part.tobytes()).digest() for c,part in zip(codes.tolist(), parts)}

def image_fingerprint(hashes, codes):
    """SHA-256 of the images of the splits and of which are of one class, whatever the order and the names of images and classes

    `hashes` holds uint8 (N, 16) and `codes` class codes (N) for each split.
    """
    h = hashlib.sha256()
    for s in hashes:
        h.update(f'{s} {len(hashes[s])}'.encode())
        for digest in sorted(_digests(hashes[s], codes[s]).values()): h.update(digest)
    return h.hexdigest()

def row_order(hashes, codes, fingerprint):
    """Rows (N) of each split in their order, that of their hashes, which depends on neither files nor names

    Of two images that are equal and of different classes, that of the class with the lower digest comes first. Images of a data set that
    is `KNOWN` have the order of its official files instead: by class, and in a class by name.
    """
    place,start,order = _known_places(KNOWN[fingerprint]) if fingerprint in KNOWN else None,0,{}
    for s in hashes:
        digests = _digests(hashes[s], codes[s])
        rank = {c:i for i,c in enumerate(sorted(digests, key=digests.get))}
        by_class = np.array([rank[c] for c in codes[s].tolist()])
        rows = _by_hash(hashes[s], by_class)
        if place is not None: # the known places are by class digest, and in a class by hash
            rows = rows[np.argsort(by_class[rows], kind='stable')]
            rows = rows[np.lexsort((place[start:start+len(rows)], codes[s][rows]))]
        order[s] = rows
        start += len(rows)
    return order

@lru_cache
def _known_places(name):
    "Position in its class of each image of the known data set `name`, by split, class digest and hash"
    return np.load(list_file(name))

def first_equal(hashes):
    "For each row of uint8 (N, 16), the number of the first row that is equal to it (N)"
    _,first,of = np.unique(np.ascontiguousarray(hashes).view('V16').reshape(-1), return_index=True, return_inverse=True)
    return first[of.reshape(-1)]

def find_duplicates(hashes, filenames):
    "Images with the same pixels in two splits: a list of [split, filename, earlier split, filename]"
    names = list(hashes)
    split = np.repeat(np.arange(len(names)), [len(hashes[s]) for s in names])
    files = np.concatenate([np.asarray(filenames[s], object) for s in names])
    earlier = first_equal(np.concatenate(list(hashes.values())))
    return [[names[split[i]], files[i], names[split[j]], files[j]] for i in np.flatnonzero(split[earlier] < split) for j in [earlier[i]]]
