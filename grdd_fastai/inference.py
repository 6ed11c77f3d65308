"""Classifiers on features: `(support, support_y, query) -> logits`, stateless, batched over episodes."""
from .losses import class_relatedness, relatedness

__all__ = ['sum_of_cosines']


def sum_of_cosines(
    support,   # features (E, NS, D)
    support_y, # classes 0..C-1 (E, NS)
    query,     # features (E, NQ, D)
):
    "The paper's classifier: sigma of Eq. 14 as logits (E, NQ, C); a query takes the class it is most related to"
    return class_relatedness(relatedness(support, query), support_y, int(support_y.max())+1)
