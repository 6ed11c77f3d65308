"""Transductive classifiers, which use all queries of an episode together; shapes and errors are described in `classifiers`

A `balanced` classifier assumes that every class has equally many queries. This is true of the usual benchmark episodes, but rarely in real
use, where the gain from this assumption is lost.
"""
import torch
import torch.nn.functional as F

from .classifiers import cosines, n_classes, one_hot, prototypes, register_classifier, squared_distances

__all__ = ['tim_gd', 'alpha_tim', 'tim_adm', 'bd_cspn', 'laplacian_shot', 'pt_map', 'soft_kmeans']


EPS = 1e-12
TINY = torch.finfo(torch.float32).tiny


# ---- transductive information maximisation ------------------------------------------------------------------------------

def tim_logits(z, W, scale):
    "-scale/2 ||z - w||^2 for features z (E, N, D) and class weights W (E, C, D), without the term that all classes share: (E, N, C)"
    return scale * (z @ W.mT - W.square().sum(-1).unsqueeze(1)/2)

def entropy_gradient(p, alpha):
    "Gradient in p, up to a constant, of Shannon's entropy (alpha = 1) or of Tsallis' entropy (1 - sum p^alpha) / (alpha - 1)"
    return -(p + EPS).log() if alpha == 1 else -alpha/(alpha - 1) * p.pow(alpha - 1)

def information_maximisation(support, support_y, query, scale, ce_weight, marginal_weight, conditional_weight, alpha, lr, steps,
                             betas=(.9, .999), eps=1e-8):
    "Minimise ce_weight*CE - marginal_weight*H(Y_Q) + conditional_weight*H(Y_Q|X_Q) over the class weights W by Adam, from the prototypes"
    z_s,z_q = F.normalize(support, dim=-1),F.normalize(query, dim=-1)
    Y = one_hot(support_y, support)
    W = prototypes(z_s, support_y)
    mean,sqr = torch.zeros_like(W),torch.zeros_like(W)
    for t in range(1, steps + 1):
        p = tim_logits(z_q, W, scale).softmax(-1)
        g = (conditional_weight*entropy_gradient(p, alpha) - marginal_weight*entropy_gradient(p.mean(1, keepdim=True), alpha)) / p.shape[1]
        g = p * (g - (p*g).sum(-1, keepdim=True)) # gradient of the loss in the logits of the queries, then in those of the support
        g_s = ce_weight/Y.shape[1] * (tim_logits(z_s, W, scale).softmax(-1) - Y)
        grad = scale * (g.mT @ z_q + g_s.mT @ z_s - (g.sum(1) + g_s.sum(1)).unsqueeze(-1)*W)
        mean.lerp_(grad, 1 - betas[0])
        sqr.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
        W.addcdiv_(mean, (sqr / (1 - betas[1]**t)).sqrt_().add_(eps), value=-lr/(1 - betas[0]**t))
    return -scale/2 * squared_distances(z_q, W)

@register_classifier('tim_gd', transductive=True, balanced=True)
def tim_gd(support, support_y, query,
    scale=15., # tau: logits are -tau/2 times the squared distance to W
    ce_weight=.1, # lambda, weight of the cross-entropy on the support
    marginal_weight=1., # weight of the marginal entropy of the queries, which spreads them evenly over the classes
    conditional_weight=.1, # alpha, weight of the conditional entropy of the queries
    lr=1e-4, # learning rate of Adam
    steps=1000, # steps of Adam
):
    "TIM (transductive information maximisation) by gradient descent (arXiv 2008.11297)"
    return information_maximisation(support, support_y, query, scale, ce_weight, marginal_weight, conditional_weight, 1., lr, steps)

@register_classifier('alpha_tim', transductive=True)
def alpha_tim(support, support_y, query,
    # order of both entropies of the queries; above 1 they may be unbalanced; None: 2 for 1 support image per class, 5 for 2 to 4, 7 from 5
    alpha=None,
    scale=15., ce_weight=1., marginal_weight=1., conditional_weight=1., lr=1e-4, steps=1000, # same as in `tim_gd`
):
    "TIM with Tsallis' entropies, for unbalanced queries (arXiv 2204.11181)"
    if alpha is None: alpha = by_shot(support, support_y, 2., 5., 7.)
    return information_maximisation(support, support_y, query, scale, ce_weight, marginal_weight, conditional_weight, alpha, lr, steps)

@register_classifier('tim_adm', transductive=True, balanced=True)
def tim_adm(support, support_y, query,
    scale=15., ce_weight=.1, marginal_weight=1., conditional_weight=.1, # same as in `tim_gd`
    steps=150, # steps of the method
):
    "TIM by the alternating direction method, whose steps have closed forms (arXiv 2008.11297, section 3.2)"
    z_s,z_q = F.normalize(support, dim=-1),F.normalize(query, dim=-1)
    Y = one_hot(support_y, support)
    W = prototypes(z_s, support_y)
    a = ce_weight/(1 + conditional_weight)
    b = support.shape[1]/query.shape[1]
    n_s = Y.sum(1).unsqueeze(-1) # (E, C, 1)
    SY = Y.mT @ z_s
    for _ in range(steps):
        p_s,p_q = (tim_logits(z, W, scale).softmax(-1) for z in (z_s, z_q))
        q = p_q.pow(1 + conditional_weight)
        q = q / (q.sum(1, keepdim=True) + EPS).pow(marginal_weight/(1 + marginal_weight))
        q = q / q.sum(-1, keepdim=True)
        pull_s,pull_q = (p.sum(1).unsqueeze(-1)*W - p.mT @ z for p,z in ((p_s, z_s), (p_q, z_q))) # sum_i p_ik (w_k - z_i)
        W = (a*(SY + pull_s) + b*(q.mT @ z_q + pull_q)) / (a*n_s + b*q.sum(1).unsqueeze(-1))
    return -scale/2 * squared_distances(z_q, W)


# ---- rectified prototypes -----------------------------------------------------------------------------------------------

def rectified_prototypes(support, support_y, query, scale):
    """Rectified prototypes (E, C, D), and the queries (E, NQ, D) shifted so that their mean is that of the support

    Every image, also of the support, is assigned to the class with the nearest prototype by cosine. The new prototype of a class is the
    mean of its images, each weighted by the softmax over classes of scale * cosine. A class without images keeps its prototype.
    """
    p = prototypes(support, support_y)
    shifted = query + (support.mean(1, keepdim=True) - query.mean(1, keepdim=True))
    images = torch.cat([support, shifted], 1)
    cos = cosines(images, p)
    Y = F.one_hot(cos.argmax(-1), p.shape[1]).to(cos.dtype)
    n = Y.sum(1).unsqueeze(-1) # (E, C, 1)
    new = (Y * (scale*cos).softmax(-1)).mT @ images / n.clamp_min(1)
    return torch.where(n > 0, new, p),shifted

def by_shot(support, support_y, few, some, many):
    "Value of a setting by the mean number of support images per class: `few` for 1, `some` for 2 to 4, `many` from 5"
    shots = support.shape[1] / n_classes(support_y)
    return few if shots < 2 else some if shots < 5 else many

@register_classifier('bd_cspn', transductive=True)
def bd_cspn(support, support_y, query,
    scale=10., # factor of the cosines in the weights of the images
    normalize=True, # whether features are scaled to unit length first
    shift=False, # whether the shifted queries are classified; the prototypes are always made with them (`rectified_prototypes`)
):
    """Negative squared distances to prototypes that are rectified by the predictions of the queries (BD-CSPN, arXiv 1911.10713)

    The defaults are the settings of the comparison in arXiv 2204.11181.
    """
    if normalize: support,query = F.normalize(support, dim=-1),F.normalize(query, dim=-1)
    p,shifted = rectified_prototypes(support, support_y, query, scale)
    return -squared_distances(shifted if shift else query, p)

@register_classifier('laplacian_shot', transductive=True)
def laplacian_shot(support, support_y, query,
    weight=None, # lambda, weight of the predictions of the neighbours; None: 0.7, or 0.3 from 5 support images per class
    n_neighbours=2, # neighbours of a query among the other queries (the authors' knn = 3 counts the query itself)
    steps=20, # updates of the predictions
    scale=10., # same as in `bd_cspn`
    normalize=True, # whether features are scaled to unit length first
    shift=False, # same as in `bd_cspn`; the authors' program shifts, which costs accuracy if the queries are not balanced
):
    """Log-probabilities from squared distances to rectified prototypes, smoothed over near queries (LaplacianShot, arXiv 2006.15486)

    The defaults are the settings of the comparison in arXiv 2204.11181.
    """
    if weight is None: weight = by_shot(support, support_y, 0.7, 0.7, 0.3)
    if normalize: support,query = F.normalize(support, dim=-1),F.normalize(query, dim=-1)
    p,shifted = rectified_prototypes(support, support_y, query, scale)
    if shift: query = shifted
    unary = squared_distances(query, p)
    far = squared_distances(query, query)
    far.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    near = far.topk(min(n_neighbours, query.shape[1] - 1), largest=False).indices # (E, NQ, k)
    z = (-unary).softmax(-1)
    rows = near.flatten(1).unsqueeze(-1).expand(-1, -1, z.shape[-1])
    for _ in range(steps): z = (weight*z.gather(1, rows).unflatten(1, near.shape[1:]).sum(2) - unary).softmax(-1)
    return z.clamp_min(TINY).log()


# ---- optimal transport and clustering -----------------------------------------------------------------------------------

def sinkhorn(cost, scale, steps, tol, log_v=None):
    """Optimal transport plan by Sinkhorn's algorithm: its log (E, NQ, C), and the log of the column factors (E, C)

    The plan is exp(-scale*cost) with a factor for each row and each column, so that rows sum to 1 and columns to NQ/C. `log_v` holds the
    column factors to start from. Each episode stops by itself when no row factor changes by more than `tol`, or after `steps` steps.
    """
    E,NQ,C = cost.shape
    log_v = cost.new_zeros(E, C) if log_v is None else log_v
    # (E, C, NQ); subtracting the minimum of a row only changes the row factor, and keeps the row from underflowing to zero
    K = (-scale*(cost - cost.amin(-1, keepdim=True))).exp().mT.contiguous()
    live = torch.arange(E, device=cost.device) # the episodes that have not stopped
    v = log_v.exp()
    row = None
    for step in range(steps):
        rows = (K*v.unsqueeze(-1)).sum(1).clamp_min(TINY) # sums of the rows, (E, NQ)
        v = NQ/C / (K/rows.unsqueeze(1)).sum(2).clamp_min(TINY)
        if step % 10 == 9:
            log_v = log_v.index_copy(0, live, v.log())
            if len(go := ((rows/row - 1).abs().amax(1) >= tol).nonzero().flatten()) < len(live):
                if not len(go): break
                live,K,v,rows = live[go],K[go],v[go],rows[go]
        row = rows
    else: log_v = log_v.index_copy(0, live, v.log())
    return (log_v.unsqueeze(1) - scale*cost).log_softmax(-1),log_v

@register_classifier('pt_map', transductive=True, balanced=True, chunk_multiplier=8)
def pt_map(support, support_y, query,
    power=0.5, # exponent of the features, after negative ones are set to zero
    scale=10., # lambda, factor of the squared distances in the transport
    lr=0.2, # share of the way that the prototypes move in a step
    steps=20, # moves of the prototypes
    # whether features, after the power, get unit length, mean zero (in support and queries separately) and unit length again
    normalize=True,
    sinkhorn_steps=1000, tol=1e-6, # most steps and tolerance of `sinkhorn`
):
    "Prototypes moved by an optimal transport plan that gives each class equally many queries (PT-MAP, arXiv 2006.03806)"
    z_s,z_q = ((x.relu() + 1e-6).pow(power) for x in (support, query))
    if normalize: z_s,z_q = (F.normalize(z - z.mean(1, keepdim=True), dim=-1) for z in (F.normalize(z_s, dim=-1), F.normalize(z_q, dim=-1)))
    Y = one_hot(support_y, support)
    p = prototypes(z_s, support_y)
    log_v = None
    for step in range(steps + 1):
        logits,log_v = sinkhorn(squared_distances(z_q, p), scale, sinkhorn_steps, tol, log_v)
        if step == steps: return logits
        plan = logits.exp()
        target = (Y.mT @ z_s + plan.mT @ z_q) / (Y.sum(1) + plan.sum(1)).unsqueeze(-1)
        p = p + lr*(target - p)

@register_classifier('soft_kmeans', transductive=True)
def soft_kmeans(support, support_y, query,
    scale=15., # logits are -scale/2 times the squared distances
    steps=10, # updates of the prototypes
    normalize=True, # whether features are scaled to unit length first
):
    "Soft k-means: prototypes are repeatedly computed from the support and the softly assigned queries (arXiv 1803.00676)"
    if normalize: support,query = F.normalize(support, dim=-1),F.normalize(query, dim=-1)
    Y = one_hot(support_y, support)
    p = prototypes(support, support_y)
    for _ in range(steps):
        z = tim_logits(query, p, scale).softmax(-1)
        p = (Y.mT @ support + z.mT @ query) / (Y.sum(1) + z.sum(1)).unsqueeze(-1)
    return -scale/2 * squared_distances(query, p)
