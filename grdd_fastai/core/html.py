"""Pages of HTML that need nothing beside them: no script, no file, no connection."""
import base64
import io
from collections.abc import Iterable
from html import escape
from pathlib import Path

from PIL import Image

from .errors import UserError
from .storage import atomic_write, user_path

__all__ = ['write_html', 'text', 'bullets', 'table', 'figure_uri', 'thumbnail', 'image_uri']


STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #777; --warn: #b35c00 }
* { box-sizing: border-box }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 75rem; padding: 1.5rem }
h1 { font-size: 1.6rem; margin: 0 0 .5rem } h2 { font-size: 1.15rem; margin: 2rem 0 .75rem }
h2 small, figcaption small { color: var(--soft); font-weight: normal }
ul { padding-left: 1.2rem } li { margin: .3rem 0 }
"""


def write_html(path:str|Path, title:str, parts:Iterable[str], style:str='') -> Path:
    """Write a page with the HTML `parts` and further CSS `style`; returns the path

    The page may show only pictures that are part of it (`figure_uri`, `image_uri`). UserError for a file that cannot be written.
    """
    path = user_path(path)
    page = ('<!doctype html><html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; style-src \'unsafe-inline\'">'
            f'<title>{text(title)}</title><style>{STYLE}{style}</style></head><body>{"".join(parts)}</body></html>')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, page)
    except OSError as e: raise UserError(f'{path} cannot be written ({e.strerror}): give another file') from None
    return path

def text(o) -> str:
    "`o` as text that is escaped for HTML; bytes of a file name that are not UTF-8 become question marks"
    return escape(str(o).encode('utf-8', 'replace').decode(), quote=True)

def bullets(lines:Iterable) -> str:
    "A list of the `lines`, which are escaped"
    return '<ul>' + ''.join(f'<li>{text(line)}</li>' for line in lines) + '</ul>'

def table(rows:Iterable[Iterable], head:Iterable=()) -> str:
    "A table of the `rows`, below the names of its columns, all of which are escaped"
    names = ''.join(f'<th>{text(o)}</th>' for o in head)
    body = ''.join('<tr>' + ''.join(f'<td>{text(o)}</td>' for o in row) + '</tr>' for row in rows)
    return '<div class="wide"><table>' + (f'<thead><tr>{names}</tr></thead>' if names else '') + f'<tbody>{body}</tbody></table></div>'

def thumbnail(image:Image.Image, side:int) -> Image.Image:
    "A copy of the image whose longest side has at most `side` pixels"
    small = image.copy()
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    return small

def image_uri(image:Image.Image, side:int) -> str:
    "A data URI with a JPEG of the image, whose longest side has at most `side` pixels"
    return uri('jpeg', lambda file: thumbnail(image, side).save(file, 'JPEG', quality=80))

def figure_uri(fig) -> str:
    "A data URI with a PNG of a matplotlib Figure, which is closed"
    import matplotlib.pyplot as plt
    try: return uri('png', lambda file: fig.savefig(file, dpi=130, format='png'))
    finally: plt.close(fig)

def uri(kind, save):
    file = io.BytesIO()
    save(file)
    return f'data:image/{kind};base64,' + base64.b64encode(file.getvalue()).decode()
