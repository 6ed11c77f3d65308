"""Markdown tables, and numbers as the report writes them."""
import statistics

__all__ = ['markdown_table', 'accuracy_text', 'difference_text', 'over_seeds', 'accuracy', 'differences', 'distinct', 'arxiv_link',
           'CLASSES']


CLASSES = dict(val='validation', novel='novel') # the words for the classes that are scored


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
