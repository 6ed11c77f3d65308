"""Image files of many formats, decoded to upright RGB arrays."""
import io
import warnings

import numpy as np
from PIL import ExifTags, Image, ImageOps

__all__ = ['decode', 'square', 'open_image', 'upright_rgb']

# other formats are refused because decoding some of them, such as EPS, may run programs
FORMATS = ('PNG', 'JPEG', 'MPO', 'BMP', 'WEBP', 'GIF', 'TIFF', 'PPM', 'AVIF', 'JPEG2000')
MAX_MEGAPIXELS = 89 # size of the largest image that is decoded without `allow_large`


def decode(image, px, allow_large=False):
    "Bytes of an image file -> uint8 RGB array (px, px, 3): upright, shorter side resized to `px`, centre crop; limits as in `open_image`"
    return square(upright_rgb(open_image(io.BytesIO(image), allow_large)), px)

def square(im, px):
    "Upright RGB image -> uint8 array (px, px, 3): shorter side resized to `px`, centre crop"
    return np.asarray(im if im.size == (px, px) else ImageOps.fit(im, (px, px), Image.Resampling.BICUBIC))


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
