"""Test the HTML page of classified photos: what it shows, that it needs nothing else, and names that are HTML."""
import re
from html.parser import HTMLParser

import pandas as pd
import pytest
from helpers import posix, recipe, says, write_images

from grdd_fastai.core.errors import UserError
from grdd_fastai.photos.classifier import FewShotClassifier
from grdd_fastai.photos.report import plot_photos, write_page


class Page(HTMLParser):
    "Tags, images, texts and links of an HTML page"
    def __init__(self, path):
        super().__init__()
        self.tags,self.images,self.links,self.text,self.ids,self.open = [],[],[],'',set(),[]
        self.feed(path.read_text())
    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        if tag not in ('meta', 'img'): self.open.append(tag)
        if tag == 'img': self.images.append((attrs['alt'], attrs['src']))
        if tag == 'a': self.links.append(attrs['href'])
        if 'id' in attrs: self.ids.add(attrs['id'])
    def handle_endtag(self, tag): assert self.open.pop() == tag
    def handle_data(self, data):
        if self.open[-1:] != ['style']: self.text += data

@pytest.fixture
def folders(tmp_path):
    "few/ with three classes of four photos, one of them with a name that is HTML, and new/ with three photos of each and a broken one"
    for i,c in enumerate(('red', 'green', '<b>&blue')):
        write_images(tmp_path/'few'/c, [f'{k}.png' for k in range(4)], 40, i, i/3)
        write_images(tmp_path/'new', [f'{i}{k}.png' for k in range(3)], 50, 10 + i, i/3)
    (tmp_path/'new'/'broken.png').write_bytes(b'no image')
    return tmp_path

def test_the_page_shows_each_photo_and_its_nearest(folders):
    few = FewShotClassifier.from_folder(folders/'few')
    with pytest.warns(UserWarning): table = few.predict_table(folders/'new')
    page = Page(write_page(folders/'page.html', few, folders/'new', table))
    names = [name for name,_ in page.images]
    assert not page.open and sum('/new/' in n for n in names) == 9 and sum('/few/' in n for n in names) == 9
    assert all(src.startswith('data:image/jpeg;base64,') and len(src) < 20_000 for _,src in page.images)
    assert {href.removeprefix('#') for href in page.links} == page.ids and 'b' not in page.tags and '<b>&blue (3)' in page.text
    assert re.search(r'Expect \d+% of new photos to be classified right', page.text)
    assert 'broken.png cannot be read as an image (it holds no image)' in page.text
    outside = re.findall(r'(?:src|href)="(?!data:|#)[^"]*"|url\(|@import|<script', (folders/'page.html').read_text())
    assert outside == []

def test_a_page_without_evidence_says_so(folders, monkeypatch):
    few = FewShotClassifier().fit([folders/'few'/c/'0.png' for c in ('red', 'green')], ['red', 'green'])
    text = Page(write_page(folders/'page.html', few, [folders/'new'/'00.png'])).text
    assert 'The accuracy to expect is not known: each class has one photo' in text and '%' not in text
    says(lambda: write_page(folders/'page.html', few, [folders/'new'/'00.png'], pd.DataFrame(dict(file=[]))), '0 rows', 'these 1 photos')
    (folders/'file').write_text('')
    says(lambda: write_page(folders/'file'/'page.html', few, [folders/'new'/'00.png']), 'cannot be written', 'give another file')

def test_only_some_photos_of_a_large_class_are_shown(folders, monkeypatch):
    from grdd_fastai.photos import report
    monkeypatch.setattr(report, 'MOST', 2)
    few = FewShotClassifier.from_folder(folders/'few')
    page = Page(write_page(folders/'page.html', few, sorted(folders.glob('new/[0-9]*.png'))))
    assert sum('/new/' in name for name,_ in page.images) == 6 and 'The first 2 are shown.' in page.text

def test_the_recipe(folders, capsys, monkeypatch):
    common = dict(report=str(folders/'a'/'page.html'), csv=str(folders/'a.csv'))
    recipe('classify')(str(folders/'new'), support=str(folders/'few'), unknown=.2, save=str(folders/'mine'), **common)
    first,table = capsys.readouterr().out,pd.read_csv(folders/'a.csv')
    assert len(table) == 10 and 'broken.png' in first and (folders/'a'/'page.html').stat().st_size > 5000
    recipe('classify')(str(folders/'new'), load=str(folders/'mine'), csv=str(folders/'b.csv'))
    again = pd.read_csv(folders/'b.csv')
    assert again['class'].equals(table['class']) and (again.probability - table.probability).abs().max() < 1e-5
    for wrong,word in ((dict(), 'give --support'), (dict(support='a', load='b'), 'support and load are both given'),
                       (dict(load=str(folders/'mine'), classifier='lda'), 'classifier cannot be given with load')):
        with pytest.raises(UserError, match=word): recipe('classify')(str(folders/'new'), **wrong)

def test_the_figure_shows_photos_above_their_nearest(folders):
    few = FewShotClassifier.from_folder(folders/'few')
    files = [*sorted(folders.glob('new/[0-9]*.png'))[:7], folders/'new'/'broken.png']
    with pytest.warns(UserWarning): fig = plot_photos(few, files, 8)
    with pytest.warns(UserWarning): table = few.predict_table(files)
    top,below,again,_ = (fig.axes[i:i + 6] for i in (0, 6, 12, 18))
    assert [ax.get_title().split()[0] for ax in [*top, again[0]]] == table['class'].tolist()[:7]
    assert [ax.get_title() for ax in below] == ['/'.join(n.split('/')[-2:]) for n in table.nearest[:6]]
    assert again[1].texts[0].get_text() == 'not read' and len(plot_photos(few, files[:2]).axes) == 4

def test_a_table_of_other_photos_is_refused(folders):
    few = FewShotClassifier.from_folder(folders/'few')
    files = sorted(folders.glob('new/[0-9]*.png'))
    table = few.predict_table(files)
    says(lambda: write_page(folders/'page.html', few, files, table[::-1]), 'in this order')
    table.to_csv(folders/'a.csv', index=False)
    page = Page(write_page(folders/'page.html', few, files, pd.read_csv(folders/'a.csv'))) # a table from a file
    assert sum('/new/' in name for name,_ in page.images) == 9

def test_a_loaded_classifier_shows_no_photos_that_only_have_the_name(folders, monkeypatch):
    few = FewShotClassifier.load(FewShotClassifier.from_folder(folders/'few').save(folders/'mine'))
    monkeypatch.chdir(folders/'few') # where red/0.png is a file, of whoever
    page = Page(write_page(folders/'page.html', few, [folders/'new'/'00.png']))
    assert len(page.images) == 1 and len(plot_photos(few, [folders/'new'/'00.png']).axes[1].images) == 0

def test_damaged_support_photos_leave_a_gap(folders):
    few = FewShotClassifier.from_folder(folders/'few')
    for f in (folders/'few').rglob('*.png'): f.write_bytes(b'no image')
    assert len(plot_photos(few, folders/'new'/'00.png').axes[1].images) == 0
    assert len(Page(write_page(folders/'page.html', few, [folders/'new'/'00.png'])).images) == 1

@posix
def test_names_that_are_no_text(folders, capsys):
    import os
    odd = os.fsdecode(b'caf\xe9.png')
    (folders/'odd').mkdir()
    os.link(folders/'new'/'00.png', folders/'odd'/odd)
    recipe('classify')(str(folders/'odd'), support=str(folders/'few'), report=str(folders/'p.html'), csv=str(folders/'deep'/'p.csv'))
    assert 'caf' in (folders/'p.html').read_text() and 'caf' in (folders/'deep'/'p.csv').read_text() and 'caf' in capsys.readouterr().out
