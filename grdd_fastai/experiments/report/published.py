"""The tables beside the paper and the best published numbers, inductive and transductive, and the one of the teachers."""
import json
import statistics

from ...runs.report import PAPER_ACCURACY
from .classifiers import GRDD_TIM, chosen_on_validation
from .markdown import SHOTS, accuracy, accuracy_text, arxiv_link, markdown_table

__all__ = ['published_table', 'teachers_table', 'transductive_table']


WEIGHTS = 'grdd_fastai/weights'
NETWORKS = dict(convnet4='ConvNet-4, 64-64-64-64', convnet4_256='ConvNet-4, 64-96-128-256',
                resnet12='ResNet-12', resnet12_320='ResNet-12, half as wide')
CHOSEN = 'as chosen on the validation classes'
COSINE,RFS = 'cosine','logistic regression, five views of each support image'
PAPER_CONVNET4,PAPER_RESNET12 = (PAPER_ACCURACY['cifar_fs', k].values() for k in ('convnet4', 'resnet12'))
PUBLISHED = ( # inductive accuracies that papers give for the novel classes of CIFAR-FS, 5-way 1-shot and 5-shot
    ('GRDD from a ResNet-12, the paper', 'ConvNet-4, width not given', COSINE, *PAPER_CONVNET4, '2107.05583'),
    ('RFS-distill', 'ConvNet-4, 64-64-64-64', RFS, '63.8 ± 0.8', '79.5 ± 0.5', '2003.11539'),
    ('R2-D2', 'ConvNet-4, 96-192-384-512', 'ridge regression', '65.3', '79.4', '1805.08136'),
    ('GRDD, the paper', 'ResNet-12', COSINE, *PAPER_RESNET12, '2107.05583'),
    ('RFS-distill', 'ResNet-12', RFS, '73.9', '86.9', '2003.11539'),
    ('IER-distill', 'ResNet-12', "the paper's", '77.87 ± 0.85', '89.74 ± 0.57', '2103.01315'))


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
            rows.append([f'`{name}`, {CHOSEN}', network, words, *accuracies, source])
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
            rows.append([f'`{name}`, {CHOSEN}', network, words, *cells, source])
    if not rows: return ''
    rows += [['GRDD-TIM, the paper', network, 'TIM', *accuracies, arxiv_link('2107.05583')] for network,accuracies in GRDD_TIM.items()]
    return markdown_table(published_head('all queries together, equally many of each class'), rows)
