"""Every layout of raw data, told apart by their own files; every fault of a CSV a sentence."""
import os
import shutil
import subprocess
import sys
import zipfile

import pandas as pd
import pytest
from helpers import ROOT, classes, list_classes, mutations, posix, refused, says, write_csv_set, write_images, zipped

from grdd_fastai.core.errors import UserError
from grdd_fastai.data.cache import few_shot_data
from grdd_fastai.data.class_lists import SPLITS, class_list
from grdd_fastai.data.sources import open_source, prepare


def spelt_otherwise(label): return label.replace('_', ' ').title()


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

def test_split_folders(tmp_path):
    want = dict(train=['cat','dog'], val=['emu'], test=['fox','gnu'])
    for s,cs in want.items():
        for c in cs: write_images(tmp_path/dict(val='validation').get(s, s)/c, ['1.jpeg','2.BMP','3.webp'])
    assert classes(open_source(tmp_path)) == want

def test_base_images_without_classes_lie_in_train(tmp_path):
    "And the classes of the other splits stay where they are; images of these need classes"
    for folder in ('train', 'val/a', 'val/b', 'test/c', 'test/d'): write_images(tmp_path/folder, ['1.png', '2.png'])
    write_images(tmp_path/'val', ['stray.png']) # which is left out
    assert classes(open_source(tmp_path)) == dict(train=['train'], val=['a', 'b'], test=['c', 'd'])
    write_images(tmp_path/'flat'/'train'/'x', ['1.png'])
    for split in ('val', 'test'): write_images(tmp_path/'flat'/split, ['1.png'])
    says(lambda: open_source(tmp_path/'flat'), 'the images of test lie in it directly', 'a folder for each class')

def test_classes_that_are_called_like_splits_are_classes(tmp_path):
    for name in ('train', 'val', 'test', 'bus', 'car'): write_images(tmp_path/name, ['1.png'])
    assert sum(len(c) for c in classes(open_source(tmp_path)).values()) == 5

def test_class_folders_are_split_by_class_with_a_seed(tmp_path):
    for i in range(25): write_images(tmp_path/f'c{i}', ['a.png'], px=4)
    a,b,again = (classes(open_source(tmp_path, seed)) for seed in (0, 1, 0))
    assert a == again != b and [len(a[s]) for s in SPLITS] == [16, 4, 5]
    assert sorted(sum(a.values(), [])) == sorted(f'c{i}' for i in range(25))

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

def test_the_real_ravi_lists_agree_with_the_class_list(real_zip):
    path = real_zip.parent/'mini-imagenet-ravi-splits.zip'
    if not path.exists(): pytest.skip(f'the real miniImageNet lists are not at {path}')
    with zipfile.ZipFile(path) as z:
        for s in SPLITS: assert sorted(pd.read_csv(z.open(f'{s}.csv')).label.unique()) == list_classes('mini_imagenet')[s]


# ---- CSVs -------------------------------------------------------------------------------------------------------------

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

def test_damaged_csvs(tmp_path):
    root = write_csv_set(tmp_path/'set', (3, 3, 3), 4, px=8)
    whole,n = (root/'train.csv').read_bytes(),0
    for b in mutations(whole, 60):
        (root/'train.csv').write_bytes(b)
        if refused(lambda: open_source(root)): n += 1
        else: # what is accepted is a CSV of images that are there, in classes of their own
            source = open_source(root)
            assert all((root/p).resolve().is_relative_to(root) and (root/p).is_file() for df in source.frames.values() for p in df.path)
    assert n > 30

@posix
@pytest.mark.parametrize('target', ['pipe', '/dev/zero', '/etc/hostname', 'nowhere'])
def test_a_csv_that_names_one_gets_a_sentence(root, tmp_path, target):
    f = root/'images'/'train0'/'00.png'
    f.unlink()
    os.mkfifo(f) if target == 'pipe' else f.symlink_to(target)
    says(lambda: few_shot_data(root, px=8, cache=tmp_path/'c'), 'train.csv, row 2', 'train0/00.png')

def test_a_csv_of_blank_lines_takes_no_memory(root, tmp_path):
    "In a process that may not have more than 3 GB; read as one list of lines it took twenty times the file"
    with zipfile.ZipFile(tmp_path/'set.zip', 'w', zipfile.ZIP_DEFLATED) as z:
        for f in sorted(root.rglob('*')):
            if f.is_file() and f.name != 'val.csv': z.write(f, f.relative_to(root))
        with z.open('val.csv', 'w', force_zip64=True) as f:
            for _ in range(50): f.write(b'\n'*2**20)
    code = f'''
import resource
from grdd_fastai.data.sources import open_source
from grdd_fastai.core.errors import UserError
from grdd_fastai.fewshot.evaluate import evaluate
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try: open_source({str(tmp_path/'set.zip')!r})
except UserError as e: print(e)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
'''
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, timeout=120, cwd=ROOT)
    sentence,grown = done.stdout.strip().splitlines()
    assert 'val.csv is empty' in sentence and int(grown) < 300*1024 # kilobytes

@pytest.mark.parametrize('line, member, word', [('filename,label\n' + 'train0/00.png,train0\n'*3, 'train.csv', 'is listed twice'),
                                                (','*(2**21), 'train.csv', 'characters'), ('x'*(2**21), 'train.csv', 'characters')])
def test_texts_that_unpack_to_much(root, tmp_path, line, member, word):
    with zipfile.ZipFile(tmp_path/'set.zip', 'w', zipfile.ZIP_DEFLATED) as z:
        for f in sorted(root.rglob('*')):
            if f.is_file() and f.name != member: z.write(f, f.relative_to(root))
        z.writestr(member, line)
    says(lambda: open_source(tmp_path/'set.zip'), member, word)


# ---- labels -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('bad', ['a\rb', 'a\nb', 'a\x00b', 'a\x85b', 'a\u2028b'])
@pytest.mark.parametrize('where', ['label', 'filename'])
def test_control_characters_get_a_sentence(root, tmp_path, bad, where):
    if where == 'filename':
        if '\x00' in bad: pytest.skip('no file can be named so')
        (root/'images'/'train0'/'00.png').rename(root/'images'/'train0'/f'{bad}.png')
    text = (root/'train.csv').read_text()
    new = text.replace('train0/00.png,train0', f'"train0/{bad}.png",train0' if where == 'filename' else f'train0/00.png,"{bad}"')
    (root/'train.csv').write_bytes(new.encode())
    says(lambda: few_shot_data(root, px=8, cache=tmp_path/'c'), f'the {where}', 'control character')

def test_a_class_folder_with_a_carriage_return(folders, tmp_path):
    "It moved every label after it by a row"
    (folders/'train'/'train0').rename(folders/'train'/'tr\rain0')
    for call in (lambda: few_shot_data(folders, px=8, cache=tmp_path/'c'), lambda: prepare(folders, tmp_path/'out')):
        says(call, 'control character')

@pytest.mark.parametrize('header, row, says_', [
    ('filename,label,label', ',x', '2 columns label'), ('filename,filename,label', None, '2 columns filename'),
    ('row,filename,label', None, None)])
def test_columns_by_any_name(root, tmp_path, header, row, says_):
    "A column `row` is one as any other; a doubled one gets a sentence"
    lines = (root/'train.csv').read_text().splitlines()[1:]
    made = [f'{i},{line}' if header.startswith('row') else f'x,{line}' if row is None else line + row for i,line in enumerate(lines)]
    (root/'train.csv').write_text('\n'.join([header, *made]) + '\n')
    if says_: says(lambda: open_source(root), says_)
    else: assert list(open_source(root).frames['train'].label.unique()) == ['train0', 'train1', 'train2']
