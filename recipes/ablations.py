"""Figure 4 of arXiv 2107.05583: the accuracy that each component of GRDD adds

    python recipes/ablations.py --data cifar-fs.zip             # ResNet-12 teacher, 90 epochs: a GPU's work
    python recipes/ablations.py --demo                          # four minutes on two cores, no download

Eq. 12 sums the KL of N_S groups, but the whole matrix is a single group. So the KL of 'w/o RDD' also has less weight relative to
gamma * L_rt; the row with matched weight multiplies it by N_S.
"""
from fastcore.meta import delegates
from fastcore.script import call_parse

from grdd_fastai.experiments.table import CL, EL, GR, table
from grdd_fastai.plots import plot_rows, save_figure
from grdd_fastai.runs.options import DataOptions
from grdd_fastai.settings import exact_flags, from_flags
from grdd_fastai.stage_two import Preset, get_preset


def ablations(two, n_classes):
    "The rows around the settings `two` of stage two, for data of `n_classes` base classes"
    n = min(two.n_way, n_classes) * (two.k_shot + (two.n_query if two.distill.pairs == 'all' else 0)) # groups in an episode, N_S in Eq. 12
    weight = two.distill.kl_weight / (n if two.distill.reduction == 'mean' else 1) # weight of each group in the sum of Eq. 12
    whole = dict(decouple=False, reduction='sum')
    return {
        'CL':                     CL,
        'CL+EL':                  EL | dict(versus=['CL']),
        'w/o RDD':                GR | dict(versus=['CL', 'CL+EL', 'GRDD'], stage_two=whole | dict(kl_weight=weight)),
        'w/o RDD matched weight': GR | dict(versus=['CL', 'CL+EL', 'GRDD'], stage_two=whole | dict(kl_weight=weight*n)),
        'w/o L_rt':               GR | dict(versus=['CL', 'CL+EL', 'GRDD'], stage_two=dict(gamma=0.)),
        'GRDD':                   GR | dict(versus=['CL', 'CL+EL']),
    }

@call_parse
@exact_flags
@delegates(table, but=['name', 'all_rows'])
def main(
    preset:Preset='best',
    **kwargs
):
    "Figure 4: the components of GRDD"
    data = from_flags(DataOptions(), kwargs).load(32, kwargs.get('demo'))
    rows = ablations(from_flags(get_preset(preset), kwargs), len(data.train.vocab))
    made = table('ablations', rows, preset=preset, **kwargs)
    title = 'Components of GRDD (RDD: relatedness decoupled-distillation)'
    if len(made.scored): save_figure(plot_rows(made.scored, made.title(title)), made.path('ablations'))
    made.check()
