"""Several processes on one training: the steps and the numbers of one process alone, and rank 0's files."""
import copy
import json
import os
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from grdd_fastai.core.distributed import check_launch, ranks
from grdd_fastai.core.errors import UserError
from grdd_fastai.data.blocks import category_dls, episodic_dls, plain_dl
from grdd_fastai.fewshot.embed import embed
from grdd_fastai.fewshot.evaluate import evaluate
from grdd_fastai.fewshot.stats import mean_ci95
from grdd_fastai.models.backbones import ResNet12
from grdd_fastai.models.create import create_backbone
from grdd_fastai.stage_one import global_learner
from grdd_fastai.stage_two import meta_learner
from grdd_fastai.stages import STAGE_ONE, fitting
from grdd_fastai.training.distributed import effective, shared_batch_norm

WORDS = dict(n_way=3, n_query=5, n_episodes=1100)


# ---- who gets what ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('n', [2, 3])
def test_the_shares_of_a_step_are_its_batch(data, n):
    alone,shares = category_dls(data, bs=24).train,[category_dls(data, bs=24).train.shared(r, n) for r in range(n)]
    for dl in (alone, *shares): dl.randomize()
    steps = np.array(alone.get_idxs())[:120].reshape(5, 24)
    mine = [np.array(dl.get_idxs()).reshape(5, 24//n) for dl in shares]
    assert all(len(dl) == len(alone) == 5 for dl in shares) and (np.concatenate(mine, 1) == steps).all()

def test_an_episode_is_never_split(data):
    dls = [episodic_dls(data, 3, 1, 4, n_episodes=7, per_step=4).train for _ in range(3)]
    alone,a,b = dls[0],dls[1].shared(0, 2),dls[2].shared(1, 2)
    whole = np.array(alone.get_idxs()).reshape(7, 15)
    assert len(a) == len(b) == 1 and [dl.bs for dl in (alone, a, b)] == [60, 30, 30]
    assert (np.array(a.get_idxs()).reshape(2, 15) == whole[[0, 1]]).all() and (np.array(b.get_idxs()).reshape(2, 15) == whole[[2, 3]]).all()
    one = episodic_dls(data, 3, 1, 4, n_episodes=7).train
    assert [len(one.shared(r, 3)) for r in range(3)] == [2, 2, 2] # seven episodes, one in each process: the last is left out

def test_all_images_are_embedded_once_in_any_number_of_processes(data):
    dl = plain_dl(data, 'val', bs=32)
    parts = [[i for i in dl.new(share=(r, 3)).get_idxs()] for r in range(3)]
    assert (sorted(sum(parts, [])) == list(range(120)) and parts[1][:2] == [32, 33]
            and [len(dl.new(share=(r, 3))) for r in range(3)] == [2, 1, 1])

@pytest.mark.parametrize('n, k, factor', [(1, 1, 1), (4, 64, 1), (4, 1, 2), (3, 64, (63/64)**.5)])
def test_the_rate_goes_with_the_root_of_the_step(n, k, factor, monkeypatch):
    monkeypatch.setattr('grdd_fastai.training.distributed.ranks', lambda: (0, n))
    seen = []
    learn = type('L', (), dict(fit_poly=lambda _, epochs, lr: seen.append(lr)))()
    fitting(STAGE_ONE | dict(lr=.1), k)(learn)
    assert seen == [pytest.approx(.1*factor)] and effective(k) % n == 0


# ---- two processes (gloo) ---------------------------------------------------------------------------------------------

def steps(data):
    "Weights after both stages and a few steps, an embedded split and its accuracy, in as many processes as there are"
    valid = dict(n_way=3, k_shot=1, n_query=5, n_episodes=20)
    several = ranks()[1] > 1
    one = global_learner(category_dls(data, bs=40), create_backbone('convnet4', 6, 16), valid=valid, amp=False, keep_best=False)
    two = meta_learner(episodic_dls(data, 3, 1, 4, n_episodes=6, per_step=2), create_backbone('convnet4', 0, 16, seed=1),
                       create_backbone('convnet4', 0, 16, seed=2), valid=valid, amp=False, keep_best=False)
    for learn in (one, two):
        with learn.distrib_ctx(), learn.no_bar(), learn.no_logging(): learn.fit(2, .005) # with larger ones float32's rounding grows
        assert ranks()[1] == 1 or not hasattr(learn, 'distributed')
    h,y = embed(two.model, plain_dl(data, 'test', bs=32), shared=several)
    # BatchNorm over a process's own images
    apart = global_learner(category_dls(data, bs=40), create_backbone('convnet4', 6, 16), valid=valid, amp=False)
    with apart.distrib_ctx(sync_bn=False), apart.no_bar(), apart.no_logging(): apart.fit(1, .05)
    assert all('forward' not in vars(m) for learn in (one, two, apart) for m in learn.model.modules())
    return dict(one=one.model.state_dict(), two=two.model.state_dict(), h=h, y=y, norm=apart.model.state_dict(),
                lr=torch.tensor(one.opt.hypers[-1]['lr']), accuracies=torch.from_numpy(evaluate(h, y, **WORDS, shared=several).episodes),
                shown=torch.tensor(list(one.recorder.values[-1])[:4]))

def norm_gradients():
    "A network's gradients and running statistics in float64, from 48 images in as many processes as there are, and by torch alone"
    rank,n = ranks()
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

WORKER = f'''
import sys, torch
sys.path[:0] = {[str(ROOT), str(ROOT/'tests')]!r}
from pathlib import Path
from grdd_fastai.core.distributed import agreed, processes, ranks, shared
from grdd_fastai.core.errors import UserError
from grdd_fastai.data.cache import few_shot_data
from test_distributed import norm_gradients, steps
folder,cache,out = sys.argv[1:]
with processes():
    rank = ranks()[0]
    assert shared(lambda: rank) == 0 and agreed(rank) == 1 and agreed(-rank, key=abs) == -1
    def fail(): raise UserError('rank 0 says no')
    try: shared(fail); raise AssertionError
    except UserError as e: assert str(e) == 'rank 0 says no'
    torch.save(steps(few_shot_data(folder, px=16, cache=cache)) | dict(norms=norm_gradients()), Path(out)/f'{{rank}}.pt')
'''

def launch(*command, n=2):
    "What `accelerate launch` of `n` processes on the CPU prints"
    env = os.environ | dict(OMP_NUM_THREADS='1', PYTHONWARNINGS='ignore')
    done = subprocess.run([sys.executable, '-m', 'accelerate.commands.accelerate_cli', 'launch', '--multi_gpu', '--num_machines', '1',
                           '--mixed_precision', 'no', '--dynamo_backend', 'no',
                           '--num_processes', str(n), '--main_process_port', '0', *map(str, command)],
                          capture_output=True, text=True, env=env, timeout=600)
    return done

@pytest.fixture(scope='module')
def both(faint, cache, tmp_path_factory):
    "What one process and the two of another came to"
    from grdd_fastai.data.cache import few_shot_data
    out = tmp_path_factory.mktemp('two')
    (out/'worker.py').write_text(WORKER)
    done = launch(out/'worker.py', faint, cache, out)
    assert done.returncode == 0, done.stderr
    return steps(few_shot_data(faint, px=16, cache=cache)),torch.load(out/'0.pt'),torch.load(out/'1.pt')

@pytest.mark.parametrize('stage', ['one', 'two'])
def test_two_processes_take_the_steps_of_one(both, stage):
    alone,a,b = both
    start = create_backbone('convnet4', 6, 16).state_dict() if stage == 'one' else create_backbone('convnet4', 0, 16, seed=1).state_dict()
    for k,v in alone[stage].items():
        assert torch.equal(a[stage][k], b[stage][k]) and torch.allclose(a[stage][k], v, rtol=1e-3, atol=2e-5), k
        if k.endswith('0.0.weight'): assert (v - start[k.removeprefix('backbone.')]).abs().max() > 1e-3 # far more than that

@pytest.mark.parametrize('arch', ['resnet12', 'efficientnet_lite0'])
def test_batch_norm_is_over_all_processes(both, arch):
    (grads,buffers),(grads_alone,buffers_alone) = both[1]['norms'][arch]
    scale = max(g.abs().max() for g in grads_alone.values())
    for k,g in grads_alone.items(): assert torch.allclose(grads[k], g, rtol=1e-7, atol=1e-10*scale), k
    for k,b in buffers_alone.items(): assert torch.allclose(buffers[k].double(), b.double(), rtol=1e-9), k

@pytest.mark.parametrize('env, says', [
    (dict(ACCELERATE_USE_CPU='True', MASTER_ADDR='127.0.0.1'), 'accelerate launch --cpu started one process'),
    (dict(OMPI_COMM_WORLD_SIZE='2'), 'mpirun started'),
    (dict(ACCELERATE_USE_CPU='True'), None), (dict(ACCELERATE_USE_CPU='True', MASTER_ADDR='127.0.0.1', WORLD_SIZE='2'), None)])
def test_a_launcher_that_does_not_start_what_it_says(env, says):
    if says is None: return check_launch(env)
    with pytest.raises(UserError, match=says): check_launch(env)

@pytest.mark.slow
def test_accelerate_launch_on_the_cpu_says_how(tmp_path):
    done = subprocess.run([sys.executable, '-m', 'accelerate.commands.accelerate_cli', 'launch', '--cpu', '--num_processes', '2',
                           '--num_machines', '1', '--mixed_precision', 'no',
                           '--dynamo_backend', 'no', str(RECIPE), '--demo', '--out', str(tmp_path/'run')],
                          capture_output=True, text=True, timeout=300)
    assert done.returncode != 0 and '--multi_gpu --num_processes 2' in done.stderr and not (tmp_path/'run').exists()

def test_two_processes_end_with_the_same_network_and_see_the_same_accuracy(both):
    _,a,b = both
    assert all(torch.equal(v, b['norm'][k]) for k,v in a['norm'].items()) and torch.equal(a['shown'][-1], b['shown'][-1])

def test_embedding_and_episodes_are_shared_and_gathered(both):
    alone,a,b = both
    assert torch.equal(a['h'], b['h']) and torch.equal(a['y'], alone['y']) and torch.allclose(a['h'], alone['h'], atol=1e-4)
    assert torch.equal(a['accuracies'], b['accuracies']) and len(a['accuracies']) == 1100
    assert (a['accuracies'] != torch.from_numpy(evaluate(a['h'], a['y'], **WORDS).episodes)).sum() == 0 # the very episodes of one process


def test_two_processes_reach_the_accuracy_of_one(both):
    "Trained and scored in two, within the interval of one"
    alone,a,_ = both
    assert (abs(a['accuracies'].mean() - alone['accuracies'].mean()) <= mean_ci95(alone['accuracies'])[1]
            and 0 < alone['accuracies'].mean() < 100)


# ---- a recipe ---------------------------------------------------------------------------------------------------------

RECIPE = ROOT/'recipes'/'cifarfs_5w1s.py'

def recipe(folder, cache, out, **kwargs):
    s = dict(data=folder, cache=cache, out=out, teacher='convnet4', student='convnet4', epochs=3, meta_epochs=2, episodes=40, query=5,
             test_episodes=600, **kwargs)
    return [RECIPE,
            *(str(o) for k,v in s.items() for o in ([f'--{k.replace("_", "-")}'] if v is True else [f'--{k.replace("_", "-")}', v]))]

def result(done):
    assert done.returncode == 0, done.stderr[-3000:]
    line, = done.stdout.strip().splitlines()[-1:]
    return json.loads(line)

@pytest.mark.slow
def test_a_recipe_in_two_processes_stops_resumes_and_writes_once(faint, cache, tmp_path):
    "Stopped at once and resumed, with the weights of a run undisturbed; rank 0's folder is the only one left"
    temporary = tmp_path/'tmp'
    temporary.mkdir()
    os.environ['TMPDIR'],was = str(temporary),os.environ.get('TMPDIR')
    try:
        straight = result(launch(*recipe(faint, cache, tmp_path/'a')))
        first = result(launch(*recipe(faint, cache, tmp_path/'b', max_minutes=.0001)))
        assert first['status'] == 'stopped'
        second = result(launch(*recipe(faint, cache, tmp_path/'b', resume=True)))
    finally:
        if was is None: del os.environ['TMPDIR']
        else: os.environ['TMPDIR'] = was
    assert second['accuracy'] == straight['accuracy'] and not list(temporary.glob('grdd_fastai_*'))
    for name in ('student_cl.safetensors', 'student_grdd.safetensors'):
        assert (tmp_path/'a'/name).read_bytes() == (tmp_path/'b'/name).read_bytes()
    assert {f.name for f in (tmp_path/'a').iterdir()} == {f.name for f in (tmp_path/'b').iterdir()}
    assert len((tmp_path/'a'/'novel_scorings.jsonl').read_text().splitlines()) == 3

@pytest.mark.slow
def test_a_user_error_in_two_processes_is_one_sentence(tmp_path):
    done = launch(RECIPE, '--data', tmp_path/'nothing', '--out', tmp_path/'out')
    assert done.returncode != 0 and 'no such file or folder' in done.stderr

def test_processes_that_have_not_joined_are_a_sentence(data, monkeypatch):
    "Each would train alone"
    learn = global_learner(category_dls(data), 'convnet4')
    monkeypatch.setenv('WORLD_SIZE', '2')
    with pytest.raises(UserError, match='with processes'), learn.distrib_ctx(): pass

def test_without_accelerate_there_is_a_sentence(monkeypatch):
    from grdd_fastai.core.distributed import processes
    monkeypatch.setenv('WORLD_SIZE', '2')
    monkeypatch.setitem(sys.modules, 'accelerate', None)
    with pytest.raises(UserError, match='grdd-fastai.distributed'), processes(): pass
