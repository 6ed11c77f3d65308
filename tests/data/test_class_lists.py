"""The field's class lists, with the counts of their papers, and the split that a user asks for."""
import zipfile

import layouts
import pandas as pd
import pytest
from helpers import cifar_archive, classes, list_classes, says, write_images
from layouts import CLASSES, PIXELS, N, encoded, tar_of

from grdd_fastai.data.cache import few_shot_data
from grdd_fastai.data.class_lists import CLASS_LISTS, SPLITS, class_list, read_split
from grdd_fastai.data.sources import open_source

COUNTS = dict(cifar_fs=(64, 16, 20), fc100=(60, 20, 20), mini_imagenet=(64, 16, 20), mini_imagenet_vinyals=(60, 20, 20),
              tiered_imagenet=(351, 97, 160), cub=(100, 50, 50))

def test_counts():
    assert COUNTS.keys() == CLASS_LISTS.keys()
    for name,counts in COUNTS.items():
        df = class_list(name)
        assert df.split.value_counts().to_dict() == dict(zip(SPLITS, counts)) and df.label.is_unique

def test_what_the_papers_say_of_their_lists():
    "FC100 splits CIFAR-100's superclasses, CUB is split by the position of a class, and tieredImageNet's names are unique"
    fish = {'aquarium_fish', 'flatfish', 'ray', 'shark', 'trout'}
    fc100 = class_list('fc100').set_index('label').split
    assert set(fc100.index) == set(class_list('cifar_fs').label) and set(fc100[list(fish)]) == {'train'}
    assert set(fc100[['baby', 'boy', 'girl', 'man', 'woman']]) == {'test'}
    cub = class_list('cub').set_index('label').split
    for i,c in enumerate(sorted(cub.index)):
        assert c.startswith(f'{i + 1:03d}.') and cub[c] == ('train' if i%2 == 0 else 'val' if i%4 == 1 else 'test')
    assert class_list('tiered_imagenet').name.is_unique
    for name in ('mini_imagenet', 'mini_imagenet_vinyals', 'tiered_imagenet'): assert class_list(name).label.str.fullmatch(r'n\d{8}').all()

def test_fc100_of_cifar100_is_one_flag(tmp_path, cache):
    source = open_source(cifar_archive(tmp_path/'a')[0], split='fc100')
    assert classes(source) == list_classes('fc100') and source.name == 'fc100'
    one,two = (few_shot_data(tmp_path/'a', px=4, cache=cache, split=split) for split in ('fc100', None))
    assert one.fingerprint != two.fingerprint and one.image_fingerprint != two.image_fingerprint and one.folder != two.folder

def test_cub_from_its_tar(tmp_path):
    png = encoded(PIXELS['n01532829'][0])
    labels = class_list('cub').label
    members = {f'CUB_200_2011/images/{c}/{c[4:]}_{i:04d}.jpg':png for c in labels for i in range(2)} | {'CUB_200_2011/README':b'Birds'}
    source = open_source(tar_of(tmp_path/'CUB_200_2011.tgz', members, 'w:gz'))
    assert source.name == 'cub' and classes(source) == list_classes('cub')

@pytest.mark.parametrize('kind', ['tree', 'tars'])
def test_a_list_takes_its_classes_out_of_imagenet(tmp_path, kind, capsys):
    root = (layouts.imagenet_tree if kind == 'tree' else layouts.a_tar_for_each_class)(tmp_path/'set')
    for i in range(30):
        if kind == 'tree': write_images(root/f'n0000{i:04d}', ['1.png', '2.png'], px=4)
        else: tar_of(root/f'n0000{i:04d}.tar', {'1.png':b'which no one opens'})
    source = open_source(root, split='mini_imagenet')
    assert source.name == 'mini_imagenet' and sum(map(len, source.frames.values())) == 100*N
    if kind == 'tree':
        open_source(root)
        assert '--split mini_imagenet takes them alone' in capsys.readouterr().err

def ravi_zip(path, first=1, n=N):
    with zipfile.ZipFile(path, 'w') as z:
        for s in SPLITS:
            rows = [(f'{c}{i + first:08d}.jpg', c) for c in CLASSES[s] for i in range(n)]
            z.writestr(f'{s}.csv', pd.DataFrame(rows, columns=['filename', 'label']).to_csv(index=False))
    return path

@pytest.mark.parametrize('kind', ['tree', 'tars'])
def test_ravi_and_larochelles_lists_name_positions(tmp_path, kind):
    "Counted by hand: of the files c_1, c_4, c_7 and c_100, positions 2 and 3 are c_4 and c_7"
    root = tmp_path/'set'
    names = [f'{k}.JPEG' for k in (1, 4, 7, 100)]
    for c in PIXELS:
        if kind == 'tree':
            for k in names: layouts.write(root/c/f'{c}_{k}', PIXELS[c][0])
        else: tar_of(root/f'{c}.tar', {f'{c}_{k}':encoded(PIXELS[c][0]) for k in names})
    source = open_source(root, split=ravi_zip(tmp_path/'ravi.zip', first=2, n=2))
    assert set(source.frames['val'].path) == {f'{c}/{c}_{k}.JPEG' for c in CLASSES['val'] for k in (4, 7)}
    says(lambda: open_source(root, split=ravi_zip(tmp_path/'more.zip', first=4, n=2)), 'has no image', '00000005.jpg')

def test_the_real_ravi_lists_have_600_images_of_each_class(real_zip):
    path = real_zip.parent/'mini-imagenet-ravi-splits.zip'
    if not path.exists(): pytest.skip(f'the real miniImageNet lists are not at {path}')
    rows = read_split(path)
    assert {s:sorted(mine.label.unique()) for s,mine in rows.groupby('split')} == list_classes('mini_imagenet')
    assert set(rows.groupby('label').size()) == {600}

def test_lists_of_ones_own(tmp_path):
    for c in 'abcdef': write_images(tmp_path/'set'/c, ['1.png', '2.png'], px=4)
    split_of = dict(a='base', b='train', c='val', d='novel', e='test')
    pd.DataFrame(split_of.items(), columns=['label', 'split']).to_csv(tmp_path/'mine.csv', index=False)
    want = dict(train=['a', 'b'], val=['c'], test=['d', 'e'])
    assert classes(open_source(tmp_path/'set', split=tmp_path/'mine.csv')) == want
    (tmp_path/'lists').mkdir()
    for s,cs in want.items(): (tmp_path/'lists'/f'{s}.txt').write_text('\n'.join(cs))
    assert classes(open_source(tmp_path/'set', split=tmp_path/'lists')) == want
    files = [('a/1.png', 'a', 'train'), ('2.png', 'b', 'val'), ('c/2.png', 'c', 'test')]
    pd.DataFrame(files, columns=['filename', 'label', 'split']).to_csv(tmp_path/'files.csv', index=False)
    frames = open_source(tmp_path/'set', split=tmp_path/'files.csv').frames
    assert [frames[s].path.tolist() for s in SPLITS] == [['a/1.png'], ['b/2.png'], ['c/2.png']]

def test_a_csv_with_a_column_split_is_a_data_set(tmp_path):
    rows = [(f'{c}/{i}.png', c, s) for c,s in dict(a='train', b='validation', c='test').items() for i in range(2)]
    for f,_,_ in rows: write_images(tmp_path, [f], px=4)
    pd.DataFrame(rows, columns=['filename', 'label', 'split']).to_csv(tmp_path/'all.csv', index=False)
    assert classes(open_source(tmp_path/'all.csv')) == dict(train=['a'], val=['b'], test=['c'])

@pytest.mark.parametrize('split, words', [
    ('imagenet', ('imagenet', 'neither a list nor a path', 'fc100')), ('fc100', ('has no images of', '100 classes of fc100')),
    ('void', ('has no train.csv or train.txt',)), ('text.csv', ('lacks the columns label, split',)), ('odd.csv', ("the split 'holdout'",)),
    ('both.csv', ('class a is in both',)), ('x.png', ('x.png', 'neither a list nor a path'))])
def test_a_split_that_cannot_be_is_one_sentence(tmp_path, split, words):
    for c in 'abc': write_images(tmp_path/'set'/c, ['1.png'], px=4)
    (tmp_path/'void').mkdir()
    (tmp_path/'text.csv').write_text('kind\na\n')
    (tmp_path/'odd.csv').write_text('label,split\na,holdout\n')
    (tmp_path/'both.csv').write_text('label,split\na,train\na,test\nb,val\n')
    write_images(tmp_path, ['x.png'], px=4)
    path = tmp_path/split
    says(lambda: open_source(tmp_path/'set', split=path if path.exists() else split), *words)
