"""Tables of the experiments whose rows are settings: Table 2, Figures 4 and 6, and their kind."""
import json
import statistics
from collections import defaultdict
from pathlib import Path

from ...stage_one import StageOne
from .markdown import CLASSES, accuracy, differences, markdown_table
from .methods import EXPERIMENTS

__all__ = ['records', 'section', 'by_start']


def records(folder):
    "experiment -> split -> (row, settings without the seed) -> list of records by seed, in the order of the experiment's rows"
    found = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    read = [json.loads(path.read_text()) for path in Path(folder).glob('*/*.json') if path.parent.name not in EXPERIMENTS]
    for r in sorted(read, key=lambda r: (r['order'], r['same'], r['seed'])):
        found[r['experiment']][r['split']][r['row'], r['same']].append(r)
    return found

def compared(seeds, shot):
    "Cell of the differences from each row that a row is compared with"
    others = dict.fromkeys(other for r in seeds for other in r['versus'])
    return '; '.join(f'{other} {text}' for other in others if (text := differences(seeds, other, shot)))

def section(rows, split, root):
    "Table of the records `rows`, whose files lie below `root`"
    every = [r for seeds in rows.values() for r in seeds]
    shots = sorted({shot for r in every for shot in r['scores']})
    paper = {shot for r in every for shot in r['paper'] or {} if shot in shots} # the shots that the paper has a number for
    head = ['row', 'phi → psi']
    for shot in shots:
        head.append(f'{shot}, {CLASSES[split]}')
        if shot in paper: head += [f'paper, {shot}, novel', 'ours - paper']
    head += [*(f'difference, {shot}' for shot in shots), 'records']
    lines = []
    for (row,_),seeds in rows.items():
        first = seeds[0]
        cells = [row, f"{first['phi']} → {first['psi']}" if first['phi'] else first['psi']]
        for shot in shots:
            cells.append(accuracy(seeds, shot))
            if shot not in paper: continue
            theirs = (first['paper'] or {}).get(shot)
            ours = [r['scores'][shot]['accuracy'] for r in seeds if shot in r['scores']]
            comparable = theirs and ours and split == 'novel'
            cells += [str(theirs or ''), f'{statistics.mean(ours) - theirs:+.1f}' if comparable else '']
        links = ' '.join(f"[{r['seed']}]({root}{r['experiment']}/{r['file']})" for r in seeds)
        lines.append([*cells, *(compared(seeds, shot) for shot in shots), links])
    return markdown_table(head, lines)

def from_random(record):
    "Describe a student that started from random weights: its architecture and the length of its stage two"
    return f'{record["student"]["arch"]}, random weights; {stage_two_words(record)}'

def stage_two_words(record): return f'stage two: {record["epochs"]} epochs of {record["episodes"]} {record["way"]}-way episodes'

def described(record):
    "Describe how a network was trained: its stage one and, if it had one, its stage two"
    if 'student' not in record: return StageOne.from_record(record).described()
    if record['student'].keys() == {'arch'}: return from_random(record)
    return f'{described(record["student"])}; {stage_two_words(record)}'

def by_start(rows):
    """Group the rows by the student's stage one, with the most epochs first: yields (words on the stage one of psi and phi, rows)

    Rows that compare settings of stage one form one group.
    """
    groups = defaultdict(dict)
    epochs = {} # of each group's stage one
    for (row,same),seeds in rows.items():
        settings = seeds[0]['settings'].get('student', seeds[0]['settings'])
        start = from_random(seeds[0]['settings']) if settings.keys() == {'arch'} else described(settings)
        group = 'Stage one alone, row by row' if row.startswith('stage one') else f'Stage one of psi: {start}'
        groups[group][row, same] = seeds
        length = (settings if 'epochs' in settings else seeds[0]['settings'])['epochs']
        epochs[group] = length if group.endswith(start) else -1
    for group in sorted(groups, key=lambda group: (-epochs[group], group)):
        every = [r for seeds in groups[group].values() for r in seeds]
        shared = any(r.get('stage_one_seed') is not None for r in every)
        words = [group + (" (one for all seeds, which are stage two's alone)" if shared else '')]
        teachers = {described(r['settings']['teacher']) for r in every if r['settings'].get('teacher')}
        words += [f'of phi: {teacher}' for teacher in sorted(teachers) if teacher not in group]
        yield '; '.join(words),groups[group]
