"""Image files of any kind to upright RGB arrays."""
import io
import warnings

import numpy as np
from PIL import Image, ImageOps

__all__ = ['decode']

# the image formats that are decoded; others, such as EPS, may run programs
FORMATS = ('PNG', 'JPEG', 'MPO', 'BMP', 'WEBP', 'GIF', 'TIFF', 'PPM', 'AVIF', 'JPEG2000')
MEGAPIXELS = 89 # of an image that is decoded without being asked about


def decode(image, px, allow_large=False):
    "The bytes of an image -> RGB uint8 (px, px, 3): upright, shorter side to `px`, centre crop; `allow_large` as in `open_image`"
    im = upright_rgb(open_image(io.BytesIO(image), allow_large))
    return np.asarray(im if im.size == (px, px) else ImageOps.fit(im, (px, px), Image.Resampling.BICUBIC))


def open_image(file, allow_large=False):
    """A PIL image, not yet decoded; ValueError above 89 megapixels, or with `allow_large` above 179

    A small file can hold an image that fills the memory. The limits are those at which Pillow warns and refuses.
    """
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', Image.DecompressionBombWarning) # the size is looked at here
        Image.init()
        im = Image.open(file, formats=[f for f in FORMATS if f in Image.OPEN])
    if not allow_large and im.width*im.height > MEGAPIXELS*10**6:
        raise ValueError(f'it has {im.width} x {im.height} pixels, more than {MEGAPIXELS} million: '
                         'make it smaller or allow it by --allow-large')
    return im

def upright_rgb(im):
    "A PIL image of any mode -> RGB, turned as its camera says"
    im = ImageOps.exif_transpose(im)
    if im.mode[0] in 'IF': im = Image.fromarray(_to_8_bit(np.asarray(im), im.mode))
    return im.convert('RGB')

def _to_8_bit(a, mode):
    "Deep grey levels by the range they use: [0, 1], 8 bit, 16 bit, or their own maximum"
    top = a.max() if a.size else 0
    full = 1 if mode == 'F' and top <= 1 else 255 if top <= 255 else 65535 if top <= 65535 else top
    out = np.empty(a.shape, np.uint8)
    # a row at a time: floating-point levels of a large image would fill the memory
    for row,levels in zip(out, a): row[:] = (levels * (255/full)).clip(0, 255)
    return out
