"""Write RESULTS.md, and the measured parts of README.md, docs/ and benchmarks/README.md, from the records in results/

Each number in the tables comes from a record, which holds the command that gives the number again. The texts of results/LEARNT.md and
results/NOTES.md stand above the tables.
"""
import json
import statistics
from collections import defaultdict
from pathlib import Path

from ..photos.trust import AUTO
from ..runs.report import PAPER_ACCURACY
from ..stage_one import StageOne
from .comparison_report import METHODS_SIDE_BY_SIDE, comparison
from .markdown import CLASSES, accuracy, accuracy_text, arxiv_link, difference_text, differences, distinct, markdown_table

__all__ = ['write_report']

TITLES = dict(table2='Table 2: category labels, episodic labels, global relatedness', ablations='Figure 4: the components of GRDD',
              sweep='Figure 6: gamma and T', pairs='Which images are related to which: stage two from random weights',
              teachers='Teachers, and students of them that start from random weights',
              distillations='What the student learns from the teacher: relatedness, and other distillation',
              readings='Readings of what the paper leaves open')
FIGURES = dict(figure3='Figure 3: t-SNE of five novel classes', figure5="Figure 5: the teacher's relatedness over T")
WEIGHTS = 'grdd_fastai/weights'
MARKS = '<!-- measured: written by recipes/report.py -->','<!-- /measured -->'
NETWORKS = dict(convnet4='ConvNet-4, 64-64-64-64', convnet4_256='ConvNet-4, 64-96-128-256',
                resnet12='ResNet-12', resnet12_320='ResNet-12, half as wide')
CHOSEN = 'as chosen on the validation classes'
SHOTS = ('1-shot', '5-shot') # of the tables beside the published numbers
GRDD_TIM = {'ConvNet-4':('79.9 ± 0.2', '87.9 ± 0.2'), 'ResNet-12':('85.4 ± 0.2', '91.1 ± 0.2')} # the paper's accuracies, 1-shot and 5-shot
COSINE,RFS = 'cosine','logistic regression, five views of each support image'
PAPER_CONVNET4,PAPER_RESNET12 = (PAPER_ACCURACY['cifar_fs', k].values() for k in ('convnet4', 'resnet12'))
PUBLISHED = ( # inductive accuracies that papers give for the novel classes of CIFAR-FS, 5-way 1-shot and 5-shot
    ('GRDD from a ResNet-12, the paper', 'ConvNet-4, width not given', COSINE, *PAPER_CONVNET4, '2107.05583'),
    ('RFS-distill', 'ConvNet-4, 64-64-64-64', RFS, '63.8 ± 0.8', '79.5 ± 0.5', '2003.11539'),
    ('R2-D2', 'ConvNet-4, 96-192-384-512', 'ridge regression', '65.3', '79.4', '1805.08136'),
    ('GRDD, the paper', 'ResNet-12', COSINE, *PAPER_RESNET12, '2107.05583'),
    ('RFS-distill', 'ResNet-12', RFS, '73.9', '86.9', '2003.11539'),
    ('IER-distill', 'ResNet-12', "the paper's", '77.87 ± 0.85', '89.74 ± 0.57', '2103.01315'))
HEAD = '''# Results

`python recipes/report.py` writes this file from the [records](results/). Accuracies are in percent, on 5-way episodes of the novel classes
of CIFAR-FS with 15 queries per class. ± is the 95% interval, ours over 10,000 episodes, that of others as they published it. Networks and
classifiers differ from row to row: their columns say what is compared with what.
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


def picture(root, name, title):
    "Markdown lines of a figure; none if it has not been drawn"
    path = Path('results')/'figures'/f'{name}.png'
    return [f'![{title}]({path})\n'] if (root/path).exists() else []

def replace_measured(text, measured, after=''):
    "`text` with `measured` between the first marks that follow `after`"
    start = text.index(MARKS[0], text.index(after)) + len(MARKS[0])
    return text[:start] + '\n' + measured + '\n' + text[text.index(MARKS[1], start):]


# ---- tables of the experiments ----------------------------------------------------------------------------------------

def records(folder):
    "experiment -> split -> (row, settings without the seed) -> list of records by seed, in the order of the experiment's rows"
    found = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    read = [json.loads(path.read_text()) for path in Path(folder).glob('*/*.json') if path.parent.name != METHODS_SIDE_BY_SIDE]
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

def table_summary(rows):
    "A sentence on the data, the episodes and the networks of a table, with the hours and machines of their training"
    every = [r for seeds in rows.values() for r in seeds]
    networks = {n['run']:n for r in every for n in r['networks'].values()}
    data = distinct(r['data']['name'] for r in every)
    fingerprint = distinct(r['data']['fingerprint'][:8] for r in every)
    episodes = distinct(score['n'] for r in every for score in r['scores'].values())
    hours = sum(n['minutes'] for n in networks.values())/60
    devices,threads = (distinct(n[k] for n in networks.values()) for k in ('device','torch_threads'))
    torch = distinct(n['versions']['torch'] for n in networks.values())
    return (f'{data} (fingerprint {fingerprint}), {episodes} episodes; {len(networks)} networks, {hours:.1f} hours on {devices}, '
            f'threads per training: {threads}, torch {torch}.')


# ---- other parts of the report ----------------------------------------------------------------------------------------

def published_networks(root, folder):
    "Yield the name, the description and the `measured.json` of each network that recipes/publish.py wrote to `folder`"
    for path in sorted((root/folder).glob('*/measured.json')):
        name = path.parent.name
        yield name,NETWORKS[name.partition('.')[0]],json.loads(path.read_text())

def published_head(what): return [what, 'network', 'classifier', '1-shot', '5-shot', 'source']

def card_row(what, name, network, measured, folder):
    "Table cells of a published network; its card has the accuracies of the cosine on the novel classes"
    accuracies = [accuracy_text(measured['scores']['novel'][k]) for k in SHOTS]
    return [what, network, COSINE, *accuracies, f'[card]({folder}/{name}/README.md)']

def best_of_table2(found, arch):
    """Cells of the row of Table 2 with the network `arch` that is best on the validation classes, with its accuracies on the novel ones

    Only rows count that were scored for both shots on both. None if there is no such row.
    """
    val,novel = (found['table2'].get(split, {}) for split in ('val', 'novel'))
    def both(seeds): return all(set(SHOTS) <= r['scores'].keys() for r in seeds)
    rows = [k for k in val if k in novel and val[k][0]['psi'] == arch and both(val[k]) and both(novel[k])]
    if not rows: return None
    best = max(rows, key=lambda k: statistics.mean(o['accuracy'] for r in val[k] for o in r['scores'].values()))
    source = f'results/table2/{novel[best][0]["file"]}'
    return [f'`{best[0]}` of Table 2, ours', NETWORKS[arch], COSINE, *(accuracy(novel[best], k) for k in SHOTS), f'[record]({source})']

def published_table(root, found, networks=''):
    "Table of our networks, the paper's and the best published; only the rows whose network begins with the text `networks`"
    rows = []
    for name,network,measured in published_networks(root, WEIGHTS):
        rows.append(card_row(f'**`{name}`, ours**', name, network, measured, WEIGHTS))
        if chosen := chosen_on_validation(root/'results', name, measured['sha256']):
            words,accuracies,source = chosen
            rows.append([f'`{name}`, {CHOSEN}', network, words, *accuracies, f'[record](results/{source})'])
    if best := best_of_table2(found, 'resnet12'): rows.append(best)
    rows += [[*cells, arxiv_link(number)] for *cells,number in PUBLISHED]
    rows = [cells for cells in rows if cells[1].startswith(networks)]
    return markdown_table(published_head('5-way, novel classes of CIFAR-FS'), rows)

def teachers_table(root):
    "Table of the teachers, which are the published networks in the folder weights/; empty if there are none"
    rows = [card_row(f'`{name}`', name, network, measured, 'weights') for name,network,measured in published_networks(root, 'weights')
            if set(SHOTS) <= measured['scores'].get('novel', {}).keys()]
    return markdown_table(published_head('the teacher'), rows) if rows else ''

def transductive_table(root):
    "Table of the package's weights with classifiers that see all queries of an episode together, beside the paper's; empty without records"
    rows = []
    for name,network,measured in published_networks(root, WEIGHTS):
        for shot in (1, 5):
            if not (chosen := chosen_on_validation(root/'results', name, measured['sha256'], (shot,), transductive=True)): continue
            words,accuracies,source = chosen
            cells = [accuracies[0] if k == shot else '' for k in (1, 5)]
            rows.append([f'`{name}`, {CHOSEN}', network, words, *cells, f'[record](results/{source})'])
    if not rows: return ''
    rows += [['GRDD-TIM, the paper', network, 'TIM', *accuracies, arxiv_link('2107.05583')] for network,accuracies in GRDD_TIM.items()]
    return markdown_table(published_head('all queries together, equally many of each class'), rows)

def chosen_on_validation(results, name, sha256, shots=(1, 5), transductive=False):
    """Words, accuracies on the novel classes and record of the classifier with the best mean accuracy of `shots` on the validation classes

    The records are those of recipes/evaluate_weights.py on the weights with this checksum; None without such records. The classifier is an
    inductive one, or a transductive one.
    """
    found = {} # (classifier, mirror, support views, split) -> accuracies by shot, and the record's name
    for path in sorted(results.glob('inference-*.json')):
        r = json.loads(path.read_text())
        if r.get('weights', {}).get(name) != sha256 or r['queries'] != 'balanced': continue
        for s in r['scores']:
            if s['transductive'] != transductive or (s['way'], s['query']) != (5, 15) or s['shot'] not in shots: continue
            by_shot,_ = found.setdefault((s['classifier'], r.get('mirror', False), r['support_views'], r['split']), ({}, path.name))
            by_shot[s['shot']] = s
    whole = {k:by_shot for k,(by_shot,_) in found.items() if {*shots} <= by_shot.keys()}
    on_both = [how for *how,split in whole if split == 'val' and (*how, 'novel') in whole]
    if not on_both: return None
    best = max(on_both, key=lambda how: sum(whole[(*how, 'val')][shot]['accuracy'] for shot in shots))
    classifier,mirror,views = best
    words = [f'`{classifier}`', *(['features averaged with those of the mirror image'] if mirror else []),
             *([f'{views} views of each support image'] if views else [])]
    by_shot,source = found[(*best, 'novel')]
    return ', '.join(words),[accuracy_text(by_shot[shot]) for shot in shots],source

def inference(folder):
    "Tables of all classifiers on the published weights: one for each record of recipes/evaluate_weights.py"
    parts = []
    for path in sorted(Path(folder).glob('inference-*.json')):
        r = json.loads(path.read_text())
        kinds = list(dict.fromkeys((s['way'], s['shot'], s['query']) for s in r['scores']))
        scores = {(s['network'], s['classifier'], (s['way'], s['shot'], s['query'])):s for s in r['scores']}
        support = f"each support image as {r['support_views']} augmented views" if r['support_views'] else 'the support as it is'
        if r.get('mirror'): support += ', features averaged with those of the mirror image'
        episodes = distinct(s['n'] for s in r['scores'])
        parts.append(f"{CLASSES[r['split']].capitalize()} classes, {r['queries']} queries, {support}; {episodes} episodes; "
                     f"{r['data']['name']}; [record](results/{path.name}), commit {str(r['commit'])[:8]}, {r['device']}\n")
        rows = []
        for network,name in dict.fromkeys((s['network'], s['classifier']) for s in r['scores']):
            s = scores[network, name, kinds[0]]
            seen = 'one' if not s['transductive'] else 'all, taken to be balanced' if s['balanced'] else 'all'
            rows.append([network, name, seen, *(accuracy_text(scores[network, name, k]) for k in kinds)])
        plain = not (r['support_views'] or r.get('mirror'))
        comparable = (r['split'] == 'novel' and r['queries'] == 'balanced' and r['data']['name'] == 'cifar_fs' and plain
                      and kinds == [(5, 1, 15), (5, 5, 15)])
        if comparable:
            rows += [[f'GRDD-TIM, {k}, the paper', 'tim', 'all, taken to be balanced', *accuracies] for k,accuracies in GRDD_TIM.items()]
        head = ['network', 'classifier', 'queries seen', *(f'{w}-way {k}-shot, {q} queries' for w,k,q in kinds)]
        parts.append(markdown_table(head, rows) + '\n')
    return parts

def novel_log(path):
    "Table of every scoring of the novel classes that the log at `path` holds"
    if not path.exists(): return 'The novel classes have not been scored yet.'
    rows = []
    for line in path.read_text().splitlines():
        o = json.loads(line)
        what = ', '.join([o['what'], *(str(o[k]) for k in ('classifier','queries') if k in o), *(['mirrored'] if o.get('mirror') else [])])
        rows.append([o['time'], what, str(o['shot']), accuracy_text(o), str(o['test_episodes']), o['commit'][:8]])
    return markdown_table(['time', 'network', 'shot', 'accuracy', 'episodes', 'commit'], rows)


# ---- benchmarks -------------------------------------------------------------------------------------------------------

def benchmark_source(r, *packages):
    "Device, versions, commit and command of a benchmark's record"
    versions = ', '.join(f'{k} {v}' for k,v in r['versions'].items() if k in packages)
    return f"{r['device']}, {r['cores']} cores; {versions}; commit {r['commit'][:8]}, `{r['command']}`"

def benchmark(path):
    "Table of benchmarks/evaluate.py"
    r = json.loads(path.read_text())
    methods = defaultdict(dict)
    for line in r['lines']: methods[line['method']].update(line)
    both = [[k, f"{o['easyfsl_us']:,.0f}", f"{o['ours_us']:,.0f}", f"{o['ratio']:.1f}", f"{o['accuracy_easyfsl']:.2f}",
             f"{o['accuracy_ours']:.2f} ({o['episodes']} episodes)"] for k,o in methods.items() if 'ratio' in o]
    ours = [f"| {k} | | {1e6/o['episodes_per_second']:,.0f} ({o['episodes_per_second']:.0f} episodes/s) | | | |"
            for k,o in methods.items() if 'episodes_per_second' in o]
    e = methods['evaluation']
    return '\n'.join([
        markdown_table(['method', 'easyfsl, us per episode', 'ours', 'ratio', 'accuracy, easyfsl', 'ours'], both), *ours, '',
        'Ten thousand 5-way 1-shot episodes of 12,000 images and their ConvNet-4 forward pass take '
        f"{e['forward_and_episodes_over_forward']:.2f} times "
        f"the forward pass alone ({e['forward_s']:.1f} s + {e['episodes_10000_s']:.1f} s, {e['threads']} threads).", '',
        benchmark_source(r, 'torch', 'numpy', 'easyfsl')])

def benchmark_tables(path):
    "The lines of any other benchmark as tables, one for each kind of line"
    r = json.loads(path.read_text())
    kinds = defaultdict(list) # names of the entries -> lines
    for line in r['lines']: kinds[tuple(line)].append(line)
    def cell(v): return f'{v:,}' if isinstance(v, (int, float)) and not isinstance(v, bool) else '' if v is None else str(v)
    parts = [markdown_table(names, [map(cell, line.values()) for line in lines]) for names,lines in kinds.items()]
    floor = next((line['gflop_per_image'] for line in r['lines'] if (line['name'], line.get('px')) == ('resnet12', 32)), None)
    if floor:
        parts.append("Counted floor of the paper's stage one on CIFAR-FS: 90 epochs of 38,400 images at four rotations, "
                     f'{floor} GFLOP each with ResNet-12: {90*38400*4*floor*1e9:.2g} floating-point operations.')
    return '\n\n'.join([*parts, benchmark_source(r, 'torch', 'fastai', 'albumentations', 'easyfsl')])


# ---- photos -----------------------------------------------------------------------------------------------------------

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


# ---- the files --------------------------------------------------------------------------------------------------------

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
            parts += [f'## {title}, on the {CLASSES[split]} classes\n', table_summary(rows) + '\n']
            for words,group in by_start(rows): parts += [f'{words}\n', section(group, split, 'results/') + '\n']
            parts += picture(root, f'{name}_{split}', title)
    for name,title in FIGURES.items():
        if shown := picture(root, name, title): parts += [f'## {title}\n', *shown]
    if tables := inference(root/'results'): parts += ['## Inference: other classifiers, inductive and transductive\n', *tables]
    parts += ['## Every scoring of the novel classes\n', novel_log(root/'results'/'novel_scorings.jsonl') + '\n']
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
    parts = [table_summary(rows)]
    for words,group in by_start(rows): parts += [words, section(group, 'val', '../results/')]
    doc.write_text(replace_measured(doc.read_text(), '\n\n'.join(parts)))
