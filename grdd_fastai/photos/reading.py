"""Read photos from files, folders, patterns, PIL images, arrays and tensors, several at a time."""
import glob
import io
import os
import re
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from ..core.errors import UserError
from ..core.progress import with_progress
from ..core.storage import read_bytes, user_path
from ..data.archives import ENDINGS, Folder
from ..data.images import open_image, upright_rgb

__all__ = ['UnreadablePhoto', 'list_photos', 'photo_name', 'short_name', 'load_photo', 'load_photos']


PHOTOS = re.compile(rf'\.({ENDINGS}|avif|jp2)$', re.IGNORECASE) # file names of the image formats that are supported
OTHERS = re.compile(r'\.(hei[cf]|dng|cr[23]|nef|arw|raw|psd|svg)$', re.IGNORECASE) # file names of image formats that are not supported
MANY = 200 # number of photos from which a progress bar is shown
THREADS = min(8, os.cpu_count() or 1)


class UnreadablePhoto(UserError):
    "A file that cannot be read as an image"


def list_photos(photos) -> list:
    """Make a list of paths, PIL images, arrays and tensors from one photo or several, in any form that a user may give

    `photos` is one photo or several: a path, a folder (all images in it and in its folders, by name), a pattern such as 'new/*.jpg', a PIL
    image, an array (H, W, 3) or (N, H, W, 3), a tensor (3, H, W) or (N, 3, H, W), or a list of photos. UserError if there is none, and for
    a set or a dict.
    """
    check_ordered(photos, 'photos')
    if isinstance(photos, str | Path): found = files_of(photos)
    elif isinstance(photos, Image.Image) or getattr(photos, 'ndim', 0) in (2, 3): found = [photos]
    else:
        try: found = [user_path(p) if isinstance(p, str | Path) else p for p in photos]
        except TypeError: raise UserError(f'a {type(photos).__name__} is no image: give an image or a list of images') from None
    if not found: raise UserError('no image is given: give at least one')
    return found

def check_ordered(items, what):
    "Raise UserError if the `items` are a set or a dict, whose order means nothing"
    if isinstance(items, set | frozenset | dict):
        raise UserError(f'the {what} are a {type(items).__name__}, which has no order: give a list')

def files_of(path):
    "The files that a path stands for: itself, the images in a folder, or the images that match a pattern"
    path = user_path(path)
    if path.is_dir():
        if not (found := photos_below(path)): raise UserError(f'{path} holds no images: give a folder that does')
        return found
    if path.exists() or not glob.has_magic(str(path)): return [path]
    found = [Path(f) for f in sorted(glob.glob(str(path), recursive=True)) if PHOTOS.search(f)]
    if not found: raise UserError(f'no image matches {path}: check the folder and the ending')
    return found

def photos_below(path):
    "The photos in a folder and its subfolders, except hidden ones; a warning names photos in a format that is not supported"
    files = [f for f in Folder(path).files if not re.search(r'(^|/)\.', f)]
    if others := [f for f in files if OTHERS.search(f)]:
        warnings.warn(f'{len(others)} photos in {path} have a format that is not read, such as {others[0]}: convert them to JPEG',
                      stacklevel=4)
    return [path/f for f in files if PHOTOS.search(f)]

def photo_name(photo) -> str|None:
    "The path of a photo as text; None if the photo does not come from a file"
    if isinstance(photo, Image.Image): photo = getattr(photo, 'filename', None) or None
    return str(photo) if isinstance(photo, str | Path) else None

def short_name(name) -> str:
    "The last folder and the file name of a path, such as cat/1.jpg"
    return '/'.join(Path(str(name)).parts[-2:])

def load_photo(photo, allow_large:bool=False) -> Image.Image:
    """An upright RGB image from a path, a PIL image, an array or a tensor; `allow_large` as in `open_image`

    UnreadablePhoto for a file that cannot be read, UserError for what is no photo at all.
    """
    if isinstance(photo, torch.Tensor | np.ndarray): photo = from_array(photo)
    if not isinstance(photo, str | Path | Image.Image):
        raise UserError(f'a {type(photo).__name__} is no image: give a path, a PIL image, an array or a tensor')
    try:
        im = photo if isinstance(photo, Image.Image) else open_image(io.BytesIO(read_bytes(photo)), allow_large)
        im.load() # PIL reads a file here at the latest
        return upright_rgb(im)
    except FileNotFoundError: raise UnreadablePhoto(f'{photo} is not there: check the path') from None
    except Exception as e:
        why = 'it holds no image' if isinstance(e, UnidentifiedImageError) else getattr(e, 'strerror', None) or e
        name = photo_name(photo) or 'a PIL image'
        raise UnreadablePhoto(f'{name} cannot be read as an image ({why}): remove it or replace it') from None

def from_array(a):
    "PIL image of an array (H, W, 3) or (H, W) of uint8, or of a tensor (3, H, W) of uint8 or of floating-point numbers from 0 to 1"
    what = f'{type(a).__name__} of {a.dtype} {tuple(a.shape)}'
    if isinstance(a, torch.Tensor):
        levels = a.detach().cpu()
        if a.ndim == 3 and a.is_floating_point() and levels.numel() and 0 <= levels.min() and levels.max() <= 1:
            levels = (levels*255).round().to(torch.uint8)
        a = levels.movedim(0, -1).numpy() if a.ndim == 3 else np.zeros(0)
    if a.dtype != np.uint8 or not a.size or not (a.ndim == 2 or (a.ndim == 3 and a.shape[2] == 3)):
        raise UserError(f'a {what} is no image: give an array of uint8 (H, W, 3), or a tensor (3, H, W) of uint8 or of numbers from 0 to 1')
    return Image.fromarray(np.ascontiguousarray(a))

def load_photos(photos:list, transform:Callable, allow_large:bool=False, errors:str='skip') -> Iterator:
    """`transform(image)` of each photo in order, or the `UnreadablePhoto` in its place; read by several threads, a few ahead

    With errors='raise' the first unreadable photo is raised.
    """
    def load(photo):
        try: return transform(load_photo(photo, allow_large))
        except UnreadablePhoto as e: return e
    with ThreadPoolExecutor(THREADS) as pool:
        ahead = deque()
        for photo in with_progress(photos, MANY):
            if isinstance(photo, Image.Image):
                with suppress(Exception): photo.load() # two threads must not read one image; `load` raises the error of an unreadable one
            ahead.append(pool.submit(load, photo))
            if len(ahead) > 2*THREADS: yield checked(ahead.popleft().result(), errors)
        while ahead: yield checked(ahead.popleft().result(), errors)

def checked(loaded, errors):
    "Return what was loaded; with errors='raise', raise an `UnreadablePhoto` instead"
    if errors == 'raise' and isinstance(loaded, UnreadablePhoto): raise loaded
    return loaded

def warn_of(problems:Iterable[UnreadablePhoto], n:int):
    "Warn that some of `n` photos are left out, and name the first ones"
    problems = list(problems)
    if not problems: return
    more = f'; and {len(problems) - 3} more' if len(problems) > 3 else ''
    warnings.warn(f'{len(problems)} of {n} photos are left out: ' + '; '.join(map(str, problems[:3])) + more, stacklevel=4)
