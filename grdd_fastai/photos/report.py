"""Photos with their classes: as one HTML page that needs nothing beside it, and as a figure."""
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from ..core.errors import UserError
from ..core.html import bullets, image_uri, text, write_html
from .classifier import UNKNOWN, FewShotClassifier
from .reading import UnreadablePhoto, list_photos, load_photos, photo_name, short_name

__all__ = ['write_page', 'plot_photos']


SIDE = 160 # longest side of the small pictures in pixels
MOST = 200 # largest number of photos of a class on the page

STYLE = """
.grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(10.5rem, 1fr)) }
figure { border: 1px solid var(--line); border-radius: .5rem; margin: 0; overflow: hidden; padding: .6rem }
figure > img { display: block; height: 9rem; object-fit: contain; width: 100% }
figcaption { font-size: .85rem; margin-top: .4rem; overflow-wrap: anywhere }
meter { display: block; height: .7rem; margin: .3rem 0; width: 100% }
.near { align-items: center; display: flex; gap: .5rem; margin-top: .4rem } .near img { border-radius: .25rem; height: 2.6rem }
.suspect { border-color: var(--warn) } nav a { margin-right: .9rem; white-space: nowrap }
"""


def write_page(path:str|Path, few:FewShotClassifier, photos, table:pd.DataFrame|None=None) -> Path:
    """Write an HTML page that shows the class of each photo, the accuracy to expect and what is wrong with the support

    `photos` is what `predict_table` takes, and `table` what it has returned for them, where it is there already. Small pictures are part of
    the page. UserError for a file that cannot be written.
    """
    photos = list_photos(photos)
    if table is None: table = few.predict_table(photos)
    if list(table.file) != [photo_name(p) for p in photos]:
        raise UserError(f'the table ({len(table)} rows) is not of these {len(photos)} photos in this order: make it by predict_table')
    table = table.assign(problem=table.problem.fillna('')).reset_index(drop=True)
    classes = by_class(table)
    shown = [i for _,rows in classes for i in rows[:MOST]]
    images = dict(zip(shown, pictures([photos[i] for i in shown])))
    nearest = support_pictures(few, [table.nearest[i] for i in images])
    unread = table[table.problem != '']
    try: lines,doubtful = str(check := few.check()).splitlines(),suspects(few, check.suspects)
    except UserError as e: lines,doubtful = [f'The accuracy to expect is not known: {e}.'],''
    parts = [f'<h1>{count(photos)}, {len(few.vocab)} classes</h1>', bullets(lines), contents(classes)]
    for name,rows in classes:
        more = f' The first {MOST} are shown.' if len(rows) > MOST else ''
        note = f'<small>{count(rows)}, the least certain first.{more}</small>'
        parts.append(f'<h2 id="{anchor(name)}">{text(name)} {note}</h2>')
        parts.append('<div class="grid">' + ''.join(card(few, table.loc[i], images[i], nearest) for i in rows[:MOST]) + '</div>')
    if len(unread):
        parts.append('<h2>Not read</h2>' + bullets(unread.problem))
    parts.append(doubtful)
    return write_html(path, count(photos), parts, STYLE)


def by_class(table):
    "List of (class, its rows of the table) for each class that has photos, with the least probable row first and unknown photos last"
    read = table[table.problem == '']
    names = sorted(set(read['class']), key=lambda c: (c == UNKNOWN, str(c)))
    return [(c, read[read['class'] == c].sort_values('probability', na_position='first').index.tolist()) for c in names]

def pictures(photos):
    "A data URI with a small JPEG of each photo; None for one that cannot be read"
    return [None if isinstance(p, UnreadablePhoto) else p for p in load_photos(photos, partial(image_uri, side=SIDE), allow_large=True)]

def support_files(few, names):
    "The `names` of support photos that are files on this machine; a loaded classifier has none, because its photos are elsewhere"
    return sorted({n for n in names if isinstance(n, str) and Path(n).is_file()}) if few.photos_here else []

def support_pictures(few, names):
    "name -> data URI for the support photos that are files on this machine"
    files = support_files(few, names)
    return dict(zip(files, pictures(files)))

def count(photos): return '1 photo' if len(photos) == 1 else f'{len(photos)} photos'

def percent(p): return f'{p:.0%}' if p < 0.995 else '>99%'

def anchor(name): return 'class-' + ''.join(c if c.isalnum() else '-' for c in str(name))

def contents(classes):
    links = (f'<a href="#{anchor(c)}">{text(c)} ({len(rows)})</a>' for c,rows in classes)
    return '<nav>' + ' '.join(links) + '</nav>'

def picture(uri, name): return f'<img src="{uri}" alt="{text(name)}">' if uri else ''

def is_unknown(few, row): return few.unknown is not None and row['class'] == UNKNOWN

def card(few, row, uri, nearest):
    "A photo with its file, its probability, the class that comes second, and the most similar support photo of its class"
    name = row.file or 'a photo without a file'
    unknown = is_unknown(few, row)
    second = 'most like' if unknown else 'or'
    parts = [picture(uri, name), '<figcaption>', text(Path(name).name)]
    if not np.isnan(row.probability):
        what = 'probability of the most similar class' if unknown else 'probability'
        parts.append(f'<meter value="{row.probability:.3f}" title="{what}"></meter>{text(percent(row.probability))}')
    parts.append(f' <small>{second} {text(row.runner_up)}</small>')
    parts.append(f'<div class="near">{picture(nearest.get(row.nearest), row.nearest)}'
                 f'<small>nearest: {text(short_name(row.nearest))}</small></div></figcaption>')
    return f'<figure>{"".join(parts)}</figure>'

def suspects(few, found):
    "HTML of the support photos in the DataFrame `found`, whose labels may be wrong; empty if there are none"
    if found.empty: return ''
    shown = support_pictures(few, found.file)
    cards = [f'<figure class="suspect">{picture(shown.get(r.file), r.file)}<figcaption>{text(r.file)}<br>'
             f'labelled {text(r.label)}, looks like {text(r.looks_like)}</figcaption></figure>' for r in found.itertuples()]
    return f'<h2>Perhaps a wrong label <small>among the photos of the support</small></h2><div class="grid">{"".join(cards)}</div>'


def plot_photos(few:FewShotClassifier, photos, n:int=12) -> plt.Figure:
    "Figure of the first `n` photos with their classes, each above the most similar support photo of its class, if that is a file here"
    photos = list_photos(photos)[:n]
    table = few.predict_table(photos)
    columns = min(6, len(photos))
    rows = -(-len(photos)//columns)
    fig,axes = plt.subplots(2*rows, columns, figsize=(2*columns, 3.6*rows), squeeze=False, height_ratios=[2, 1]*rows, layout='constrained')
    for ax in axes.flat: ax.axis('off')
    def read(files): return load_photos(files, lambda image: image.copy(), allow_large=True)
    files = support_files(few, table.nearest)
    support = dict(zip(files, read(files)))
    for i,(image,near) in enumerate(zip(read(photos), table.nearest)):
        top,below = axes[2*(i//columns):2*(i//columns) + 2, i % columns]
        row = table.loc[i]
        if isinstance(image, UnreadablePhoto):
            top.text(.5, .5, 'not read', ha='center', va='center')
            continue
        top.imshow(image)
        certain = not np.isnan(row.probability) and not is_unknown(few, row)
        top.set_title(f'{row["class"]} {percent(row.probability)}' if certain else row['class'], fontsize=10)
        found = support.get(near)
        if found is None or isinstance(found, UnreadablePhoto): continue
        below.imshow(found)
        below.set_title(short_name(near), fontsize=7)
    return fig
