import os
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
from PIL import Image

matplotlib.use('Agg')
ROOT = Path(__file__).parent.parent
REAL = Path(os.environ.get('CIFAR_FS', ROOT.parent/'shared'/'data'/'cifar-fs.zip'))


def write_images(folder, names, px=16, seed=0, hue=0., amplitude=90):
    "PNGs whose colour says their class a little and whose noise is their own; `hue` places the class"
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    base = 127 + amplitude*np.sin(2*np.pi*(hue + np.arange(3)/3))
    for name in names:
        (folder/name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((base + rng.normal(0, 40, (px, px, 3))).clip(0, 255).astype(np.uint8)).save(folder/name)

def write_csv_set(root, n_classes=(6, 6, 6), n_images=20, px=16, amplitude=90):
    "Split CSVs and images/: classes `<split><i>` of `n_images` each"
    for s,n in zip(('train','val','test'), n_classes):
        rows = []
        for c in range(n):
            names = [f'{s}{c}/{i:02d}.png' for i in range(n_images)]
            write_images(root/'images', names, px, hash_seed(s, c), c/n, amplitude)
            rows += [(f, f'{s}{c}') for f in names]
        pd.DataFrame(rows, columns=['filename','label']).to_csv(root/f'{s}.csv', index=False)
    return root

def hash_seed(*key): return abs(sum(ord(ch)*31**i for i,ch in enumerate(repr(key)))) % 2**31


@pytest.fixture(scope='session')
def csv_set(tmp_path_factory): return write_csv_set(tmp_path_factory.mktemp('set'))

@pytest.fixture(scope='session')
def faint(tmp_path_factory):
    "Split CSVs of classes that can hardly be told apart: no accuracy is 100%"
    return write_csv_set(tmp_path_factory.mktemp('faint'), amplitude=4)

@pytest.fixture(scope='session')
def cache(tmp_path_factory): return tmp_path_factory.mktemp('cache')

@pytest.fixture(scope='session')
def data(csv_set, cache):
    from grdd_fastai.data.cache import few_shot_data
    return few_shot_data(csv_set, px=16, cache=cache)

@pytest.fixture(scope='session')
def real_zip():
    if not REAL.exists(): pytest.skip(f'the real CIFAR-FS is not at {REAL} (set CIFAR_FS)')
    return REAL

@pytest.fixture(scope='session')
def real(real_zip, cache):
    from grdd_fastai.data.cache import few_shot_data
    return few_shot_data(real_zip, cache=cache)
