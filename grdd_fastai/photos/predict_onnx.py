"""Classify photos with classifier.onnx: python predict_onnx.py photo.jpg ..."""
import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

HERE = Path(__file__).parent
ABOUT = json.loads((HERE/'classes.json').read_text())


def load(path):
    "Array (3, px, px) from 0 to 1: the middle of the upright photo"
    image = ImageOps.exif_transpose(Image.open(path)).convert('RGB')
    px,side,how = ABOUT['px'],ABOUT['resize'],Image.Resampling[ABOUT['interpolation'].upper()]
    short = min(image.size)
    size = (side, side) if ABOUT['squash'] else tuple(side if n == short else int(side*n/short) for n in image.size)
    left,top = (round((n - px)/2) for n in size)
    return np.asarray(image.resize(size, how).crop((left, top, left + px, top + px)), np.float32).transpose(2, 0, 1)/255

def predict(paths):
    "A list of (class, probability) for a list of files; a photo that is like none of the classes is of the class 'unknown'"
    session = onnxruntime.InferenceSession(str(HERE/'classifier.onnx'))
    p,similarity = session.run(None, dict(photos=np.stack([load(path) for path in paths])))
    limit = -1 if ABOUT['unknown_below'] is None else ABOUT['unknown_below']
    return [(ABOUT['classes'][row.argmax()] if s >= limit else ABOUT['unknown'], float(row.max())) for row,s in zip(p, similarity)]


if __name__ == '__main__':
    for path,(name,probability) in zip(sys.argv[1:], predict(sys.argv[1:])): print(f'{path}\t{name}\t{probability:.2f}')
