"""Test which inputs count as photos, and what happens to photos that cannot be read."""
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import says, write_images
from PIL import Image

from grdd_fastai.photos.reading import THREADS, UnreadablePhoto, list_photos, load_photo, load_photos, photo_name


@pytest.fixture
def folder(tmp_path):
    "Three photos, one of them in a subfolder, and files that are not photos or are hidden"
    write_images(tmp_path/'new', ['b.png', 'a.jpg'], 20)
    write_images(tmp_path/'new'/'more', ['c.png'], 20)
    write_images(tmp_path/'new'/'.hidden', ['d.png'], 20)
    write_images(tmp_path/'new', ['.e.png'], 20)
    (tmp_path/'new'/'notes.txt').write_text('no photo')
    return tmp_path/'new'

def test_a_folder_a_pattern_and_a_list_of_files(folder):
    assert [f.name for f in list_photos(folder)] == ['a.jpg', 'b.png', 'c.png'] == [f.name for f in list_photos(str(folder))]
    assert [f.name for f in list_photos(folder/'*')] == ['a.jpg', 'b.png']
    assert [f.name for f in list_photos(str(folder/'**'/'*.png'))] == ['b.png', 'c.png']
    assert list_photos([folder/'b.png', 'x.png']) == [folder/'b.png', Path('x.png')] and list_photos(folder/'b.png') == [folder/'b.png']
    says(lambda: list_photos(folder/'*.webp'), 'no image matches')
    (folder/'empty').mkdir()
    says(lambda: list_photos(folder/'empty'), 'holds no images')

def test_a_file_whose_name_looks_like_a_pattern_is_that_file(tmp_path):
    write_images(tmp_path, ['a[1].png', 'a1.png'], 20)
    assert list_photos(tmp_path/'a[1].png') == [tmp_path/'a[1].png']

def test_arrays_and_tensors_are_the_image_they_hold():
    a = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)
    x = torch.from_numpy(a).movedim(-1, 0)
    for photo in (a, x, x/255, Image.fromarray(a)): assert (np.array(load_photo(photo)) == a).all()
    assert (np.array(load_photo(a[..., 0])) == a[..., :1]).all() # grey
    assert [len(list_photos(o)) for o in (a, a[..., 0], x, a[None].repeat(4, 0), x[None], [a, x])] == [1, 1, 1, 4, 1, 2]
    for wrong in (a.astype(float), a[..., :2], x[:2], x.float(), torch.zeros(6, 9), np.zeros((0, 9, 3), np.uint8), 5):
        says(lambda w=wrong: load_photo(w), 'is no image')

def test_names_are_the_files(folder):
    path = folder/'b.png'
    assert photo_name(path) == photo_name(str(path)) == photo_name(Image.open(path)) == str(path)
    assert photo_name(Image.new('RGB', (3, 3))) is None and photo_name(np.zeros((3, 3, 3), np.uint8)) is None

def test_unreadable_photos_stay_in_their_place_or_stop(folder):
    (folder/'b.png').write_bytes(b'no image')
    photos = [folder/'a.jpg', folder/'b.png', folder/'gone.png', folder/'more'/'c.png']
    kinds = [type(o) for o in load_photos(photos, np.array)]
    assert kinds == [np.ndarray, UnreadablePhoto, UnreadablePhoto, np.ndarray]
    says(lambda: list(load_photos(photos, np.array, errors='raise')), 'b.png cannot be read as an image')

def test_many_photos_come_in_order_and_only_a_few_are_held():
    "A slow reader of the results does not let the decoded photos pile up"
    held,most,lock = [0],[0],threading.Lock()
    def transform(im):
        with lock:
            held[0] += 1
            most[0] = max(most[0], held[0])
        return im.getpixel((0, 0))[0]
    for i,value in enumerate(load_photos([np.full((2, 2, 3), i, np.uint8) for i in range(100)], transform)):
        assert value == i
        time.sleep(.001)
        with lock: held[0] -= 1
    assert i == 99 and most[0] <= 2*THREADS + 2
