"""Write RESULTS.md, and the measured part of docs/readings.md, from the records in results/

    python recipes/report.py

Nothing in either is typed by hand: each number is a record's, and the record holds the command that gives it again.
"""
import json
import statistics
from collections import defaultdict
from pathlib import Path

from fastcore.script import call_parse

TITLES = dict(table2='Table 2: category labels, episodic labels, global relatedness', ablations='Figure 4: the components of GRDD',
              sweep='Figure 6: gamma and T', readings='Readings of what the paper leaves open')
CLASSES = dict(val='validation', novel='novel')
MARKS = '<!-- measured: written by recipes/report.py -->','<!-- /measured -->'
HEAD = '''# Results

Written by `python recipes/report.py` from the [records](results/): each row links those of its training seeds, and a record holds the
command, commit, settings, data fingerprint, device and wall time. Accuracies are 5-way, 15 queries a class, in percent, by the sum of
cosines; the interval is 95% over episodes. Differences are paired, on the very same episodes, in points: **bold** where the interval
excludes zero on one side in every seed, and only such an ordering counts. The validation classes choose; the novel ones are scored at
the end. The paper's numbers are on the novel classes, at 90 + 15 epochs with a ResNet-12 teacher; where ours are not, the record says so.
'''


def records(folder):
    "experiment -> split -> row -> its records by seed, in the order of the experiment's rows"
    found = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for r in sorted((json.loads(p.read_text()) for p in Path(folder).glob('*/*.json')), key=lambda r: (r['order'], r['seed'])):
        found[r['experiment']][r['split']][r['row']].append(r)
    return found

def mean_sd(values): return f'{statistics.mean(values):.2f}' + (f' (sd {statistics.stdev(values):.2f})' if len(values) > 1 else '')

def accuracy(rs, shot):
    of = [r['scores'][shot] for r in rs if shot in r['scores']]
    if not of: return ''
    return mean_sd([o['accuracy'] for o in of]) if len(of) > 1 else f"{of[0]['accuracy']:.2f} ± {of[0]['ci95']:.2f}"

def compared(rs, shot):
    "Differences with each row it is compared with: a mean over seeds, bold if every seed's interval lies on the same side of zero"
    cells = []
    for other in dict.fromkeys(o for r in rs for o in r['versus']):
        ds = [r['versus'][other][shot] for r in rs if shot in r['versus'].get(other, {})]
        if not ds: continue
        sides = {(d['difference'] > d['ci95']) - (d['difference'] < -d['ci95']) for d in ds}
        text = f"{statistics.mean(d['difference'] for d in ds):+.2f}" + (f' (sd {statistics.stdev(d["difference"] for d in ds):.2f})' if len(ds) > 1 else
                                                                       f" ± {ds[0]['ci95']:.2f}")
        cells.append(f'{other} ' + (f'**{text}**' if sides in ({1}, {-1}) else text))
    return '; '.join(cells)

def section(rows, split, root):
    shots = sorted({shot for rs in rows.values() for r in rs for shot in r['scores']})
    paper = any(r['paper'] for rs in rows.values() for r in rs)
    head = ['row', 'phi → psi', *(f'{shot}, {CLASSES[split]}' for shot in shots), *(['paper', 'ours - paper'] if paper else []), *(f'difference, {s}' for s in shots), 'records']
    lines = [f'| {" | ".join(head)} |', '|' + '---|'*len(head)]
    for row,rs in rows.items():
        r = rs[0]
        cells = [row, f"{r['phi']} → {r['psi']}" if r['phi'] else r['psi'], *(accuracy(rs, s) for s in shots)]
        if paper:
            ours = statistics.mean(x['scores'][shots[0]]['accuracy'] for x in rs)
            cells += [f"{r['paper'] or ''}", f"{ours - r['paper']:+.1f}" if r['paper'] and split == 'novel' else '']
        cells += [*(compared(rs, s) for s in shots), ' '.join(f"[{x['seed']}]({root}{x['experiment']}/{x['file']})" for x in rs)]
        lines.append(f'| {" | ".join(cells)} |')
    return '\n'.join(lines)

def about(rows):
    "What the records of a table have in common"
    rs = [r for of in rows.values() for r in of]
    each = lambda get: ', '.join(sorted({str(get(r)) for r in rs}))
    n = each(lambda r: next(iter(r['scores'].values()))['n'])
    return (f"{each(lambda r: r['data']['name'])} (fingerprint {each(lambda r: r['data']['fingerprint'][:8])}), {n} episodes, "
            f"{each(lambda r: r['device'])}, {each(lambda r: r['torch_threads'])} thread(s) a training, torch {each(lambda r: r['versions']['torch'])}; "
            f"{sum(max(r['minutes'].values()) if r['supervision'] == 'CL' else r['minutes']['net'] for r in rs)/60:.1f} hours of training in all.")

def novel_log(path):
    if not path.exists(): return 'The novel classes have not been scored yet.'
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return '\n'.join(['| time | network | shot | accuracy | episodes | commit |', '|---|---|---|---|---|---|',
                      *(f"| {o['time']} | {o['what']} | {o['shot']} | {o['accuracy']:.2f} ± {o['ci95']:.2f} | {o['test_episodes']} | {o['commit'][:8]} |" for o in lines)])

def between(text, measured):
    before,rest = text.split(MARKS[0])
    return before + MARKS[0] + '\n' + measured + '\n' + MARKS[1] + rest.split(MARKS[1])[1]

@call_parse
def main(
    root:str='.', # of the checkout
):
    "Write RESULTS.md and docs/readings.md from results/"
    root = Path(root)
    found = records(root/'results')
    parts = [HEAD]
    for name,title in TITLES.items():
        for split,rows in found[name].items():
            parts += [f'## {title}, on the {CLASSES[split]} classes\n', about(rows) + '\n', section(rows, split, 'results/') + '\n']
    parts += ['## Every scoring of the novel classes\n', novel_log(root/'results'/'novel_scorings.jsonl') + '\n']
    (root/'RESULTS.md').write_text('\n'.join(parts))
    doc,rows = root/'docs'/'readings.md',found['readings'].get('val')
    if rows: doc.write_text(between(doc.read_text(), about(rows) + '\n\n' + section(rows, 'val', '../results/')))
