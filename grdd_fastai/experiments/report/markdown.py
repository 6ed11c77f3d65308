"""Markdown tables, figures and folded parts, and numbers as the report writes them."""
import statistics
from pathlib import Path

__all__ = ['markdown_table', 'accuracy_text', 'difference_text', 'over_seeds', 'accuracy', 'differences', 'distinct', 'arxiv_link',
           'networks_text', 'picture', 'folded', 'CLASSES', 'SHOTS']


CLASSES = dict(val='validation', novel='novel') # the words for the classes that are scored
SHOTS = ('1-shot', '5-shot') # of the tables beside published numbers


def markdown_table(head, rows):
    "A Markdown table from the cells of its head and of each of its rows"
    def line(cells): return '| ' + ' | '.join(cells) + ' |'
    return '\n'.join([line(head), '|' + '---|'*len(head), *map(line, rows)])

def difference_text(d): return f"{d['difference']:+.2f} ± {d['ci95']:.2f}"

def accuracy_text(score): return f"{score['accuracy']:.2f} ± {score['ci95']:.2f}"

def over_seeds(values, sign=''): return f'{statistics.mean(values):{sign}.2f} (sd {statistics.stdev(values):.2f})'

def accuracy(seeds, shot):
    "Table cell with the accuracy of a row, from its records of all seeds; empty if the shot was not scored"
    scores = [r['scores'][shot] for r in seeds if shot in r['scores']]
    if len(scores) > 1: return over_seeds([o['accuracy'] for o in scores])
    return accuracy_text(scores[0]) if scores else ''

def differences(seeds, other, shot):
    "Table cell with the difference of a row from the row `other`; the mean over several seeds is bold if the order holds in each"
    found = [r['versus'][other][shot] for r in seeds if shot in r['versus'].get(other, {})]
    if len(found) < 2: return difference_text(found[0]) if found else ''
    text = over_seeds([d['difference'] for d in found], '+')
    return f'**{text}**' if {d['clear'] for d in found} in ({1}, {-1}) else text

def distinct(values):
    "The different values, sorted as text and separated by commas"
    return ', '.join(sorted({str(v) for v in values}))

def arxiv_link(number): return f'[{number}](https://arxiv.org/abs/{number})'

def networks_text(records):
    "A sentence on the records of experiments: data, episodes, number of networks, and the hours and machines of their training"
    networks = {n['run']:n for r in records for n in r['networks'].values()}
    def of(k): return distinct(n[k] for n in networks.values())
    data,fingerprint = distinct(r['data']['name'] for r in records),distinct(r['data']['fingerprint'][:8] for r in records)
    episodes = distinct(score['n'] for r in records for score in r['scores'].values())
    hours = sum(n['minutes'] for n in networks.values())/60
    torch = distinct(n['versions']['torch'] for n in networks.values())
    return (f"{data} (fingerprint {fingerprint}), {episodes} episodes; {len(networks)} networks, {hours:.1f} hours on {of('device')}, "
            f"threads per training: {of('torch_threads')}, torch {torch}.")

def picture(root, name, title):
    "A list with the Markdown of a figure in results/figures/ of the checkout `root`; the list is empty if the figure does not exist"
    path = Path('results')/'figures'/f'{name}.png'
    return [f'![{title}]({path})\n'] if (root/path).exists() else []

def folded(title, parts):
    "Markdown that hides the `parts`, a list of texts, until the reader clicks on their title"
    return [f'<details markdown="1">\n<summary>{title}</summary>\n', *parts, '</details>\n']
