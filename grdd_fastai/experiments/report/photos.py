"""The tables of the docs for people with photos: how far a classifier can be trusted, and what a distilled network costs."""
import json

from ...photos.trust import AUTO
from .markdown import CLASSES, SHOTS, accuracy_text, difference_text, markdown_table

__all__ = ['trust_table', 'distill_table']


def trust_table(folder):
    "Table of the records of recipes/trust.py in a folder; classifiers other than the default one are shown for five photos alone"
    names = ('covered', 'ece', 'ece_before', 'lost', 'found', 'auroc')
    rows = []
    for path in sorted(folder.glob('trust-*.json')):
        r = json.loads(path.read_text())
        shown = [o for o in r['rows'] if o['classifier'] == AUTO[0] or o['shot'] == 5]
        data = [f"[{r['data']['name']}, {CLASSES[r['split']]} classes](../results/{path.name})", *['']*len(shown)]
        rows += [[d, f"`{o['classifier']}`", f"{o['way']} x {o['shot']}", f"{o['accuracy']:.1f}", f"{o['expected']:.1f}",
                  *(f'{o[k]:.1f}' if k in o else '' for k in names)] for d,o in zip(data, shown)]
    return markdown_table(['data', 'classifier', 'classes x photos', 'accuracy', 'expected', *(f'`{k}`' for k in names)], rows)


def distill_table(folder):
    "Table of the records of recipes/distill.py: a small network beside its teacher and beside the same network on labels alone"
    rows = []
    for path in sorted(folder.glob('distill-*.json')):
        r = json.loads(path.read_text())
        def both(key, show): return ' / '.join(show(r[key][k]) for k in SHOTS) if key in r else ''  # noqa: B023
        costs,two = r['costs'],r['settings']['stage_two']
        faster = costs['student']['images_per_second']/costs['teacher']['images_per_second']
        million = [f"{costs[k]['million_parameters']:.2f}" for k in ('student', 'teacher')]
        name = f"[`{r['student']}`](../results/{path.name}), {two['epochs']} epochs"
        rows.append([name, 'no' if r['settings'].get('unlabeled') else 'yes', both('accuracy_student', accuracy_text),
                     both('accuracy_labels', accuracy_text), both('student_minus_labels', difference_text),
                     both('accuracy_teacher', accuracy_text), f'{million[0]} of {million[1]} million', f'{faster:.1f}'])
    return markdown_table(['student', 'labels', 'distilled, 1-shot / 5-shot', 'on labels alone', 'difference', 'teacher', 'parameters',
                           'times as fast'], rows)
