"""Raw data opened and prepared: what is read is what was written, and a sentence for what is no data."""
import os
import shutil
import zipfile

import layouts
import numpy as np
import pytest
import torch
import torchvision
from helpers import cifar_archive, classes, list_classes, posix, says, write_images, zipped
from PIL import Image

from grdd_fastai.core.errors import UserError
from grdd_fastai.data.cache import few_shot_data
from grdd_fastai.data.class_lists import SPLITS
from grdd_fastai.data.sources import open_source, prepare


@pytest.mark.parametrize('kind', ['csvs', 'pickles'])
def test_prepare_writes_what_open_source_reads(csv_set, tmp_path, kind):
    src = csv_set if kind == 'csvs' else cifar_archive(tmp_path/'a')[0]
    before,after = open_source(src),open_source(prepare(src, tmp_path/'out'))
    for s in SPLITS:
        assert (before.frames[s].label == after.frames[s].label).all()
        for i in (0, -1): assert before.read(before.frames[s].path.iloc[i]) == after.read(after.frames[s].path.iloc[i])
    with pytest.raises(UserError, match='there already'): prepare(src, tmp_path/'out')

def test_prepare_leaves_nothing_of_a_failure(csv_set, tmp_path):
    bad = zipped(csv_set, tmp_path/'bad.zip')
    b = bytearray(bad.read_bytes())
    b[3000:3100] = bytes(100)
    bad.write_bytes(b)
    mine = tmp_path/'out.part'
    mine.mkdir()
    with pytest.raises(UserError, match='cannot be read'): prepare(bad, tmp_path/'out')
    assert {p.name for p in tmp_path.iterdir()} == {'bad.zip', 'out.part'}

@pytest.mark.parametrize('change', ['a..b', 'latin1', 'nameless'])
def test_prepared_names_are_the_images_own(tmp_path, change):
    for s,c in (('train', 'a..b'), ('train', 'a_b'), ('val', 'v'), ('test', 't')): write_images_of(tmp_path/'set'/s/c)
    if change == 'a..b':
        out = prepare(tmp_path/'set', tmp_path/'out')
        assert (sorted(f.relative_to(out).as_posix() for f in out.rglob('*.png'))[1:3]
                == ['images/train/train/a..b/0.png', 'images/train/train/a_b/0.png']
                and len(open_source(out).frames['train']) == 2)
    if change == 'latin1':
        (tmp_path/'set'/'train'/'a_b').rename(os.fsdecode(os.fsencode(tmp_path/'set'/'train') + b'/caf\xe9'))
        says(lambda: prepare(tmp_path/'set', tmp_path/'out'), 'is not UTF-8')
    if change == 'nameless':
        with zipfile.ZipFile(tmp_path/'x.zip', 'w') as z:
            for f in sorted((tmp_path/'set').rglob('*.png')):
                z.writestr(str(f.relative_to(tmp_path/'set')).replace('a_b/', '/'), f.read_bytes())
        says(lambda: prepare(tmp_path/'x.zip', tmp_path/'out'), 'a class folder without a name')

def write_images_of(folder):
    folder.mkdir(parents=True)
    Image.fromarray(np.random.default_rng(hash_of(folder)).integers(0, 255, (8, 8, 3), np.uint8)).save(folder/'0.png')
def hash_of(folder): return sum(map(ord, folder.name))

@pytest.mark.parametrize('name', ['x'*300, '~nobody-of-this-name/x', 'nul\0byte'])
def test_impossible_names_are_one_sentence(csv_set, tmp_path, name):
    with pytest.raises(UserError, match='no such file'): open_source(name)
    root = shutil.copytree(csv_set, tmp_path/'set')
    (root/'val.csv').write_text(f'filename,label\n{name},v\n')
    with pytest.raises(UserError, match='val.csv'): open_source(root)

def test_names_that_are_no_utf8_are_read(tmp_path, cache):
    for c in (b'caf\xe9', b'b', b'c'): write_images(tmp_path/os.fsdecode(c), ['1.png','2.png'])
    data = few_shot_data(tmp_path, px=8, cache=cache)
    assert os.fsdecode(b'caf\xe9') in data.train.vocab + data.val.vocab + data.test.vocab

def test_other_faults_are_one_sentence(tmp_path):
    (tmp_path/'text.txt').write_text('hello')
    (tmp_path/'void').mkdir()
    write_images(tmp_path/'two'/'a', ['x.png']), write_images(tmp_path/'two'/'b', ['x.png'])
    bad = tmp_path/'bad.zip'
    bad.write_bytes(zipped(tmp_path/'two', tmp_path/'ok.zip').read_bytes()[:-30])
    for path,fault in ((tmp_path/'nowhere','no such file'), (tmp_path/'text.txt','neither a folder'), (tmp_path/'void','no train.csv'),
                       (tmp_path/'two','at least 3'), (bad,'neither a folder')):
        with pytest.raises(UserError, match=fault): open_source(path)

@posix
@pytest.mark.parametrize('what', ['fifo', '/dev/zero', '/dev/urandom'])
def test_data_that_is_no_file(tmp_path, what):
    if what == 'fifo': os.mkfifo(what := tmp_path/'fifo')
    for call in (lambda: few_shot_data(what, cache=tmp_path/'c'), lambda: prepare(what, tmp_path/'out')):
        says(call, 'neither a folder nor a regular file')

def test_the_real_cifar_fs(real_zip):
    source = open_source(real_zip)
    assert source.name == 'cifar_fs' and classes(source) == list_classes('cifar_fs')
    assert {s:set(df.label.value_counts()) for s,df in source.frames.items()} == {s:{600} for s in SPLITS}


# ---- data sets in memory ----------------------------------------------------------------------------------------------

def test_torchvision_data_sets_by_split(tmp_path, cache):
    root = layouts.split_folders(tmp_path/'set')
    sets = {s:torchvision.datasets.ImageFolder(root/s) for s in SPLITS}
    data,want = few_shot_data(sets, px=12, cache=cache),few_shot_data(root, px=12, cache=cache)
    assert data.image_fingerprint == want.image_fingerprint and data.test.vocab == want.test.vocab and data.name == 'mini_imagenet'
    made = os.stat(data.folder/'train.npy').st_mtime_ns
    assert os.stat(few_shot_data(sets, px=12, cache=cache).folder/'train.npy').st_mtime_ns == made # known again by its pixels
    sets['train'].samples = sets['train'].samples[1:]
    sets['train'].targets = sets['train'].targets[1:]
    assert len(few_shot_data(sets, px=12, cache=cache).train) == len(want.train) - 1

def test_one_torchvision_data_set_is_split_by_its_classes(tmp_path, cache):
    whole = torchvision.datasets.ImageFolder(layouts.imagenet_tree(tmp_path/'set'))
    assert few_shot_data(whole, px=12, cache=cache).image_fingerprint == few_shot_data(tmp_path/'set', px=12, cache=cache).image_fingerprint

def test_hugging_face_data_sets(tmp_path, cache):
    hf = pytest.importorskip('datasets', reason='Hugging Face data sets need datasets')
    sets = {}
    for s in SPLITS:
        names,images,y = layouts.shuffled(s)
        features = hf.Features(image=hf.Image(), label=hf.ClassLabel(names=names))
        rows = dict(image=[dict(bytes=layouts.encoded(im), path=None) for im in images], label=y.tolist())
        sets[dict(val='validation').get(s, s)] = hf.Dataset.from_dict(rows, features=features)
    data = few_shot_data(hf.DatasetDict(sets), px=12, cache=cache)
    assert data.image_fingerprint == few_shot_data(layouts.split_csvs(tmp_path/'csvs'), px=12, cache=cache).image_fingerprint

class Pairs(torch.utils.data.Dataset):
    "A data set of torch of given items"
    def __init__(self, items): self.items = items
    def __len__(self): return len(self.items)
    def __getitem__(self, i): return self.items[i]

@pytest.mark.parametrize('data, words', [
    (5, ('a int', 'give a path')), (Pairs([]), ('is empty',)), (Pairs([1, 2, 3]), ('other kind than (image, label)',)),
    (Pairs([(torch.zeros(3, 4, 4), 0)]), ('gives tensors', 'transform')),
    (Pairs([(Image.new('RGB', (4, 4)), [0, 1])]), ('labels',))])
def test_data_sets_that_cannot_be_read_are_one_sentence(data, words, cache): says(lambda: few_shot_data(data, px=4, cache=cache), *words)

def test_a_hub_data_set_that_cannot_be_fetched_is_one_sentence(monkeypatch):
    import huggingface_hub
    def refuse(*args, **kwargs): raise OSError('no route to host')
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', refuse)
    says(lambda: open_source('hf://datasets/owner/name'), 'hf://datasets/owner/name could not be fetched', 'no route to host')
