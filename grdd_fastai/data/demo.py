"""The embedded data set: characters in matplotlib's own fonts, with random affine maps, colours and noise."""
import hashlib
from functools import lru_cache

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw, ImageFont

from .class_lists import SPLITS
from .parts import png

__all__ = ['DemoSource']


CHARS = ('ABDEFGHJKLMNPQRTUVWXYZ' 'abdefghkmnqrty' '23456789' 'ΓΔΘΛΞΠΣΦΨΩαβγδεζηλμξπρστφψω' 'БДЖИЛЦЧШЩЪЭЮЯ' '@#$%&?€∞≈≠√∫±¶§¿')
FONTS = ('DejaVuSans', 'DejaVuSans-Bold', 'DejaVuSerif', 'DejaVuSerif-Bold', 'DejaVuSansMono')
N_CLASSES = dict(train=64, val=16, test=20)
PX = 32


@lru_cache
def _glyph(char, font, side=64):
    "An 8-bit mask (side, side) with the character in its centre"
    import matplotlib
    im = Image.new('L', (side, side))
    face = ImageFont.truetype(f'{matplotlib.get_data_path()}/fonts/ttf/{font}.ttf', 44)
    ImageDraw.Draw(im).text((side/2, side/2), char, fill=255, font=face, anchor='mm')
    return im


def draw(char, rng):
    "A uint8 image (32, 32, 3) of `char`, dark on light paper: font, rotation, shear, scale, position, colours and noise are random"
    side = 64
    mask = _glyph(char, FONTS[rng.integers(len(FONTS))])
    angle = rng.uniform(-.45, .45)
    scale = side/PX*rng.uniform(.75, 1.25)
    shear = rng.uniform(-.3, .3)
    A = scale*np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) @ np.array([[1, shear], [0, 1]])
    b = side/2 - A @ (np.full(2, PX/2) + rng.uniform(-4, 4, 2))
    alpha = np.asarray(mask.transform((PX, PX), Image.Transform.AFFINE, (*A[0], b[0], *A[1], b[1]),
                                      Image.Resampling.BILINEAR))[..., None] / 255
    paper,ink = rng.uniform(130, 255, 3),rng.uniform(0, 110, 3)
    noise = rng.normal(0, rng.uniform(5, 20), (PX, PX, 3))
    return (paper*(1-alpha) + ink*alpha + noise).clip(0, 255).astype(np.uint8)


class DemoSource:
    "A `Source` of 64/16/20 drawn classes: image i of a class is drawn when it is read and depends only on the seed, the class and i"
    name = path = 'demo'
    ordered = True # its rows stay in the order in which they are drawn
    def __init__(self, seed=0, n_per_class=80):
        self.seed,self.n_per_class = seed,n_per_class
        self.key = f'demo {seed}'
        self.frames = {}
        chars = list(CHARS)
        np.random.default_rng(seed).shuffle(chars)
        for s in SPLITS:
            mine,chars = chars[:N_CLASSES[s]],chars[N_CLASSES[s]:]
            files = [(f'u{ord(c):04x}_{i:03d}.png', c) for c in sorted(mine) for i in range(n_per_class)]
            df = pd.DataFrame(files, columns=['filename','label'])
            self.frames[s] = df.assign(path=df.filename)

    def read(self, path):
        char,i = int(path[1:5], 16),int(path[6:9])
        return png(draw(chr(char), np.random.default_rng([self.seed, char, i])))

    def stamp(self): return hashlib.sha256(repr(('demo 2', self.seed, self.n_per_class)).encode()).hexdigest()
