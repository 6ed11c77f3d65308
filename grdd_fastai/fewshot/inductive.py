"""Inductive classifiers, which classify each query by itself; shapes and errors are described in `classifiers`."""
import warnings

import torch
import torch.nn.functional as F

from ..core.errors import UserError
from .classifiers import cosines, n_classes, nan_without_support, norms, one_hot, prototypes, register_classifier, squared_distances

__all__ = ['mean_cosine', 'nearest_prototype', 'nearest_prototype_cosine', 'simpleshot_cl2n', 'simpleshot_l2n', 'power_transform',
           'nearest_neighbour', 'lda', 'ridge', 'logistic_regression']


@register_classifier('cosine')
def mean_cosine(support, support_y, query):
    """The paper's classifier: sigma of Eq. 14 (arXiv 2107.05583), divided by the number of support images of the class

    The division changes no prediction if all classes have equally many support images. Otherwise it keeps a class with more support images
    from being preferred.
    """
    Y = one_hot(support_y, support)
    return query @ ((Y.mT @ (support / norms(support))) / Y.sum(1).unsqueeze(-1)).mT / norms(query)

@register_classifier('prototype')
def nearest_prototype(support, support_y, query):
    "Negative squared distance to the mean feature of each class: the classifier of Prototypical Networks (arXiv 1703.05175)"
    return -squared_distances(query, prototypes(support, support_y))

@register_classifier('prototype_cosine')
def nearest_prototype_cosine(support, support_y, query):
    "Cosine with the mean feature of each class"
    return cosines(query, prototypes(support, support_y))

@register_classifier('simpleshot_cl2n')
def simpleshot_cl2n(support, support_y, query,
    mean=None, # mean feature of the base classes (D), required
):
    "Nearest centroid of features from which the base classes' mean is subtracted, then normalised (SimpleShot's CL2N, arXiv 1911.04623)"
    if mean is None: raise UserError('simpleshot_cl2n needs the mean feature of the base classes: give mean=, or take simpleshot_l2n')
    mean = torch.as_tensor(mean, device=support.device)
    if mean.ndim and mean.shape[-1] != support.shape[-1]:
        raise UserError(f'the mean has {mean.shape[-1]} features and the images {support.shape[-1]}: take it of the same network')
    return simpleshot_l2n(support - mean, support_y, query - mean)

@register_classifier('simpleshot_l2n')
def simpleshot_l2n(support, support_y, query):
    "Nearest centroid of normalised features (SimpleShot's L2N, arXiv 1911.04623)"
    p = prototypes(F.normalize(support, dim=-1), support_y)
    return 2 * query @ p.mT / norms(query) - p.square().sum(-1).unsqueeze(1) - 1 # negative squared distance of the normalised query

@register_classifier('power_transform')
def power_transform(support, support_y, query,
    power=.5, # exponent of the features, after negative ones are set to zero
):
    "Nearest centroid of features that are raised to a power and then normalised, as in PT-MAP (arXiv 2006.03806), but inductive"
    return simpleshot_l2n((support.relu() + 1e-6).pow(power), support_y, (query.relu() + 1e-6).pow(power))

@register_classifier('nearest_neighbour')
def nearest_neighbour(support, support_y, query):
    "Cosine with the nearest support image of each class"
    R = cosines(query, support)
    index = support_y.unsqueeze(1).expand_as(R)
    return R.new_full((*R.shape[:2], n_classes(support_y)), -torch.inf).scatter_reduce(2, index, R, 'amax')

@register_classifier('lda')
def lda(support, support_y, query,
    normalize=True, # whether features are scaled to unit length first
):
    """Linear discriminant analysis with equal priors and one covariance for all classes, shrunk as Ledoit and Wolf (2004) say

    The shrinkage is scikit-learn's `ledoit_wolf` of the features' differences to their class means; the covariance is divided by the number
    of support images less the number of classes. It is inverted in dual form, as an (NS, NS) matrix. If each class has one support image,
    there is no covariance, and this is the nearest mean.
    """
    if normalize: support,query = F.normalize(support, dim=-1),F.normalize(query, dim=-1)
    Y,p = one_hot(support_y, support),prototypes(support, support_y)
    N,D = support.shape[1:]
    free = N - Y.shape[2] # degrees of freedom
    if free < 1: return -squared_distances(query, p)
    X = support - Y @ p
    K = X @ X.mT
    lengths = K.diagonal(dim1=1, dim2=2)
    mean = lengths.sum(1)/(N*D) # of the variances
    square = K.square().sum((1, 2))/N**2 # squared Frobenius norm of the covariance
    delta = square/D - mean**2
    beta = (lengths.square().sum(1)/N - square)/(N*D)
    shrinkage = (beta/delta.clamp_min(torch.finfo(K.dtype).tiny)).clamp(0, 1)
    own = ((1 - shrinkage)/free).view(-1, 1, 1) # the covariance is own * X.T X + spherical * identity
    spherical = (shrinkage.clamp_min(1e-4)*mean.clamp_min(1e-12)*N/free).view(-1, 1, 1)
    K = own*K
    K.diagonal(dim1=1, dim2=2).add_(spherical.squeeze(-1))
    w = (p - own*(X.mT @ torch.linalg.solve(K, X @ p.mT)).mT)/spherical # inverse covariance times class means
    return query @ w.mT - (w*p).sum(-1).unsqueeze(1)/2 + nan_without_support(Y)

@register_classifier('ridge')
def ridge(support, support_y, query,
    weight=1., # weight of the squared norm of the coefficients
    normalize=True, # whether features are scaled to unit length first
):
    "Ridge regression to the targets -1 and 1 with an intercept, in dual form (R2-D2, arXiv 1805.08136; scikit-learn's RidgeClassifier)"
    if normalize: support,query = F.normalize(support, dim=-1),F.normalize(query, dim=-1)
    Y = 2*one_hot(support_y, support) - 1
    mean = support.mean(1, keepdim=True)
    offset = Y.mean(1, keepdim=True)
    X = support - mean
    K = X @ X.mT
    K.diagonal(dim1=1, dim2=2).add_(weight)
    return (query - mean) @ X.mT @ torch.linalg.solve(K, Y - offset) + offset + nan_without_support(Y)

@register_classifier('logistic')
def logistic_regression(support, support_y, query,
    C=1., # weight of the sum of the losses, against half the squared norm of the coefficients, as in scikit-learn
    normalize=True, # whether features are scaled to unit length first, as in RFS and SKD
    tol=1e-6, # an episode stops when no logit of its support images changes by this much
    max_iter=2000, # most steps; a warning is given if an episode needs more
):
    """Multinomial logistic regression with an unpenalised intercept: RFS's classifier (arXiv 2003.11539), scikit-learn's LogisticRegression

    Each step minimises a quadratic upper bound of the loss (Boehning, 1992) in dual form, with Nesterov's momentum. A step is a product
    with one (NS, NS) matrix, so its cost does not depend on D.
    """
    if normalize: support,query = F.normalize(support, dim=-1),F.normalize(query, dim=-1)
    Y = one_hot(support_y, support)
    K = support @ support.mT
    h = C/2 # upper bound of the curvature of C * cross-entropy in the logits
    M = h*K
    M.diagonal(dim1=1, dim2=2).add_(1.)
    M = torch.linalg.inv(M)
    u = M.sum(2, keepdim=True)
    M = M - u @ u.mT / u.sum(1, keepdim=True) # for the intercept, the columns of A sum to zero
    A = Z = Z_new = torch.zeros_like(Y)
    t = torch.ones(len(Y), 1, 1, device=Y.device)
    live = torch.ones(len(Y), 1, 1, dtype=torch.bool, device=Y.device)
    for step in range(max_iter):
        G = C * (Z.softmax(-1) - Y)
        A = torch.where(live, M @ (h*Z - G), A)
        Z_old = Z_new
        Z_new = torch.where(live, Z - (G + A)/h, Z_new)
        moved = Z_new - Z_old
        live = live & (moved.abs().amax((1, 2), keepdim=True) >= tol) # an episode that has converged stays as it is
        if step % 5 == 4 and not live.any(): break # not at each step, because this check waits for a GPU
        t = torch.where(((Z - Z_new)*moved).sum((1, 2), keepdim=True) > 0, 1., t) # restart momentum that points uphill
        t_new = (1 + (1 + 4*t*t).sqrt()) / 2
        Z = Z_new + (t - 1)/t_new*moved
        t = t_new
    if live.any():
        warnings.warn(f'logistic_regression has not converged in {max_iter} steps: normalise the features or lower C', stacklevel=2)
    b = (Z_new - K @ A).mean(1, keepdim=True)
    return query @ support.mT @ A + b + nan_without_support(Y)
