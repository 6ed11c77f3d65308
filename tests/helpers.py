"""What several tests make and run: images, data sets, archives, networks, Learners, recipes, experiments and processes."""
import contextlib
import copy
import json
import os
import pickle
import runpy
import signal
import subprocess
import sys
import tarfile
import zipfile
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.callback.schedule import *  # noqa: F401
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from grdd_fastai.core import storage
from grdd_fastai.core.distributed import rank_world
from grdd_fastai.core.errors import UserError
from grdd_fastai.data.blocks import category_dls, episodic_dls, plain_dl
from grdd_fastai.data.class_lists import SPLITS, class_list
from grdd_fastai.data.episodes import sample_episodes, sample_unbalanced
from grdd_fastai.experiments.publish import publish
from grdd_fastai.experiments.table import CL, EL, GR
from grdd_fastai.fewshot.classifiers import CLASSIFIERS
from grdd_fastai.fewshot.embed import embed
from grdd_fastai.fewshot.evaluate import evaluate
from grdd_fastai.models.create import create_backbone
from grdd_fastai.models.resnet12 import ResNet12
from grdd_fastai.runs import checkpoint
from grdd_fastai.stage_one import global_learner
from grdd_fastai.stage_two import meta_learner
from grdd_fastai.training.distributed import shared_batch_norm

ROOT = Path(__file__).parent.parent
NO_FOLDER = str(ROOT/'LICENSE'/'x') # no folder can be made below a file
posix = pytest.mark.skipif(os.name != 'posix', reason='signals, pipes, devices and links of POSIX')


# ---- images and data sets ---------------------------------------------------------------------------------------------

def write_images(folder, names, px=16, seed=0, hue=0., amplitude=90):
    "PNGs whose colour says their class a little and whose noise is their own; `hue` places the class"
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    base = 127 + amplitude*np.sin(2*np.pi*(hue + np.arange(3)/3))
    for name in names:
        (folder/name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((base + rng.normal(0, 40, (px, px, 3))).clip(0, 255).astype(np.uint8)).save(folder/name)

def write_csv_set(root, n_classes=(6, 6, 6), n_images=20, px=16, amplitude=90):
    "Split CSVs and images/: classes `<split><i>` of `n_images` each"
    for s,n in zip(('train','val','test'), n_classes):
        rows = []
        for c in range(n):
            names = [f'{s}{c}/{i:02d}.png' for i in range(n_images)]
            write_images(root/'images', names, px, hash_seed(s, c), c/n, amplitude)
            rows += [(f, f'{s}{c}') for f in names]
        pd.DataFrame(rows, columns=['filename','label']).to_csv(root/f'{s}.csv', index=False)
    return root

def hash_seed(*key): return abs(sum(ord(ch)*31**i for i,ch in enumerate(repr(key)))) % 2**31

def zipped(folder, to):
    "All files of a folder in a zip"
    with zipfile.ZipFile(to, 'w') as z:
        for f in sorted(folder.rglob('*')):
            if f.is_file(): z.write(f, f.relative_to(folder))
    return to

def cifar_archive(path, n=2, how='folder', evil=None):
    "CIFAR-100 in Python's pickles with `n` training images a class, as a folder or a tar; the training part may be `evil`"
    names,rng = sorted(class_list('cifar_fs').label),np.random.default_rng(0)
    parts = {'meta':dict(fine_label_names=names, coarse_label_names=[])}
    for part,k in (('train', n), ('test', 1)):
        y = np.repeat(np.arange(100), k)
        parts[part] = dict(data=rng.integers(0, 256, (len(y), 3072), dtype=np.uint8), fine_labels=[int(v) for v in y],
                           filenames=[f'{part}{i}.png' for i in range(len(y))])
    raw = {f'cifar-100-python/{k}':pickle.dumps(v, protocol=2) for k,v in parts.items()}
    if evil is not None: raw['cifar-100-python/train'] = pickle.dumps(evil, protocol=2)
    if how == 'tar':
        with tarfile.open(path, 'w:gz') as tar:
            for k,b in raw.items():
                info = tarfile.TarInfo(k)
                info.size = len(b)
                tar.addfile(info, BytesIO(b))
    else:
        (path/'cifar-100-python').mkdir(parents=True)
        for k,b in raw.items(): (path/k).write_bytes(b)
    return path,parts

def classes(source): return {s:sorted(df.label.unique()) for s,df in source.frames.items()}

def list_classes(name): return {s:sorted(class_list(name).query('split==@s').label) for s in SPLITS}

def mutations(whole, n, seed=0):
    "`n` damaged copies: flipped bits, cuts, zeroed and doubled stretches"
    rng = np.random.default_rng(seed)
    for i in range(n):
        b,at = bytearray(whole),int(rng.integers(len(whole)))
        if   i%4 == 0: b[at] ^= 1 << int(rng.integers(8))
        elif i%4 == 1: b = b[:at]
        elif i%4 == 2: b[at:at+20] = bytes(len(b[at:at+20]))
        else: b[at:at] = b[max(0, at-30):at]
        yield bytes(b)

def pixels(data, x):
    "Undo normalisation"
    mean,std = (torch.tensor(s).view(1, 3, 1, 1) for s in data.stats)
    return (x*std + mean)*255

def batches(dls, epoch=0):
    "All training batches of an epoch"
    dls.train.epoch = epoch - 1
    return [(x.clone(), y.clone()) for x,y in dls.train]

def equal(a, b): return all(torch.equal(p[0], q[0]) and torch.equal(p[1], q[1]) for p,q in zip(a, b)) and len(a) == len(b)


# ---- sentences and hangs ----------------------------------------------------------------------------------------------

@contextlib.contextmanager
def no_hang(seconds=20):
    "An error after `seconds`, where a pipe or a device is waited for; Windows has no such alarm"
    if not hasattr(signal, 'SIGALRM'):
        yield
        return
    def fail(*_): raise AssertionError('it hangs')
    was = signal.signal(signal.SIGALRM, fail)
    signal.alarm(seconds)
    try: yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, was)

def says(f, *words):
    "`f` ends in a UserError of one sentence that holds each of `words`"
    with no_hang(), pytest.raises(UserError) as e: f()
    text = str(e.value)
    assert '\n' not in text and len(text) < 600 and all(w in text for w in words), text

def refused(f):
    "Whether `f` gave a one-sentence UserError; any other exception is a failure of the test"
    try: f()
    except UserError as e:
        assert '\n' not in str(e) and len(str(e)) > 20
        return True
    return False


# ---- features and episodes --------------------------------------------------------------------------------------------

Y = np.repeat(np.arange(8), 30) # classes of 240 images

def all_episodes(*args, **kwargs): return [np.concatenate(o) for o in zip(*sample_episodes(*args, **kwargs))]

def all_unbalanced(*args, **kwargs): return [np.concatenate(o) for o in zip(*sample_unbalanced(*args, **kwargs))]

SLOW = dict(tim_gd=dict(steps=60, lr=1e-3), alpha_tim=dict(steps=60, lr=1e-3)) # fewer steps, longer ones
GIVEN = SLOW | dict(simpleshot_cl2n=dict(mean=torch.tensor(.3)))

def episodes(E=3, C=4, K=2, Q=5, D=6, seed=0, noise=.8):
    "Positive features of classes that overlap, support in no order; support_y, query_y"
    g = np.random.default_rng(seed)
    centres = g.normal(size=(E, C, D))
    def images(n):
        y = np.stack([g.permutation(np.repeat(np.arange(C), n)) for _ in range(E)])
        return np.abs(np.take_along_axis(centres, y[..., None], 1) + noise*g.normal(size=(E, C*n, D)) + 1),y
    (s,s_y),(q,q_y) = images(K),images(Q)
    return s,s_y,q,q_y

def logits(name, s, s_y, q, **settings):
    "The logits of the classifier with this name; arguments and result are arrays"
    t = lambda a: torch.as_tensor(a).float() if a.dtype.kind == 'f' else torch.as_tensor(a)
    return CLASSIFIERS[name](t(s), t(s_y), t(q), **settings).numpy()


# ---- networks and Learners --------------------------------------------------------------------------------------------

VALID = dict(n_way=3, k_shot=1, n_query=5, n_episodes=20)

def net(seed, **kwargs): return create_backbone('convnet4', 0, 16, seed, **kwargs)

def like_data(net, data):
    "The network `net`, configured for images as the DataLoaders of `data` make them"
    mean,std = data.stats
    net.pretrained_cfg = net.pretrained_cfg | dict(input_size=(3, data.px, data.px), mean=tuple(mean), std=tuple(std))
    return net

def same_state(a, b): return all(torch.equal(a[k], b[k]) for k in a)

def stage_one_learner(data, aug=None, arch='convnet4', bs=60, **kwargs):
    "A Learner of stage one on a tiny set, in float32"
    return global_learner(category_dls(data, bs=bs, aug=aug), arch, valid=VALID, **{**dict(amp=False), **kwargs})

def stage_two_learner(data, teacher=None, student=None, n_episodes=2, episodes_per_step=1, aug=None, **kwargs):
    "A Learner of stage two: episodes of 3 ways, 2 shots and 4 queries"
    dls = episodic_dls(data, 3, 2, 4, n_episodes, episodes_per_step, aug=aug)
    return meta_learner(dls, student or net(1), teacher, valid=VALID, **{**dict(amp=False), **kwargs})

def fit(learn, n=1, lr=.05, f='fit', **kwargs):
    with learn.no_bar(), learn.no_logging(): getattr(learn, f)(n, lr, **kwargs)
    return learn

class Grab(Callback):
    "Keep every step's images, loss and the weights it started from"
    run_valid,order = False,1000
    def before_fit(self): self.x,self.losses,self.weights = [],[],[]
    def before_batch(self):
        self.x.append(self.xb[0].clone())
        self.weights.append(copy.deepcopy(self.model.state_dict()))
    def after_batch(self): self.losses.append(self.learn.loss.item())

# What is known of a network that is published
ABOUT = dict(stats=[[.5]*3, [.2]*3], px=32, scores=dict(val={'1-shot':dict(accuracy=50., ci95=1., n=9)}), supervision='CL', classes=['a'],
             dataset='x', fingerprint='f'*64,
             settings={}, trained=dict(command='python recipes/table2.py --data /home/alice/secret/birds.zip --cache=/home/alice/c',
                                       commit='c', device='d', torch_threads=1, versions=dict(torch='1', timm='1')))

def forged(folder, change=None, tensors=None, **cfg):
    "A published network whose config.json `change`s, or whose pretrained_cfg has `cfg`"
    publish(create_backbone('convnet4', 0), ABOUT, folder)
    config = json.loads((folder/'config.json').read_text())
    config['pretrained_cfg'] |= cfg
    (folder/'config.json').write_text(json.dumps(config | (change or {})))
    if tensors is not None: save_file(tensors, folder/'model.safetensors', metadata=dict(format='pt'))
    return folder


# ---- recipes and experiments ------------------------------------------------------------------------------------------

# A run of one epoch each
SMALL = dict(teacher='convnet4', student='convnet4', epochs=1, meta_epochs=1, episodes=4, test_episodes=50, query=5)

def recipe(name):
    "The function `main` of a recipe"
    return runpy.run_path(str(ROOT/'recipes'/f'{name}.py'))['main']

def shell(*args, **env):
    "A Python program and its words, run from the checkout"
    return subprocess.run([sys.executable, *map(str, args)], capture_output=True, text=True, cwd=ROOT, env={**os.environ, **env},
                          timeout=550)

# A run of three stages: students and teacher differ
THREE = dict(teacher='convnet4', student='convnet4_128', epochs=2, meta_epochs=2, episodes=3, test_episodes=20, query=3, bs=40)
STAGES = ('student_cl','teacher','student_grdd')

def settings(csv_set, cache, **kwargs):
    "Arguments of a run of three stages, with what `kwargs` change"
    return {**THREE, 'data':str(csv_set), 'cache':str(cache), **kwargs}

def stopped(csv_set, cache, out, sessions=1):
    "The folder of a run that was stopped and resumed so that it has taken `sessions` steps"
    for _ in range(sessions): recipe('cifarfs_5w1s')(out=str(out), resume=True, max_minutes=1e-9, **settings(csv_set, cache))
    return out

def leavings(out):
    "The results of a run: names and bytes of its weights, cards and histories, and its result without the time"
    result = json.loads((out/'result.json').read_text())
    files = {p.name:p.read_bytes() for p in out.iterdir() if p.suffix in ('.safetensors','.csv') or p.stem in STAGES}
    return files,{k:v for k,v in result.items() if k != 'seconds'}

def laid_out(files, out):
    "A folder of these files"
    out.mkdir()
    for name,content in files.items(): (out/name).write_bytes(content)
    return out

def files_of(out): return {f.name:f.read_bytes() for f in out.iterdir()}

def child(out, kwargs, threads, die_at_write):
    "The recipe in a process of its own that checkpoints at every step and may die inside its n-th file write"
    torch.set_num_threads(threads)
    checkpoint.MINUTES = 0
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1), os.dup2(os.open(f'{out}.log', os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    if die_at_write is not None:
        n,how = die_at_write
        names = ('fsync','replace','sync_folder') # before the rename, instead of it, after it
        left,real = [n],{k:getattr(storage if k == 'sync_folder' else os, k) for k in names}
        def maybe_die(k):
            def f(*args, **kw):
                if k == names[how]:
                    left[0] -= 1
                    if left[0] <= 0: os.kill(os.getpid(), signal.SIGKILL)
                return real[k](*args, **kw)
            return f
        os.fsync,os.replace,storage.sync_folder = maybe_die('fsync'),maybe_die('replace'),maybe_die('sync_folder')
    recipe('cifarfs_5w1s')(out=str(out), resume=True, **kwargs)

# Experiments of three networks
TABLE = dict(student='convnet4', teacher='convnet4_128', epochs=1, teacher_epochs=1, schedule='one_cycle', lr=0.1,
             rotation=False, bs=64, meta_epochs=1, episodes=2, test_episodes=40)
ROWS = {'CL':CL, 'CL+EL':EL | dict(versus=['CL']),
        'GRDD':GR | dict(versus=['CL','CL+EL'], paper={('faint0', 'convnet4_128', 'convnet4'):{'1-shot':69.3}})}

def net_weights(out): return {p.parent.name:p.read_bytes() for p in out.glob('*/net.safetensors')}


# ---- several processes ------------------------------------------------------------------------------------------------

WORDS = dict(n_way=3, n_query=5, n_episodes=1100)

def steps(data):
    "Weights after both stages and a few steps, an embedded split and its accuracy, in as many processes as there are"
    valid = dict(n_way=3, k_shot=1, n_query=5, n_episodes=20)
    several = rank_world()[1] > 1
    one = global_learner(category_dls(data, bs=40), create_backbone('convnet4', 6, 16), valid=valid, amp=False, keep_best=False)
    two = meta_learner(episodic_dls(data, 3, 1, 4, n_episodes=6, episodes_per_step=2), create_backbone('convnet4', 0, 16, seed=1),
                       create_backbone('convnet4', 0, 16, seed=2), valid=valid, amp=False, keep_best=False)
    layers = meta_learner(episodic_dls(data, 3, 1, 4, n_episodes=6, episodes_per_step=2), create_backbone('convnet4', 0, 16, seed=1),
                          create_backbone('convnet4', 0, 16, seed=2), kd_weight=1., regression_weight=1., ema_decay=.5, valid=valid,
                          amp=False, keep_best=False) # its terms train layers, and its fit ends with the moving average
    for learn in (one, two, layers):
        with learn.distrib_ctx(), learn.no_bar(), learn.no_logging(): learn.fit(2, .001) # with larger ones float32's rounding grows
        assert rank_world()[1] == 1 or not hasattr(learn, 'distributed')
    h,y = embed(two.model, plain_dl(data, 'test', bs=32), distributed=several)
    # BatchNorm over a process's own images
    apart = global_learner(category_dls(data, bs=40), create_backbone('convnet4', 6, 16), valid=valid, amp=False, ema_decay=.5)
    with apart.distrib_ctx(sync_bn=False), apart.no_bar(), apart.no_logging(): apart.fit(1, .05)
    assert all('forward' not in vars(m) for learn in (one, two, apart) for m in learn.model.modules())
    return dict(one=one.model.state_dict(), two=two.model.state_dict(), layers=layers.model.state_dict(), norm=apart.model.state_dict(),
                h=h, y=y, lr=torch.tensor(one.opt.hypers[-1]['lr']),
                accuracies=torch.from_numpy(evaluate(h, y, **WORDS, distributed=several).episodes),
                shown=torch.tensor(list(one.recorder.values[-1])[:5]))

def norm_gradients():
    "A network's gradients and running statistics in float64, from 48 images in as many processes as there are, and by torch alone"
    rank,n = rank_world()
    torch.manual_seed(0)
    x,y,found = torch.randn(48, 3, 32, 32, dtype=torch.float64),torch.randint(6, (48,)),{}
    for arch in ('resnet12', 'efficientnet_lite0'): # the second one uses timm's BatchNormAct2d
        net = (create_backbone(arch, 6, 32, drop_path_rate=0.) if arch != 'resnet12'
               else ResNet12(num_classes=6, widths=(4,8,8,8), block_drop_rate=0.))
        net = net.double().train()
        alone = copy.deepcopy(net)
        F.cross_entropy(alone(x), y).backward()
        for m in net.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm): m.forward = partial(shared_batch_norm, m)
        mine,several = slice(rank*48//n, (rank + 1)*48//n),DistributedDataParallel(net, broadcast_buffers=False)
        F.cross_entropy(several(x[mine]), y[mine]).backward()
        found[arch] = [({k:p.grad for k,p in o.named_parameters()}, dict(o.named_buffers())) for o in (net, alone)]
    return found

def launch(*command, n=2):
    "What `accelerate launch` of `n` processes on the CPU prints"
    env = os.environ | dict(OMP_NUM_THREADS='1', PYTHONWARNINGS='ignore')
    done = subprocess.run([sys.executable, '-m', 'accelerate.commands.accelerate_cli', 'launch', '--multi_gpu', '--num_machines', '1',
                           '--mixed_precision', 'no', '--dynamo_backend', 'no',
                           '--num_processes', str(n), '--main_process_port', '0', *map(str, command)],
                          capture_output=True, text=True, env=env, timeout=600)
    return done
