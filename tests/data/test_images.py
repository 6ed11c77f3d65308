"""Decoded images: any format, upright, at their centre, of sides and kinds that may be."""
import os

import numpy as np
import pytest
import timm
import torch
from helpers import SMALL, recipe, says
from PIL import Image

from grdd_fastai.data.cache import few_shot_data
from grdd_fastai.data.class_lists import SPLITS
from grdd_fastai.data.images import crop_config, decode, square
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


# ---- from an image to a square ----------------------------------------------------------------------------------------

WIDE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 5, 3), dtype=np.uint8)).resize((60, 44), Image.Resampling.BICUBIC)

@pytest.mark.parametrize('resize, by_hand', [
    ('fit', lambda im: im.resize((20, 20), Image.Resampling.BILINEAR, box=(8, 0, 52, 44))),
    ('squash', lambda im: im.resize((20, 20), Image.Resampling.BILINEAR)),
    ('crop24', lambda im: im.resize((24, 24), Image.Resampling.BILINEAR, box=(8, 0, 52, 44)).crop((2, 2, 22, 22))),
    ('squash24', lambda im: im.resize((24, 24), Image.Resampling.BILINEAR).crop((2, 2, 22, 22)))])
def test_resizing_by_name(resize, by_hand):
    assert (square(WIDE, 20, resize, 'bilinear') == np.asarray(by_hand(WIDE))).all()

@pytest.mark.parametrize('resize', ['fit', 'squash', 'crop92', 'squash92', 'crop96', 'crop97', 'squash125'])
@pytest.mark.parametrize('interpolation', ['bicubic', 'bilinear', 'lanczos'])
def test_timm_prepares_photos_in_the_same_way(resize, interpolation):
    config = crop_config(resize, interpolation, 84)
    transform = timm.data.create_transform((3, 84, 84), mean=(0,)*3, std=(1,)*3, **config)
    im = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 9, 3), dtype=np.uint8)).resize((180, 240), Image.Resampling.BICUBIC)
    mine = square(im, 84, resize, interpolation)
    theirs = (transform(im)*255).round().permute(1, 2, 0).numpy()
    assert mine.shape == (84, 84, 3) and abs(mine - theirs).mean() < (.01 if resize.startswith('squash') else 3)

def test_an_image_that_has_its_size_is_left_as_it_is():
    im = WIDE.resize((20, 20))
    for resize in ('fit', 'squash'): assert (square(im, 20, resize, 'lanczos') == np.asarray(im)).all()

@pytest.mark.parametrize('resize, interpolation, word', [
    ('stretch', 'bicubic', 'resize'), ('crop', 'bicubic', 'crop or squash with a side'), ('crop10', 'bicubic', 'a side of 20 or more'),
    ('fit', 'cubic', 'bicubic, bilinear')])
def test_names_that_are_none(resize, interpolation, word): says(lambda: square(WIDE, 20, resize, interpolation), word)

def test_how_images_were_resized_is_part_of_everything(tmp_path, cache):
    for s in SPLITS:
        for c in range(3):
            (tmp_path/'set'/s/f'{s}{c}').mkdir(parents=True)
            for i in range(6): WIDE.rotate(17*i + c).save(tmp_path/'set'/s/f'{s}{c}'/f'{i}.png')
    found = [few_shot_data(tmp_path/'set', 16, cache, resize=resize) for resize in ('fit', 'squash', 'crop20')]
    assert len({d.fingerprint for d in found}) == len({d.image_fingerprint for d in found}) == len({d.folder for d in found}) == 3
    done = recipe('train')(data=str(tmp_path/'set'), cache=str(cache), out=str(tmp_path/'run'), px=16, way=2, resize='squash',
                           **SMALL | dict(query=2, meta_query=2))
    assert done['resize'] == 'squash bicubic' and done['image_fingerprint'] == found[1].image_fingerprint
    few = FewShotClassifier(tmp_path/'run') # which prepares photos as the run's images were prepared
    photo = few.transform(WIDE)*torch.tensor(found[1].stats[1]).view(3, 1, 1) + torch.tensor(found[1].stats[0]).view(3, 1, 1)
    assert abs((photo*255).permute(1, 2, 0).numpy() - square(WIDE, 16, 'squash')).max() < 1
