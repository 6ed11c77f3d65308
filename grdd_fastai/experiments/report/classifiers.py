"""Tables of the classifiers on trained networks, from the records of recipes/evaluate_weights.py, and the log of the novel classes."""
import json
from collections import defaultdict
from pathlib import Path

from .markdown import CLASSES, accuracy_text, distinct, markdown_table

__all__ = ['chosen_on_validation', 'inference', 'novel_log', 'GRDD_TIM']


GRDD_TIM = {'ConvNet-4':('79.9 ± 0.2', '87.9 ± 0.2'), 'ResNet-12':('85.4 ± 0.2', '91.1 ± 0.2')} # the paper's accuracies, 1-shot and 5-shot

def chosen_on_validation(results, name, sha256, shots=(1, 5), transductive=False):
    """Words, novel accuracies and links to the records of the classifier with the best mean accuracy of `shots` on the validation classes

    The records are those of recipes/evaluate_weights.py on the weights with this checksum; None without such records. The classifier is an
    inductive one, or a transductive one.
    """
    found = {} # (classifier, mirror, support views, split) -> accuracies by shot, each with the name of its record
    for path in sorted(results.glob('inference-*.json')):
        r = json.loads(path.read_text())
        if r.get('weights', {}).get(name) != sha256 or r['queries'] != 'balanced': continue
        for s in r['scores']:
            if s['network'] != name or s['transductive'] != transductive: continue
            if (s['way'], s['query']) != (5, 15) or s['shot'] not in shots: continue
            by_shot = found.setdefault((s['classifier'], r.get('mirror', False), r['support_views'], r['split']), {})
            by_shot[s['shot']] = s | dict(source=path.name)
    whole = {k:by_shot for k,by_shot in found.items() if {*shots} <= by_shot.keys()}
    on_both = [how for *how,split in whole if split == 'val' and (*how, 'novel') in whole]
    if not on_both: return None
    best = max(on_both, key=lambda how: sum(whole[(*how, 'val')][shot]['accuracy'] for shot in shots))
    classifier,mirror,views = best
    words = [f'`{classifier}`', *(['features averaged with those of the mirror image'] if mirror else []),
             *([f'{views} views of each support image'] if views else [])]
    scores = [whole[(*best, 'novel')][shot] for shot in shots]
    sources = dict.fromkeys(score['source'] for score in scores)
    return ', '.join(words),[accuracy_text(score) for score in scores],' '.join(f'[record](results/{source})' for source in sources)

def inference(folder):
    "The tables of recipes/evaluate_weights.py: a title that names networks and episodes -> the Markdown of its records"
    found = defaultdict(list)
    for path in sorted(Path(folder).glob('inference-*.json')):
        r = json.loads(path.read_text())
        kinds = list(dict.fromkeys((s['way'], s['shot'], s['query']) for s in r['scores']))
        scores = {(s['network'], s['classifier'], (s['way'], s['shot'], s['query'])):s for s in r['scores']}
        support = f"each support image as {r['support_views']} augmented views" if r['support_views'] else 'the support as it is'
        if r.get('mirror'): support += ', features averaged with those of the mirror image'
        episodes = distinct(s['n'] for s in r['scores'])
        networks = ', '.join(dict.fromkeys(s['network'] for s in r['scores']))
        about = f"{networks}: {CLASSES[r['split']]} classes, {r['queries']} queries, {support}"
        source = (f"{r['data']['name']}, {episodes} episodes; [record](results/{path.name}), commit {str(r['commit'])[:8]}, "
                  f"{r['device']}\n")
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
        found[about] += [source, markdown_table(head, rows) + '\n']
    return found

def novel_log(path):
    "Table of every scoring of the novel classes that the log at `path` holds"
    if not path.exists(): return 'The novel classes have not been scored yet.'
    rows = []
    for line in path.read_text().splitlines():
        o = json.loads(line)
        what = ', '.join([o['what'], *(str(o[k]) for k in ('classifier','queries') if k in o), *(['mirrored'] if o.get('mirror') else [])])
        rows.append([o['time'], what, str(o['shot']), accuracy_text(o), str(o['test_episodes']), o['commit'][:8]])
    return markdown_table(['time', 'network', 'shot', 'accuracy', 'episodes', 'commit'], rows)
