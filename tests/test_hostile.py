"""What strangers and accidents put in the way: pipes, devices, links, forged files, sizes, full disks. A sentence each, no hang."""
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import zipfile

import numpy as np
import pytest
import torch
from conftest import ROOT, write_csv_set
from PIL import Image
from safetensors.torch import save_file
from test_recipes import SMALL, recipe
from test_resume import settings, stopped

from grdd_fastai.core import storage
from grdd_fastai.core.errors import UserError
from grdd_fastai.core.storage import atomic_write, load_tensors, locked, output_folder, read_json, save_tensors
from grdd_fastai.data.cache import few_shot_data
from grdd_fastai.data.images import decode
from grdd_fastai.data.sources import open_source, prepare
from grdd_fastai.experiments.publish import publish
from grdd_fastai.experiments.table import CL, EL, table
from grdd_fastai.fewshot.evaluate import evaluate
from grdd_fastai.fewshot.predict import FewShotClassifier
from grdd_fastai.models.create import create_backbone
from grdd_fastai.models.pretrained import load_network, save_weights
from grdd_fastai.runs.provenance import command, public

posix = pytest.mark.skipif(os.name != 'posix', reason='pipes, devices and links of POSIX')

@contextlib.contextmanager
def no_hang(seconds=20):
    "An error after `seconds`, where a pipe or a device is waited for"
    def fail(*_): raise AssertionError('it hangs')
    was = signal.signal(signal.SIGALRM, fail)
    signal.alarm(seconds)
    try: yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, was)

def says(f, *words):
    "`f` ends in a UserError of one sentence that holds each of `words`"
    with no_hang(), pytest.raises(UserError) as e: f()
    text = str(e.value)
    assert '\n' not in text and len(text) < 600 and all(w in text for w in words), text

@pytest.fixture
def root(tmp_path): return write_csv_set(tmp_path/'set', (3, 3, 3), 6, px=8)

@pytest.fixture
def folders(root):
    "The same images without CSVs: train, val and test folders of class folders"
    for s in ('train', 'val', 'test'):
        (root/f'{s}.csv').unlink()
        (root/s).mkdir()
        for d in (root/'images').glob(f'{s}[0-9]'): d.rename(root/s/d.name)
    return root


# ---- files that are none ----------------------------------------------------------------------------------------------

@posix
def test_pipes_devices_and_links_that_lead_out_are_left_out_and_said(folders, tmp_path, capfd):
    n = {s:len(df) for s,df in open_source(folders).frames.items()}
    outside = tmp_path/'secret.png'
    Image.new('RGB', (8, 8)).save(outside)
    a = folders/'train'/'train0'
    os.mkfifo(a/'pipe.png')
    for name,target in (('zero.png', '/dev/zero'), ('random.png', '/dev/urandom'), ('passwd.png', '/etc/passwd'), ('gone.png', 'nowhere'),
                        ('out.png', outside), ('self.png', 'self.png')):
        (a/name).symlink_to(target)
    (a/'inside.png').symlink_to('../train1/00.png') # a link that stays inside is a file
    (folders/'train'/'loop').symlink_to('..')
    with no_hang():
        capfd.readouterr()
        source = open_source(folders)
        assert {s:len(df) for s,df in source.frames.items()} == n | dict(train=n['train'] + 1)
        said = capfd.readouterr().err
        assert '8 links that lead out of the folder, nowhere or in a circle, pipes and devices are left out, train/loop the first' in said
        out = prepare(folders, tmp_path/'prepared')
    assert not any(f.is_symlink() for f in out.rglob('*')) and b'root:' not in b''.join(f.read_bytes() for f in out.rglob('*.png'))

@posix
@pytest.mark.parametrize('target', ['pipe', '/dev/zero', '/etc/hostname', 'nowhere'])
def test_a_csv_that_names_one_gets_a_sentence(root, tmp_path, target):
    f = root/'images'/'train0'/'00.png'
    f.unlink()
    os.mkfifo(f) if target == 'pipe' else f.symlink_to(target)
    says(lambda: few_shot_data(root, px=8, cache=tmp_path/'c'), 'train.csv, row 2', 'train0/00.png')

@posix
@pytest.mark.parametrize('target', ['pipe', '/dev/zero', '/dev/urandom', 'nowhere', 'folder'])
def test_a_photo_that_is_none_gets_a_sentence(tmp_path, target):
    f = tmp_path/'photo.png'
    if target == 'pipe': os.mkfifo(f)
    elif target == 'folder': f.mkdir()
    else: f.symlink_to(target)
    net = create_backbone('convnet4', 0)
    says(lambda: FewShotClassifier(net).fit([f, f], ['a', 'b']), 'photo.png cannot be read as an image')

@posix
@pytest.mark.parametrize('name', ['settings.json', 'result.json', 'data.json', 'student_cl.json', 'checkpoint_student_cl.safetensors'])
def test_pipes_in_a_run(csv_set, cache, tmp_path, name):
    out = stopped(csv_set, cache, tmp_path/'run')
    (out/name).unlink(missing_ok=True)
    os.mkfifo(out/name)
    with no_hang(60), contextlib.suppress(UserError): stopped(csv_set, cache, out)

@posix
@pytest.mark.parametrize('name', ['net.json', 'net.safetensors', 'config.json', 'model.safetensors'])
def test_pipes_in_a_network(tmp_path, name):
    save_weights(create_backbone('convnet4', 0), tmp_path/'net', arch='convnet4', px=32, stats=[[.5]*3, [.2]*3])
    if name.startswith(('config', 'model')):
        publish(create_backbone('convnet4', 0), ABOUT, tmp_path)
        for f in ('net.json', 'net.safetensors'): (tmp_path/f).unlink()
    (tmp_path/name).unlink()
    os.mkfifo(tmp_path/name)
    says(lambda: load_network(tmp_path), str(tmp_path))

@posix
def test_a_lock_that_is_a_link_or_a_pipe_is_refused(tmp_path):
    (tmp_path/'precious').write_text('mine')
    (tmp_path/'a').symlink_to('precious')
    (tmp_path/'b').symlink_to('made')
    os.mkfifo(tmp_path/'c')
    for n in 'abc': says(lambda n=n: locked(tmp_path/n).__enter__(), 'remove it')
    assert (tmp_path/'precious').read_text() == 'mine' and not (tmp_path/'made').exists()

@posix
def test_what_is_half_written_has_a_name_nobody_can_foretell(tmp_path, monkeypatch):
    seen,real = [],os.replace
    def replace(a, b): seen.append(os.path.basename(a)); real(a, b)
    monkeypatch.setattr(os, 'replace', replace)
    (tmp_path/'precious').write_text('mine')
    (tmp_path/'.x.json.part').symlink_to('precious')
    for _ in range(2): atomic_write(tmp_path/'x.json', 'content')
    assert len(set(seen)) == 2 and (tmp_path/'precious').read_text() == 'mine' and (tmp_path/'x.json').read_text() == 'content'
    for name in ('.x.json.0123456789abcdef.part', '.mine.part', '.other.0123456789abcdef.part'): (tmp_path/name).write_text('half')
    storage.sweep(tmp_path, 'x.json')
    assert {f.name for f in tmp_path.iterdir()} == {'precious', 'x.json', '.x.json.part', '.mine.part', '.other.0123456789abcdef.part'}
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path/'x.json').stat().st_mode & 0o777 == 0o666 & ~umask


# ---- networks from strangers ------------------------------------------------------------------------------------------

ABOUT = dict(stats=[[.5]*3, [.2]*3], px=32, scores=dict(val={'1-shot':dict(accuracy=50., ci95=1., n=9)}), supervision='CL', classes=['a'],
             dataset='x', fingerprint='f'*64,
             settings={}, trained=dict(command='python recipes/table2.py --data /home/alice/secret/birds.zip --cache=/home/alice/c',
                                       commit='c', device='d', torch_threads=1, versions=dict(torch='1', timm='1')))

def forged(folder, change=None, tensors=None, **cfg):
    "A published network whose config.json `change`s, or whose pretrained_cfg has `cfg`"
    publish(create_backbone('convnet4', 0), ABOUT, folder)
    config = json.loads((folder/'config.json').read_text())
    config['pretrained_cfg'] |= cfg
    (folder/'config.json').write_text(json.dumps(config | (change or {})))
    if tensors is not None: save_file(tensors, folder/'model.safetensors', metadata=dict(format='pt'))
    return folder

def test_a_published_network_is_read_as_it_was(tmp_path):
    net = load_network(forged(tmp_path/'convnet4.mine')).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad(): assert torch.equal(net(x), create_backbone('convnet4', 0).eval()(x))
    assert net.pretrained_cfg['mean'] == (.5, .5, .5) and net.pretrained_cfg['input_size'] == (3, 32, 32)

@pytest.mark.parametrize('name', ['pytorch_model.bin', 'model.pth', 'weights.pt'])
def test_pickles_are_refused_before_they_are_opened(tmp_path, name):
    folder = forged(tmp_path/'convnet4.mine')
    (folder/'model.safetensors').unlink()
    class Evil:
        def __reduce__(self): return os.system, (f'touch {tmp_path}/marker',)
    torch.save(dict(a=Evil()), folder/name)
    says(lambda: load_network(folder), 'has no model.safetensors', name, 'safetensors')
    with pytest.raises(UserError) as e: load_network(folder)
    assert 'weights_only' not in str(e.value) and not (tmp_path/'marker').exists()

@pytest.mark.parametrize('cfg, change, word', [
    (dict(pretrained_strict=False), dict(pretrained_strict=False, model_args=dict(pretrained_strict=False)), 'pretrained_strict'),
    ({}, dict(model_args=dict(widths=[12000]*4)), 'widths'), ({}, dict(model_args=dict(widths=[4000]*4)), 'does not fit'),
    ({}, dict(model_args=dict(checkpoint_path='/etc/passwd')), 'checkpoint_path'),
    ({}, dict(model_args=dict(widths=[[[[1]]]])), 'widths'), ({}, dict(model_args=dict(nothing=1)), 'cannot be built'),
    ({}, dict(model_args=[1]), 'does not describe'),
    ({}, dict(architecture='resnet18'), 'does not fit'), ({}, dict(architecture='vit_giant_patch14_224'), 'does not fit'),
    ({}, dict(architecture=['x']), 'architecture'), ({}, dict(architecture='nothing_like_it'), 'unknown backbone'),
    (dict(input_size=[3, 100000, 100000]), {}, 'images of 100000 px'), (dict(input_size=[1, 32, 32]), {}, 'RGB'),
    (dict(input_size='x'), {}, 'does not describe'), (dict(std=[0, 1, 1]), {}, 'std'),
    (dict(mean=['a']*3), {}, 'mean'), (dict(crop_pct=9), {}, 'crop_pct'), ({}, dict(pretrained_cfg=5), 'does not describe')])
def test_forged_configs(tmp_path, cfg, change, word): says(lambda: load_network(forged(tmp_path/'convnet4.mine', change, **cfg)), word)

def test_weights_are_all_of_the_network_or_refused(tmp_path):
    state = create_backbone('convnet4', 0).state_dict()
    one = {'stages.0.0.weight':state['stages.0.0.weight']}
    says(lambda: load_network(forged(tmp_path/'a', tensors=one, pretrained_strict=False)), 'does not fit the network', 'is missing')
    says(lambda: load_network(forged(tmp_path/'b', tensors=state | dict(more=torch.ones(2)))), 'more is none of its tensors')
    says(lambda: load_network(forged(tmp_path/'c', tensors=state | {'stages.0.0.weight':torch.ones(2, 2)})), 'has the shape (2, 2)')
    (tmp_path/'c'/'model.safetensors').write_bytes(b'\xff'*100)
    says(lambda: load_network(tmp_path/'c'), 'is damaged')

@pytest.mark.parametrize('change',
                         [dict(px='x'), dict(px=10**5), dict(px=0), dict(px=True), dict(stats=[]), dict(stats=[[.5]*3, [0, 1, 1]]),
                          dict(stats=[[.5], [.2]]), dict(arch=5), dict(arch='x/y'), dict(sha256=5)])
@pytest.mark.parametrize('how', ['card', '[]', 'null', 'deep'])
def test_forged_cards(tmp_path, change, how):
    save_weights(create_backbone('convnet4', 0), tmp_path/'net', **dict(arch='convnet4', px=32, stats=[[.5]*3, [.2]*3]))
    card = json.loads((tmp_path/'net.json').read_text()) | change
    (tmp_path/'net.json').write_text(dict(card=json.dumps(card), deep='['*200_000 + ']'*200_000).get(how, how))
    says(lambda: load_network(tmp_path), str(tmp_path))

def test_json_of_any_shape(tmp_path):
    for text in ('[]', 'null', '5', '"x"', '{', '', '['*200_000, '{"a": NaN}', '{"a": 1', '\xff'):
        (tmp_path/'x.json').write_bytes(text.encode('latin1'))
        says(lambda: read_json(tmp_path/'x.json'), 'x.json is damaged')
    (tmp_path/'x.json').write_text('{"a": true}')
    says(lambda: read_json(tmp_path/'x.json', keys=dict(a=int)), 'a is missing or no int')
    assert read_json(tmp_path/'none.json', {}) == {} and read_json(tmp_path/'x.json', keys=dict(a=bool)) == dict(a=True)


# ---- sizes ------------------------------------------------------------------------------------------------------------

def test_photos_above_89_megapixels_are_asked_about(tmp_path):
    Image.new('L', (11_648, 8_736)).save(tmp_path/'large.png') # 102 megapixels, as a medium format camera makes them
    photo = (tmp_path/'large.png').read_bytes()
    with pytest.raises(ValueError, match='11648 x 8736 pixels, more than 89 million'): decode(photo, 8)
    assert decode(photo, 8, allow_large=True).shape == (8, 8, 3)
    net = create_backbone('convnet4', 0)
    says(lambda: FewShotClassifier(net).fit([tmp_path/'large.png']*2, ['a', 'b']), '--allow-large')
    assert FewShotClassifier(net, allow_large=True).fit([tmp_path/'large.png']*2, ['a', 'b']).vocab == ['a', 'b']

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

@pytest.mark.parametrize('px', [0, -1, 100_000, 2.5, '32', None])
def test_sides_that_cannot_be(root, tmp_path, px): says(lambda: few_shot_data(root, px=px, cache=tmp_path/'c'), 'px must be from 1 to 1024')


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

@pytest.mark.parametrize('other', ['TRAIN0', 'train0 ', 'tra\u0131n0', '\uff54rain0'])
def test_classes_that_differ_in_spelling_alone_are_a_warning(root, tmp_path, other, capfd):
    text = (root/'val.csv').read_text().replace(',val0', f',"{other}"')
    (root/'val.csv').write_bytes(text.encode())
    capfd.readouterr()
    few_shot_data(root, px=8, cache=tmp_path/'c')
    said = capfd.readouterr().err
    if other == 'tra\u0131n0': assert 'differ in case' not in said # a dotless i is another letter
    else: assert f"the classes 'train0' (train) and {other!r} (val) differ in case, blanks or Unicode form alone" in said

def test_an_image_in_two_splits_is_a_warning_every_time(root, tmp_path, capfd):
    (root/'images'/'test1'/'03.png').write_bytes((root/'images'/'train2'/'01.png').read_bytes())
    for _ in range(2):
        capfd.readouterr()
        data = few_shot_data(root, px=8, cache=tmp_path/'c')
        assert '1 images are in two splits' in (said := capfd.readouterr().err) and 'test1/03.png (test) is train2/01.png (train)' in said
    assert data.shared == [['test', 'test1/03.png', 'train', 'train2/01.png']]


# ---- runs -------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def finished(csv_set, cache, tmp_path_factory):
    "The files of a finished run, to be laid out anew"
    out = tmp_path_factory.mktemp('finished')/'run'
    recipe('cifarfs_5w1s')(out=str(out), **settings(csv_set, cache))
    return {f.name:f.read_bytes() for f in out.iterdir()}

def laid_out(files, out):
    out.mkdir()
    for name,content in files.items(): (out/name).write_bytes(content)
    return out

def files_of(out): return {f.name:f.read_bytes() for f in out.iterdir()}

def test_a_finished_run_is_not_replaced(finished, csv_set, cache, tmp_path, capfd):
    out,main = laid_out(finished, tmp_path/'run'),recipe('cifarfs_5w1s')
    for change in ({}, dict(lr=.1), dict(epochs=1)):
        says(lambda change=change: main(out=str(out), **settings(csv_set, cache, **change)), 'holds a finished run',
             '--resume to print its result', '--overwrite')
    says(lambda: main(out=str(out), resume=True, overwrite=True, **settings(csv_set, cache)), 'give one of them')
    assert files_of(out) == finished
    says(lambda: main(out=str(out), overwrite=True, **settings(csv_set, cache, data='/no/where')), 'no such file')
    assert files_of(out) == finished # nothing is deleted before the new run begins
    capfd.readouterr()
    main(out=str(out), overwrite=True, **settings(csv_set, cache, epochs=1))
    assert ('deleting settings.json, data.json, result.json, student_cl.safetensors' in capfd.readouterr().err
            and json.loads((out/'settings.json').read_text())['settings']['epochs'] == 1)

def test_a_demo_has_a_folder_of_its_own(tmp_path, monkeypatch, cache):
    monkeypatch.chdir(tmp_path)
    seen = []
    monkeypatch.setattr('grdd_fastai.grdd.Run', lambda out, *_, **__: seen.append(out) or (_ for _ in ()).throw(UserError('enough')))
    for demo in (False, True):
        for name in ('cifarfs_5w1s', 'mini_5w5s'):
            with pytest.raises(UserError, match='enough'): recipe(name)(data='x', demo=demo)
    assert seen == ['runs/cifarfs_5w1s', 'runs/mini_5w5s', 'runs/cifarfs_5w1s-demo', 'runs/mini_5w5s-demo'] and not list(tmp_path.iterdir())

@pytest.mark.parametrize('forge', ['weights', 'result', 'missing', 'seconds', 'list', 'deep'])
def test_a_forged_result_is_not_believed(finished, csv_set, cache, tmp_path, forge):
    out = laid_out(finished, tmp_path/'run')
    result = json.loads((out/'result.json').read_text())
    if forge == 'weights': save_weights(create_backbone('convnet4_128', 0, seed=9), out/'student_grdd', val_accuracy=1.)
    if forge == 'result': result['weights']['student_grdd'] = '0'*64
    if forge == 'missing': (out/'teacher.safetensors').unlink()
    if forge == 'seconds': result['seconds'] = 'x'
    (out/'result.json').write_text(dict(list='[]', deep='['*200_000).get(forge, json.dumps(result)))
    says(lambda: stopped(csv_set, cache, out), str(out))

def test_settings_that_are_lost_are_not_made_up(finished, csv_set, cache, tmp_path):
    out = laid_out(finished, tmp_path/'run')
    (out/'settings.json').unlink()
    before = files_of(out)
    for how in (dict(resume=True), {}, dict(overwrite=True)):
        says(lambda how=how: recipe('cifarfs_5w1s')(out=str(out), **how, **settings(csv_set, cache)), 'no settings.json')
    assert files_of(out) == before

@pytest.mark.parametrize('name', ['net.json', 'data.json', 'teacher.safetensors', 'settings.json'])
@pytest.mark.parametrize('overwrite', [False, True])
def test_files_of_the_users_own_that_are_named_as_a_runs_are_never_deleted(csv_set, cache, tmp_path, name, overwrite):
    (tmp_path/'run').mkdir()
    (tmp_path/'run'/name).write_text('{"mine": 1}')
    says(lambda: recipe('cifarfs_5w1s')(out=str(tmp_path/'run'), overwrite=overwrite, **settings(csv_set, cache)), name)
    assert (tmp_path/'run'/name).read_text() == '{"mine": 1}'

def test_a_finished_run_prints_its_result_from_a_disk_that_takes_no_writing(finished, csv_set, cache, tmp_path, monkeypatch, capsys):
    out,real = laid_out(finished, tmp_path/'run'),os.open
    def read_only(path, flags, *args, **kwargs):
        if flags & (os.O_WRONLY | os.O_RDWR) and str(path).startswith(str(out)): raise OSError(30, 'Read-only file system')
        return real(path, flags, *args, **kwargs)
    monkeypatch.setattr(storage.os, 'open', read_only)
    r = recipe('cifarfs_5w1s')(out=str(out), resume=True, **settings(csv_set, cache))
    assert json.loads(capsys.readouterr().out) == r == json.loads(finished['result.json']) and files_of(out) == finished
    says(lambda: recipe('cifarfs_5w1s')(out=str(out), overwrite=True, **settings(csv_set, cache)), 'Read-only file system')

@pytest.mark.parametrize('change, word', [(dict(epoch=10**9), 'epoch 1000000000'), (dict(epoch=-1), 'epoch -1'),
                                          (dict(step=10**9), 'step 1000000000'), (dict(epoch='x'), 'epoch x'),
                                          (dict(format=2), 'has format 2'),
                                          (dict(stage='teacher'), 'not a checkpoint of this training'), (dict(values=[]), None),
                                          (dict(values=[[1.]]*7), 'not a checkpoint'),
                                          (dict(parts={}), 'not a checkpoint'), (dict(opt=5), 'not a checkpoint'),
                                          (dict(groups=[]), 'not a checkpoint'), (dict(best='x'), 'not a checkpoint')])
def test_forged_checkpoints(csv_set, cache, tmp_path, change, word):
    out = stopped(csv_set, cache, tmp_path/'run')
    path = out/'checkpoint_student_cl.safetensors'
    tensors,meta = load_tensors(path)
    save_tensors(path, tensors, meta | change)
    if word: says(lambda: stopped(csv_set, cache, out), 'checkpoint_student_cl.safetensors', word)

@pytest.mark.parametrize('change', ['lacks', 'more', 'shape', 'optimiser'])
def test_checkpoints_of_another_network(csv_set, cache, tmp_path, change):
    out = stopped(csv_set, cache, tmp_path/'run')
    path = out/'checkpoint_student_cl.safetensors'
    tensors,meta = load_tensors(path)
    k = next(k for k in tensors if k.startswith('model/backbone') and k.endswith('weight'))
    if change == 'lacks': del tensors[k]
    if change == 'more': tensors['model/more'] = torch.ones(1)
    if change == 'shape': tensors[k] = torch.ones(2)
    if change == 'optimiser': tensors['opt/999/momentum_buffer'] = torch.ones(2)
    save_tensors(path, tensors, meta)
    says(lambda: stopped(csv_set, cache, out), 'checkpoint_student_cl.safetensors')

@pytest.mark.parametrize('out', ['', ' '])
def test_an_empty_out_is_refused(csv_set, cache, tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    says(lambda: recipe('cifarfs_5w1s')(out=out, **settings(csv_set, cache)), '--out is empty')
    says(lambda: table('a', dict(CL=CL), out=out, data=str(csv_set)), '--out is empty')
    assert not list(tmp_path.iterdir())

def test_a_folder_that_is_deleted_hides_no_error(csv_set, cache, tmp_path, monkeypatch):
    import shutil
    out = tmp_path/'run'
    def gone(*_): shutil.rmtree(out); raise UserError('the real error')
    monkeypatch.setattr('grdd_fastai.runs.run.History.after_epoch', gone)
    says(lambda: recipe('cifarfs_5w1s')(out=str(out), **settings(csv_set, cache)), 'the real error')

def test_what_was_made_for_nothing_goes_again(tmp_path):
    with pytest.raises(KeyError), output_folder(tmp_path/'a'/'b'/'c'): raise KeyError
    assert not list(tmp_path.iterdir())
    with output_folder(tmp_path/'a'/'b'/'c') as folder: (folder/'file').write_text('x')
    assert (tmp_path/'a'/'b'/'c'/'file').exists()

BAD_FLAGS = [dict(teacher='x'), dict(epochs=0), dict(schedule='x'), dict(lr=-1.), dict(bs=0), dict(classifier='x'), dict(smoothing=1.),
             dict(augment='x'), dict(opt='x'), dict(meta_opt='x'), dict(reading='x'), dict(meta_epochs=0),
             dict(meta_schedule='x'), dict(meta_lr=0.), dict(meta_way=1), dict(meta_query=0), dict(episodes=0), dict(per_step=0),
             dict(T=-1.), dict(gamma=-1.), dict(scale=0.), dict(teacher_view='x'), dict(query=0), dict(query=10**6),
             dict(test_episodes=0), dict(classifiers='x'), dict(seed=-1), dict(max_minutes=-1.), dict(data='/no/where'),
             dict(cache='/proc/x'), dict(student='convnet4.untrained'), dict(student='resnet18', pretrained='x', teacher='nothing.x')]

@pytest.mark.parametrize('bad', BAD_FLAGS, ids=[next(iter(b)) + str(i) for i,b in enumerate(BAD_FLAGS)])
def test_bad_flags_leave_nothing_behind(csv_set, cache, tmp_path, bad):
    says(lambda: recipe('cifarfs_5w1s')(**dict(out=str(tmp_path/'runs'/'x'), **settings(csv_set, cache)) | bad))
    assert not list(tmp_path.iterdir())


# ---- tables and scores ------------------------------------------------------------------------------------------------

ROWS = {'CL':CL, 'CL+EL':EL}
TINY = dict(student='convnet4', teacher='convnet4_128', epochs=1, teacher_epochs=1, episodes=3, test_episodes=20, meta_epochs=1)

@pytest.mark.parametrize('where', ['out', 'results'])
def test_a_folder_that_takes_no_files_is_said_before_the_first_training(csv_set, cache, tmp_path, monkeypatch, where):
    monkeypatch.setattr('grdd_fastai.experiments.table.train', lambda *_: pytest.fail('it trains'))
    given = dict(out=str(tmp_path/'out'), results=str(tmp_path/'results')) | {where:'/proc/x'}
    says(lambda: table('a', ROWS, data=str(csv_set), cache=str(cache), **given, **TINY), f'--{where}', '/proc/x')
    assert not list(tmp_path.iterdir())

def test_rows_that_fail_are_no_success(csv_set, cache, tmp_path, monkeypatch, capsys):
    "Every write of a run fails, as on a full disk: the exit code, the status and a sentence say so"
    def full(*_, **__): raise UserError('No space left on device')
    monkeypatch.setattr('grdd_fastai.runs.run.save_weights', full)
    says(lambda: recipe('table2')(rows='CL,CL+EL', data=str(csv_set), cache=str(cache), out=str(tmp_path/'out'), **TINY),
         '2 of the rows failed, CL, seed 0', 'No space left')
    said = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert said['status'] == 'failed' and len(said['failed']) == 2

def test_three_evaluations_at_one_out_are_all_there(csv_set, cache, tmp_path):
    run = tmp_path/'nets'
    run.mkdir()
    data = few_shot_data(csv_set, 32, cache)
    for i in range(3): save_weights(create_backbone('convnet4', 0, seed=i), run/f'n{i}', arch='convnet4', px=32, stats=data.stats)
    errors = []
    def work(i):
        try:
            recipe('evaluate_weights')(str(run/f'n{i}'), data=str(csv_set), cache=str(cache), out=str(tmp_path/'out'), shots='1',
                                       queries='3', test_episodes=20)
        except BaseException as e: errors.append(e)
    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for t in threads: t.start()
    for t in threads: t.join()
    records = [json.loads(f.read_text()) for f in (tmp_path/'out').glob('*.json')]
    assert (not errors and sorted(next(iter(r['weights'])) for r in records) == sorted(str(run/f'n{i}') for i in range(3))
            and len(list((tmp_path/'out').glob('*.csv'))) == 3)


# ---- what others see --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('word, shown', [('/home/alice/birds.zip', 'birds.zip'), ('--data=/home/alice/birds.zip', '--data=birds.zip'),
                                         ('~/birds', 'birds'), ('../../alice/birds', 'birds'), ('data/birds', 'data/birds'),
                                         ('/home/alice/grdd/recipes/table2.py', 'recipes/table2.py'), ('--lr', '--lr'), ('0.1', '0.1'),
                                         ('CL+EL lr=0.1', 'CL+EL lr=0.1')])
def test_commands_that_are_published_have_no_paths_of_a_machine(word, shown):
    assert public(word) == shown and command(['x', word]) == command(['x', shown])

def test_cards_have_no_paths_of_a_machine(tmp_path):
    about = ABOUT | dict(trained=ABOUT['trained'] | dict(command=command(ABOUT['trained']['command'].split()[1:])))
    publish(create_backbone('convnet4', 0), about, tmp_path/'convnet4.mine')
    for f in (tmp_path/'convnet4.mine').glob('*[dn]'): assert str(tmp_path) not in f.read_text() and 'alice' not in f.read_text(), f

def test_a_push_that_hangs_ends(tmp_path, monkeypatch):
    from types import SimpleNamespace

    from grdd_fastai.experiments import publish as publishing
    monkeypatch.setattr(publishing, 'HfApi', lambda **_: SimpleNamespace(create_repo=lambda *_, **__: threading.Event().wait()))
    says(lambda: publishing.push(tmp_path, 'me/mine', minutes=.01), 'me/mine was not pushed (no answer in 0.01 minutes)')


# ---- a tag is its weights ---------------------------------------------------------------------------------------------

def test_a_tag_starts_from_its_weights_and_the_result_says_so(csv_set, cache, tmp_path):
    common = dict(data=str(csv_set), cache=str(cache), **SMALL | dict(epochs=1))
    r = recipe('cifarfs_5w1s')(out=str(tmp_path/'a'), **common | dict(student='convnet4.grdd_cifarfs'))
    assert (r['initial_weights'] == dict(teacher='random', student='convnet4.grdd_cifarfs') and 'accuracy_pretrained' in r
            and 'accuracy_untrained' not in r)
    shipped,fresh = (create_backbone(n, 0, 32).state_dict() for n in ('convnet4.grdd_cifarfs', 'convnet4'))
    assert (torch.equal(shipped['stages.1.0.weight'], create_backbone('convnet4', 7, 32, pretrained=True).state_dict()['stages.1.0.weight'])
            and not torch.equal(shipped['stages.1.0.weight'], fresh['stages.1.0.weight']))
    trained = load_network(tmp_path/'a'/'student_cl').state_dict()['stages.0.0.weight']
    near = [(trained - s['stages.0.0.weight']).abs().mean() for s in (shipped, fresh)]
    assert near[0] < near[1]/3
    r = recipe('cifarfs_5w1s')(out=str(tmp_path/'b'), **common)
    assert r['initial_weights'] == dict(teacher='random', student='random') and 'accuracy_untrained' in r

@pytest.mark.parametrize('name, word', [('convnet4.untrained', 'has no pretrained weights'), ('convnet4.nothing', 'convnet4.grdd_cifarfs'),
                                        ('resnet12.x', 'give resnet12 for random ones')])
def test_a_tag_without_weights_is_refused(csv_set, cache, tmp_path, name, word):
    says(lambda: recipe('cifarfs_5w1s')(out=str(tmp_path/'run'), **settings(csv_set, cache, student=name)), word)
    assert np.array_equal(os.listdir(tmp_path), [])


# ---- what a second drill found ----------------------------------------------------------------------------------------

def test_a_fit_that_fails_changes_no_classifier(tmp_path):
    images = [np.full((9, 9, 3), v, np.uint8) for v in (0, 10, 240, 250)]
    few = FewShotClassifier(create_backbone('convnet4', 0)).fit(images, ['dark', 'dark', 'light', 'light'])
    says(lambda: few.fit([tmp_path/'gone.png']*2, ['x', 'y']), 'gone.png')
    assert few.vocab == ['dark', 'light'] and set(few.predict(images)) <= {'dark', 'light'}

@pytest.mark.parametrize('where', ['grdd_fastai.core.storage.digest', 'grdd_fastai.models.pretrained.digest',
                                   'grdd_fastai.data.cache._fingerprint'])
def test_a_signal_is_never_taken_for_a_damaged_file(finished, csv_set, cache, tmp_path, monkeypatch, where):
    "It ends the program with its code, and no file is refused or made anew"
    out = (stopped(csv_set, cache, tmp_path/'run', 2) if 'storage' in where
           else laid_out({k:v for k,v in finished.items() if 'grdd' not in k and k != 'result.json'}, tmp_path/'run'))
    before = {k:v for k,v in files_of(out).items() if k != 'result.json'}
    def hit(*_): os.kill(os.getpid(), signal.SIGTERM); raise AssertionError('it goes on')
    monkeypatch.setattr(where, hit)
    with pytest.raises(SystemExit) as e: recipe('cifarfs_5w1s')(out=str(out), resume=True, **settings(csv_set, cache))
    assert e.value.code == 143 and {k:v for k,v in files_of(out).items() if k != 'result.json'} == before

@posix
def test_a_folder_by_a_name_that_is_no_utf8(csv_set, cache, tmp_path):
    out = os.fsdecode(os.fsencode(tmp_path) + b'/caf\xe9')
    for _ in range(2): recipe('cifarfs_5w1s')(out=out, resume=True, max_minutes=1e-9, **settings(csv_set, cache))
    r = recipe('cifarfs_5w1s')(out=out, resume=True, **settings(csv_set, cache))
    assert recipe('cifarfs_5w1s')(out=out, resume=True, **settings(csv_set, cache)) == r and load_network(out).num_classes == 0

@pytest.mark.parametrize('bad', [dict(test_episodes=10**13), dict(episodes=10**8), dict(epochs=10**9), dict(epochs=1.5), dict(epochs='3'),
                                 dict(lr='x'), dict(query=2.5)])
def test_numbers_that_no_run_can_have(csv_set, cache, tmp_path, bad):
    says(lambda: recipe('cifarfs_5w1s')(**dict(out=str(tmp_path/'x'), **settings(csv_set, cache)) | bad),
         f'--{next(iter(bad)).replace("_", "-")} is')
    assert not list(tmp_path.iterdir())

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

@pytest.mark.parametrize('classifier', ['cosine', 'centroid', 'ridge', 'logistic', 'simpleshot_l2n', 'tim_adm'])
@pytest.mark.parametrize('factor', [1e25, 1e-25, 0.])
def test_features_whose_lengths_cannot_be_computed(classifier, factor):
    h = torch.eye(6).repeat_interleave(20, 0)
    says(lambda: evaluate(h*factor, torch.arange(6).repeat_interleave(20), n_episodes=10, classifier=classifier), 'the largest feature is')

def test_overwrite_deletes_by_name(finished, csv_set, cache, tmp_path):
    out = laid_out(finished, tmp_path/'run')
    (out/'checkpoint_mine.pth').write_text('mine')
    (out/'checkpoint_old').mkdir()
    recipe('cifarfs_5w1s')(out=str(out), overwrite=True, **settings(csv_set, cache, epochs=1))
    assert (out/'checkpoint_mine.pth').read_text() == 'mine' and (out/'checkpoint_old').is_dir()

def test_publish_replaces_nothing_that_is_not_its_own(tmp_path):
    (tmp_path/'mine').mkdir()
    (tmp_path/'mine'/'README.md').write_text('mine')
    says(lambda: publish(create_backbone('convnet4', 0), ABOUT, tmp_path/'mine'), 'holds README.md of something else')
    assert (tmp_path/'mine'/'README.md').read_text() == 'mine'
    publish(create_backbone('convnet4', 0), ABOUT | dict(sha256='a'), tmp_path/'other')
    says(lambda: publish(create_backbone('convnet4', 0), ABOUT | dict(sha256='b'), tmp_path/'other'), 'of something else')
    publish(create_backbone('convnet4', 0), ABOUT | dict(sha256='a'), tmp_path/'other')

@posix
def test_links_that_multiply_come_to_an_end(folders):
    a = folders/'train'/'train0'
    for i in range(24):
        (folders/f'd{i}').mkdir()
        if i:
            for name in 'xy': (folders/f'd{i-1}'/name).symlink_to(f'../d{i}')
    (a/'deep').mkdir()
    with no_hang(): assert len(open_source(folders).frames['train']) == 18
    deep = folders/'train'/'deep'
    for _ in range(300): deep = deep/'d'
    deep.mkdir(parents=True)
    with no_hang(): open_source(folders)

@posix
@pytest.mark.parametrize('what', ['fifo', '/dev/zero', '/dev/urandom'])
def test_data_that_is_no_file(tmp_path, what):
    if what == 'fifo': os.mkfifo(what := tmp_path/'fifo')
    for call in (lambda: few_shot_data(what, cache=tmp_path/'c'), lambda: prepare(what, tmp_path/'out')):
        says(call, 'neither a folder nor a regular file')

def test_an_image_that_is_a_program_is_not_run(folders, tmp_path, monkeypatch):
    (tmp_path/'bin').mkdir()
    (tmp_path/'bin'/'gs').write_text(f'#!/bin/sh\ntouch {tmp_path}/ran\n')
    (tmp_path/'bin'/'gs').chmod(0o755)
    monkeypatch.setenv('PATH', f'{tmp_path/"bin"}:{os.environ["PATH"]}')
    (folders/'train'/'train0'/'00.png').write_bytes(b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n{ } loop\n')
    says(lambda: few_shot_data(folders, px=8, cache=tmp_path/'c'), '00.png does not decode')
    assert not (tmp_path/'ran').exists()

@pytest.mark.parametrize('line, member, word', [('filename,label\n' + 'train0/00.png,train0\n'*3, 'train.csv', 'is listed twice'),
                                                (','*(2**21), 'train.csv', 'characters'), ('x'*(2**21), 'train.csv', 'characters')])
def test_texts_that_unpack_to_much(root, tmp_path, line, member, word):
    with zipfile.ZipFile(tmp_path/'set.zip', 'w', zipfile.ZIP_DEFLATED) as z:
        for f in sorted(root.rglob('*')):
            if f.is_file() and f.name != member: z.write(f, f.relative_to(root))
        z.writestr(member, line)
    says(lambda: open_source(tmp_path/'set.zip'), member, word)

@pytest.mark.parametrize('args', [dict(architecture='vit_tiny_patch16_224', model_args=dict(depth=4096)),
                                  dict(architecture='resnet18', model_args=dict(layers=[4096]*4)),
                                  dict(architecture='convnext_tiny', model_args=dict(depths=[200]*4))])
def test_networks_that_would_take_minutes_to_build(tmp_path, args):
    says(lambda: load_network(forged(tmp_path/'convnet4.mine', args)), 'too large')

@pytest.mark.parametrize('path', ['~nobody9/x', 'x'*300, 'a\0b', '/dev/null/x'])
def test_paths_that_cannot_be(csv_set, cache, tmp_path, path):
    for call in (lambda: recipe('cifarfs_5w1s')(out=path, **settings(csv_set, cache)),
                 lambda: recipe('cifarfs_5w1s')(out=path, resume=True, **settings(csv_set, cache)),
                 lambda: table('a', ROWS, out=path, data=str(csv_set)),
                 lambda: few_shot_data(csv_set, px=8, cache=path), lambda: load_network(path), lambda: FewShotClassifier.from_folder(path),
                 lambda: open_source(path)): says(call)

@pytest.mark.parametrize('change', [dict(parts={'rotation':5}), dict(parts={'rotation':{}}),
                                    dict(parts={'rotation':{'L_c':[1., 'x'], 'L_r':[1., 2]}}), dict(smooth_loss=[1., 'x']),
                                    dict(smooth_loss=5), dict(groups=[5]), dict(groups=[dict(weight_decay='x')]),
                                    dict(values=['x']), dict(best=['x', 'y']), dict(scaler=5)])
def test_more_forged_checkpoints(csv_set, cache, tmp_path, change):
    out = stopped(csv_set, cache, tmp_path/'run')
    path = out/'checkpoint_student_cl.safetensors'
    tensors,meta = load_tensors(path)
    save_tensors(path, tensors, meta | change)
    says(lambda: stopped(csv_set, cache, out), 'checkpoint_student_cl.safetensors')

def test_a_checkpoint_of_whole_numbers(csv_set, cache, tmp_path):
    out = stopped(csv_set, cache, tmp_path/'run')
    path = out/'checkpoint_student_cl.safetensors'
    tensors,meta = load_tensors(path)
    save_tensors(path, {k:v.to(torch.int8) if k.startswith('model/') else v for k,v in tensors.items()}, meta)
    says(lambda: stopped(csv_set, cache, out), 'holds torch.int8')

@pytest.mark.parametrize('value', ['x', None, [1]])
def test_a_card_without_its_accuracy(finished, csv_set, cache, tmp_path, value):
    out = laid_out({k:v for k,v in finished.items() if k != 'result.json'}, tmp_path/'run')
    card = json.loads((out/'student_cl.json').read_text()) | dict(val_accuracy=value)
    (out/'student_cl.json').write_text(json.dumps(card))
    says(lambda: stopped(csv_set, cache, out), 'student_cl.json is damaged (val_accuracy')

def test_a_finished_result_has_to_name_its_weights(finished, csv_set, cache, tmp_path):
    out = laid_out(finished, tmp_path/'run')
    for forged_ in (dict(status='finished'), dict(status='finished', weights={}, accuracy=99.)):
        (out/'result.json').write_text(json.dumps(forged_))
        says(lambda: stopped(csv_set, cache, out), 'is of other weights')

@pytest.mark.parametrize('logits', [lambda s, y, q: torch.full((*q.shape[:2], 2), torch.nan), lambda s, y, q: q, lambda s, y, q: None])
def test_a_classifier_of_ones_own_on_photos(logits):
    images = [np.full((9, 9, 3), v, np.uint8) for v in (0, 240)]
    says(lambda: FewShotClassifier(create_backbone('convnet4', 0), logits).fit(images, ['a', 'b']).predict(images), 'the classifier gives')

@pytest.mark.parametrize('images', [torch.zeros(2, 3, 8, 8), [5, 5], None, 7])
def test_images_that_are_none(images): says(lambda: FewShotClassifier(create_backbone('convnet4', 0)).fit(images, ['a', 'b']))

def test_a_sentence_is_one_line_whatever_it_quotes(root):
    (root/'train.csv').write_text('"file\nname\x1b[31m",' + ','.join(f'c{i}' for i in range(5000)) + '\n1,2\n')
    with pytest.raises(UserError) as e: open_source(root)
    assert str(e.value).isprintable() and len(str(e.value)) < 700

@pytest.mark.parametrize('word, shown', [('./../../home/alice/x.zip', 'x.zip'), ('a/../../../home/alice/x', 'x'),
                                         ('--data=./../alice/x', '--data=x'), ('file:///home/alice/x', 'x'),
                                         ('runs/a,/home/alice/b', 'runs/a,b'), (r'C:\Users\alice\x', 'x'), ('1,5', '1,5'),
                                         ('hf-hub:user/name', 'hf-hub:user/name')])
def test_more_paths_of_a_machine(word, shown): assert public(word) == shown

def test_publish_says_what_it_cannot_write_before_it_scores(tmp_path):
    says(lambda: recipe('publish')(run=str(tmp_path), results='/proc/x'), '--results')

@posix
def test_a_log_that_is_a_link_is_not_followed(tmp_path):
    from grdd_fastai.runs.provenance import log_line
    (tmp_path/'novel_scorings.jsonl').symlink_to('made')
    says(lambda: log_line(tmp_path/'novel_scorings.jsonl', dict(a=1)), 'cannot be written')
    assert not (tmp_path/'made').exists()
    (tmp_path/'log.jsonl').write_bytes(b'\xff\xfe\n')
    log_line(tmp_path/'log.jsonl', dict(a=1))
    assert (tmp_path/'log.jsonl').read_bytes() == b'\xff\xfe\n{"a": 1}\n'

def test_an_optimiser_state_of_another_shape(csv_set, cache, tmp_path):
    "A fused optimiser would read beyond it"
    out = stopped(csv_set, cache, tmp_path/'run')
    path = out/'checkpoint_student_cl.safetensors'
    tensors,meta = load_tensors(path)
    save_tensors(path, {k:torch.zeros(3) if k.startswith('opt/1/') else v for k,v in tensors.items()}, meta)
    says(lambda: stopped(csv_set, cache, out), 'of shape (3,)')

@pytest.mark.parametrize('bad', [dict(n_way='5'), dict(k_shot=1.5), dict(n_episodes=True), dict(seed=-1), dict(classifier=[]),
                                 dict(classifier=[['cosine']]),
                                 dict(classifier=lambda s, y, q: torch.ones(*q.shape[:2], 5, dtype=torch.bool)),
                                 dict(query_distribution=['x'])])
def test_more_arguments_of_evaluate(bad):
    h,y = torch.randn(200, 8),torch.arange(10).repeat_interleave(20)
    says(lambda: evaluate(h, y, **dict(n_episodes=5) | bad))

@pytest.mark.parametrize('call', [lambda n: FewShotClassifier(torch.nn.Linear(3, 2)), lambda n: FewShotClassifier(n, bs=0),
                                  lambda n: FewShotClassifier(n, stats='x'), lambda n: FewShotClassifier(n, stats=([.5]*3, [0, 1, 1])),
                                  lambda n: FewShotClassifier(n, px=True),
                                  lambda n: FewShotClassifier(n).fit([np.zeros((9, 9, 3), np.uint8)]*2, [['a'], ['b']]),
                                  lambda n: FewShotClassifier(n).embed(None),
                                  lambda n: FewShotClassifier(n).embed(np.zeros((0, 0, 3), np.uint8)),
                                  lambda n: few_shot_data('demo', seed=-1), lambda n: few_shot_data(5), lambda n: prepare('x', None)])
def test_more_arguments_that_cannot_be(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    says(lambda: call(create_backbone('convnet4', 0)))

def test_folders_that_many_make_and_leave_at_once(tmp_path):
    "Some write and some find nothing to write: nobody's folder goes while another is in it"
    errors = []
    def work(i):
        try:
            for n in range(40):
                with output_folder(tmp_path/'a'/'b') as folder:
                    if (i + n) % 3 == 0:
                        atomic_write(folder/f'{i}-{n}', 'x')
                        (folder/f'{i}-{n}').unlink()
        except BaseException as e: errors.append(e)
    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert not errors and not [f for f in tmp_path.rglob('*') if f.is_file()]
