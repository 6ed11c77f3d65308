"""Table 2 of arXiv 2107.05583: category labels, episodic labels and global relatedness, in eight rows of settings

    python recipes/table2.py --data cifar-fs.zip                # ResNet-12 and 90 epochs: a GPU's work
    python recipes/table2.py --demo                             # four minutes on two cores, no download

Writes scores and paired differences as CSV and a figure to --out. Each network is trained once, whatever rows need it, and the
same command goes on where it was stopped. `--teacher` names the table's large network, `--student` its small one.
"""
from fastcore.meta import delegates
from fastcore.script import call_parse

from grdd_fastai.plots import plot_rows, save_figure
from grdd_fastai.tables import CL, EL, GR, table

small,large = dict(psi='student'),dict(psi='teacher')
ROWS = {
    'CL':                       CL | small | dict(paper=64.6),
    'CL+EL':                    EL | small | dict(paper=66.7, versus=['CL']),
    'CL+GR from small':         GR | small | dict(paper=67.3, versus=['CL', 'CL+EL'], phi='student'),
    'CL+GR from large':         GR | small | dict(paper=69.3, versus=['CL', 'CL+EL', 'CL+GR from small'], phi='teacher'),
    'large CL':                 CL | large | dict(paper=74.9),
    'large CL+EL':              EL | large | dict(paper=72.9, versus=['large CL']),
    'large CL+GR from small':   GR | large | dict(paper=75.4, versus=['large CL', 'large CL+EL'], phi='student'),
    'large CL+GR from large':   GR | large | dict(paper=77.5, versus=['large CL', 'large CL+EL', 'large CL+GR from small'], phi='teacher'),
}

@call_parse
@delegates(table, but=['name', 'keep'])
def main(
    rows:str=None, # the rows wanted, separated by commas (all eight)
    **kwargs
):
    "Table 2: category labels, episodic labels, global relatedness"
    made = table('table2', ROWS, rows, **kwargs)
    save_figure(plot_rows(made.scored, 'Table 2'), made.path('table2'))
