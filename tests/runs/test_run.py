"""The folder of a run: what it prints again, refuses, deletes and never touches; damaged and forged records."""
import contextlib
import json
import os
import shutil

import pytest
import torch
from helpers import SMALL, files_of, laid_out, mutations, no_hang, posix, recipe, refused, says, settings, stopped, write_csv_set

from grdd_fastai.core import storage
from grdd_fastai.core.errors import UserError
from grdd_fastai.models.create import create_backbone
from grdd_fastai.models.pretrained import save_weights

# ---- finished runs ----------------------------------------------------------------------------------------------------

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
    assert ('deleting settings.json, data.json, result.json, report.html, student_cl.safetensors' in capfd.readouterr().err
            and json.loads((out/'settings.json').read_text())['settings']['student']['epochs'] == 1)

def test_a_finished_run_prints_its_result_from_a_disk_that_takes_no_writing(finished, csv_set, cache, tmp_path, monkeypatch, capsys):
    out,real = laid_out(finished, tmp_path/'run'),os.open
    def read_only(path, flags, *args, **kwargs):
        if flags & (os.O_WRONLY | os.O_RDWR) and str(path).startswith(str(out)): raise OSError(30, 'Read-only file system')
        return real(path, flags, *args, **kwargs)
    monkeypatch.setattr(storage.os, 'open', read_only)
    r = recipe('cifarfs_5w1s')(out=str(out), resume=True, **settings(csv_set, cache))
    assert json.loads(capsys.readouterr().out) == r == json.loads(finished['result.json']) and files_of(out) == finished
    says(lambda: recipe('cifarfs_5w1s')(out=str(out), overwrite=True, **settings(csv_set, cache)), 'Read-only file system')

def test_overwrite_deletes_by_name(finished, csv_set, cache, tmp_path):
    out = laid_out(finished, tmp_path/'run')
    (out/'checkpoint_mine.pth').write_text('mine')
    (out/'checkpoint_old').mkdir()
    recipe('cifarfs_5w1s')(out=str(out), overwrite=True, **settings(csv_set, cache, epochs=1))
    assert (out/'checkpoint_mine.pth').read_text() == 'mine' and (out/'checkpoint_old').is_dir()

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

def test_a_finished_result_has_to_name_its_weights(finished, csv_set, cache, tmp_path):
    out = laid_out(finished, tmp_path/'run')
    for forged_ in (dict(status='finished'), dict(status='finished', weights={}, accuracy=99.)):
        (out/'result.json').write_text(json.dumps(forged_))
        says(lambda: stopped(csv_set, cache, out), 'is of other weights')


# ---- what is refused --------------------------------------------------------------------------------------------------

def test_other_settings_or_data_are_refused(csv_set, cache, tmp_path):
    out,main = stopped(csv_set, cache, tmp_path/'run'),recipe('cifarfs_5w1s')
    with pytest.raises(UserError, match='started with student.lr=0.05, not 0.1'):
        main(out=str(out), resume=True, **settings(csv_set, cache, lr=.1))
    root = write_csv_set(tmp_path/'set', n_images=8)
    out = tmp_path/'other'
    main(out=str(out), resume=True, max_minutes=1e-9, **settings(root, cache))
    (root/'images'/'train0'/'00.png').write_bytes((root/'images'/'train0'/'01.png').read_bytes())
    with pytest.raises(UserError, match='the data changed'): main(out=str(out), resume=True, **settings(root, cache))

def test_two_runs_in_one_folder(csv_set, cache, tmp_path):
    (tmp_path/'run').mkdir()
    with storage.locked(tmp_path/'run'/'.lock'):
        with pytest.raises(UserError, match='another run is at work'):
            recipe('cifarfs_5w1s')(out=str(tmp_path/'run'), **settings(csv_set, cache))

def test_settings_that_are_lost_are_not_made_up(finished, csv_set, cache, tmp_path):
    out = laid_out(finished, tmp_path/'run')
    (out/'settings.json').unlink()
    before = files_of(out)
    for how in (dict(resume=True), {}, dict(overwrite=True)):
        says(lambda how=how: recipe('cifarfs_5w1s')(out=str(out), **how, **settings(csv_set, cache)), 'no settings.json')
    assert files_of(out) == before

def test_damaged_stage_weights_are_one_sentence(csv_set, cache, tmp_path):
    out = tmp_path/'run'
    while not (out/'student_cl.json').exists(): stopped(csv_set, cache, out)
    (out/'student_cl.safetensors').write_bytes((out/'student_cl.safetensors').read_bytes()[:-1] + b'\0')
    with pytest.raises(UserError, match='student_cl.safetensors and its .json cannot be used'): stopped(csv_set, cache, out)

@pytest.mark.parametrize('value', ['x', None, [1]])
def test_a_card_without_its_accuracy(finished, csv_set, cache, tmp_path, value):
    out = laid_out({k:v for k,v in finished.items() if k != 'result.json'}, tmp_path/'run')
    card = json.loads((out/'student_cl.json').read_text()) | dict(val_accuracy=value)
    (out/'student_cl.json').write_text(json.dumps(card))
    says(lambda: stopped(csv_set, cache, out), 'student_cl.json is damaged (val_accuracy')

def test_damaged_records_of_a_run(csv_set, cache, tmp_path):
    "Its JSON files and weights: refused, or what is read is what was written"
    out,main = tmp_path/'run',recipe('cifarfs_5w1s')
    kwargs = dict(out=str(out), resume=True, data=str(csv_set), cache=str(cache), **SMALL)
    want,n = main(**kwargs),0
    for name in ('settings.json','result.json'):
        whole = (out/name).read_bytes()
        for b in [*mutations(whole, 20), b'[]', b'5', b'{"settings": 5, "torch_threads": 1}']:
            (out/name).write_bytes(b)
            try: json.loads(b)
            except ValueError: assert refused(lambda: main(**kwargs))
            else: continue # still JSON: another run's, or a digit of a report
            n += 1
        (out/name).write_bytes(whole)
    assert n > 20 and main(**kwargs) == want

@posix
@pytest.mark.parametrize('name', ['settings.json', 'result.json', 'data.json', 'student_cl.json', 'checkpoint_student_cl.safetensors'])
def test_pipes_in_a_run(csv_set, cache, tmp_path, name):
    out = stopped(csv_set, cache, tmp_path/'run')
    (out/name).unlink(missing_ok=True)
    os.mkfifo(out/name)
    with no_hang(60), contextlib.suppress(UserError): stopped(csv_set, cache, out)

@pytest.mark.parametrize('name', ['net.json', 'data.json', 'teacher.safetensors', 'settings.json'])
@pytest.mark.parametrize('overwrite', [False, True])
def test_files_of_the_users_own_that_are_named_as_a_runs_are_never_deleted(csv_set, cache, tmp_path, name, overwrite):
    (tmp_path/'run').mkdir()
    (tmp_path/'run'/name).write_text('{"mine": 1}')
    says(lambda: recipe('cifarfs_5w1s')(out=str(tmp_path/'run'), overwrite=overwrite, **settings(csv_set, cache)), name)
    assert (tmp_path/'run'/name).read_text() == '{"mine": 1}'

def test_a_folder_that_is_deleted_hides_no_error(csv_set, cache, tmp_path, monkeypatch):
    out = tmp_path/'run'
    def gone(*_):
        shutil.rmtree(out)
        raise UserError('the real error')
    monkeypatch.setattr('grdd_fastai.runs.run.History.after_epoch', gone)
    says(lambda: recipe('cifarfs_5w1s')(out=str(out), **settings(csv_set, cache)), 'the real error')


# ---- deterministic ----------------------------------------------------------------------------------------------------

def test_deterministic_is_for_the_run_alone(csv_set, cache, tmp_path, undisturbed):
    r = recipe('cifarfs_5w1s')(out=str(tmp_path/'run'), deterministic=True, **settings(csv_set, cache))
    assert not torch.are_deterministic_algorithms_enabled() and r['accuracy'] == undisturbed[1]['accuracy']
