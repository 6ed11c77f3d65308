"""Measure on a GPU what the other benchmarks measure on a CPU, and what only a GPU can show

    python benchmarks/gpu.py                                    # a quarter of an hour on an NVIDIA GPU
    python benchmarks/gpu.py --out benchmarks/gpu.json          # for benchmarks/README.md
    python benchmarks/gpu.py --full --data cifar-fs.zip         # also trains and scores the recipe of CIFAR-FS, with all its epochs

Every line is measured in its own process. If that fails, the line has the error instead of numbers, the other lines are measured, and the
exit code is 1. The images are made up, except with `--full`. Without an NVIDIA GPU the script measures the CPU; then give small settings.

The lines are:

- `step ratio`: a step of the recipe beside a bare one, as in train_step.py. `peak_mb` is the most memory that torch's tensors take during a
  few steps of the recipe. A GPU also holds the base images, 3 bytes per pixel.
- `synchronisations`: how often the host waits for the GPU in a step of a recipe's run, as far as torch warns of it, and `where` in the code
- `compiled`: the step of stage one with and without torch.compile, and the time from the start of the fit to the end of its first step
- `resume`: both stages with deterministic kernels. `same` says whether a run that is stopped in the middle of an epoch of each stage and
  resumed has the weights and histories of an unbroken run, to the bit, and `repeats` whether a second unbroken run has.
- `whole recipe`: seconds of recipes/cifarfs_5w1s.py at the paper's schedule and of its parts, without the reading of the archive. They are
  extrapolated from the first steps, one validation and one checkpoint of each training. The last network in `--archs` is the teacher; a
  student of its architecture shares stage one with it.
- `full recipe`: the result of that recipe
"""
import json
import os
import shlex
import subprocess
import sys
import warnings
from collections import Counter
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from common import MadeUp, in_own_process, print_line, wait, write
from fastai.callback.core import Callback, CancelFitException, CancelTrainException
from fastai.torch_core import default_device
from fastcore.script import call_parse
from train_step import ONE, TWO, batch_of, beside_bare, learner

from grdd_fastai.core.storage import digest
from grdd_fastai.data.blocks import plain_dl
from grdd_fastai.fewshot.embed import embed
from grdd_fastai.fewshot.evaluate import evaluate
from grdd_fastai.grdd import PAPER
from grdd_fastai.runs.checkpoint import Stopped
from grdd_fastai.runs.provenance import git_commit
from grdd_fastai.runs.run import Run
from grdd_fastai.stage_one import StageOne, stage_one
from grdd_fastai.stage_two import get_preset, stage_two

DEVICE = torch.device(default_device())
GPU = DEVICE.type == 'cuda'
WARM = 5 # first steps of a fit, which are not timed
EPISODE = dict(n_way=5, k_shot=1, n_query=15) # of the validation and the novel classes in recipes/cifarfs_5w1s.py
RECIPE = Path(__file__).parent.parent/'recipes'/'cifarfs_5w1s.py'


# ---- fits -------------------------------------------------------------------------------------------------------------

class Clock(Callback):
    """Time the steps of an epoch after the first `WARM`, and end it, or the whole fit, after `steps` of them

    The times are the seconds of the `first` step, of a timed `step`, and of what follows the steps in an epoch: `validation` and `saving`,
    which is the history and the checkpoint as far as the fit waits for them. With `warn`, torch warns of the synchronisations of host and
    GPU in the timed steps.
    """
    order = 1000 # after all other callbacks
    run_valid = False
    def __init__(self, steps, end=CancelTrainException, warn=False):
        self.steps = steps
        self.end = end
        self.warn = warn and GPU
    def lap(self):
        "Seconds since the last lap"
        before,self.time = self.time,wait(DEVICE)
        return self.time - before
    def before_fit(self): self.time = wait(DEVICE)
    def after_batch(self):
        last = min(WARM + self.steps, self.n_iter) - 1
        if self.iter == 0: self.first = self.lap()
        if self.iter == WARM - 1:
            self.lap()
            if self.warn: torch.cuda.set_sync_debug_mode('warn')
        if self.iter == last:
            if self.warn: torch.cuda.set_sync_debug_mode('default')
            self.step = self.lap()/(last + 1 - WARM)
            self.steps_per_epoch = self.n_iter
            raise self.end()
    def after_cancel_train(self): self.recorder.cancel_train = False # the epoch still gets its row in the history
    def after_train(self): self.validation = self.lap()
    def after_epoch(self): self.saving = self.lap()

def steps_alone(stage, arch, px, step, steps, compile=False):
    "The `Clock` of a fit of the recipe's steps, without validation and a run's callbacks"
    n,_ = batch_of(stage, arch, px, DEVICE, step)
    learn,fit = learner(stage, arch, px, n, WARM + steps, compile)
    clock = Clock(steps, CancelFitException)
    learn.add_cb(clock)
    with learn.no_bar(), learn.no_logging(): fit(learn)
    return clock

def train_in_run(data, s, arch, clock, *nets):
    "The network that a recipe's run trains by a stage's settings `s` in the epoch of `clock`; `nets` are stage two's student and teacher"
    stage = stage_one if isinstance(s, StageOne) else stage_two
    learn,fit = stage(data, s.but(epochs=1), *nets, valid=EPISODE)
    learn.add_cb(clock)
    with TemporaryDirectory() as folder, Run(folder, {}, plan=['net']) as run:
        run.begin(data)
        return run.train('net', learn, fit, arch)[0]


# ---- what is measured -------------------------------------------------------------------------------------------------

def step_ratio(arch, stage, px, repeats, step):
    "The step of a recipe beside a bare one, and its memory"
    steps_alone(stage, arch, px, step, 5)
    peak = round(torch.cuda.max_memory_allocated()/2**20) if GPU else None # of this new process, so of these steps
    found = beside_bare(stage, arch, px, repeats, step)
    return found | dict(images_per_second=round(1e3*found['images']/found['recipe_ms']), peak_mb=peak)

def synchronisations(arch, stage, px, steps=10):
    "Synchronisations of host and GPU in `steps` steps of a stage"
    data = MadeUp(px, 1280)
    clock = Clock(steps, warn=stage == 'one')
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        net = train_in_run(data, StageOne(arch=arch), arch, clock)
        if stage == 'two': train_in_run(data, TWO, arch, Clock(steps, warn=True), net, net)
    lines = Counter(f'{Path(w.filename).name}:{w.lineno}' for w in caught if 'called a synchronizing' in str(w.message))
    return dict(per_step=lines.total()/steps if GPU else None, where=', '.join(f'{k} {n/steps:g}' for k,n in lines.most_common()))

def compiled(arch, px, compile, step, steps):
    "The step of stage one with a mode of torch.compile, and the time until it is compiled"
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ['TORCHINDUCTOR_CACHE_DIR'] = folder # nothing is compiled yet
        clock = steps_alone('one', arch, px, step, steps, dict(no=False, default=True).get(compile, dict(mode=compile)))
    return dict(step_ms=round(1e3*clock.step, 2), first_step_s=round(clock.first, 2))


class Witness(Callback):
    "Append the digest of the weights after each epoch to `digests`; a `deadline` that is given ends in the middle of the second epoch"
    run_valid = False
    def __init__(self, digests, deadline=None):
        self.digests = digests
        self.deadline = deadline
    def after_batch(self):
        if self.deadline and (self.epoch, self.iter) == (1, self.n_iter//2): self.deadline.end = 0.
    def after_epoch(self): self.digests.append(digest(self.model.state_dict()))

def session(out, data, arch, digests, stop=None):
    "Start or resume a small deterministic run in the folder `out`, and stop it in the stage `stop`"
    with Run(out, dict(deterministic=True), resume=True, plan=['student_cl', 'student_grdd']) as run, suppress(Stopped):
        def train(name, stage, s, *nets):
            witness = Witness(digests, run.deadline if name == stop else None)
            learn,fit = stage(data, s.but(epochs=2), *nets, valid=dict(n_query=5, n_episodes=100), cbs=witness)
            return run.train(name, learn, fit, arch)[0]
        run.begin(data)
        net = train('student_cl', stage_one, ONE.but(arch=arch, bs=16))
        train('student_grdd', stage_two, TWO.but(n_episodes=10), net, net)
    if stop and not (out/f'checkpoint_{stop}.safetensors').exists(): raise RuntimeError(f'{stop} was not stopped')

def both_stages(arch, px, stops=()):
    "The digests of a run that is stopped and resumed once in each of the stages `stops`, and its weights and histories, as bytes by name"
    data,digests = MadeUp(px, 160, 20, 160),[]
    with TemporaryDirectory() as folder:
        out = Path(folder)
        for stop in (*stops, None): session(out, data, arch, digests, stop)
        return digests,{f.name:f.read_bytes() for f in out.iterdir() if f.suffix in ('.safetensors', '.csv')}

def resume(arch, px):
    "Whether a run that is resumed, and a run that is repeated, leaves what an unbroken run leaves"
    unbroken = both_stages(arch, px)
    return dict(same=both_stages(arch, px, ('student_cl', 'student_grdd')) == unbroken, repeats=both_stages(arch, px) == unbroken)


def whole_recipe(teacher, student, images, steps):
    "Seconds of recipes/cifarfs_5w1s.py and of its parts, extrapolated from `steps` steps of each of its trainings"
    data = MadeUp(32, images, n_other=images//4) # of validation, and about as many novel ones
    one,two = PAPER['one'],get_preset('best').but(k_shot=EPISODE['k_shot'], **PAPER['two'])
    plan = dict(teacher=one.but(arch=teacher), student=one.but(arch=student), meta=two)
    if teacher == student: del plan['teacher'] # one network is the student's start and its teacher
    found,nets,validation,saving = {},{},0.,0.
    for name,s in plan.items():
        clock = Clock(steps)
        given = [nets['student'], nets.get('teacher', nets['student'])] if name == 'meta' else []
        nets[name] = train_in_run(data, s, getattr(s, 'arch', student), clock, *given)
        n = s.epochs*clock.steps_per_epoch
        found |= {f'{name}_steps':n, f'{name}_step_ms':round(1e3*clock.step, 2), f'{name}_s':round(n*clock.step, 1)}
        validation += s.epochs*clock.validation
        saving += s.epochs*clock.saving
    begun = wait(DEVICE)
    evaluate(*embed(nets['meta'], plain_dl(data, 'test')), **EPISODE, n_episodes=PAPER['test_episodes'])
    scoring = 3*(wait(DEVICE) - begun) # before training, after stage one and after stage two
    found |= dict(validation_s=round(validation, 1), checkpoints_s=round(saving, 1), scoring_s=round(scoring, 1))
    return found | dict(seconds=round(sum(v for k,v in found.items() if k.endswith('_s'))))

def full_recipe(data, flags):
    "The result of recipes/cifarfs_5w1s.py, whose run in runs/ is named after this commit"
    out = f'runs/gpu-{(git_commit() or "")[:8]}'
    words = [sys.executable, RECIPE, *(['--data', data] if data else []), '--out', out, '--resume', *shlex.split(flags)]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True)
    if done.returncode: raise RuntimeError(f'the recipe ended with code {done.returncode}')
    result = json.loads(done.stdout.splitlines()[-1])
    return {k:result[k] for k in ('teacher', 'student', 'epochs', 'meta_epochs', 'accuracy', 'ci95', 'accuracy_cl', 'gain', 'ci95_gain',
                                  'val_accuracy', 'seconds')}


@call_parse
def main(
    archs:str='convnet4,resnet12', # timm models, separated by commas; the last one is the teacher of the whole recipe
    sides:str='32,84', # sides of the images in pixels, separated by commas; only the step ratio is measured on all of them
    repeats:int=5, # number of times that each step ratio is measured
    step:float=2., # longest time of a bare step in seconds; larger batches are halved
    steps:int=50, # number of timed steps in the measurements without a bare step
    modes:str='no,default,reduce-overhead', # modes of torch.compile, separated by commas
    images:int=38_400, # base images of the whole recipe: those of CIFAR-FS
    full:bool=False, # also run the CIFAR-FS recipe in runs/; an interrupted run of this commit is resumed
    data:str=None, # CIFAR-FS archive for `--full` (default: fetch it)
    flags:str='', # further flags of the recipe for `--full`, such as --flags='--student convnet4'
    only:str='', # names of the lines to measure, separated by commas (default: all)
    out:str=None, # JSON file for the lines with device, versions and commit
):
    "Measure on a GPU"
    if not GPU: print(f'there is no NVIDIA GPU: the numbers are those of the {DEVICE.type.upper()}', file=sys.stderr)
    archs,sides = archs.split(','),[int(px) for px in sides.split(',')]
    px = sides[0]
    failed = []
    def measure(f, *args, **what):
        "Print the line of `f(*values of what, *args)`"
        name = f.__name__.replace('_', ' ')
        if only and name not in only.split(','): return
        found = in_own_process(f, *what.values(), *args)
        if 'error' in found: failed.append(name)
        print_line(name=name, **what, device=DEVICE.type, **found)
    for arch in archs:
        for side in sides:
            for stage in ('one', 'two'): measure(step_ratio, repeats, step, arch=arch, stage=stage, px=side)
    for stage in ('one', 'two'): measure(synchronisations, arch=archs[0], stage=stage, px=px)
    for arch in archs:
        for mode in modes.split(','): measure(compiled, step, steps, arch=arch, px=px, compile=mode)
    for arch in archs: measure(resume, arch=arch, px=px)
    for arch in archs: measure(whole_recipe, images, steps, teacher=archs[-1], student=arch)
    if full: measure(full_recipe, data, flags)
    write(out)
    if failed: sys.exit(f'not measured: {", ".join(failed)}')
