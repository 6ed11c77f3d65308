"""Decoded images: any format, upright, at their centre, of sides and kinds that may be."""
import os

import numpy as np
import pytest
from helpers import says
from PIL import Image

from grdd_fastai.data.cache import few_shot_data
from grdd_fastai.data.images import decode
from grdd_fastai.models.create import create_backbone
from grdd_fastai.photos.classifier import FewShotClassifier


@pytest.mark.parametrize('mode, suffix',
                         [('RGB','jpg'), ('L','png'), ('P','gif'), ('RGBA','webp'), ('CMYK','jpg'), ('1','bmp'), ('I;16','tiff')])
def test_any_format_becomes_rgb(tmp_path, mode, suffix):
    grey = np.full((20, 20), 200, np.uint8)
    im = Image.fromarray(grey.astype(np.uint16)*256) if mode == 'I;16' else Image.fromarray(grey).convert('RGB').convert(mode, dither=0)
    im.save(tmp_path/f'x.{suffix}')
    x = decode((tmp_path/f'x.{suffix}').read_bytes(), 16)
    assert x.shape == (16, 16, 3) and x.dtype == np.uint8 and abs(x.astype(int) - (255 if mode == '1' else 200)).max() <= 6

@pytest.mark.parametrize('a, mode', [(np.array([[0., .5], [1., 1.]]), 'F'), (np.array([[0, 128], [255, 255]]), 'I'),
                                     (np.array([[0, 32768], [65535, 65535]]), 'I')])
def test_deep_grey_levels_are_not_black(tmp_path, a, mode):
    Image.fromarray(a.astype(np.float32 if mode == 'F' else np.int32)).save(tmp_path/'x.tiff')
    assert np.abs(decode((tmp_path/'x.tiff').read_bytes(), 2)[..., 0].astype(int) - [[0, 128], [255, 255]]).max() <= 1

def test_a_photo_is_upright_and_cropped_at_its_centre(tmp_path):
    a = np.zeros((30, 60, 3), np.uint8)
    a[:, :15],a[:, 45:],a[:15, 15:45] = 255,255,(200, 0, 0) # white margins to lose, a red upper half to keep
    exif = Image.Exif()
    exif[0x0112] = 3 # taken upside down
    Image.fromarray(a).rotate(180).save(tmp_path/'x.png', exif=exif)
    x = decode((tmp_path/'x.png').read_bytes(), 30)
    assert (x[:14] == (200, 0, 0)).all() and (x[16:] == 0).all()

def test_photos_above_89_megapixels_are_asked_about(tmp_path):
    Image.new('L', (11_648, 8_736)).save(tmp_path/'large.png') # 102 megapixels, as a medium format camera makes them
    photo = (tmp_path/'large.png').read_bytes()
    with pytest.raises(ValueError, match='11648 x 8736 pixels, more than 89 million'): decode(photo, 8)
    assert decode(photo, 8, allow_large=True).shape == (8, 8, 3)
    net = create_backbone('convnet4', 0)
    says(lambda: FewShotClassifier(net).fit([tmp_path/'large.png']*2, ['a', 'b']), '--allow-large')
    assert FewShotClassifier(net, allow_large=True).fit([tmp_path/'large.png']*2, ['a', 'b']).vocab == ['a', 'b']

def test_an_image_that_is_a_program_is_not_run(folders, tmp_path, monkeypatch):
    (tmp_path/'bin').mkdir()
    (tmp_path/'bin'/'gs').write_text(f'#!/bin/sh\ntouch {tmp_path}/ran\n')
    (tmp_path/'bin'/'gs').chmod(0o755)
    monkeypatch.setenv('PATH', f'{tmp_path/"bin"}:{os.environ["PATH"]}')
    (folders/'train'/'train0'/'00.png').write_bytes(b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n{ } loop\n')
    says(lambda: few_shot_data(folders, px=8, cache=tmp_path/'c'), '00.png does not decode')
    assert not (tmp_path/'ran').exists()
