"""Figure 6 of arXiv 2107.05583: accuracy over gamma and over T, where each row changes one of them in a preset of stage two

    python recipes/sweep.py --data cifar-fs.zip                 # ResNet-12 teacher, 90 epochs: a GPU's work
    python recipes/sweep.py --demo                              # four minutes on two cores, no download

T divides the cosines. A T below 1 sharpens the softmax: T = 0.25 multiplies the cosines by 4.
"""
from fastcore.meta import delegates
from fastcore.script import call_parse

from grdd_fastai.experiments.table import CL, EL, GR, table
from grdd_fastai.plots import plot_sweep, save_figure
from grdd_fastai.settings import exact_flags

GAMMA = (0., 0.05, 0.2, 1., 5.)
T = (0.05, 0.1, 0.25, 1., 4.)
ROWS = {'CL': CL, 'CL+EL': EL | dict(versus=['CL']),
        **{f'gamma={v:g}': GR | dict(versus=['CL', 'CL+EL'], stage_two=dict(gamma=v)) for v in GAMMA},
        **{f'T={v:g}': GR | dict(versus=['CL', 'CL+EL'], stage_two=dict(T=v)) for v in T}}

@call_parse
@exact_flags
@delegates(table, but=['name', 'all_rows'])
def main(**kwargs):
    "Figure 6: accuracy over gamma and T"
    made = table('sweep', ROWS, **kwargs)
    scored = made.scored
    if scored.empty: return made.check() # the program was stopped, or every row failed
    values = scored.assign(symbol=scored.row.str.split('=').str[0], value=scored.row.str.extract('=(.*)', expand=False).astype(float))
    sweeps = {symbol:values[values.symbol == symbol] for symbol in ('gamma', 'T') if (values.symbol == symbol).any()}
    references = scored[scored.row.isin(['CL', 'CL+EL'])].groupby(['row', 'shot'])
    lines = {f'{row}, {shot}-shot':runs.accuracy.mean() for (row,shot),runs in references}
    if sweeps: save_figure(plot_sweep(sweeps, lines, title=made.title('Figure 6: gamma and T')), made.path('sweep'))
    made.check()
