"""The page for the browser: a visit compared with the classifier in Python, and the page itself in a headless browser."""
import gc
import shutil
import socket
import sys
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import says, write_images

from grdd_fastai.core.errors import UserError
from grdd_fastai.photos.app import Visit, caption, launch, make_app
from grdd_fastai.photos.classifier import FewShotClassifier

CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')


@pytest.fixture(scope='module')
def few(): return FewShotClassifier()

@pytest.fixture
def photos(tmp_path):
    "class -> four files, and 'new' -> three files of each class and a broken one"
    for i,c in enumerate(('red', 'green', 'blue')):
        write_images(tmp_path/c, [f'{k}.png' for k in range(4)], 40, i, i/3)
        write_images(tmp_path/'new', [f'{c}-{k}.png' for k in range(3)], 50, 10 + i, i/3)
    (tmp_path/'new'/'broken.png').write_bytes(b'no image')
    return {d.name:sorted(d.iterdir()) for d in tmp_path.iterdir()}

@pytest.fixture
def visit(few, photos):
    visit = Visit(few)
    for c in ('red', 'green', 'blue'): visit.add(c, photos[c])
    with pytest.warns(UserWarning, match='broken'): visit.classify(photos['new'])
    return visit

def place(photos, name): return [f.name for f in photos['new']].index(name)

def test_a_visit_says_what_the_classifier_says(few, photos, visit):
    classes = [c for c in ('red', 'green', 'blue') for _ in range(4)]
    same = FewShotClassifier().fit([f for c in ('red', 'green', 'blue') for f in photos[c]], classes)
    with pytest.warns(UserWarning, match='broken'): expected = same.predict_table(photos['new'])
    found = visit.table()
    assert found['class'].equals(expected['class']) and np.allclose(found.probability, expected.probability, atol=1e-5, equal_nan=True)
    assert visit.says() == str(same.check()) and not found.corrected.any() and few.vocab is None

def test_a_corrected_photo_becomes_an_example(visit, photos):
    i = place(photos, 'red-0.png')
    visit.correct(i, 'blue')
    assert visit.labels.count('blue') == 5 and len(visit.few.support) == 13
    row = visit.table().loc[i]
    assert row['class'] == 'blue' and np.isnan(row.probability) and row.runner_up != 'blue' and row.nearest == str(visit.photos[i])
    visit.correct(i, 'violet') # on second thoughts: of a class that was not there
    row = visit.table().loc[i]
    assert visit.labels.count('blue') == 4 and visit.labels.count('violet') == 1 and row['class'] == 'violet' and row.corrected
    examples = [f for c in ('red', 'green', 'blue') for f in photos[c]] + [photos['new'][i]]
    same = FewShotClassifier().fit(examples, [*visit.labels[:12], 'violet'])
    others = [f for k,f in enumerate(photos['new']) if k != i and f.name != 'broken.png']
    assert same.predict(others) == [r['class'] for r in visit.table().to_dict('records') if not r['problem'] and not r['corrected']]

def test_a_correction_goes_with_its_example(visit, photos):
    i = place(photos, 'red-0.png')
    before = visit.table()
    visit.correct(i, 'violet')
    visit.change_example(len(visit.files) - 1, 'green') # on second thoughts, among the examples
    assert visit.table().loc[i, 'class'] == 'green' and visit.corrected == {i:'green'}
    visit.remove_example(len(visit.files) - 1)
    assert visit.table().equals(before) and not visit.corrected and 'violet' not in visit.classes

def test_examples_change_their_class_and_go(visit):
    before = visit.few.support.clone()
    visit.change_example(0, 'green')
    assert visit.labels[:2] == ['green', 'red'] and visit.few._labels()[0] == 'green' and visit.few.support.equal(before)
    visit.remove_example(0)
    assert len(visit.files) == 11 and visit.few.support.equal(before[1:])
    visit.remove_class_of(0)
    assert visit.classes == ['blue', 'green'] and visit.few.vocab == ['blue', 'green']
    visit.remove_class_of(0) # one class is left, which is nothing to choose from
    assert visit.classes == ['blue'] and 'There is one: blue.' in visit.says()
    with pytest.raises(UserError, match='fewer than two classes'): visit.table()
    visit.remove_class_of(0)
    assert visit.classes == [] and 'two classes or more' in visit.says()
    assert sorted(f.name for f in visit.root.glob('photos/*/*')) == sorted(f.name for f in visit.photos) # removed photos are deleted

def test_mistakes_change_nothing(visit, photos, tmp_path):
    before = visit.says(),visit.labels,visit.files,visit.table().to_csv()
    (tmp_path/'a.png').write_bytes(b'')
    with pytest.warns(UserWarning, match='a.png'):
        says(lambda: visit.add('black', [tmp_path/'a.png']), 'none of the photos of black', 'a.png')
    for wrong,*words in ((lambda: visit.add(' ', photos['red']), 'no name'), (lambda: visit.add('red', None), 'no photos of red'),
                         (lambda: visit.correct(None, 'red'), 'no photo is selected'), (lambda: visit.remove_example(None), 'selected'),
                         (lambda: visit.correct(place(photos, 'broken.png'), 'red'), 'broken.png', 'cannot be read')):
        says(wrong, *words)
    assert (visit.says(), visit.labels, visit.files, visit.table().to_csv()) == before
    visit.classify(None)
    assert visit.table().to_csv() == before[-1]

def test_names_are_no_paths_and_no_photo_replaces_another(few, photos, tmp_path):
    visit = Visit(few)
    for name in ('../../x', '.', '<b>', 'a/b', 'ä ü', '0.jpg', 'pictures', 'new'): visit.add(name, photos['red'])
    for f in visit.pictures(visit.files): assert f.parent == visit.root/'pictures'
    visit.add('a_b', photos['green']) # its folder has the name of that of a/b
    inside = [f for f in visit.files if f.startswith(visit.folder.name)]
    assert visit.classes == sorted(['../../x', '.', '<b>', 'a/b', 'ä ü', '0.jpg', 'pictures', 'new', 'a_b'])
    assert len(set(inside)) == len(visit.files) == 36
    assert [f.read_bytes() for f in map(Path, visit.files[-4:])] == [f.read_bytes() for f in photos['green']]
    folder = visit.folder.name
    assert folder not in visit.says()
    del visit
    gc.collect()
    assert not Path(folder).exists()

def test_a_visit_begins_with_the_classes_of_a_loaded_classifier(photos, tmp_path, monkeypatch):
    "Whose names of photos may be those of other files on this machine"
    monkeypatch.chdir(tmp_path)
    few = FewShotClassifier().fit([*photos['red'], *photos['blue']], [1]*4 + [2]*4)
    loaded = FewShotClassifier.load(few.save(tmp_path/'mine'))
    visit = Visit(loaded)
    visit.add('2', photos['green'][:1])
    assert visit.classes == [1, 2] and visit.labels.count(2) == 5 and loaded.support.shape[0] == 8
    assert len({visit.pictures([f])[0].read_bytes() for f in visit.files[:8]}) == 1 # the photos are elsewhere: grey squares
    with pytest.raises(UserError, match='text'): visit.add('three', photos['green'])
    assert Path(visit.files[0]).exists() # from here

def test_unknown_photos_wait_for_enough_examples(photos):
    visit = Visit(FewShotClassifier(unknown=.15))
    says(lambda: visit.add('unknown', photos['red']), 'give the class another name')
    visit.add('red', photos['red'])
    visit.add('green', photos['green'][:1])
    visit.classify(photos['blue'])
    says(visit.table, 'unknown=0.15 needs 6 photos')
    visit.add('green', photos['green'][1:])
    assert visit.table()['class'].tolist() == ['unknown']*4 # blue photos are far from red and green ones

def test_what_is_downloaded(visit, photos, tmp_path):
    i = place(photos, 'red-0.png')
    visit.correct(i, 'violet')
    archive,table,page = visit.download()
    with zipfile.ZipFile(archive) as z: z.extractall(tmp_path/'away')
    again = FewShotClassifier.load(tmp_path/'away')
    assert again.vocab == ['blue', 'green', 'red', 'violet'] and again.predict(photos['red']) == visit.few.predict(photos['red'])
    table = pd.read_csv(table)
    assert table.file.tolist() == [f.name for f in photos['new']]
    assert table['class'][i] == 'violet' and np.flatnonzero(table.corrected).tolist() == [i]
    visit.photos = []
    assert [f.name for f in visit.download()] == ['classifier.zip']
    assert page.read_text().count('<figure') == 9
    assert all(visit.folder.name not in (archive.parent/name).read_text() for name in ('photos.csv', 'photos.html'))

def test_captions():
    row = dict(problem='', corrected=False, probability=.873)
    assert [caption(row | {'class':'cat'} | more) for more in ({}, dict(corrected=True), dict(probability=np.nan), dict(problem='x'))] == [
        'cat 87%', '✓ cat', 'cat', 'not read']


# ---- in the browser ---------------------------------------------------------------------------------------------------

def test_an_address_that_cannot_be_used(few):
    pytest.importorskip('gradio', reason="needs gradio: pip install 'grdd-fastai[app]'")
    app = launch(few, port=free_port(), wait=False)
    try: says(lambda: launch(few, port=int(app.server_port), wait=False), f'port {app.server_port}', '--port')
    finally: app.close()
    says(lambda: launch(few, port=99_999, wait=False), 'port 99999', '--port')

def test_without_gradio_a_sentence_says_how_to_get_it(few, monkeypatch):
    monkeypatch.setitem(sys.modules, 'gradio', None)
    says(lambda: launch(few), 'gradio is not installed', "pip install 'grdd-fastai[app]'")

def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]

@pytest.fixture(params=[1200, 390], ids=['wide', 'phone'])
def page(few, request):
    "The page in a headless browser of this width, and what the browser complains of and asks for outside of the page's own address"
    pytest.importorskip('gradio', reason="needs gradio: pip install 'grdd-fastai[app]'")
    sync_api = pytest.importorskip('playwright.sync_api', reason='needs playwright')
    if not CHROMIUM: pytest.skip('needs Chromium')
    app = launch(few, port=free_port(), wait=False)
    with sync_api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox'])
        page = browser.new_page(viewport=dict(width=request.param, height=800))
        page.complaints = []
        page.on('console', lambda m: page.complaints.append(m.text) if m.type == 'error' else None)
        page.on('pageerror', lambda e: page.complaints.append(str(e)))
        page.on('request', lambda r: page.complaints.append(r.url) if not r.url.startswith((app.local_url, 'data:', 'blob:')) else None)
        page.goto(app.local_url)
        yield page
        browser.close()
    app.close()

def test_the_page_in_a_browser(page, photos, tmp_path):
    from playwright.sync_api import expect
    expect(page.get_by_text('Add photos of two classes or more')).to_be_visible(timeout=60_000)
    thumbs = page.locator('button.thumbnail-item')
    for n,c in enumerate(('red', 'green', '<i>blue'), 1):
        expect(page.get_by_text('Drop File Here')).to_have_count(2)
        page.get_by_label('Class', exact=True).first.fill(c)
        page.locator('input[type=file]').first.set_input_files([str(f) for f in photos[c.removeprefix('<i>')]])
        expect(page.locator('a[download]')).to_have_count(4, timeout=30_000)
        page.get_by_role('button', name='Add these photos').click()
        expect(thumbs).to_have_count(4*n, timeout=30_000)
    expect(page.get_by_text('12 photos were held out')).to_be_visible()
    page.locator('input[type=file]').nth(1).set_input_files([str(f) for f in photos['new']])
    expect(thumbs).to_have_count(22, timeout=30_000)
    expect(page.get_by_text('broken.png cannot be read as an image')).to_be_visible()
    expect(page.get_by_text('not read')).to_be_visible()
    right = page.get_by_role('radio', name='red').nth(1)
    right.click() # before a photo
    expect(page.get_by_text('no photo is selected')).to_be_visible()
    expect(right).not_to_be_checked()
    thumbs.nth(12 + place(photos, 'blue-1.png')).click()
    page.wait_for_timeout(500) # the selection reaches the server
    right.click()
    expect(page.get_by_text('✓ red')).to_be_visible(timeout=30_000)
    expect(thumbs).to_have_count(23)
    page.get_by_role('button', name='Remove its class').click() # nothing is selected
    expect(page.get_by_text('no photo is selected').last).to_be_visible()
    thumbs.nth(0).click()
    page.wait_for_timeout(500)
    page.get_by_role('button', name='Remove the selected example').click()
    expect(thumbs).to_have_count(22, timeout=30_000)
    page.get_by_role('button', name='Make the files').click()
    expect(page.locator('a[download]')).to_have_count(3, timeout=30_000)
    with page.expect_download() as download: page.locator('a[download]').first.click()
    download.value.save_as(tmp_path/'classifier.zip')
    with zipfile.ZipFile(tmp_path/'classifier.zip') as z: z.extractall(tmp_path/'mine')
    few = FewShotClassifier.load(tmp_path/'mine')
    assert few.vocab == ['<i>blue', 'green', 'red'] and len(few.support) == 12
    assert page.evaluate('document.documentElement.scrollWidth <= innerWidth')
    assert page.complaints == []

def test_the_page_has_no_public_functions(few):
    pytest.importorskip('gradio', reason="needs gradio: pip install 'grdd-fastai[app]'")
    assert make_app(few).get_api_info()['named_endpoints'] == {}
