"""Classify photos with classifier.onnx: python predict_onnx.py photo.jpg ..."""
import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

HERE = Path(__file__).parent
ABOUT = json.loads((HERE/'classes.json').read_text())
BATCH = 32


def load(path):
    "Array (3, px, px) from 0 to 1: the middle of the upright photo"
    image = ImageOps.exif_transpose(Image.open(path))
    if image.mode[0] in 'IF': # grey levels of more than 8 bits, in the range that they use
        a = np.asarray(image, np.float32)
        top = a.max()
        full = 1 if image.mode == 'F' and top <= 1 else 255 if top <= 255 else 65535 if top <= 65535 else top
        image = Image.fromarray((a*(255/full)).clip(0, 255).astype(np.uint8))
    image = image.convert('RGB')
    px,side,how = ABOUT['px'],ABOUT['resize'],Image.Resampling[ABOUT['interpolation'].upper()]
    short = min(image.size)
    size = (side, side) if ABOUT['squash'] else tuple(side if n == short else int(side*n/short) for n in image.size)
    left,top = (round((n - px)/2) for n in size)
    return np.asarray(image.resize(size, how).crop((left, top, left + px, top + px)), np.float32).transpose(2, 0, 1)/255

def predict(paths):
    "(class, probability) of each file: 'unknown' for a photo that is like none of the classes, (None, None) for one that cannot be read"
    session = onnxruntime.InferenceSession(str(HERE/'classifier.onnx'))
    limit = -np.inf if ABOUT['unknown_below'] is None else ABOUT['unknown_below']
    found = []
    for i in range(0, len(paths), BATCH):
        photos = {}
        for path in paths[i:i + BATCH]:
            try: photos[path] = load(path)
            except (OSError, ValueError) as e: print(f'{path} cannot be read: {e}', file=sys.stderr)
        read = {}
        if photos:
            p,similarity = session.run(None, dict(photos=np.stack(list(photos.values()))))
            names = [ABOUT['classes'][row.argmax()] if s >= limit else ABOUT['unknown'] for row,s in zip(p, similarity)]
            read = dict(zip(photos, zip(names, p.max(1).tolist())))
        found += [read.get(path, (None, None)) for path in paths[i:i + BATCH]]
    return found


if __name__ == '__main__':
    if not sys.argv[1:]: sys.exit(__doc__)
    found = predict(sys.argv[1:])
    for path,(name,probability) in zip(sys.argv[1:], found):
        if name is not None: print(f'{path}\t{name}\t{probability:.2f}')
    sys.exit(any(name is None for name,_ in found))
