"""Slow, plain restatements of what the package computes: loops, float64 and the formulas as papers and programs write them."""
import math

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from PIL import Image
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax

# ---- images and episodes ----------------------------------------------------------------------------------------------

def naive_crop_and_flip(image, top, left, flip, px, pad):
    "A slice of the padded image (3, H, W), mirrored where `flip`"
    crop = np.pad(image, ((0, 0), (pad, pad), (pad, pad)))[:, top:top+px, left:left+px]
    return crop[..., ::-1] if flip else crop

def naive_jitter(image, factors, order):
    "torchvision's functions in turn, of a float image: of uint8 ones they cut off after each"
    ops,image = (TF.adjust_brightness,TF.adjust_contrast,TF.adjust_saturation),image/255
    for f,kind in zip(factors, order): image = ops[kind](image, float(f))
    return 255*image

def naive_embed(net, images, stats):
    "Features of images (N, 3, H, W) of 0 to 255 by a network in evaluation mode, normalised by mean and standard deviation"
    mean,std = (torch.tensor(s).view(3, 1, 1) for s in stats)
    with torch.no_grad(): return net.eval()((images/255 - mean) / std)

def naive_logits_of_photos(net, folders, path):
    "The mean cosine of a photo and the photos of each folder, all at 32 px"
    mean,std = (torch.tensor(net.pretrained_cfg[k]).view(3, 1, 1) for k in ('mean','std'))
    def h(path):
        x = torch.from_numpy(np.array(Image.open(path).convert('RGB').resize((32, 32), Image.BICUBIC))).permute(2, 0, 1)
        with torch.no_grad(): return F.normalize(net.eval()(((x/255 - mean) / std)[None])[0], dim=0)
    q = h(path)
    return {d.name:float(sum(h(f) @ q for f in d.iterdir())) / len(list(d.iterdir())) for d in folders}

def naive_predictions(h, support, query):
    "Of one episode: each query has the class of the largest sum of cosines; support (C, K) and query (Q,) are rows of `h`"
    return [int(np.argmax([sum(float(torch.dot(h[s], h[q])/h[s].norm()/h[q].norm()) for s in rows) for rows in support])) for q in query]

def naive_accuracy(h, support, query, query_y): return 100*np.mean(np.equal(naive_predictions(h, support, query), query_y))

def naive_accuracy_of_views(h, views, support, query):
    "The support is the sum of its unit views; query (C, Q)"
    z = F.normalize(views, dim=-1).sum(0)
    right = [int(np.argmax([float(h[q] @ z[s].sum(0)) for s in support]) == c) for c in range(len(support)) for q in query[c]]
    return 100*np.mean(right)


# ---- losses: equations 2 to 15 ----------------------------------------------------------------------------------------

def cosine_of(a, b): return sum(x*y for x,y in zip(a, b)) / math.sqrt(sum(x*x for x in a)) / math.sqrt(sum(y*y for y in b))

def naive_R(s, q): return [[[cosine_of(a, b) for b in q[e].tolist()] for a in s[e].tolist()] for e in range(len(s))]

def naive_softmax(v):
    ex = [math.exp(x) for x in v]
    return [x/sum(ex) for x in ex]

def naive_kl(R_e, R_g, T, decouple, reverse):
    total = 0.
    for Re,Rg in zip(R_e, R_g):
        groups = list(zip(Re, Rg)) if decouple else [(sum(Re, []), sum(Rg, []))]
        for e,g in groups:
            w_e,w_g = naive_softmax([x/T for x in e]),naive_softmax([x/T for x in g])
            p,q = (w_e,w_g) if reverse else (w_g,w_e)
            total += sum(a*math.log(a/b) for a,b in zip(p, q))
    return total / len(R_e)

def naive_sigma(R, y, n_way):
    "Each query's sum of relatedness over the support of each class"
    sigma = np.zeros((len(R), len(R[0][0]), n_way))
    for e in range(len(R)):
        for i in range(len(R[e])):
            for j in range(len(R[e][i])): sigma[e, j, y[e, i]] += R[e][i][j]
    return sigma

def naive_cross_entropy(rows, y, scale=10.):
    "Of rows of cosines times the logit scale"
    return np.mean([-math.log(naive_softmax([scale*v for v in row])[k]) for row,k in zip(rows, y)])

def naive_stage_one_loss(model, images, y, rotation_from):
    "L_c + L_r of images turned by 0, 90, 180 and 270 degrees, image by image"
    x = torch.cat([torch.rot90(images, k, (2, 3)) for k in range(4)])
    h = model.backbone.forward_head(model.backbone.forward_features(x), pre_logits=True)
    p = h @ model.backbone.head.weight.T + model.backbone.head.bias
    r = F.linear(p.softmax(1) if rotation_from == 'probabilities' else p, model.rotation_head.weight, model.rotation_head.bias)
    N = len(images)
    L_c = -sum(p.log_softmax(1)[k*N+i, y[i]] for k in range(4) for i in range(N)) / (4*N)
    L_r = -sum(r.log_softmax(1)[k*N+i, k] for k in range(4) for i in range(N)) / (4*N)
    return L_c + L_r

def naive_cosine_logits(h, weight): return torch.stack([torch.stack([10 * (a @ b) / (a.norm() * b.norm()) for b in weight]) for a in h])

def naive_stage_two_loss(h_e, h_g, way, shot, query, T, gamma, decouple, kl_weight, T_squared, reverse, reduction, teacher_output, mean):
    "The distance from student features `h_e` to teacher features `h_g` of two episodes, class by class, and the loss of their labels"
    if teacher_output == 'probabilities': h_g = torch.stack([torch.tensor(naive_softmax(z)) for z in h_g.tolist()])
    place = np.arange(len(h_e)).reshape(2, way, shot+query)
    S,Q = place[..., :shot].reshape(2, -1),place[..., shot:].reshape(2, -1)
    R_e,R_g = (naive_R(h[S], h[Q]) for h in (h_e, h_g))
    L_kl = naive_kl(R_e, R_g, T, decouple, reverse) / (way*shot if reduction == 'mean' and decouple else 1)
    sigma = [[sum(R[c*shot+k][j] for k in range(shot)) / (shot if mean else 1) for c in range(way)] for R in R_e for j in range(way*query)]
    L_rt = naive_cross_entropy(sigma, [j//query for j in range(way*query)]*2)
    return kl_weight*(T**2 if T_squared else 1)*L_kl + gamma*L_rt


# ---- backbones --------------------------------------------------------------------------------------------------------

# name: parameters without classifier (counted by hand from widths), features at 32 px, at 84 px
def conv4(*w, c=3): return sum(9*a*b + b + 2*b for a,b in zip((c, *w), w))
def res12(*w, c=3): return sum(9*(a*b + 2*b*b) + 6*b + a*b + 2*b for a,b in zip((c, *w), w))
BACKBONES = dict(
    convnet4=(conv4(64,64,64,64), 64, 64), convnet4_flat=(conv4(64,64,64,64), 256, 1600),
    convnet4_128=(conv4(64,64,128,128), 128, 128), convnet4_256=(conv4(64,96,128,256), 256, 256),
    convnet4_r2d2=(conv4(96,192,384,512), 8192, 384*100 + 512*25),
    resnet12=(res12(64,160,320,640), 640, 640), resnet12_512=(res12(64,128,256,512), 512, 512),
    resnet12_320=(res12(32,80,160,320), 320, 320))
PUBLISHED = dict(convnet4=.113, convnet4_128=.261, convnet4_256=.464, convnet4_r2d2=2.6, resnet12=12.42, resnet12_512=8.0) # millions

def published_convnet4(net, x):
    "The forward pass of ConvNet-4 in the published order: convolution, BatchNorm, ReLU, pool"
    for i,stage in enumerate(net.stages):
        x = torch.relu(stage[1](stage[0](x)))
        if i < 3: x = F.max_pool2d(x, 2)
    return net.head(x.mean((2, 3)))

def published_resnet12_block(b, x):
    "Written out with functional calls, activation before the pool"
    act = lambda x: F.leaky_relu(x, .1)
    y = act(b.bn3(b.conv3(act(b.bn2(b.conv2(act(b.bn1(b.conv1(x))))))))+ b.downsample[1](b.downsample[0](x)))
    return F.max_pool2d(y, 2)

def kept_share(rate, k, side):
    "What DropBlock keeps of each place of a map, as the squares of `k` that can cover it, counted one by one, foretell"
    places = range(side - k + 1)
    gamma = rate/k**2 * side**2/len(places)**2
    def squares(i): return sum(p <= i < p + k for p in places)
    return torch.tensor([[(1 - gamma)**(squares(i)*squares(j)) for j in range(side)] for i in range(side)])

def dropped_squares(corners, shape, k):
    "Ones in which each square that is lost is marked by hand from its corner, at the mean they had"
    kept = torch.ones(shape)
    for n,c,i,j in corners.nonzero().tolist(): kept[n, c, i:i+k, j:j+k] = 0
    return kept * kept.numel()/kept.sum()


# ---- classifiers: one episode each, float64, from the papers ----------------------------------------------------------

def unit(x): return x / np.linalg.norm(x, axis=-1, keepdims=True)
def means(s, y): return np.stack([s[y == c].mean(0) for c in range(y.max()+1)])
def sq(a, b): return np.array([[((x - z)**2).sum() for z in b] for x in a])
def cos(a, b): return np.array([[x @ z / np.linalg.norm(x) / np.linalg.norm(z) for z in b] for x in a])

def cosine(s, y, q): return np.array([[cos([x], s[y == c]).mean() for c in range(y.max()+1)] for x in q])
def prototype(s, y, q): return -sq(q, means(s, y))
def prototype_cosine(s, y, q): return cos(q, means(s, y))
def simpleshot_l2n(s, y, q): return -sq(unit(q), means(unit(s), y))
def simpleshot_cl2n(s, y, q, mean=.3): return simpleshot_l2n(s - mean, y, q - mean)
def power_transform(s, y, q, power=.5): return simpleshot_l2n((np.maximum(s, 0) + 1e-6)**power, y, (np.maximum(q, 0) + 1e-6)**power)
def nearest_neighbour(s, y, q): return np.array([[max(cos([x], s[y == c])[0]) for c in range(y.max()+1)] for x in q])

def shots(y): return len(y) / (y.max()+1)
def rectified(s, y, q):
    "BD-CSPN: each class's weighted mean of its support and of the shifted queries nearest to it by cosine; the weights are softmax values"
    p,moved = means(s, y),q + s.mean(0) - q.mean(0)
    images = [*s, *moved]
    C = [cos([x], p)[0] for x in images]
    members = [[softmax(10*c)[k]*x for c,x in zip(C, images) if c.argmax() == k] for k in range(len(p))]
    return np.array([np.mean(m, 0) if m else p[k] for k,m in enumerate(members)]),moved
def bd_cspn(s, y, q, shift=False):
    p,moved = rectified(unit(s), y, unit(q))
    return -sq(moved if shift else unit(q), p)

def laplacian_shot(s, y, q, weight=None, n_neighbours=2, steps=20, shift=False):
    if weight is None: weight = .7 if shots(y) < 5 else .3
    p,moved = rectified(unit(s), y, unit(q))
    q = moved if shift else unit(q)
    a,W = sq(q, p),np.zeros((len(q), len(q)))
    for i,row in enumerate(sq(q, q)): W[i, [j for j in row.argsort() if j != i][:n_neighbours]] = 1
    z = softmax(-a, 1)
    for _ in range(steps): z = softmax(weight*W @ z - a, 1)
    return np.log(z)

def pt_map(s, y, q, power=.5, scale=10., lr=.2, steps=20):
    z_s,z_q = (unit(z - z.mean(0)) for z in (unit((x + 1e-6)**power) for x in (s, q)))
    p,C = means(z_s, y),y.max()+1
    for step in range(steps + 1):
        M = np.exp(-scale*sq(z_q, p))
        for _ in range(5000): # rows to 1, columns to NQ/C
            M /= M.sum(1, keepdims=True)
            M *= len(q)/C / M.sum(0)
        M /= M.sum(1, keepdims=True)
        if step == steps: return np.log(M)
        of = np.stack([(z_s[y == c].sum(0) + M[:, c] @ z_q) / ((y == c).sum() + M[:, c].sum()) for c in range(C)])
        p = p + lr*(of - p)

def soft_kmeans(s, y, q, scale=15., steps=10):
    s,q = unit(s),unit(q)
    p = means(s, y)
    for _ in range(steps):
        z = softmax(-scale/2*sq(q, p), 1)
        p = np.stack([(s[y == c].sum(0) + z[:, c] @ q) / ((y == c).sum() + z[:, c].sum()) for c in range(len(p))])
    return -scale/2*sq(q, p)

def tim_adm(s, y, q, tau=15., lam=.1, a=1., b=.1, steps=150):
    s,q = unit(s),unit(q)
    W,C = means(s, y),y.max()+1
    for _ in range(steps):
        P_s,P_q = softmax(-tau/2*sq(s, W), 1),softmax(-tau/2*sq(q, W), 1)
        Q = P_q**(1 + b)
        Q = Q / Q.sum(0)**(a/(a + 1))
        Q = Q / Q.sum(1, keepdims=True)
        new = []
        for k in range(C):
            S = sum((y[i] == k)*s[i] + P_s[i, k]*(W[k] - s[i]) for i in range(len(s)))
            U = sum(Q[i, k]*q[i] + P_q[i, k]*(W[k] - q[i]) for i in range(len(q)))
            new.append((lam/(1 + b)*S + len(s)/len(q)*U) / (lam/(1 + b)*(y == k).sum() + len(s)/len(q)*Q[:, k].sum()))
        W = np.array(new)
    return -tau/2*sq(q, W)

def descent(s, y, q, loss, lr, steps, tau=15.):
    "Adam written out, with derivatives by differences"
    s,q = unit(s),unit(q)
    W = means(s, y)
    m,v,f = np.zeros_like(W),np.zeros_like(W),lambda W: loss(-tau/2*sq(s, W), y, -tau/2*sq(q, W))
    for t in range(1, steps + 1):
        g = np.zeros_like(W)
        for i in np.ndindex(*W.shape):
            d = np.zeros_like(W)
            d[i] = 1e-5
            g[i] = (f(W + d) - f(W - d)) / 2e-5
        m,v = .9*m + .1*g,.999*v + .001*g*g
        W = W - lr * m/(1 - .9**t) / (np.sqrt(v/(1 - .999**t)) + 1e-8)
    return -tau/2*sq(q, W)
def cross_entropy(rows, y): return -np.mean([log_softmax(row)[k] for row,k in zip(rows, y)])
def shannon(p): return -sum(x*np.log(x) for x in p)
def tim_gd(s, y, q, steps=60, lr=1e-3):
    def loss(l_s, y, l_q):
        P = softmax(l_q, 1)
        return .1*cross_entropy(l_s, y) - (shannon(P.mean(0)) - .1*np.mean([shannon(p) for p in P]))
    return descent(s, y, q, loss, lr, steps)
def alpha_tim(s, y, q, steps=60, lr=1e-3):
    alpha = 2. if shots(y) < 2 else 5. if shots(y) < 5 else 7.
    def H(p): return (1 - sum(x**alpha for x in p)) / (alpha - 1)
    def loss(l_s, y, l_q):
        P = softmax(l_q, 1)
        return cross_entropy(l_s, y) - (H(P.mean(0)) - np.mean([H(p) for p in P]))
    return descent(s, y, q, loss, lr, steps)

PLAIN = dict(cosine=cosine, prototype=prototype, prototype_cosine=prototype_cosine, simpleshot_l2n=simpleshot_l2n,
             simpleshot_cl2n=simpleshot_cl2n, power_transform=power_transform, nearest_neighbour=nearest_neighbour, bd_cspn=bd_cspn,
             laplacian_shot=laplacian_shot,
             pt_map=pt_map, soft_kmeans=soft_kmeans, tim_adm=tim_adm, tim_gd=tim_gd, alpha_tim=alpha_tim)

def naive_logistic(s, y, q, C):
    "The minimum of the loss as it is written, by scipy"
    n,D = y.max()+1,s.shape[1]
    def loss(w):
        W,b = w[:n*D].reshape(n, D),w[n*D:]
        return (W**2).sum()/2 + C*sum(-log_softmax(W@x + b)[k] for x,k in zip(s, y))
    w = minimize(loss, np.zeros(n*D + n), method='BFGS', options=dict(gtol=1e-7)).x
    return q @ w[:n*D].reshape(n, D).T + w[n*D:]

def official_tim(s, y, q, alpha=None):
    "A thousand steps of torch's own Adam and autograd on the loss as the authors write it; of alpha-TIM where `alpha` is given"
    z_s,z_q = F.normalize(s, dim=1),F.normalize(q, dim=1)
    W = torch.stack([z_s[y == c].mean(0) for c in range(5)]).requires_grad_()
    opt = torch.optim.Adam([W], lr=1e-4)
    def scores(z): return 15*(z @ W.T - W.square().sum(1)/2 - z.square().sum(1, keepdim=True)/2)
    for _ in range(1000):
        p_s,p_q = scores(z_s).softmax(1),scores(z_q).softmax(1)
        ce,m = -(p_s[torch.arange(len(y)), y] + 1e-12).log().mean(),p_q.mean(0)
        if alpha is None: loss = .1*ce - (-(m*m.log()).sum() - .1*-(p_q*(p_q + 1e-12).log()).sum(1).mean())
        else: loss = ce - (1 - m.pow(alpha).sum())/(alpha - 1) + ((1 - (p_q + 1e-12).pow(alpha).sum(1))/(alpha - 1)).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
    return scores(z_q).detach()
