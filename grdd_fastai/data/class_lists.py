"""Which classes, or which images, are base, validation and novel: the field's lists, and lists of one's own."""
import csv
import posixpath
import re
from functools import lru_cache
from pathlib import Path

import pandas as pd

from ..core.errors import UserError
from .archives import Folder, Zip, open_tree

__all__ = ['SPLITS', 'ALIASES', 'CLASS_LISTS', 'class_list', 'list_of', 'usual_names', 'read_split', 'normal']


SPLITS = ('train', 'val', 'test') # base, validation and novel classes
# usual names of the splits; where the images of the base classes are divided once more, only those of train_phase_train are base images
ALIASES = dict(train='train', base='train', train_phase_train='train', val='val', valid='val', validation='val', test='test', novel='test')
MAX_ROWS = 5*10**6 # most rows of a CSV
MAX_LINE = 2**20 # most characters in a line of a text file

# name of each list in data/ and what it splits; of lists of the same classes, the first one is used where none is asked for
CLASS_LISTS = dict(
    cifar_fs='CIFAR-100 (Bertinetto et al., 2019)', fc100='CIFAR-100 by superclasses (Oreshkin et al., 2018)',
    mini_imagenet='miniImageNet (Ravi and Larochelle, 2017)', mini_imagenet_vinyals='miniImageNet (Vinyals et al., 2016)',
    tiered_imagenet='tieredImageNet (Ren et al., 2018)', cub='CUB-200-2011 (Chen et al., 2019)')


def normal(name):
    "A class name without case, blanks and underscores, for comparison"
    return re.sub(r'[\s_]', '', name).lower()

def list_file(name):
    "The file `name` of data/, which an installed package has in class_lists/"
    here = Path(__file__).parent.parent # the package
    return next(p for p in (here/'class_lists'/name, here.parent/'data'/name) if p.exists())

@lru_cache
def class_list(name):
    "The list `name` of `CLASS_LISTS` as a DataFrame with the columns label and split, and name where classes have another name, too"
    return pd.read_csv(list_file(f'{name}.csv'), dtype=str)

def list_of(classes):
    """Name of the first of `CLASS_LISTS` that splits classes as they are split, or None

    `classes` holds the set of the class names of each split; case, blanks and underscores do not matter.
    """
    mine = {(normal(c), s) for s in classes for c in classes[s]}
    return next((n for n in CLASS_LISTS if mine == {(normal(c), s) for c,s in zip(class_list(n).label, class_list(n).split)}), None)

def usual_names(classes):
    """{class name: the name that the lists give it} for the numbers of CIFAR-100's classes, and for tieredImageNet's names in words

    `classes` holds the set of the class names of each split. Empty if they are neither.
    """
    tiered = class_list('tiered_imagenet')
    by_name = {s:dict(zip(mine.name, mine.label)) for s,mine in tiered.groupby('split')}
    if all(classes[s] == by_name.get(s, {}).keys() for s in classes): return {c:label for s in classes for c,label in by_name[s].items()}
    fine = sorted(class_list('cifar_fs').label) # CIFAR-100 numbers its classes by their names
    for name in ('cifar_fs', 'fc100'):
        numbers = {s:{f'{fine.index(c):02d}' for c in mine.label} for s,mine in class_list(name).groupby('split')}
        if classes == numbers: return {f'{i:02d}':c for i,c in enumerate(fine)}
    return {}

def read_lines(f):
    "Yield the lines of an open text file; ValueError for a line of more than `MAX_LINE` characters"
    while line := f.readline(MAX_LINE):
        if len(line) == MAX_LINE: raise ValueError(f'a line has more than {MAX_LINE} characters')
        yield line


# ---- CSVs -------------------------------------------------------------------------------------------------------------

COLUMNS = dict(filename=('filename', 'image_name', 'file_name', 'image', 'path'), label=('label', 'class_name', 'class'), split=('split',))

def read_table(tree, name, needs=('filename', 'label')):
    """The rows of a CSV of `tree` as a DataFrame with the columns `needs` and, where it has them, filename, label and split

    Other usual names of a column are in `COLUMNS`. UserError at the first wrong row.
    """
    where = f'{tree.path}, {name}' if name != tree.path.name else str(tree.path)
    try:
        with tree.lines(name) as lines:
            rows = csv.reader(read_lines(lines), strict=True)
            header = next(rows, None)
            if not header: raise UserError(f'{where} is empty: it needs the columns {",".join(needs)} and one row per image')
            columns = {c:next((n for n in names if n in header), None) for c,names in COLUMNS.items()}
            missing = [c for c in needs if columns[c] is None]
            if missing:
                lacks = f'column {missing[0]}' if len(missing) == 1 else f'columns {missing[0]}, {missing[1]}'
                raise UserError(f'{where} lacks the {lacks}: it has {", ".join(header[:20])}')
            columns = {c:n for c,n in columns.items() if n is not None}
            twice = next((n for n in columns.values() if header.count(n) > 1), None)
            if twice: raise UserError(f'{where} has {header.count(twice)} columns {twice}: leave one of them')
            places = {c:header.index(n) for c,n in columns.items()}
            found = []
            for n,row in enumerate(rows, 2):
                if not row: continue
                if len(row) != len(header):
                    raise UserError(f'{where}, row {n} has {len(row)} fields, the header {len(header)}: mend the row')
                empty = next((columns[c] for c in needs if not row[places[c]]), None)
                if empty: raise UserError(f'{where}, row {n}: the {empty} is empty: fill it in or remove the row')
                found.append((n, *(row[i] for i in places.values())))
                if len(found) > MAX_ROWS: raise UserError(f'{where} has more than {MAX_ROWS:,} rows: give a part of them')
    except UserError: raise
    except (csv.Error, UnicodeDecodeError) as e: raise UserError(f'{where} is not a readable CSV ({e}): save it as CSV in UTF-8') from None
    except Exception as e: raise UserError(f'{where} cannot be read ({e}): fetch it again') from None # damage can raise any error
    if not found: raise UserError(f'{where} has no rows: it needs a row ({",".join(needs)}) an image')
    return pd.DataFrame(found, columns=['row', *places], dtype=object)

def usual_split(name, where):
    "train, val or test for a usual name of a split"
    if name.lower() not in ALIASES: raise UserError(f'{where} has the split {name!r}: a split is train, val or test')
    return ALIASES[name.lower()]


# ---- the split that is asked for --------------------------------------------------------------------------------------

def read_split(split):
    """The split that `split` names, as a DataFrame with the columns label and split, and filename if it lists images

    `split` is a name of `CLASS_LISTS`, a CSV with a column split, or a folder or zip with train, val and test as .csv or .txt files. A
    .txt file has a class in each line.
    """
    if str(split) in CLASS_LISTS: return class_list(str(split))
    try: tree = open_tree(split)
    except UserError:
        raise UserError(f'the split {str(split)!r} is neither a list nor a path: give --split one of {", ".join(CLASS_LISTS)}, a CSV or a '
                        'folder of CSVs') from None
    path = Path(split).expanduser()
    if path.is_file() and path.suffix.lower() == '.csv':
        df = read_table(tree, path.name, ('label', 'split'))
        df['split'] = [usual_split(s, path) for s in df.split]
    elif isinstance(tree, Folder | Zip): df = pd.concat([_split_file(tree, s) for s in SPLITS], ignore_index=True)
    else: raise UserError(f'{path} holds no lists: give --split a CSV, or a folder or zip of train.csv, val.csv and test.csv')
    df = df.drop(columns='row', errors='ignore').drop_duplicates()
    for label,s in df.groupby('label').split.unique().items():
        if len(s) > 1: raise UserError(f'{path}: class {label} is in both {s[0]} and {s[1]}: the classes of the splits must be disjoint')
    return df

def _split_file(tree, split):
    "The rows of one split of a folder or zip of lists"
    f = next((f for f in tree.files if posixpath.basename(f).lower() in (f'{split}.csv', f'{split}.txt')), None)
    if f is None: raise UserError(f'{tree.path} has no {split}.csv or {split}.txt: it needs them of train, val and test')
    if f.lower().endswith('.csv'): return read_table(tree, f, ('label',)).assign(split=split)
    try:
        with tree.lines(f) as lines: names = sorted({c for line in read_lines(lines) if (c := line.strip())})
    except (UnicodeDecodeError, ValueError) as e: raise UserError(f'{tree.path}, {f} is no list of classes ({e}): mend it') from None
    return pd.DataFrame(dict(label=names, split=split))
