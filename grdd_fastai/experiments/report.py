"""The report: RESULTS.md, and the measured parts of README.md, docs/method.md and benchmarks/README.md, from the records in results/

Each number in the tables is a record's, and the record holds the command that gives it again. results/NOTES.md, which says what the numbers
are and are not, stands above the tables.
"""
import json
import statistics
from collections import defaultdict
from pathlib import Path

from ..stage_one import StageOne

__all__ = ['write_report']

TITLES = dict(table2='Table 2: category labels, episodic labels, global relatedness', ablations='Figure 4: the components of GRDD',
              sweep='Figure 6: gamma and T', readings='Readings of what the paper leaves open')
FIGURES = dict(figure3='Figure 3: t-SNE of five novel classes', figure5="Figure 5: the teacher's relatedness over T")
WEIGHTS = 'grdd_fastai/weights'
CLASSES = dict(val='validation', novel='novel')
MARKS = '<!-- measured: written by recipes/report.py -->','<!-- /measured -->'
NETWORKS = dict(convnet4='ConvNet-4, 64-64-64-64', resnet12='ResNet-12', resnet12_320='ResNet-12, half as wide')
PUBLISHED = ( # 5-way on the novel classes of CIFAR-FS, 1-shot and 5-shot, inductive, as their papers give them
    ('GRDD from a ResNet-12, the paper, width not given', 'ConvNet-4', '69.3 ± 0.9', '84.7 ± 0.6', '2107.05583'),
    ('RFS-distill, best published for 64-64-64-64', 'ConvNet-4', '63.8 ± 0.8', '79.5 ± 0.5', '2003.11539'),
    ('GRDD, the paper', 'ResNet-12', '77.5 ± 0.9', '89.1 ± 0.6', '2107.05583'),
    ('IER-distill, best published plain embedding', 'ResNet-12', '77.87 ± 0.85', '89.74 ± 0.57', '2103.01315'))
HEAD = '''# Results

Written by `python recipes/report.py` from the [records](results/): each row links those of its training seeds. A record holds the
command, seed, settings, data fingerprint, the commit of the scoring and commit, device, threads and minutes of each network's training;
its command, at the commit of the scoring, gives the number again. Accuracies are 5-way, 15 queries a class, in percent, by the sum of
cosines; ± is the 95% interval over episodes, sd the standard deviation over training seeds. Differences are paired, on the very same
episodes, in points; one is **bold** where there are several seeds and every seed's interval lies on the same side of zero: only such an
ordering counts. A seed is one of the student's two stages, or of the second alone where a table says so; \
a teacher of another architecture is the same network for all of them. The
validation classes choose; the novel ones are scored at the end. The paper's numbers are on the novel classes at 90 + 15 epochs, and
stand only beside its own architectures.
'''


def records(folder):
    "experiment -> split -> (row, its settings but for the seed) -> its records by seed, in the order of the experiment's rows"
    found = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for r in sorted((json.loads(p.read_text()) for p in Path(folder).glob('*/*.json')), key=lambda r: (r['order'], r['same'], r['seed'])):
        found[r['experiment']][r['split']][r['row'], r['same']].append(r)
    return found

def over_seeds(values, sign=''): return f'{statistics.mean(values):{sign}.2f} (sd {statistics.stdev(values):.2f})'

def accuracy(rs, shot):
    of = [r['scores'][shot] for r in rs if shot in r['scores']]
    if len(of) > 1: return over_seeds([o['accuracy'] for o in of])
    return f"{of[0]['accuracy']:.2f} ± {of[0]['ci95']:.2f}" if of else ''

def compared(rs, shot):
    "Differences with each row it is compared with: over several seeds the mean, bold if the order holds in each"
    cells = []
    for other in dict.fromkeys(o for r in rs for o in r['versus']):
        ds = [r['versus'][other][shot] for r in rs if shot in r['versus'].get(other, {})]
        if len(ds) == 1: cells.append(f"{other} {ds[0]['difference']:+.2f} ± {ds[0]['ci95']:.2f}")
        if len(ds) < 2: continue
        text,holds = over_seeds([d['difference'] for d in ds], '+'),{d['clear'] for d in ds} in ({1}, {-1})
        cells.append(f'{other} ' + (f'**{text}**' if holds else text))
    return '; '.join(cells)

def section(rows, split, root):
    shots = sorted({shot for rs in rows.values() for r in rs for shot in r['scores']})
    paper = {s for rs in rows.values() for r in rs for s in r['paper'] or {} if s in shots}
    head = ['row', 'phi → psi',
            *(h for s in shots for h in (f'{s}, {CLASSES[split]}', *([f'paper, {s}, novel', 'ours - paper'] if s in paper else []))),
            *(f'difference, {s}' for s in shots), 'records']
    lines = [f'| {" | ".join(head)} |', '|' + '---|'*len(head)]
    for (row,_),rs in rows.items():
        r,cells = rs[0],[]
        for shot in shots:
            cells.append(accuracy(rs, shot))
            if shot not in paper: continue
            theirs,ours = (r['paper'] or {}).get(shot),[x['scores'][shot]['accuracy'] for x in rs if shot in x['scores']]
            cells += [f"{theirs or ''}", f'{statistics.mean(ours) - theirs:+.1f}' if theirs and ours and split == 'novel' else '']
        links = ' '.join(f"[{x['seed']}]({root}{x['experiment']}/{x['file']})" for x in rs)
        cells = [row, f"{r['phi']} → {r['psi']}" if r['phi'] else r['psi'], *cells, *(compared(rs, s) for s in shots), links]
        lines.append(f'| {" | ".join(cells)} |')
    return '\n'.join(lines)

def described(record): return StageOne.from_record(record).described()

def by_start(rows):
    """The rows by the student's stage one, the longest first: (words on psi's and phi's stage one, rows)

    Rows that compare stages one are together.
    """
    groups,epochs = defaultdict(dict),{}
    for (row,same),rs in rows.items():
        s = rs[0]['settings'].get('student', rs[0]['settings'])
        key = 'Stage one alone, row by row' if row.startswith('stage one') else f'Stage one of psi: {described(s)}'
        groups[key][row, same],epochs[key] = rs,s['epochs'] if key.endswith(described(s)) else -1
    for key in sorted(groups, key=lambda k: (-epochs[k], k)):
        shared = any(r.get('stage_one_seed') is not None for rs in groups[key].values() for r in rs)
        words = key + (" (one for all seeds, which are stage two's alone)" if shared else '')
        phis = {described(r['settings']['teacher']) for rs in groups[key].values() for r in rs if r['settings'].get('teacher')}
        yield '; '.join([words, *(f'of phi: {phi}' for phi in sorted(phis) if phi not in key)]),groups[key]

def about(rows):
    "What the records of a table have in common, and what its networks took"
    rs = [r for of in rows.values() for r in of]
    nets = {n['run']:n for r in rs for n in r['networks'].values()}
    def each(values): return ', '.join(sorted({str(v) for v in values}))
    return (f"{each(r['data']['name'] for r in rs)} (fingerprint {each(r['data']['fingerprint'][:8] for r in rs)}), "
            f"{each(s['n'] for r in rs for s in r['scores'].values())} episodes; "
            f"{len(nets)} networks, {sum(n['minutes'] for n in nets.values())/60:.1f} hours on "
            f"{each(n['device'] for n in nets.values())}, threads a training: {each(n['torch_threads'] for n in nets.values())}, "
            f"torch {each(n['versions']['torch'] for n in nets.values())}.")

def picture(root, name, title):
    path = Path('results')/'figures'/f'{name}.png'
    return [f'![{title}]({path})\n'] if (root/path).exists() else []

def beside(root):
    "The package's weights beside the paper's and the best published numbers"
    lines = ['| 5-way, novel classes of CIFAR-FS | network | 1-shot | 5-shot | source |', '|---|---|---|---|---|']
    for f in sorted((root/WEIGHTS).glob('*/measured.json')):
        of = json.loads(f.read_text())['scores']['novel']
        cells = [f"{of[s]['accuracy']:.2f} ± {of[s]['ci95']:.2f}" for s in ('1-shot','5-shot')]
        lines.append(f"| **`{f.parent.name}`, ours** | {NETWORKS[f.parent.name.partition('.')[0]]} "
                     f"| {' | '.join(cells)} | [card]({WEIGHTS}/{f.parent.name}/README.md) |")
    return '\n'.join([*lines, *(f'| {what} | {net} | {one} | {five} | [{arxiv}](https://arxiv.org/abs/{arxiv}) |'
                                for what,net,one,five,arxiv in PUBLISHED)])

def inference(folder):
    "Every classifier on the published weights: a table for each record of recipes/evaluate_weights.py"
    parts = []
    for f in sorted(Path(folder).glob('inference-*.json')):
        r = json.loads(f.read_text())
        kinds,of = (list(dict.fromkeys((s['way'], s['shot'], s['query']) for s in r['scores'])),
                    {(s['network'], s['classifier'], (s['way'], s['shot'], s['query'])):s for s in r['scores']})
        support = f"each support image as {r['support_views']} augmented views" if r['support_views'] else 'the support as it is'
        parts.append(f"{CLASSES[r['split']].capitalize()} classes, {r['queries']} queries, {support}; "
                     f"{', '.join(sorted({str(s['n']) for s in r['scores']}))} episodes; "
                     f"{r['data']['name']}; [record](results/{f.name}), commit {str(r['commit'])[:8]}, {r['device']}\n")
        lines = ['| network | classifier | queries seen | ' + ' | '.join(f'{w}-way {k}-shot, {q} queries' for w,k,q in kinds) + ' |',
                 '|' + '---|'*(3 + len(kinds))]
        for network,name in dict.fromkeys((s['network'], s['classifier']) for s in r['scores']):
            s = of[network, name, kinds[0]]
            seen = 'one' if not s['transductive'] else 'all, taken to be balanced' if s['balanced'] else 'all'
            lines.append(f'| {network} | {name} | {seen} | ' +
                         ' | '.join(f"{of[network, name, k]['accuracy']:.2f} ± {of[network, name, k]['ci95']:.2f}" for k in kinds) + ' |')
        papers = (r['split'] == 'novel' and r['queries'] == 'balanced' and r['data']['name'] == 'cifar_fs' and not r['support_views']
                  and kinds == [(5, 1, 15), (5, 5, 15)])
        if papers: lines += ['| GRDD-TIM, ConvNet-4, the paper | tim | all, taken to be balanced | 79.9 ± 0.2 | 87.9 ± 0.2 |',
                             '| GRDD-TIM, ResNet-12, the paper | tim | all, taken to be balanced | 85.4 ± 0.2 | 91.1 ± 0.2 |']
        parts += ['\n'.join(lines) + '\n']
    return parts

def benchmark(path):
    "evaluate.py's table"
    r = json.loads(path.read_text())
    of = defaultdict(dict)
    for line in r['lines']: of[line['method']].update(line)
    lines = ['| method | easyfsl, us an episode | ours | ratio | accuracy, easyfsl | ours |', '|---|---|---|---|---|---|']
    lines += [f"| {k} | {o['easyfsl_us']:,.0f} | {o['ours_us']:,.0f} | {o['ratio']:.1f} "
              f"| {o['accuracy_easyfsl']:.2f} | {o['accuracy_ours']:.2f} ({o['episodes']} episodes) |"
              for k,o in of.items() if 'ratio' in o]
    lines += [f"| {k} | | {1e6/o['episodes_per_second']:,.0f} ({o['episodes_per_second']:.0f} episodes/s) | | | |"
              for k,o in of.items() if 'episodes_per_second' in o]
    e = of['evaluation']
    return '\n'.join([
        *lines, '', "Ten thousand 5-way 1-shot episodes of 12,000 images and their ConvNet-4 forward pass take "
        f"{e['forward_and_episodes_over_forward']:.2f} times "
        f"the forward pass alone ({e['forward_s']:.1f} s + {e['episodes_10000_s']:.1f} s, {e['threads']} threads).", '',
        taken(r, 'torch', 'numpy', 'easyfsl')])

def novel_log(path):
    if not path.exists(): return 'The novel classes have not been scored yet.'
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return '\n'.join(['| time | network | shot | accuracy | episodes | commit |', '|---|---|---|---|---|---|',
                      *(f"| {o['time']} | {o['what']}{''.join(', ' + str(o[k]) for k in ('classifier','queries') if k in o)} | {o['shot']} "
                        f"| {o['accuracy']:.2f} ± {o['ci95']:.2f} | {o['test_episodes']} | {o['commit'][:8]} |" for o in lines)])

def taken(r, *packages):
    "Where and by what a benchmark's lines were taken"
    return (f"{r['device']}, {r['cores']} cores; {', '.join(f'{k} {v}' for k,v in r['versions'].items() if k in packages)}; "
            f"commit {r['commit'][:8]}, `{r['command']}`")

def as_they_are(path):
    "A benchmark's lines as tables, one for each kind of line"
    r,kinds = json.loads(path.read_text()),defaultdict(list)
    for line in r['lines']: kinds[tuple(line)].append(line)
    def cell(v): return f'{v:,}' if isinstance(v, (int, float)) and not isinstance(v, bool) else str(v)
    tables = ['\n'.join(['| ' + ' | '.join(keys) + ' |', '|---'*len(keys) + '|',
                         *('| ' + ' | '.join(map(cell, line.values())) + ' |' for line in lines)]) for keys,lines in kinds.items()]
    floor = next((line['gflop_per_image'] for line in r['lines'] if (line['name'], line.get('px')) == ('resnet12', 32)), None)
    counted = ['Counted floor of the paper\'s stage one on CIFAR-FS: 90 epochs of 38,400 images at four rotations, '
               f'{floor} GFLOP each with ResNet-12: {90*38400*4*floor*1e9:.2g} floating-point operations.'] if floor else []
    return '\n\n'.join([*tables, *counted, taken(r, 'torch', 'fastai', 'albumentations', 'easyfsl')])

def between(text, measured, after=''):
    "`text` with `measured` between the first marks that follow `after`"
    at = text.index(MARKS[0], text.index(after)) + len(MARKS[0])
    return text[:at] + '\n' + measured + '\n' + text[text.index(MARKS[1], at):]

def write_report(root='.'):
    "Write RESULTS.md and the measured parts of README.md, docs/method.md and benchmarks/README.md in the checkout `root` from its records"
    root = Path(root)
    found = records(root/'results')
    notes = root/'results'/'NOTES.md'
    parts = [HEAD, '## Beside the paper and the best published\n', beside(root) + '\n', *([notes.read_text()] if notes.exists() else [])]
    for name,title in TITLES.items():
        for split,rows in sorted(found[name].items()): # novel, val
            parts += [f'## {title}, on the {CLASSES[split]} classes\n', about(rows) + '\n']
            for words,of in by_start(rows): parts += [f'{words}\n', section(of, split, 'results/') + '\n']
            parts += picture(root, f'{name}_{split}', title)
    for name,title in FIGURES.items():
        if shown := picture(root, name, title): parts += [f'## {title}\n', *shown]
    if tables := inference(root/'results'): parts += ['## Inference: other classifiers, inductive and transductive\n', *tables]
    parts += ['## Every scoring of the novel classes\n', novel_log(root/'results'/'novel_scorings.jsonl') + '\n']
    (root/'RESULTS.md').write_text('\n'.join(parts))
    doc = root/'benchmarks'/'README.md'
    for measured in sorted((root/'benchmarks').glob('*.json')):
        table = benchmark(measured) if measured.stem == 'evaluate' else as_they_are(measured)
        doc.write_text(between(doc.read_text(), table, f'## {measured.stem}.py'))
    readme = root/'README.md'
    readme.write_text(between(readme.read_text(), beside(root)))
    doc,rows = root/'docs'/'method.md',found['readings'].get('val')
    if rows:
        doc.write_text(between(doc.read_text(), '\n\n'.join(
            [about(rows), *(f'{words}\n\n' + section(of, 'val', '../results/') for words,of in by_start(rows))])))
