"""Write RESULTS.md, and the measured parts of README.md, docs/ and benchmarks/README.md, from the records in results/

Each number in the tables comes from a record, which holds the command that gives the number again. The texts of results/LEARNT.md and
results/NOTES.md stand above the tables.
"""
from pathlib import Path

from .benchmarks import benchmark, benchmark_tables
from .classifiers import inference, novel_log
from .markdown import CLASSES, folded, networks_text, picture
from .methods import comparison
from .photos import distill_table, trust_table
from .published import published_table, teachers_table, transductive_table
from .rows import by_start, records, section

__all__ = ['write_report']


TITLES = dict(table2='Table 2: category labels, episodic labels, global relatedness', ablations='Figure 4: the components of GRDD',
              sweep='Figure 6: gamma and T', pairs='Which images are related to which: stage two from random weights',
              teachers='Teachers, and students of them that start from random weights',
              distillations='What the student learns from the teacher: relatedness, and other distillation',
              readings='Readings of what the paper leaves open')
FIGURES = dict(figure3='Figure 3: t-SNE of five novel classes', figure5="Figure 5: the teacher's relatedness over T")
MARKS = '<!-- measured: written by recipes/report.py -->','<!-- /measured -->'
HEAD = '''# Results

`python recipes/report.py` writes this file from the [records](results/). Accuracies are in percent, on 5-way episodes of CIFAR-FS with 15
queries per class. The title of a table says whether its classes are the novel ones or the validation classes. ± is the 95% interval, ours
over 10,000 episodes, that of others as they published it. Networks and classifiers differ from row to row: their columns say what is
compared with what.
'''
HOW_TO_READ = '''## How to read the tables

Each row of a table links the records of its training seeds. A record holds the command, the seed, the settings, the data fingerprint and
the commit of the scoring. For each network it also holds the commit, device, threads and minutes of the training. The command of a record,
at the commit of its scoring, gives the number again.

Accuracies are those of the sum of cosines unless a table names another classifier. ± is the 95% interval over episodes, and sd is the
standard deviation over training seeds. Differences are paired, which means that both networks see the same episodes, and they are in
percentage points. A difference is **bold** if there are several seeds and the interval of every seed lies on the same side of zero. Only
such an order counts. A seed is the seed of both stages of the student, or of stage two alone where a table says so. A teacher of another
architecture is the same network for all seeds.

Settings were chosen on the validation classes; the novel classes are scored at the end. The paper's numbers are on the novel classes
after 90 + 15 epochs, and can be compared only with networks of the paper's own architectures.
'''


def replace_measured(text, measured, after=''):
    "`text` with `measured` between the first marks that follow `after`"
    start = text.index(MARKS[0], text.index(after)) + len(MARKS[0])
    return text[:start] + '\n' + measured + '\n' + text[text.index(MARKS[1], start):]


def of_all(rows): return [r for seeds in rows.values() for r in seeds]

def results(root, found):
    "Text of RESULTS.md, from the `records` found in the checkout `root`"
    learnt,notes = root/'results'/'LEARNT.md',root/'results'/'NOTES.md'
    parts = [HEAD, '## Beside the paper and the best published\n', published_table(root, found) + '\n']
    parts += [table + '\n' for table in (transductive_table(root), teachers_table(root)) if table]
    if learnt.exists(): parts.append(learnt.read_text())
    parts.append(HOW_TO_READ)
    parts += comparison(root)
    if notes.exists(): parts.append(notes.read_text())
    for name,title in TITLES.items():
        for split,rows in sorted(found[name].items()): # the novel classes come before val
            parts += [f'## {title}, on the {CLASSES[split]} classes\n', networks_text(of_all(rows)) + '\n']
            (words,group),*others = by_start(rows)
            parts += [f'{words}\n', section(group, split, 'results/') + '\n', *picture(root, f'{name}_{split}', title)]
            for words,group in others: parts += folded(words, [section(group, split, 'results/') + '\n'])
    for name,title in FIGURES.items():
        if shown := picture(root, name, title): parts += [f'## {title}\n', *shown]
    if tables := inference(root/'results'):
        parts.append('## Other classifiers, inductive and transductive\n')
        for about,table in tables.items(): parts += folded(about, table)
    log = novel_log(root/'results'/'novel_scorings.jsonl')
    parts += ['## Every scoring of the novel classes\n', *folded('The log, one line for each scoring', [log + '\n'])]
    return '\n'.join(parts)

def write_report(root='.'):
    "Write RESULTS.md and the measured parts of README.md, docs/ and benchmarks/README.md in the checkout `root` from its records"
    root = Path(root)
    found = records(root/'results')
    (root/'RESULTS.md').write_text(results(root, found))
    doc = root/'benchmarks'/'README.md'
    for measured in sorted((root/'benchmarks').glob('*.json')):
        table = benchmark(measured) if measured.stem == 'evaluate' else benchmark_tables(measured)
        doc.write_text(replace_measured(doc.read_text(), table, f'## {measured.stem}.py'))
    readme = root/'README.md'
    readme.write_text(replace_measured(readme.read_text(), published_table(root, found, 'ConvNet-4')))
    doc = root/'docs'/'photos.md'
    doc.write_text(replace_measured(doc.read_text(), trust_table(root/'results')))
    doc = root/'docs'/'recipes.md'
    doc.write_text(replace_measured(doc.read_text(), distill_table(root/'results')))
    doc = root/'docs'/'method.md'
    rows = found['readings'].get('val')
    if not rows: return
    parts = [networks_text(of_all(rows))]
    for words,group in by_start(rows): parts += [words, section(group, 'val', '../results/')]
    doc.write_text(replace_measured(doc.read_text(), '\n\n'.join(parts)))
