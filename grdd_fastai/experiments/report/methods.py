"""The tables of recipes/compare.py in RESULTS.md: each has the records of one protocol, one teacher and one number of images alone."""
import json
import statistics
from collections import defaultdict

from ...core.errors import UserError
from ..store import slug
from .markdown import CLASSES, SHOTS, accuracy, arxiv_link, differences, distinct, folded, markdown_table, networks_text, picture

__all__ = ['comparison', 'file_name', 'HOW', 'EXPERIMENTS']


EXPERIMENTS = dict(compare='Methods side by side', term_weights='Weights of the terms') # folder in results/ -> title
HOW = { # the protocols in words, for figures and the report
    'own': 'each method by its own classifier',
    'cosine': 'mean cosine with the support images',
    'prototype': 'nearest mean of normalised features',
    'logistic': 'logistic regression on normalised features',
    'views': 'logistic regression, five augmented views in place of each support image',
    'transductive': 'TIM-ADM, all queries together, equally many of each class',
    'dirichlet': 'alpha-TIM, all queries together, unevenly many of each class',
}


def file_name(experiment, protocol, split, images, teacher=None):
    "Name of the table and the figure of a protocol, for trainings of so many `images` and the network `teacher`"
    return '_'.join([experiment, protocol, split, str(images), *([slug(teacher)] if teacher else [])])

def comparison(root):
    "Parts of RESULTS.md with the tables of all methods; none if there are no records"
    # (experiment, classes, data, network, --teacher) -> images per training -> protocol -> method -> records by seed
    groups = defaultdict(lambda: defaultdict(lambda: defaultdict(lambda: defaultdict(list))))
    read = [json.loads(path.read_text()) for name in EXPERIMENTS for path in (root/'results'/name).glob('*.json')]
    for r in sorted(read, key=lambda r: (r['order'], r['seed'])):
        key = r['experiment'], r['split'], r['data']['name'], r['arch'], r['given']['network'] if r['given'] else ''
        groups[key][r['budget']][r['protocol']][r['method']].append(r)
    parts = []
    for (experiment,split,data,arch,teacher),lengths in sorted(groups.items()):
        where = f'{arch}{teacher and ", teacher "}{teacher}, {CLASSES[split]} classes of {data}'
        for budget in sorted(lengths, reverse=True):
            parts.append(f'## {EXPERIMENTS[experiment]}: {budget:,} images, {where}\n')
            for protocol in sorted(lengths[budget], key=list(HOW).index):
                figure = picture(root, file_name(experiment, protocol, split, budget, teacher), 'Accuracy and cost')
                parts += protocol_table(protocol, lengths[budget][protocol], figure)
        if compared := lengths_table({budget:protocols.get('own', {}) for budget,protocols in lengths.items()}):
            parts += [f'## {EXPERIMENTS[experiment]}, by the length of their training: {where}\n', compared + '\n']
    return parts

def protocol_table(protocol, rows, figure):
    "The table and the figure of one protocol, from method -> records by seed; all protocols but `own` are folded"
    for seeds in rows.values(): check_seeds(seeds)
    every = [r for seeds in rows.values() for r in seeds]
    if len({json.dumps([r['data']['fingerprint'], r['given']]) for r in every}) > 1:
        raise UserError(f'the records of {", ".join(rows)} have other data or teachers of the same name: remove those that are out of date')
    shown = [f"Seeds {distinct(r['seed'] for r in every)}; {networks_text(every)}\n", table(rows, protocol != 'own') + '\n', *figure]
    title = f'{HOW[protocol][0].upper()}{HOW[protocol][1:]}'
    return [f'{title}.', *shown] if protocol == 'own' else folded(title, shown)

def check_seeds(seeds):
    "Raise UserError unless the records of a method are different seeds of the same training"
    names = ', '.join(r['file'] for r in seeds)
    if len({r['seed'] for r in seeds}) < len(seeds) or len({(r['same'], r['teacher']) for r in seeds}) > 1:
        raise UserError(f'the records {names} are not seeds of one training: remove those that are out of date')

def table(rows, merge=False):
    """Table of the methods, method -> records by seed, in the order of their accuracy for the fewest shots

    With `merge` methods with the same network share a line: they differ in their classifiers alone.
    """
    names = defaultdict(list) # of each network
    for name,seeds in rows.items(): names[seeds[0]['same'] if merge else name].append(name)
    shots = sorted({shot for seeds in rows.values() for r in seeds for shot in r['scores']}, key=lambda k: int(k.partition('-')[0]))
    versus = next((other for seeds in rows.values() for r in seeds for other in r['versus']), None)
    images = 'million images; the second number has those of networks trained for it, without the given teacher'
    head = ['method', 'classifier', images, 'teacher']
    known = ['published'] if any(r['published'] for seeds in rows.values() for r in seeds) else []
    for shot in shots: head += [shot, *known, *([f'minus `{versus}`'] if versus else [])]
    lines = []
    for first,*others in sorted(names.values(), key=lambda o: -mean(rows[o[0]], shots[0])):
        seeds = rows[first]
        r = seeds[0]
        paper = f" ({arxiv_link(r['source'])})" if r['source'] else ''
        also = ''.join(f', `{name}`' for name in others)
        seen = [f"{max(r[k].values())/1e6:.2f}" for k in ('images', 'images_with_others')]
        cells = [f"`{first}`: {r['title']}{paper}{also}", f"`{r['classifier']}`" if "'" not in r['classifier'] else r['classifier'],
                 seen[0] if seen[0] == seen[1] else f'{seen[0]}, {seen[1]}', taught(r)]
        for shot in shots:
            published = dict(zip(SHOTS, r['published'] or ())).get(shot, '')
            cells += [accuracy(seeds, shot), *([str(published)] if known else []), *([paired(seeds, rows, versus, shot)] if versus else [])]
        links = ' '.join(f"[{r['seed']}](results/{r['experiment']}/{r['file']})" for r in seeds)
        lines.append([*cells, links])
    return markdown_table([*head, 'records'], lines)

def paired(seeds, rows, versus, shot):
    "Cell of the difference from `versus`; it leaves out seeds whose recorded difference is from another network than the table shows"
    shown = {r['seed']:(r['networks'].get(shot) or r['networks']['net'])['weights'][:16] for r in rows.get(versus, ())}
    same = [r for r in seeds if r['versus'].get(versus, {}).get(shot, {}).get('weights', '') == shown.get(r['seed'])]
    return differences(same, versus, shot)

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
    return '' if r['teacher'] is None else 'yes' if r['given'] and r['teacher'] == r['given']['network'] else f"`{r['teacher']}`"

def mean(seeds, shot): return statistics.mean([r['scores'][shot]['accuracy'] for r in seeds if shot in r['scores']] or [0.])
