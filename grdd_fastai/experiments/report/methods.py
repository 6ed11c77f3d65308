"""The tables of recipes/compare.py in RESULTS.md: each has the records of one protocol, one teacher and one number of images alone."""
import json
import statistics
from collections import defaultdict

from ...core.errors import UserError
from ..store import slug
from .markdown import CLASSES, SHOTS, accuracy, arxiv_link, differences, distinct, folded, markdown_table, networks_text, picture

__all__ = ['comparison', 'figure_name', 'HOW', 'METHODS_SIDE_BY_SIDE']


METHODS_SIDE_BY_SIDE = 'compare' # the experiment's folder in results/
HOW = { # the protocols in words, for figures and the report
    'own': 'each method by its own classifier',
    'cosine': 'mean cosine with the support images',
    'prototype': 'nearest mean of normalised features',
    'logistic': 'logistic regression on normalised features',
    'views': 'logistic regression, five augmented views in place of each support image',
    'transductive': 'TIM-ADM, all queries together, equally many of each class',
    'dirichlet': 'alpha-TIM, all queries together, unevenly many of each class',
}


def figure_name(protocol, split, images, given=None):
    "Name of the figure of a protocol, for trainings of so many `images` and the teacher `given`"
    return '_'.join(['compare', protocol, split, str(images), *([slug(given)] if given else [])])

def comparison(root):
    "Parts of RESULTS.md with the tables of all methods; none if there are no records"
    # (classes, data, network, --teacher) -> images per training -> protocol -> method -> records by seed
    groups = defaultdict(lambda: defaultdict(lambda: defaultdict(lambda: defaultdict(list))))
    read = [json.loads(path.read_text()) for path in (root/'results'/METHODS_SIDE_BY_SIDE).glob('*.json')]
    for r in sorted(read, key=lambda r: (r['order'], r['seed'])):
        key = r['split'], r['data']['name'], r['arch'], r['given'] or ''
        groups[key][r['budget']][r['protocol']][r['method']].append(r)
    parts = []
    for (split,data,arch,given),lengths in sorted(groups.items()):
        where = f'{arch}{given and ", teacher "}{given}, {CLASSES[split]} classes of {data}'
        for budget in sorted(lengths, reverse=True):
            parts.append(f'## Methods side by side: {budget:,} images, {where}\n')
            parts += protocol_tables(root, split, budget, given, lengths[budget])
        if compared := lengths_table({budget:protocols.get('own', {}) for budget,protocols in lengths.items()}):
            parts += [f'## Methods and the length of their training: {where}\n', compared + '\n']
    return parts

def protocol_tables(root, split, budget, given, protocols):
    "The tables and figures of protocol -> method -> records by seed; those of the methods' own classifiers are shown, the others folded"
    parts = []
    for protocol in sorted(protocols, key=list(HOW).index):
        rows = protocols[protocol]
        for seeds in rows.values(): check_seeds(seeds)
        every = [r for seeds in rows.values() for r in seeds]
        figure = picture(root, figure_name(protocol, split, budget, given), 'Accuracy and cost')
        shown = [f"Seeds {distinct(r['seed'] for r in every)}; {networks_text(every)}\n", table(rows) + '\n', *figure]
        title = f'{HOW[protocol][0].upper()}{HOW[protocol][1:]}'
        parts += folded(title, shown) if protocol != 'own' else [f'{title}.', *shown]
    return parts

def check_seeds(seeds):
    "Raise UserError unless the records of a method are different seeds of the same training"
    names = ', '.join(r['file'] for r in seeds)
    if len({r['seed'] for r in seeds}) < len(seeds) or len({(r['same'], r['teacher']) for r in seeds}) > 1:
        raise UserError(f'the records {names} are not seeds of one training: remove those that are out of date')

def table(rows):
    "Table of the methods, method -> records by seed, in the order of their accuracy for the fewest shots"
    shots = sorted({shot for seeds in rows.values() for r in seeds for shot in r['scores']}, key=lambda k: int(k.partition('-')[0]))
    versus = next((other for seeds in rows.values() for r in seeds for other in r['versus']), None)
    head = ['method', 'classifier', 'million images, with those of its start and teacher', 'teacher']
    known = ['published'] if any(r['published'] for seeds in rows.values() for r in seeds) else []
    for shot in shots: head += [shot, *known, *([f'minus `{versus}`'] if versus else [])]
    lines = []
    for name,seeds in sorted(rows.items(), key=lambda o: -mean(o[1], shots[0])):
        r = seeds[0]
        paper = f" ({arxiv_link(r['source'])})" if r['source'] else ''
        seen = [f"{max(r[k].values())/1e6:.2f}" for k in ('images', 'images_with_others')]
        cells = [f"`{name}`: {r['title']}{paper}", f"`{r['classifier']}`" if "'" not in r['classifier'] else r['classifier'],
                 seen[0] if seen[0] == seen[1] else f'{seen[0]}, {seen[1]}', taught(r)]
        for shot in shots:
            published = dict(zip(('1-shot', '5-shot'), r['published'] or ())).get(shot, '')
            cells += [accuracy(seeds, shot), *([str(published)] if known else []), *([differences(seeds, versus, shot)] if versus else [])]
        links = ' '.join(f"[{r['seed']}](results/{METHODS_SIDE_BY_SIDE}/{r['file']})" for r in seeds)
        lines.append([*cells, links])
    return markdown_table([*head, 'records'], lines)

def lengths_table(lengths):
    """Table of the methods that were trained for several numbers of images, from images -> method -> records by seed

    Empty if no method was.
    """
    names = dict.fromkeys(name for rows in lengths.values() for name in rows)
    several = [name for name in names if sum(name in rows for rows in lengths.values()) > 1]
    def cell(seeds): return ', '.join(accuracy(seeds, shot) for shot in SHOTS) + f' ({len(seeds)})' if seeds else ''
    lines = [[f'`{name}`', *(cell(rows.get(name)) for _,rows in sorted(lengths.items()))] for name in several]
    return several and markdown_table(['method', *(f'{n:,} images: 1-shot, 5-shot (seeds)' for n in sorted(lengths))], lines)

def taught(r):
    "Cell of a method's teacher: 'yes' for the network that --teacher names, or the method whose network it is"
    return '' if r['teacher'] is None else 'yes' if r['teacher'] == r['given'] else f"`{r['teacher']}`"

def mean(seeds, shot): return statistics.mean([r['scores'][shot]['accuracy'] for r in seeds if shot in r['scores']] or [0.])
