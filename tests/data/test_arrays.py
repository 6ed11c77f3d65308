"""Pickles, .npz and parquet files: the images that were written, and a sentence for what is damaged, hostile or no set of images."""
import io
import json
import os

import numpy as np
import pytest
from helpers import cifar_archive, classes, list_classes, mutations, refused, says, zipped
from layouts import CLASSES, LAYOUTS, PIXELS, N, category_split_pickles, dump, encoded, shuffled
from PIL import Image

from grdd_fastai.core.errors import UserError
from grdd_fastai.data.array_files import read_npz
from grdd_fastai.data.cache import few_shot_data
from grdd_fastai.data.class_lists import SPLITS, class_list
from grdd_fastai.data.parts import image_file
from grdd_fastai.data.sources import open_source


class Evil:
    def __init__(self, marker): self.marker = marker
    def __reduce__(self): return os.system, (f'touch {self.marker}',)


# ---- one image --------------------------------------------------------------------------------------------------------

def test_an_array_and_the_bytes_of_a_file_give_the_same_pixels():
    im = next(iter(PIXELS.values()))[0]
    grey = im[..., 0]
    for given,want in ((im, im), (im.transpose(2, 0, 1), im), (encoded(im), im), (np.frombuffer(encoded(im), np.uint8), im),
                       (np.frombuffer(encoded(im), np.uint8)[:, None], im), (dict(bytes=encoded(im), path=None), im), (grey, grey),
                       (grey[..., None], grey), (Image.fromarray(im), im)):
        assert (np.asarray(Image.open(io.BytesIO(image_file(given)))) == want).all()
    for bad,word in ((im/255, 'float64'), (im[None], 'shape'), (dict(path='x.png'), 'not in the table')):
        with pytest.raises(ValueError, match=word): image_file(bad)


# ---- sets of images ---------------------------------------------------------------------------------------------------

ARRAYS = ('category_split_pickles', 'cache_pickles', 'encoded_pickles', 'npz_with_labels_apart')

@pytest.mark.parametrize('name', ARRAYS)
def test_a_file_stands_for_its_folder(tmp_path, name):
    root = LAYOUTS[name](tmp_path/'a')
    one = next(f for f in sorted(root.iterdir()) if 'val' in f.name and 'label' not in f.name and 'phase' not in f.name)
    assert open_source(one).stamp() == open_source(root).stamp()

def test_images_are_where_their_labels_say(tmp_path):
    source = open_source(category_split_pickles(tmp_path/'a'))
    for s in SPLITS:
        for r in source.frames[s].iloc[::7].itertuples():
            image = np.asarray(Image.open(io.BytesIO(source.read(r.path))))
            assert any((image == im).all() for im in PIXELS[r.label])

def test_two_sets_in_one_folder_are_told_apart_by_a_file(tmp_path):
    for s in SPLITS:
        _,images,y = shuffled(s)
        for name in ('A', 'B'): dump(dict(data=images, labels=[f'{name}{s}{i}' for i in y]), tmp_path/'x'/f'{name}_{s}.pickle')
    says(lambda: open_source(tmp_path/'x'), 'holds several data sets, A_test.pickle, B_test.pickle', 'give one of these files')
    assert all(c.startswith('B') for c in open_source(tmp_path/'x'/'B_val.pickle').frames['test'].label)

def test_a_set_without_splits_is_split_by_the_list_or_by_the_seed(tmp_path):
    classes_of = lambda s: {s:set(df.label) for s,df in s.frames.items()}
    images,names = np.concatenate(list(PIXELS.values())),np.repeat(list(PIXELS), N)
    np.savez(tmp_path/'mini.npz', x=images, y=names)
    assert classes_of(open_source(tmp_path/'mini.npz')) == {s:set(CLASSES[s]) for s in SPLITS}
    np.savez(tmp_path/'own.npz', x=images[:30], y=np.repeat(np.arange(10), 3), class_names=np.array([f'c{i}' for i in range(10)]))
    a,b = (classes_of(open_source(tmp_path/'own.npz', seed)) for seed in (0, 1))
    assert a != b and set.union(*a.values()) == {f'c{i}' for i in range(10)}

def test_splits_that_share_all_classes_are_put_together(tmp_path, capsys):
    "As those of an ordinary data set are, whose test images show the classes of the training images"
    images,labels = np.concatenate(list(PIXELS.values())),np.repeat(list(PIXELS), N).tolist()
    for s in SPLITS: dump(dict(data=images, labels=labels), tmp_path/'x'/f'{s}.pkl')
    source = open_source(tmp_path/'x')
    assert classes(source) == list_classes('mini_imagenet') and len(source.frames['test']) == 20*3*N
    assert 'its splits have the same classes' in capsys.readouterr().err

def test_numbers_of_cifar100_and_names_of_tiered_imagenet_become_the_usual_ones(tmp_path):
    fine = sorted(class_list('cifar_fs').label)
    for name in ('cifar_fs', 'fc100'):
        for s in SPLITS:
            codes = [fine.index(c) for c in list_classes(name)[s]]
            images = np.zeros((len(codes), 4, 4, 3), np.uint8) + np.array(codes, np.uint8)[:, None, None, None]
            dump(dict(data=images, labels=codes), tmp_path/name/f'FC_{s}.pickle')
        source = open_source(tmp_path/name)
        assert source.name == name and classes(source) == list_classes(name)
    tiered = class_list('tiered_imagenet')
    for s in SPLITS:
        names = tiered.name[tiered.split == s].tolist()
        dump([encoded(np.full((4, 4, 3), i % 251, np.uint8)) for i in range(len(names))], tmp_path/'t'/f'{s}_images_png.pkl')
        dump(dict(label_specific=np.arange(len(names)), label_specific_str=names), tmp_path/'t'/f'{s}_labels.pkl')
    assert open_source(tmp_path/'t').name == 'tiered_imagenet'

FAULTS = dict(
    no_images=(lambda: dict(labels=[1, 2]), 'holds no images'),
    no_labels=(lambda: dict(data=np.zeros((2, 4, 4, 3), np.uint8)), 'holds no labels'),
    too_few=(lambda: dict(data=np.zeros((3, 4, 4, 3), np.uint8), labels=[1, 2]), '3 images and 2 labels'),
    odd_labels=(lambda: dict(data=np.zeros((2, 4, 4, 3), np.uint8), labels=[1.5, 2]), 'neither texts nor whole numbers'),
    nested=(lambda: dict(data=np.zeros((2, 4, 4, 3), np.uint8), labels=[[1], [2, 3]]), 'labels'),
    below=(lambda: dict(data=np.zeros((2, 4, 4, 3), np.uint8), class_dict=dict(a=[0, -1])), 'rows that are not there'),
    twice=(lambda: dict(data=np.zeros((2, 4, 4, 3), np.uint8), class_dict=dict(a=[0, 1], b=[1])), 'gives row 1 two classes'),
    rows=(lambda: dict(data=np.zeros((2, 4, 4, 3), np.uint8), class_dict=dict(a=[0, 5])), 'rows that are not there'),
    gap=(lambda: dict(data=np.zeros((2, 4, 4, 3), np.uint8), class_dict=dict(a=[0])), 'leaves out row 1'),
    floats=(lambda: dict(data=np.zeros((2, 4, 4, 3), np.float32), labels=[1, 2]), 'float32'),
    a_number=(lambda: 5, 'holds no images'),
    a_text=(lambda: 'x'*5000, 'holds no images'),
)

@pytest.mark.parametrize('fault', FAULTS)
def test_a_pickle_that_is_no_set_is_one_sentence(tmp_path, fault):
    category_split_pickles(tmp_path/'x')
    dump(FAULTS[fault][0](), tmp_path/'x'/'miniImageNet_category_split_val.pickle')
    says(lambda: few_shot_data(tmp_path/'x', px=4, cache=tmp_path/'c'), FAULTS[fault][1])

def part(n, start=0, **more): return dict(data=np.stack([np.full((4, 4, 3), start + i, np.uint8) for i in range(n)])) | more

def test_labels_beside_a_set_that_has_its_own_are_not_read(tmp_path):
    for i,s in enumerate(SPLITS):
        dump(part(6, 10*i, labels=[f'{s}{c}' for c in range(6)]), tmp_path/'x'/f'{s}.pkl')
        dump(dict(labels=[f'{s} other']*6), tmp_path/'x'/f'other_{s}_labels.pkl')
    assert classes(open_source(tmp_path/'x')) == {s:[f'{s}{c}' for c in range(6)] for s in SPLITS}

def test_names_of_classes_and_names_of_images(tmp_path):
    "Six images of three classes: six names can be those of the images, or of six classes of which three are there"
    for i,s in enumerate(SPLITS):
        names = [f'{s}{c}' for c in range(6)]
        dump(part(6, 10*i, labels=[0, 0, 1, 1, 2, 2], class_names=names), tmp_path/'of_classes'/f'{s}.pkl')
        dump(part(6, 10*i, labels=[0, 0, 1, 1, 2, 2], names=np.repeat(names[:3], 2).tolist()), tmp_path/'of_images'/f'{s}.pkl')
    for name in ('of_classes', 'of_images'): assert classes(open_source(tmp_path/name)) == {s:[f'{s}{c}' for c in range(3)] for s in SPLITS}

def test_two_files_for_one_split_are_a_sentence(tmp_path):
    for i,s in enumerate((*SPLITS, 'base')): dump(part(3, 10*i, labels=[f'{s}{c}' for c in range(3)]), tmp_path/'x'/f'{s}.pkl')
    says(lambda: open_source(tmp_path/'x'), 'base.pkl and train.pkl for one split')
    (tmp_path/'y').mkdir()
    for i in range(3): np.savez(tmp_path/'y'/f'batch_{i}.npz', **part(3, 10*i, labels=[f'{i} {c}' for c in range(3)]))
    says(lambda: open_source(tmp_path/'y'), 'several data sets, batch_0.npz, batch_1.npz, batch_2.npz')

def test_numbers_that_begin_at_0_in_each_split_are_of_other_classes(tmp_path, capsys):
    for i,(s,n) in enumerate(zip(SPLITS, (12, 3, 4))): dump(part(n, 20*i, labels=list(range(n))), tmp_path/'x'/f'{s}.pkl')
    source = open_source(tmp_path/'x')
    assert classes(source) == {s:[f'{s} {y:02d}' for y in range(n)] for s,n in zip(SPLITS, (12, 3, 4))}
    assert 'numbered from 0 in each split' in capsys.readouterr().err
    for i,(s,mine) in enumerate(dict(train=[0, 11], val=[5], test=[3]).items()):
        dump(part(len(mine), 9*i, labels=mine), tmp_path/'y'/f'{s}.pkl')
    assert classes(open_source(tmp_path/'y')) == dict(train=['00', '11'], val=['05'], test=['03'])

def test_what_lies_beside_the_arrays(tmp_path):
    "Files of macOS, another archive of the same, and lists of file names; labels in files named y"
    root = category_split_pickles(tmp_path/'a')
    want = open_source(root).frames
    (root/'._miniImageNet_category_split_val.pickle').write_bytes(b'x')
    (root/'mini.tar').write_bytes(b'x')
    for s in SPLITS: (root/f'{s}.csv').write_text('filename,label\nn0153282900000005.jpg,n01532829\n')
    assert all((open_source(root).frames[s] == want[s]).all(axis=None) for s in SPLITS)
    for i,s in enumerate(SPLITS):
        (tmp_path/'npy').mkdir(exist_ok=True)
        np.save(tmp_path/'npy'/f'X_{s}.npy', part(3, 10*i)['data'])
        np.save(tmp_path/'npy'/f'y_{s}.npy', np.array([f'{s}{c}' for c in range(3)]))
    assert classes(open_source(tmp_path/'npy')) == {s:[f'{s}{c}' for c in range(3)] for s in SPLITS}

def test_a_missing_split_is_named(tmp_path):
    category_split_pickles(tmp_path/'x')
    (tmp_path/'x'/'miniImageNet_category_split_val.pickle').unlink()
    says(lambda: open_source(tmp_path/'x'), 'no such file for val', 'into one folder')

@pytest.mark.parametrize('name', ARRAYS)
def test_hostile_pickles_in_each_layout_run_nothing(tmp_path, name):
    root = LAYOUTS[name](tmp_path/'a')
    for f in sorted(root.glob('*.p*')):
        whole = f.read_bytes()
        dump(dict(data=[Evil(tmp_path/'marker')], labels=[0]), f)
        if 'train_phase_val' not in f.name and 'train_phase_test' not in f.name:
            says(lambda: few_shot_data(root, px=4, cache=tmp_path/'c'), 'refused to unpickle', f.name)
        f.write_bytes(whole)
    assert not (tmp_path/'marker').exists()

@pytest.mark.parametrize('name', ARRAYS)
def test_damaged_files_in_each_layout(tmp_path, name):
    root = LAYOUTS[name](tmp_path/'a')
    f = next(f for f in sorted(root.iterdir()) if 'val' in f.name and 'phase' not in f.name)
    n,whole = 0,f.read_bytes()
    for b in mutations(whole, 24):
        f.write_bytes(b)
        n += refused(lambda: few_shot_data(root, px=4, cache=tmp_path/'c'))
    assert n > 5 # numbers of pixels have no checksum

def test_npz_members_as_numpy_reads_them(tmp_path):
    arrays = dict(a=np.arange(24).reshape(2, 3, 4), b=np.asfortranarray(np.arange(6.).reshape(2, 3)), c=np.array(['x', 'yz']),
                  d=np.arange(3, dtype='>i2'))
    for save in (np.savez, np.savez_compressed):
        save(tmp_path/'x.npz', **arrays)
        with open(tmp_path/'x.npz', 'rb') as f:
            for k,v in read_npz(f, 'x').items(): assert (np.asarray(v) == arrays[k]).all() and (v[1] == arrays[k][1]).all()
    for save in (np.savez, np.savez_compressed):
        save(tmp_path/'x.npz', a=np.array([Evil(tmp_path/'marker')], object), b=np.float32(3), c=np.arange(3))
        with open(tmp_path/'x.npz', 'rb') as f: assert list(read_npz(f, 'x.npz')) == ['c'] # Python objects and single numbers are not read
    assert not (tmp_path/'marker').exists()

def test_a_flipped_bit_of_an_npz_is_found(tmp_path):
    np.savez(tmp_path/'x.npz', images=np.full((9, 4, 4, 3), 77, np.uint8))
    b = bytearray((tmp_path/'x.npz').read_bytes())
    b[b.index(bytes([77])*100) + 50] ^= 1
    (tmp_path/'x.npz').write_bytes(b)
    with open(tmp_path/'x.npz', 'rb') as f: says(lambda: read_npz(f, 'x.npz'), 'is not a whole .npz file')


# ---- parquet ----------------------------------------------------------------------------------------------------------

def parquet_set(root, names=None, columns=('image', 'label')):
    "As Hugging Face writes a data set: shards for a split, images as bytes, numbers of the classes and their names in the schema"
    pa = pytest.importorskip('pyarrow', reason='parquet files need pyarrow')
    pq = pytest.importorskip('pyarrow.parquet')
    (root/'data').mkdir(parents=True)
    for s in SPLITS:
        classes,images,y = shuffled(s)
        cut = len(y)//2
        about = json.dumps(dict(info=dict(features={columns[1]:dict(names=classes, _type='ClassLabel')})))
        for i,mine in enumerate((slice(0, cut), slice(cut, None))):
            table = pa.table({columns[0]:[dict(bytes=encoded(im), path=None) for im in images[mine]], columns[1]:y[mine]})
            pq.write_table(table.replace_schema_metadata(dict(huggingface=about)),
                           root/'data'/f'{dict(val="validation").get(s, s)}-{i:05d}-of-00002.parquet', row_group_size=7)
    return root

def test_parquet_files_give_the_fingerprint_of_the_pickles(tmp_path, cache):
    a,b = (few_shot_data(root, px=8, cache=cache) for root in (parquet_set(tmp_path/'p'), category_split_pickles(tmp_path/'c')))
    assert a.image_fingerprint == b.image_fingerprint and a.name == 'mini_imagenet' and (a.test.images[:] == b.test.images[:]).all()

def test_other_columns_and_damage_of_parquet_files_are_one_sentence(tmp_path):
    says(lambda: open_source(parquet_set(tmp_path/'a', columns=('photo', 'kind'))), 'columns photo, kind')
    root = parquet_set(tmp_path/'b')
    f = root/'data'/'test-00001-of-00002.parquet'
    f.write_bytes(f.read_bytes()[:-20])
    says(lambda: open_source(root), 'is not a whole parquet file')


# ---- CIFAR-100 --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('how', ['folder', 'tar'])
def test_torchvision_archive(tmp_path, how):
    path,parts = cifar_archive(tmp_path/'a', how=how)
    source = open_source(path)
    assert classes(source) == list_classes('cifar_fs') and [len(source.frames[s]) for s in SPLITS] == [192, 48, 60]
    row = source.frames['train'].iloc[0]
    image = np.asarray(Image.open(io.BytesIO(source.read(row.path))))
    of_class = np.array(parts['test']['fine_labels']) == parts['meta']['fine_label_names'].index(row.label)
    assert (image == parts['test']['data'][of_class][0].reshape(3, 32, 32).transpose(1, 2, 0)).all()

def test_a_zipped_archive_is_read(tmp_path):
    path,_ = cifar_archive(tmp_path/'a')
    assert open_source(zipped(path, tmp_path/'a.zip')).name == 'cifar_fs'

def test_a_broken_download_is_one_sentence(tmp_path):
    path,_ = cifar_archive(tmp_path/'a.tar.gz', how='tar')
    whole = path.read_bytes()
    for n in (len(whole)//2, len(whole)*3//4, 100):
        path.write_bytes(whole[:n])
        with pytest.raises(UserError, match='fetch it again|neither a folder'): open_source(path)

def test_damaged_pickle_archives(tmp_path):
    path,_ = cifar_archive(tmp_path/'a.tar.gz', n=1, how='tar')
    whole,n = path.read_bytes(),0
    good = few_shot_data(path, px=4, cache=tmp_path/'c').fingerprint
    for b in mutations(whole, 24):
        path.write_bytes(b)
        if refused(lambda: few_shot_data(path, px=4, cache=tmp_path/'c')): n += 1
        else: assert few_shot_data(path, px=4, cache=tmp_path/'c').fingerprint == good
    assert n > 15

def test_a_hostile_pickle_is_refused_and_does_nothing(tmp_path):
    path,_ = cifar_archive(tmp_path/'a', evil=Evil(tmp_path/'marker'))
    with pytest.raises(UserError, match='refused to unpickle'): open_source(path)
    assert not (tmp_path/'marker').exists()

def test_cifar100s_own_archive_has_the_rows_of_the_official_cifar_fs(real, tmp_path):
    "The archive is written from the real images with their own file names, in another order"
    names = sorted(class_list('cifar_fs').label)
    rows = [(f.rpartition('/')[2], names.index(c), im) for split in (real.train, real.val, real.test)
            for f,c,im in zip(split.df.filename, split.df.label, split.images)]
    order = np.random.default_rng(0).permutation(len(rows))
    root = tmp_path/'set'/'cifar-100-python'
    dump(dict(fine_label_names=names), root/'meta')
    for part,mine in (('train', order[:50_000]), ('test', order[50_000:])):
        dump(dict(data=np.stack([rows[i][2].transpose(2, 0, 1).reshape(-1) for i in mine]), fine_labels=[rows[i][1] for i in mine],
                  filenames=[rows[i][0] for i in mine]), root/part)
    again = few_shot_data(tmp_path/'set', cache=tmp_path/'c')
    assert again.image_fingerprint == real.image_fingerprint
    for s in SPLITS:
        one,two = getattr(real, s),getattr(again, s)
        assert (one.y == two.y).all() and one.vocab == two.vocab and (one.images[::97] == two.images[::97]).all()
