"""Image files of many formats, decoded to upright RGB arrays."""
import io
import math
import re
import warnings

import numpy as np
from PIL import ExifTags, Image, ImageOps

from ..core.errors import UserError

__all__ = ['check_resize', 'crop_config', 'decode', 'square', 'open_image', 'upright_rgb']

# other formats are refused because decoding some of them, such as EPS, may run programs
FORMATS = ('PNG', 'JPEG', 'MPO', 'BMP', 'WEBP', 'GIF', 'TIFF', 'PPM', 'AVIF', 'JPEG2000')
MAX_MEGAPIXELS = 89 # size of the largest image that is decoded without `allow_large`


RESAMPLING = ('bicubic', 'bilinear', 'lanczos', 'box', 'hamming', 'nearest')

def check_resize(resize, interpolation, px):
    "Side in pixels before the centre is cut out by `resize` (`square`); UserError for an unknown name and for a side below `px`"
    if interpolation not in RESAMPLING: raise UserError(f'the interpolation is {interpolation!r}: give one of {", ".join(RESAMPLING)}')
    m = re.fullmatch(r'fit|squash|(?:crop|squash)(\d{1,4})', str(resize))
    side = int(m[1]) if m and m[1] else px
    if not m or side < px:
        raise UserError(f'resize is {resize!r}: give fit, squash, or crop or squash with a side of {px} or more, as in crop{px*8//7}')
    return side

def crop_config(resize, interpolation, px):
    "`resize` and `interpolation` in the words of timm's `pretrained_cfg`, by which a classifier of photos prepares them in the same way"
    side = check_resize(resize, interpolation, px)
    crop_pct = px/side
    while px/crop_pct < side: crop_pct = math.nextafter(crop_pct, 0) # timm takes the whole part of px/crop_pct for the side
    return dict(crop_pct=crop_pct, crop_mode='squash' if resize.startswith('squash') else 'center', interpolation=interpolation)

def decode(image, px, allow_large=False, resize='fit', interpolation='bicubic'):
    "Bytes of an image file -> upright uint8 RGB array (px, px, 3); `resize` as in `square`, limits as in `open_image`"
    return square(upright_rgb(open_image(io.BytesIO(image), allow_large)), px, resize, interpolation)

def square(im, px, resize='fit', interpolation='bicubic'):
    """Upright RGB image -> uint8 array (px, px, 3)

    `resize` fit: the shorter side becomes `px`, then the centre is cut out. squash: both sides become `px`. crop92 and squash92: the same
    with a side of 92, then the centre of `px` is cut out. An image that has the size already is not resized.
    """
    side = check_resize(resize, interpolation, px)
    how = Image.Resampling[interpolation.upper()]
    size = (side, side)
    if im.size != size: im = im.resize(size, how) if resize.startswith('squash') else ImageOps.fit(im, size, how)
    if side > px: im = im.crop(((side - px)//2, (side - px)//2, (side + px)//2, (side + px)//2)) # of the centre square, the centre
    return np.asarray(im)


def open_image(file, allow_large=False):
    """Open an image file as a PIL image without decoding it; ValueError above 89 megapixels, or above 179 with `allow_large`

    A small file can hold an image that fills the memory. At these limits Pillow itself warns and refuses.
    """
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', Image.DecompressionBombWarning) # the size is checked below
        Image.init()
        im = Image.open(file, formats=[f for f in FORMATS if f in Image.OPEN])
    if not allow_large and im.width*im.height > MAX_MEGAPIXELS*10**6:
        raise ValueError(f'it has {im.width} x {im.height} pixels, more than {MAX_MEGAPIXELS} million: '
                         'make it smaller or allow it by --allow-large (allow_large=True)')
    return im

def upright_rgb(im):
    "PIL image of any mode -> RGB image, turned upright by its EXIF orientation"
    if im.getexif().get(ExifTags.Base.Orientation, 1) != 1: im = ImageOps.exif_transpose(im) # copies an image that is upright, too
    if im.mode[0] in 'IF': im = Image.fromarray(_to_8_bit(np.asarray(im), im.mode))
    return im if im.mode == 'RGB' else im.convert('RGB')

def _to_8_bit(a, mode):
    "Grey levels (H, W) of more than 8 bits -> uint8, scaled by the range that they use: [0, 1], 8 bits, 16 bits or their own maximum"
    top = a.max() if a.size else 0
    full = 1 if mode == 'F' and top <= 1 else 255 if top <= 255 else 65535 if top <= 65535 else top
    out = np.empty(a.shape, np.uint8)
    # row by row, because floating-point levels of a whole large image would fill the memory
    for row,levels in zip(out, a): row[:] = (levels * (255/full)).clip(0, 255)
    return out
