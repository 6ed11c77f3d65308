"""A page for the browser: drop photos of each class, see the accuracy to expect, drop others, and correct what is wrong."""
import copy
import itertools
import os
import re
import shutil
import tempfile
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image

from ..core.distributed import log
from ..core.errors import UserError, first_line
from ..core.html import text, thumbnail
from .classifier import UNKNOWN, FewShotClassifier, check_labels
from .reading import UnreadablePhoto, load_photos, short_name
from .report import percent, write_page

__all__ = ['Visit', 'make_app', 'launch']


SIDE = 320 # longest side of the pictures on the page in pixels
KEEP = 24*3600 # age in seconds at which the pictures of an open page are deleted
GONE = 'the page was left for so long that its photos have been deleted: load it again'
CSS = """
footer { display: none !important }
.gradio-container { margin: auto; max-width: 75rem !important; width: 100% }
.grid-wrap { max-height: none !important; overflow: visible !important }
.grid-container { grid-template-columns: repeat(auto-fill, minmax(5.5rem, 1fr)) !important; grid-template-rows: none !important }
.sticky { position: sticky; top: 0; z-index: 5 }
.caption-label { max-width: 100% !important; white-space: normal !important }
"""


class Visit:
    """What one visitor of the page has: example photos of classes, and photos to classify

    `few` has the network and the settings, and perhaps classes already. Photos are copied to a temporary folder, from which those that are
    removed are deleted, and which is deleted with the visit. A call that raises UserError changes nothing.
    """
    def __init__(self, few:FewShotClassifier):
        self.few = copy.copy(few) # its `fit` replaces what it has, so that visits share the network alone
        self.folder = tempfile.TemporaryDirectory(prefix='few-shot-', ignore_cleanup_errors=True)
        there = few.vocab is not None
        self.h = few.support if there else torch.zeros(0, few.n_features, device=few.device) # features of the examples
        self.labels = few._labels() if there else []
        self.files = [f or 'a photo' for f in few.files] if there else []
        self._numbers = itertools.count() # names of small pictures
        self._pictures = {} # photo -> file of its small picture
        for name in ('photos', 'pictures', 'downloads'): (self.root/name).mkdir()
        self._set_photos([], self.h[:0], {})

    @property
    def root(self): return Path(self.folder.name)

    def _set_photos(self, photos, h, problems):
        self.photos,self.photos_h,self.problems = photos,h,problems
        self._delete_unused()

    def _delete_unused(self):
        "Delete the copies and the small pictures of photos that are no longer there"
        used = {*self.files, *map(str, self.photos)}
        for f in self.root.glob('photos/*/*'):
            if str(f) not in used: f.unlink(missing_ok=True)
        for f in self._pictures.keys() - used: self._pictures.pop(f).unlink(missing_ok=True)

    def _take(self, files, under):
        "Copy files to the visitor's folder under names that are not taken yet, and return the copies"
        folder = self.root/'photos'/(re.sub(r'[^\w .-]', '_', under).strip('. ')[:80] or 'class')
        folder.mkdir(exist_ok=True)
        copies = []
        for file in map(Path, files):
            to,n = folder/file.name,1
            while to.exists(): to,n = folder/f'{file.stem}-{(n := n + 1)}{file.suffix}',n
            copies.append(Path(shutil.copyfile(file, to)))
        return copies

    def _replace(self, h, labels, files):
        "Take these examples in place of the present ones; from two classes on, they are the support of the classifier"
        if len(set(labels)) > 1: self.few._keep(h, labels, files)
        else: self.few.vocab = None
        self.h,self.labels,self.files = h,labels,files
        self._delete_unused()

    @property
    def classes(self) -> list: return sorted(set(self.labels))

    def _label(self, name):
        "The class of this name, which may be a number in a classifier that was loaded"
        name = (name or '').strip()
        if not name: raise UserError('the class has no name: write its name beside the photos')
        return next((c for c in self.classes if str(c) == name), name)

    def add(self, name:str, files:Iterable) -> list[UnreadablePhoto]:
        "Add example photos of one class, which may be new; returns the errors of those that cannot be read"
        label,files = self._label(name), list(files or [])
        if not files: raise UserError(f'there are no photos of {label}: drop some first')
        if label == UNKNOWN and self.few.unknown is not None:
            raise UserError(f'photos of no class are called {UNKNOWN!r} here: give the class another name')
        check_labels([*self.labels, label])
        files = self._take(files, str(label))
        h,problems = self.few._embed(files)
        read = [i for i in range(len(files)) if i not in problems]
        if not read: raise UserError(f'none of the photos of {label} can be read: {problems[0]}')
        self._replace(torch.cat([self.h, h[read]]), [*self.labels, *[label]*len(read)], [*self.files, *(str(files[i]) for i in read)])
        return list(problems.values())

    def remove_example(self, i:int|None):
        "Remove the example with index `i`"
        check_selected(i)
        self._keep_examples([j for j in range(len(self.labels)) if j != i])

    def remove_class_of(self, i:int|None):
        "Remove the class of the example with index `i`, with all its examples"
        check_selected(i)
        self._keep_examples([j for j,o in enumerate(self.labels) if o != self.labels[i]])

    def change_example(self, i:int|None, name:str):
        "Give the example with index `i` another class"
        check_selected(i)
        self._replace(self.h, [self._label(name) if j == i else o for j,o in enumerate(self.labels)], self.files)

    def _keep_examples(self, rows): self._replace(self.h[rows], [self.labels[i] for i in rows], [self.files[i] for i in rows])

    def classify(self, files:Iterable) -> list[UnreadablePhoto]:
        "Take other photos to classify, in place of those that are there; returns the errors of those that cannot be read"
        photos = self._take(files or [], 'new')
        if photos: self._set_photos(photos, *self.few._embed(photos))
        return list(self.problems.values())

    def correct(self, i:int|None, name:str):
        "Set the class of the classified photo with index `i`; the photo becomes an example of this class"
        check_selected(i)
        label,file = self._label(name),str(self.photos[i])
        if i in self.problems: raise UserError(str(self.problems[i]))
        rows = [j for j,f in enumerate(self.files) if f != file] # it may have been corrected before
        self._replace(torch.cat([self.h[rows], self.photos_h[i:i + 1]]), [*(self.labels[j] for j in rows), label],
                      [*(self.files[j] for j in rows), file])

    @property
    def corrected(self) -> dict:
        "Index in `photos` -> class, for the photos that have become examples"
        label_of = dict(zip(self.files, self.labels))
        return {i:label_of[str(p)] for i,p in enumerate(self.photos) if str(p) in label_of}

    def table(self) -> pd.DataFrame:
        """The DataFrame of `predict_table`, and `corrected`: whether the visitor has said the class, so that it has no probability

        UserError before there are two classes.
        """
        if self.few.vocab is None: raise UserError('there are fewer than two classes: add photos of another one')
        table = self.few._table(self.photos, self.photos_h, self.problems, self.few._limit())
        corrected = self.corrected
        for i,label in corrected.items():
            second = table.loc[i, 'class'] if table.loc[i, 'class'] != label else table.loc[i, 'runner_up']
            values = {'class':label, 'probability':np.nan, 'runner_up':second, 'nearest':str(self.photos[i]), 'distance':0.}
            for k,v in values.items(): table.loc[i, k] = v
        return table.assign(corrected=[i in corrected for i in range(len(table))])

    def says(self) -> str:
        "What to expect of the classifier, or what is missing"
        if len(self.classes) < 2:
            return 'Add photos of two classes or more, about five of each. ' + (f'There is one: {self.classes[0]}.' if self.classes else '')
        try: return self.short(self.few.check())
        except UserError as e: return f'The accuracy to expect is not known: {e}.'

    def short(self, said) -> str:
        "A text without the path of the visitor's folder"
        return str(said).replace(str(self.root/'photos') + os.sep, '')

    def download(self) -> list[Path]:
        "Write the classifier as a zip file, and the photos as a CSV table and as an HTML page; return the files"
        to = Path(tempfile.mkdtemp(dir=self.root/'downloads'))
        saved = self.few.save(to/'classifier')
        files = [Path(shutil.make_archive(str(saved), 'zip', saved))]
        if not self.photos: return files
        table = self.table()
        names = table.assign(file=[p.name for p in self.photos], nearest=table.nearest.map(short_name, na_action='ignore'),
                             problem=table.problem.map(self.short))
        names.to_csv(to/'photos.csv', index=False)
        page = write_page(to/'photos.html', self.few, self.photos, table.drop(columns='corrected'))
        page.write_text(self.short(page.read_text())) # others need not know the folders of this machine
        return [*files, to/'photos.csv', page]

    def pictures(self, files:Iterable) -> list[Path]:
        """Files with a small JPEG of each photo; a grey one for a photo that cannot be read, and for one of a classifier that was loaded

        The names in a loaded classifier may be those of other files on this machine.
        """
        files = [str(f) for f in files]
        missing = [f for f in dict.fromkeys(files) if f not in self._pictures]
        mine = [f for f in missing if self.few.photos_here or Path(f).is_relative_to(self.root)]
        images = dict(zip(mine, load_photos(mine, partial(thumbnail, side=SIDE), allow_large=True)))
        for f in missing:
            image = images.get(f)
            if image is None or isinstance(image, UnreadablePhoto): image = Image.new('RGB', (SIDE, SIDE), (128, 128, 128))
            self._pictures[f] = self.root/'pictures'/f'{next(self._numbers)}.jpg'
            image.save(self._pictures[f], quality=85)
        return [self._pictures[f] for f in files]


def check_selected(i):
    if i is None: raise UserError('no photo is selected: click on one first')

def caption(row):
    "Caption of a classified photo, from its row of `Visit.table`"
    if row['problem']: return 'not read'
    if row['corrected']: return f'✓ {row["class"]}'
    return str(row['class']) if np.isnan(row['probability']) else f'{row["class"]} {percent(row["probability"])}'


def gradio():
    "The module `gradio`; UserError if it is not installed"
    try:
        import gradio
    except ImportError: raise UserError("gradio is not installed: pip install 'grdd-fastai[app]'") from None
    return gradio

def make_app(few:FewShotClassifier):
    """The page as a `gradio.Blocks`, which `launch` serves

    Each visitor begins with the classes of `few`, if it has any. UserError if gradio is not installed.
    """
    gr = gradio()
    with gr.Blocks(title='Few-shot classifier', analytics_enabled=False, delete_cache=(3600, KEEP)) as app:
        state,example,photo = gr.State(),gr.State(),gr.State() # the Visit, the index of the selected example, that of the photo
        classes = dict(visible=False, elem_classes='sticky')
        gallery = dict(columns=4, height='auto', show_label=False, allow_preview=False, buttons=[], visible=False)
        gr.Markdown('# Classify photos by a few examples\nNothing is trained. No photo leaves the machine that this page runs on.')
        with gr.Row():
            with gr.Column():
                gr.Markdown('## Examples')
                name = gr.Textbox(label='Class', placeholder='cat', max_lines=1)
                drop = gr.File(label='Photos of this class', file_count='multiple', height=140)
                add = gr.Button('Add these photos', variant='primary')
                to_class = gr.Radio([], label='An example of the wrong class? Click on it, and then on its class', **classes)
                examples = gr.Gallery(label='Examples', **gallery)
                with gr.Row(visible=False) as removing:
                    remove_one = gr.Button('Remove the selected example', size='sm')
                    remove_class = gr.Button('Remove its class', size='sm')
            with gr.Column():
                gr.Markdown('## Photos to classify')
                says = gr.HTML()
                new = gr.File(label='Photos', file_count='multiple', height=140)
                right = gr.Radio([], label='A wrong class? Click on the photo, and then on its class', **classes)
                photos = gr.Gallery(label='Their classes', **gallery)
                prepare = gr.Button('Make the files to download', visible=False)
                files = gr.File(label='The classifier, the table and the page', interactive=False, visible=False)
        shown = [state, example, photo, examples, to_class, removing, says, photos, right, prepare, files]

        def pictures(visit, files, captions):
            return gr.Gallery(list(zip(map(str, visit.pictures(files)), captions)), selected_index=None, visible=bool(files))

        def show(visit):
            names = [str(c) for c in visit.classes]
            lines,captions,known = visit.says().splitlines(),['']*len(visit.photos),len(names) > 1
            if known and visit.photos:
                try: captions = [caption(row) for row in visit.table().to_dict('records')]
                except UserError as e: lines.append(str(e))
            return [visit, None, None, pictures(visit, visit.files, map(str, visit.labels)),
                    gr.Radio(names, value=None, visible=bool(names)), gr.Row(visible=bool(names)),
                    ''.join(f'<p>{text(line)}</p>' for line in lines), pictures(visit, visit.photos, captions),
                    gr.Radio(names, value=None, visible=known and bool(visit.photos)), gr.Button(visible=known),
                    gr.File(None, visible=False)]

        def on(event, change, inputs=(), empty=()):
            "Let an event change the visit, show what it has then, and empty some inputs; after an error, which is shown, nothing changes"
            def handler(visit, *args):
                try:
                    if visit is None: raise UserError(GONE)
                    problems = change(visit, *args) or ()
                except UserError as e:
                    gr.Warning(text(visit.short(e) if visit else e))
                    # a class that stays checked could not be clicked again
                    return [gr.Radio(value=None) if c in (to_class, right) else gr.skip() for c in (*shown, *empty)]
                for problem in problems: gr.Warning(text(visit.short(problem)))
                for uploads in (a for a in args if isinstance(a, list)):
                    for f in uploads: Path(f).unlink(missing_ok=True) # the visit has a copy
                return [*show(visit), *[None]*len(empty)]
            event(handler, [state, *inputs], [*shown, *empty], concurrency_limit=1, concurrency_id='visit', api_visibility='private')

        def selected(event:gr.SelectData): return event.index
        def download(visit):
            try:
                if visit is None: raise UserError(GONE)
                return gr.File([str(f) for f in visit.download()], visible=True)
            except UserError as e: gr.Warning(text(visit.short(e) if visit else e))

        app.load(lambda: show(Visit(few)), None, shown, concurrency_limit=1, concurrency_id='visit', api_visibility='private')
        on(add.click, Visit.add, [name, drop], [name, drop])
        on(new.upload, Visit.classify, [new], [new])
        on(to_class.input, Visit.change_example, [example, to_class])
        on(remove_one.click, Visit.remove_example, [example])
        on(remove_class.click, Visit.remove_class_of, [example])
        on(right.input, Visit.correct, [photo, right])
        examples.select(selected, None, example, api_visibility='private')
        photos.select(selected, None, photo, api_visibility='private')
        prepare.click(download, state, files, concurrency_limit=1, concurrency_id='visit', api_visibility='private')
    return app

def launch(few:FewShotClassifier, host:str='127.0.0.1', port:int=7860, browser:bool=False, wait:bool=True):
    """Serve the page until it is stopped by Ctrl+C, or with wait=False until the `gradio.Blocks` that is returned is closed

    UserError if the address cannot be used. The page needs nothing from the internet.
    """
    app = make_app(few)
    try:
        app.launch(server_name=host, server_port=port, inbrowser=browser, prevent_thread_lock=True, quiet=True, share=False, ssr_mode=False,
                   css=CSS, footer_links=[], max_file_size='200mb')
    except (OSError, OverflowError, ValueError, RuntimeError) as e:
        raise UserError(f'the page cannot be served at {host}, port {port} ({first_line(e)}): give another --port or --host') from None
    log(f'{app.local_url} shows the page; Ctrl+C stops it')
    if wait: app.block_thread()
    return app
