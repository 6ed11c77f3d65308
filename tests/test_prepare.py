"""Every layout of raw data, told apart by their own files; every fault a sentence."""
import io
import os
import pickle
import shutil
import tarfile
import zipfile

import numpy as np
import pandas as pd
import pytest
from conftest import write_csv_set, write_images
from PIL import Image

from grdd_fastai.core.errors import UserError
from grdd_fastai.data.layouts import SPLITS, class_list
from grdd_fastai.data.sources import open_source, prepare


def classes(source): return {s:sorted(df.label.unique()) for s,df in source.frames.items()}

def list_classes(name): return {s:sorted(class_list(name).query('split==@s').label) for s in SPLITS}

def spelt_otherwise(label): return label.replace('_', ' ').title()

def zipped(folder, to):
    with zipfile.ZipFile(to, 'w') as z:
        for f in sorted(folder.rglob('*')):
            if f.is_file(): z.write(f, f.relative_to(folder))
    return to


def test_class_lists_are_64_16_20_disjoint():
    for name in ('cifar_fs', 'mini_imagenet'):
        df = class_list(name)
        assert df.split.value_counts().to_dict() == dict(train=64, val=16, test=20) and df.label.is_unique

def test_split_csvs(csv_set):
    source = open_source(csv_set)
    assert classes(source) == {s:[f'{s}{i}' for i in range(6)] for s in SPLITS}
    df = pd.read_csv(csv_set/'val.csv')
    assert (source.frames['val'].filename == df.filename).all() and (source.frames['val'].label == df.label).all()
    assert source.read(source.frames['val'].path[3]) == (csv_set/'images'/df.filename[3]).read_bytes()

def test_images_beside_the_csv_and_inside_a_zip(csv_set, tmp_path):
    root = shutil.copytree(csv_set, tmp_path/'deep'/'set')
    for f in (root/'images').iterdir(): f.rename(root/f.name)
    beside,inside = open_source(root),open_source(zipped(tmp_path/'deep', tmp_path/'x.zip'))
    for s in SPLITS:
        assert (beside.frames[s].label == inside.frames[s].label).all()
        assert beside.read(beside.frames[s].path[0]) == inside.read(inside.frames[s].path[0])

def test_labels_stay_text(tmp_path):
    "001, nan and None are names of classes like any other"
    for s,label in zip(SPLITS, ('001','nan','None')):
        write_images(tmp_path/'images', [f'{s}.png'])
        pd.DataFrame(dict(filename=[f'{s}.png'], label=[label])).to_csv(tmp_path/f'{s}.csv', index=False)
    assert classes(open_source(tmp_path)) == dict(train=['001'], val=['nan'], test=['None'])

@pytest.mark.parametrize('as_zip', [False, True])
def test_official_cifar_fs(tmp_path, as_zip):
    root = tmp_path/'c'/'cifar100'
    want = dict(train=['a_b','c'], val=['d'], test=['e'])
    (root/'splits'/'bertinetto').mkdir(parents=True)
    for s,cs in want.items():
        (root/'splits'/'bertinetto'/f'{s}.txt').write_text('\n'.join(cs))
        for c in cs: write_images(root/'data'/c, ['x.png','y.png'])
    source = open_source(zipped(tmp_path/'c', tmp_path/'c.zip') if as_zip else tmp_path/'c')
    assert classes(source) == want and len(source.frames['train']) == 4

@pytest.mark.parametrize('superclass', [False, True])
def test_cifar100_class_folders_train_and_test_merged(tmp_path, superclass):
    for part in ('train','test'):
        for i,c in enumerate(class_list('cifar_fs').label):
            write_images(tmp_path/part/(f'super{i%20}' if superclass else '')/spelt_otherwise(c), [f'{part}{i}.png'], px=4)
    source = open_source(tmp_path)
    assert classes(source) == list_classes('cifar_fs') and source.name == 'cifar_fs'
    assert [len(source.frames[s]) for s in SPLITS] == [128, 32, 40]

def test_mini_imagenet_class_folders(tmp_path):
    for c in class_list('mini_imagenet').label: write_images(tmp_path/c, ['0.jpg'], px=4)
    source = open_source(tmp_path)
    assert classes(source) == list_classes('mini_imagenet') and source.name == 'mini_imagenet'

def cifar_archive(path, n=2, how='folder', evil=None):
    names,rng = sorted(class_list('cifar_fs').label),np.random.default_rng(0)
    parts = {'meta':dict(fine_label_names=names, coarse_label_names=[])}
    for part,k in (('train', n), ('test', 1)):
        y = np.repeat(np.arange(100), k)
        parts[part] = dict(data=rng.integers(0, 256, (len(y), 3072), dtype=np.uint8), fine_labels=[int(v) for v in y],
                           filenames=[f'{part}{i}.png' for i in range(len(y))])
    raw = {f'cifar-100-python/{k}':pickle.dumps(v, protocol=2) for k,v in parts.items()}
    if evil is not None: raw['cifar-100-python/train'] = pickle.dumps(evil, protocol=2)
    if how == 'tar':
        with tarfile.open(path, 'w:gz') as tar:
            for k,b in raw.items():
                info = tarfile.TarInfo(k)
                info.size = len(b)
                tar.addfile(info, io.BytesIO(b))
    else:
        (path/'cifar-100-python').mkdir(parents=True)
        for k,b in raw.items(): (path/k).write_bytes(b)
    return path,parts

@pytest.mark.parametrize('how', ['folder', 'tar'])
def test_torchvision_archive(tmp_path, how):
    path,parts = cifar_archive(tmp_path/'a', how=how)
    source = open_source(path)
    assert classes(source) == list_classes('cifar_fs') and [len(source.frames[s]) for s in SPLITS] == [192, 48, 60]
    row = source.frames['train'].iloc[0]
    image = np.asarray(Image.open(io.BytesIO(source.read(row.path))))
    of_class = np.array(parts['test']['fine_labels']) == parts['meta']['fine_label_names'].index(row.label)
    assert (image == parts['test']['data'][of_class][0].reshape(3, 32, 32).transpose(1, 2, 0)).all()

class Evil:
    def __init__(self, marker): self.marker = marker
    def __reduce__(self): return os.system, (f'touch {self.marker}',)

def test_a_hostile_pickle_is_refused_and_does_nothing(tmp_path):
    path,_ = cifar_archive(tmp_path/'a', evil=Evil(tmp_path/'marker'))
    with pytest.raises(UserError, match='refused to unpickle'): open_source(path)
    assert not (tmp_path/'marker').exists()

def test_split_folders(tmp_path):
    want = dict(train=['cat','dog'], val=['emu'], test=['fox','gnu'])
    for s,cs in want.items():
        for c in cs: write_images(tmp_path/dict(val='validation').get(s, s)/c, ['1.jpeg','2.BMP','3.webp'])
    assert classes(open_source(tmp_path)) == want

def test_class_folders_are_split_by_class_with_a_seed(tmp_path):
    for i in range(25): write_images(tmp_path/f'c{i}', ['a.png'], px=4)
    a,b,again = (classes(open_source(tmp_path, seed)) for seed in (0, 1, 0))
    assert a == again != b and [len(a[s]) for s in SPLITS] == [16, 4, 5]
    assert sorted(sum(a.values(), [])) == sorted(f'c{i}' for i in range(25))

@pytest.mark.parametrize('kind', ['csvs', 'pickles'])
def test_prepare_writes_what_open_source_reads(csv_set, tmp_path, kind):
    src = csv_set if kind == 'csvs' else cifar_archive(tmp_path/'a')[0]
    before,after = open_source(src),open_source(prepare(src, tmp_path/'out'))
    for s in SPLITS:
        assert (before.frames[s].label == after.frames[s].label).all()
        for i in (0, -1): assert before.read(before.frames[s].path.iloc[i]) == after.read(after.frames[s].path.iloc[i])
    with pytest.raises(UserError, match='there already'): prepare(src, tmp_path/'out')

# ---- faults -----------------------------------------------------------------------------------------------------------

def edit(root, csv, f):
    text = (root/csv).read_text()
    (root/csv).write_text(f(text))

FAULTS = dict(
    empty=(lambda r: (r/'train.csv').write_text(''), r'train\.csv is empty'),
    no_rows=(lambda r: (r/'val.csv').write_text('filename,label\n'), r'val\.csv has no rows'),
    column=(lambda r: edit(r, 'val.csv', lambda t: t.replace('label', 'klass', 1)),
            r'val\.csv lacks the column label: it has filename, klass'),
    no_val=(lambda r: (r/'val.csv').unlink(), r'val\.csv is not'),
    missing=(lambda r: (r/'images/test2/05.png').unlink(), r'test\.csv, row 47: test2/05\.png is neither'),
    outside=(lambda r: edit(r, 'train.csv', lambda t: t.replace('train0/00.png', '../secret.png', 1)),
             r'row 2: \.\./secret\.png lies outside'),
    absolute=(lambda r: edit(r, 'train.csv', lambda t: t.replace('train0/00.png', '/etc/passwd', 1)), r'row 2: /etc/passwd lies outside'),
    no_label=(lambda r: edit(r, 'train.csv', lambda t: t.replace('train0/03.png,train0', 'train0/03.png,', 1)),
              r'row 5: the label is empty'),
    two_splits=(lambda r: edit(r, 'val.csv', lambda t: t.replace(',val0', ',train0')), r'class train0 is in both'),
    twice=(lambda r: edit(r, 'val.csv', lambda t: t.replace('val0/01.png', 'val0/00.png')), r'val0/00\.png is listed twice'),
    fields=(lambda r: edit(r, 'val.csv', lambda t: t.replace('val0/00.png,val0', 'val0/00.png,val0,', 1)),
            r'val\.csv, row 2 has 3 fields, the header 2'),
    quotes=(lambda r: edit(r, 'val.csv', lambda t: t.replace('val0/00.png', '"val0/00.png', 1)), r'val\.csv is not a readable CSV'),
    binary=(lambda r: (r/'train.csv').write_bytes(b'\xff\xfe\x00\x01'*9), r'train\.csv is not a readable CSV'),
)

@pytest.mark.parametrize('fault', FAULTS)
def test_a_bad_csv_is_one_sentence(tmp_path, fault):
    root,(harm,says) = write_csv_set(tmp_path/'set', (3, 3, 3), 6),FAULTS[fault]
    if fault == 'missing': root = write_csv_set(tmp_path/'set2', (3, 3, 3), 20)
    harm(root)
    with pytest.raises(UserError, match=says) as e: open_source(root)
    assert '\n' not in str(e.value) and str(root) in str(e.value)

def test_stray_images_do_not_change_a_split(tmp_path, capsys):
    for s,cs in dict(train=['a','b'], val=['c'], test=['d']).items():
        for c in cs: write_images(tmp_path/'parts'/s/c, ['1.png'])
    write_images(tmp_path/'parts'/'docs', ['logo.png'])
    assert classes(open_source(tmp_path/'parts')) == dict(train=['a','b'], val=['c'], test=['d'])
    for i,c in enumerate(class_list('cifar_fs').label): write_images(tmp_path/'cifar'/c, [f'{i}.png'], px=4)
    write_images(tmp_path/'cifar'/'docs', ['logo.png'])
    assert open_source(tmp_path/'cifar').name == 'cifar_fs'
    assert capsys.readouterr().err.count('logo.png the first') == 2

def test_a_class_in_two_official_lists_is_one_sentence(tmp_path):
    (tmp_path/'splits'/'bertinetto').mkdir(parents=True)
    for s,c in zip(SPLITS, 'aba'): (tmp_path/'splits'/'bertinetto'/f'{s}.txt').write_text(c)
    with pytest.raises(UserError, match='class a is in both train and test'): open_source(tmp_path)

def test_a_broken_download_is_one_sentence(tmp_path):
    path,_ = cifar_archive(tmp_path/'a.tar.gz', how='tar')
    whole = path.read_bytes()
    for n in (len(whole)//2, len(whole)*3//4, 100):
        path.write_bytes(whole[:n])
        with pytest.raises(UserError, match='fetch it again|neither a folder'): open_source(path)

def test_a_zipped_archive_is_read(tmp_path):
    path,_ = cifar_archive(tmp_path/'a')
    assert open_source(zipped(path, tmp_path/'a.zip')).name == 'cifar_fs'

@pytest.mark.parametrize('name', ['x'*300, '~nobody-of-this-name/x', 'nul\0byte'])
def test_impossible_names_are_one_sentence(csv_set, tmp_path, name):
    with pytest.raises(UserError, match='no such file'): open_source(name)
    root = shutil.copytree(csv_set, tmp_path/'set')
    (root/'val.csv').write_text(f'filename,label\n{name},v\n')
    with pytest.raises(UserError, match='val.csv'): open_source(root)

def test_names_that_are_no_utf8_are_read(tmp_path, cache):
    for c in (b'caf\xe9', b'b', b'c'): write_images(tmp_path/os.fsdecode(c), ['1.png','2.png'])
    from grdd_fastai.data.cache import few_shot_data
    data = few_shot_data(tmp_path, px=8, cache=cache)
    assert os.fsdecode(b'caf\xe9') in data.train.vocab + data.val.vocab + data.test.vocab

def test_prepare_leaves_nothing_of_a_failure(csv_set, tmp_path):
    bad = zipped(csv_set, tmp_path/'bad.zip')
    b = bytearray(bad.read_bytes())
    b[3000:3100] = bytes(100)
    bad.write_bytes(b)
    mine = tmp_path/'out.part'
    mine.mkdir()
    with pytest.raises(UserError, match='cannot be read'): prepare(bad, tmp_path/'out')
    assert {p.name for p in tmp_path.iterdir()} == {'bad.zip', 'out.part'}

def test_other_faults_are_one_sentence(tmp_path):
    (tmp_path/'text.txt').write_text('hello')
    (tmp_path/'void').mkdir()
    write_images(tmp_path/'two'/'a', ['x.png']), write_images(tmp_path/'two'/'b', ['x.png'])
    bad = tmp_path/'bad.zip'
    bad.write_bytes(zipped(tmp_path/'two', tmp_path/'ok.zip').read_bytes()[:-30])
    for path,says in ((tmp_path/'nowhere','no such file'), (tmp_path/'text.txt','neither a folder'), (tmp_path/'void','no split CSVs'),
                      (tmp_path/'two','at least 3'), (bad,'neither a folder')):
        with pytest.raises(UserError, match=says): open_source(path)

# ---- the real thing ---------------------------------------------------------------------------------------------------

def test_the_real_cifar_fs(real_zip):
    source = open_source(real_zip)
    assert source.name == 'cifar_fs' and classes(source) == list_classes('cifar_fs')
    assert {s:set(df.label.value_counts()) for s,df in source.frames.items()} == {s:{600} for s in SPLITS}

def test_the_real_ravi_lists_agree_with_the_class_list(real_zip):
    path = real_zip.parent/'mini-imagenet-ravi-splits.zip'
    if not path.exists(): pytest.skip(f'the real miniImageNet lists are not at {path}')
    with zipfile.ZipFile(path) as z:
        for s in SPLITS: assert sorted(pd.read_csv(z.open(f'{s}.csv')).label.unique()) == list_classes('mini_imagenet')[s]
