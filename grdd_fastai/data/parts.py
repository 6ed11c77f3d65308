"""Images and labels in what a file of arrays holds, whatever they are called there."""
import io
import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from PIL import Image

from ..core.errors import UserError, first_line
from .archives import MAX_BYTES
from .pickles import FileArray, FileBytes, FileRows

__all__ = ['IMAGES', 'LABELS', 'NAMES', 'Part', 'part_of', 'class_names', 'image_file', 'png']


IMAGES = ('data', 'image_data', 'images', 'image', 'imgs', 'features', 'x') # usual names of the images
LABELS = ('label_specific', 'fine_labels', 'fine_label', 'labels', 'label', 'targets', 'y')
NAMES = ('label_specific_str', 'fine_label_names', 'class_names', 'classes', 'names')


class Part(NamedTuple):
    """Images of one split, by row: uint8 arrays (H, W, 3), (H, W) or (3, H, W), or the bytes of image files; and the class of each

    The classes are names, or whole numbers if they have no names.
    """
    images: object
    labels: list


def _found(content, names):
    "The entry of the dict `content` that has the first of the usual `names`, whatever its case, or None"
    lower = {str(k).lower():k for k in content}
    return next((content[lower[n]] for n in names if n in lower), None)

def as_text(name):
    if isinstance(name, bytes): return name.decode()
    if isinstance(name, str | int | float | np.generic): return str(name)
    raise ValueError(f'a name that is a {type(name).__name__}')

def with_text_keys(content): return {as_text(k):v for k,v in content.items()}

def is_images(value):
    "Whether `value` can be a list of images: an array of at least three dimensions, or a list of arrays or of bytes"
    if isinstance(value, np.ndarray | FileArray): return value.ndim >= 3
    return isinstance(value, list) and bool(value) and isinstance(value[0], np.ndarray | FileArray | bytes | FileBytes)

def part_of(content, labels=None, where=''):
    "The `Part` in what a file holds, an array, a list or a dict; if it has no labels, they are in another file's `labels`"
    try: among = with_text_keys(content) if isinstance(content, Mapping) else dict(images=content)
    except ValueError as e: raise UserError(f'{where} holds {e}: fetch it again') from None
    images = _found(among, IMAGES)
    if not is_images(images): images = next((v for v in among.values() if is_images(v)), None)
    if images is None:
        raise UserError(f'{where} holds no images: an array (N, H, W, 3) of uint8 or a list of encoded images was looked for, '
                        f'under a name such as {", ".join(IMAGES[:3])}')
    if isinstance(images, list) and FileRows.fits(images): images = FileRows(images)
    if _found(among, (*LABELS, 'class_dict')) is None and labels is not None:
        among = labels if isinstance(labels, Mapping) else dict(labels=labels)
    try: return Part(images, class_names(with_text_keys(among), len(images), where))
    except UserError: raise
    except ValueError as e: raise UserError(f'{where}: {first_line(e)}: fetch it again') from None

def class_names(content, n, where):
    "The classes (N) in the dict of a file: their names, or whole numbers where they have none"
    if isinstance(rows := content.get('class_dict'), Mapping): return of_rows(rows, n, where)
    found = _found(content, LABELS)
    if found is None:
        raise UserError(f'{where} holds no labels: a class for each image was looked for, under a name such as '
                        f'{", ".join(LABELS[-4:])} or class_dict')
    labels = simple_list(found, where)
    if len(labels) != n: raise UserError(f'{where} has {n} images and {len(labels)} labels: each image needs one')
    if all(isinstance(y, str | bytes) for y in labels): return [as_text(y) for y in labels]
    if not all(type(y) is int or (type(y) is float and y.is_integer()) for y in labels):
        raise UserError(f'{where}: the labels are neither texts nor whole numbers')
    labels = [int(y) for y in labels]
    names = _found(content, ('label2catname',))
    if isinstance(ids := content.get('catname2label'), Mapping): names = {v:k for k,v in ids.items()}
    if names is None: names = _found(content, NAMES)
    if names is None: return labels
    if not isinstance(names, Mapping): names = simple_list(names, where)
    if len(names) == n and not isinstance(names, Mapping) and len({*zip(labels, map(as_text, names))}) == len(set(labels)):
        return [as_text(c) for c in names] # a name for each image
    try:
        if min(labels, default=0) < 0: raise IndexError
        return [as_text(names[y]) for y in labels]
    except (KeyError, IndexError, TypeError):
        raise UserError(f'{where}: a label has no name in its list of names: fetch it again') from None

def simple_list(values, where):
    "Texts and numbers as a list"
    if isinstance(values, np.ndarray | FileArray):
        if values.dtype.itemsize*math.prod(values.shape) > MAX_BYTES:
            raise UserError(f'{where}: the labels have the shape {values.shape}: each image needs one')
        return np.asarray(values).reshape(-1).tolist()
    if not isinstance(values, list | tuple): raise UserError(f'{where}: the labels are a {type(values).__name__}: give a list or an array')
    found = [y.item() if isinstance(y, np.generic) or (isinstance(y, np.ndarray) and y.size == 1) else y for y in values]
    odd = next((y for y in found if not isinstance(y, str | bytes | int | float)), None)
    if odd is not None: raise UserError(f'{where}: one of the labels is a {type(odd).__name__}: each image needs one class')
    return found

def of_rows(rows, n, where):
    "The class of each of `n` images, from a dict that holds the rows of each class"
    labels = [None]*n
    for name,mine in rows.items():
        for row in simple_list(mine, where):
            if not isinstance(row, int) or not 0 <= row < n:
                raise UserError(f'{where}: class_dict names rows that are not there: fetch it again')
            if labels[row] is not None: raise UserError(f'{where}: class_dict gives row {row} two classes: fetch it again')
            labels[row] = as_text(name)
    if None in labels: raise UserError(f'{where}: class_dict leaves out row {labels.index(None)}: fetch it again')
    return labels


# ---- one image --------------------------------------------------------------------------------------------------------

def png(image):
    "The bytes of a PNG file that holds the uint8 array (H, W, 3) or (H, W)"
    buf = io.BytesIO()
    Image.fromarray(image).save(buf, 'png', compress_level=1)
    return buf.getvalue()

def image_file(image):
    "The bytes of an image file from one: as they are, or from an array of pixels or of the file's bytes"
    if isinstance(image, Mapping): # Hugging Face's dict of bytes and path
        if not isinstance(image.get('bytes'), bytes): raise ValueError('it is the name of a file that is not in the table')
        return image['bytes']
    if isinstance(image, Image.Image): return png(np.asarray(image.convert('RGB')))
    if isinstance(image, bytes): return image
    if isinstance(image, FileBytes): return image.read()
    if image is None: raise ValueError('there is no image')
    a = np.asarray(image)
    if a.dtype != np.uint8: raise ValueError(f'its numbers are {a.dtype}, give uint8 from 0 to 255')
    if a.ndim == 1 or (a.ndim == 2 and a.shape[1] == 1 and a.shape[0] > 32): return a.tobytes() # as cv2.imencode gives a file
    if a.ndim == 3 and a.shape[0] in (1, 3) and a.shape[2] not in (1, 3, 4): a = a.transpose(1, 2, 0)
    if a.ndim == 3 and a.shape[2] == 1: a = a[..., 0]
    if a.ndim not in (2, 3) or (a.ndim == 3 and a.shape[2] not in (3, 4)): raise ValueError(f'its shape is {a.shape}, give (H, W, 3)')
    return png(np.ascontiguousarray(a))
