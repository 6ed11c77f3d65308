"""A finished run as one HTML page: its result, its training, what it gets wrong, and where all of it comes from."""
import csv
import json
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import torch
from matplotlib.ticker import MaxNLocator
from torch import nn

from ..core.html import bullets, figure_uri, table, text, write_html
from ..core.storage import read_bytes, read_json
from ..fewshot.figures import episode_relatedness, episode_rows, tsne_points
from ..fewshot.interpret import EpisodeInterpretation
from ..models.create import features
from ..plots import COLORS, plain, plot_relatedness, plot_tsne
from .run import flat

__all__ = ['write_run_report', 'PAPER_ACCURACY']


PAPER_ACCURACY = { # Table 1 of arXiv 2107.05583: (data, student) -> accuracy in percent on 5-way episodes, by the shot
    ('cifar_fs', 'convnet4'):{1:'69.3 ± 0.9', 5:'84.7 ± 0.6'}, ('cifar_fs', 'resnet12'):{1:'77.5 ± 0.9', 5:'89.1 ± 0.6'},
    ('mini_imagenet', 'convnet4'):{1:'58.9 ± 0.8', 5:'77.1 ± 0.6'}, ('mini_imagenet', 'resnet12'):{1:'67.5 ± 0.8', 5:'84.3 ± 0.5'}}
STAGES = dict(student_cl='Stage one: the student', teacher='Stage one: the teacher', student_grdd='Stage two: the student')
STYLE = """
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: .9rem }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .9rem .25rem 0; text-align: left; vertical-align: top }
img { background: white; border-radius: .4rem; height: auto; max-width: 100% }
.big { font-size: 1.4rem; margin: .2rem 0 } p small { color: var(--soft) } details { margin: 1rem 0 } summary { cursor: pointer }
"""


def write_run_report(
    out:Path, # folder of the run
    result:dict, # its result, as docs/recipes.md describes it
    data, # its `FewShotData`
    novel:dict, # stage -> features (N, D) of the novel classes, for 'cl' and 'grdd'
    teacher:nn.Module, # network whose relatedness is shown
    episode:dict, # n_way, k_shot and n_query of its episodes
    classifier:str='cosine', # name of the classifier of the result
) -> Path:
    """Write `report.html` into the folder of a run and return its path

    The page holds the result beside the paper's, the histories of the stages, the accuracy of each class, the hardest episodes, t-SNE of
    the novel classes (Figure 3 of the paper), relatedness over T (Figure 5), settings, data and command. UserError if it cannot be written.
    """
    test = data.test
    found = EpisodeInterpretation(novel['grdd'], test.y, test.vocab, lambda row: test.images[row], **episode,
                                   classifier=classifier)
    points,y,names,_ = tsne_points({'stage one (CL)':novel['cl'], 'stage two (GRDD)':novel['grdd']}, test)
    support,query = episode_rows(data.val.y, **episode)
    panels = episode_relatedness(embed_rows(teacher, data, support), embed_rows(teacher, data, query))
    began,about = read_json(out/'settings.json'),read_json(out/'data.json')
    title = f'{result["student"]} on {data.name}, {episode["n_way"]}-way {episode["k_shot"]}-shot'
    parts = [f'<h1>{text(title)}</h1>', *summary(result, data, episode)]
    for stage,name in STAGES.items():
        if (file := out/f'history_{stage}.csv').exists():
            parts += [f'<h2>{name}</h2>', picture(plot_history(file), f'loss and validation accuracy of {name}')]
    rows = ([c, f'{r.accuracy:.1f}', '' if pd.isna(r.confused_with) else r.confused_with] for c,r in found.classes.iterrows() if r.queries)
    parts += [f'<h2>Classes <small>of the novel split, by {text(classifier)}, the hardest first</small></h2>',
              table(rows, ('class', 'accuracy, %', 'most often confused with')),
              picture(found.plot_confusion_matrix(), 'confusion of the novel classes')]
    parts += [f'<h2>The hardest of {len(found.accuracy):,} episodes</h2><p>Support images are framed in blue, right queries in green, and '
              'wrong ones in orange, with the class they are taken for and the most related support image.</p>',
              *(picture(found.plot_episode(i), f'episode {i}') for i in found.hardest(2))]
    parts += [f'<h2>{len(names)} novel classes <small>t-SNE of the features, as in Figure 3 of the paper</small></h2>',
              picture(plot_tsne(points, y, names), 't-SNE of novel classes')]
    parts += ["<h2>Relatedness over T <small>of the teacher, in an episode of the validation classes, as in Figure 5</small></h2>",
              picture(plot_relatedness(panels, episode['k_shot'], episode['n_query']), 'relatedness of an episode over T')]
    facts = dict(command=began['command'], commit=began['commit'], device=began['device'], threads=began['torch_threads'],
                 data=f'{data.name}, {data.px} px, fingerprint {about["fingerprint"]}',
                 versions=', '.join(f'{k} {v}' for k,v in began['versions'].items()))
    parts += ['<h2>Where it comes from</h2>', table(facts.items()),
              f'<details><summary>All settings</summary>{table((k, json.dumps(v)) for k,v in flat(began["settings"]).items())}</details>']
    return write_html(out/'report.html', title, parts, STYLE)


@torch.no_grad()
def embed_rows(net, data, rows):
    "Features (n, D) of some images of the validation classes"
    mean,std = (torch.tensor(v).view(1, 3, 1, 1) for v in data.stats)
    x = (torch.from_numpy(data.val.images[rows]).movedim(-1, 1)/255 - mean)/std
    device = next(net.parameters()).device
    return torch.cat([features(net.eval(), part.to(device)).float() for part in x.split(256)])

def picture(fig, name): return f'<p><img src="{figure_uri(fig)}" alt="{text(name)}"></p>'

def summary(result, data, episode):
    "The result in sentences, beside the paper's where data, network, way and shot are the same"
    def measured(accuracy, ci95): return f'{accuracy:.2f} ± {ci95:.2f} %'
    lines = [f'Stage one alone has {measured(result["accuracy_cl"], result["ci95_cl"])}; the paired gain of stage two is '
             f'{result["gain"]:+.2f} ± {result["ci95_gain"]:.2f} points.',
             f'On the validation classes, which chose the epochs: {result["val_accuracy_cl"]:.2f} % after stage one, '
             f'{result["val_accuracy"]:.2f} % after stage two.']
    paper = PAPER_ACCURACY.get((data.name, result['student']), {}).get(episode['k_shot']) if episode['n_way'] == 5 else None
    if paper:
        lines.append(f'The paper has {paper} % for {result["student"]} from a ResNet-12, trained for 90 + 15 epochs; this run had '
                     f'{result["epochs"]} + {result["meta_epochs"]}, from {result["teacher"]}.')
    lines += [f'{k}: {measured(o["accuracy"], o["ci95"])}, after stage one {o["accuracy_cl"]:.2f} %.' for k,o in result['others'].items()]
    if data.name == 'demo': lines.append('This is the demo: drawn characters and a short training, of which nothing follows for photos.')
    return [f'<p class="big">{measured(result["accuracy"], result["ci95"])} <small>by {text(result["classifier"])}, on '
            f'{result["test_episodes"]:,} episodes of the novel classes</small></p>', bullets(lines)]

def plot_history(file):
    "Figure of the history of a stage: each of its losses, and the accuracy on the validation classes, over the epochs"
    rows = list(csv.DictReader(read_bytes(file).decode().splitlines()))
    columns = [c for c in rows[0] if c not in ('epoch', 'accuracy')]
    at = [int(float(r['epoch'])) + 1 for r in rows]
    fig,(left,right) = plt.subplots(1, 2, figsize=(9, 2.9), layout='constrained')
    for i,c in enumerate(columns): left.plot(at, [float(r[c]) for r in rows], color=COLORS[i % len(COLORS)], marker='.', label=c)
    right.plot(at, [float(r['accuracy']) for r in rows], color=COLORS[0], marker='.')
    left.set(xlabel='epoch', ylabel='loss')
    right.set(xlabel='epoch', ylabel='validation accuracy, %')
    if len(columns) > 1: left.legend(frameon=False, fontsize=8, loc='upper left', bbox_to_anchor=(1, 1))
    for ax in (left, right):
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        plain(ax)
    return fig
