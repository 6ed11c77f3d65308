"""Table 2 of arXiv 2107.05583: category labels, episodic labels and global relatedness, in eight rows of settings

    python recipes/table2.py --data cifar-fs.zip                # ResNet-12 and 90 epochs: a GPU's work
    python recipes/table2.py --demo                             # four minutes on two cores, no download

Scores and paired differences are written to --out as CSV files and a figure. Each network is trained once, even if several rows need it,
and the same command goes on where it was stopped. `--teacher` names the large network of the table, `--student` its small one.
"""
from fastcore.meta import delegates
from fastcore.script import call_parse

from grdd_fastai.experiments.table import CL, EL, GR, table
from grdd_fastai.plots import plot_rows, save_figure
from grdd_fastai.settings import exact_flags

small,large = dict(psi='student'),dict(psi='teacher')
def paper(one_shot, phi, psi, five_shot=None):
    "A row's entry for the paper's accuracies: 1-shot from Table 2, and 5-shot from Table 1"
    return dict(paper={('cifar_fs', phi, psi): {'1-shot':one_shot} | ({'5-shot':five_shot} if five_shot else {})})

ROWS = {
    'CL':                     CL | small | paper(64.6, None, 'convnet4'),
    'CL+EL':                  EL | small | paper(66.7, None, 'convnet4') | dict(versus=['CL']),
    'CL+GR from small':       GR | small | paper(67.3, 'convnet4', 'convnet4') | dict(phi='student', versus=['CL', 'CL+EL']),
    'CL+GR from large':       GR | small | paper(69.3, 'resnet12', 'convnet4', 84.7) | dict(
        phi='teacher', versus=['CL', 'CL+EL', 'CL+GR from small']),
    'large CL':               CL | large | paper(74.9, None, 'resnet12'),
    'large CL+EL':            EL | large | paper(72.9, None, 'resnet12') | dict(versus=['large CL']),
    'large CL+GR from small': GR | large | paper(75.4, 'convnet4', 'resnet12') | dict(phi='student', versus=['large CL', 'large CL+EL']),
    'large CL+GR from large': GR | large | paper(77.5, 'resnet12', 'resnet12', 89.1) | dict(
        phi='teacher', versus=['large CL', 'large CL+EL', 'large CL+GR from small']),
}

@call_parse
@exact_flags
@delegates(table, but=['name', 'all_rows'])
def main(**kwargs):
    "Table 2: category labels, episodic labels, global relatedness"
    made = table('table2', ROWS, **kwargs)
    title = 'CL: category labels, EL: episodic labels, GR: global relatedness'
    if len(made.scored): save_figure(plot_rows(made.scored, made.title(title)), made.path('table2'))
    made.check()
