"""Several processes on one training: the steps and the numbers of one process alone."""
import pytest
import torch
from helpers import ROOT, WORDS, launch, steps

from grdd_fastai.core.errors import UserError
from grdd_fastai.data.blocks import category_dls
from grdd_fastai.data.cache import few_shot_data
from grdd_fastai.fewshot.evaluate import evaluate
from grdd_fastai.fewshot.stats import mean_ci95
from grdd_fastai.models.create import create_backbone
from grdd_fastai.stage_one import StageOne, global_learner
from grdd_fastai.training.distributed import effective_step
from grdd_fastai.training.schedules import fit_function

WORKER = f'''
import sys, torch
sys.path[:0] = {[str(ROOT), str(ROOT/'tests')]!r}
from pathlib import Path
from grdd_fastai.core.distributed import LateMax, processes, rank_world, from_rank_zero
from grdd_fastai.core.errors import UserError
from grdd_fastai.data.cache import few_shot_data
from helpers import norm_gradients, steps
folder,cache,out = sys.argv[1:]
with processes():
    rank = rank_world()[0]
    largest = LateMax()
    assert from_rank_zero(lambda: rank) == 0 and largest.result() == 0
    for number,expected in ((rank, 1), (5 - rank, 5)):
        largest.start(number)
        assert largest.result() == expected
    def fail(): raise UserError('rank 0 says no')
    try: from_rank_zero(fail); raise AssertionError
    except UserError as e: assert str(e) == 'rank 0 says no'
    torch.save(steps(few_shot_data(folder, px=16, cache=cache)) | dict(norms=norm_gradients()), Path(out)/f'{{rank}}.pt')
'''

@pytest.fixture(scope='module')
def both(faint, cache, tmp_path_factory):
    "What one process and the two of another came to"
    out = tmp_path_factory.mktemp('two')
    (out/'worker.py').write_text(WORKER)
    done = launch(out/'worker.py', faint, cache, out)
    assert done.returncode == 0, done.stderr
    return steps(few_shot_data(faint, px=16, cache=cache)),torch.load(out/'0.pt'),torch.load(out/'1.pt')


@pytest.mark.parametrize('stage', ['one', 'two', 'layers'])
def test_two_processes_take_the_steps_of_one(both, stage):
    alone,a,b = both
    start = create_backbone('convnet4', 6, 16).state_dict() if stage == 'one' else create_backbone('convnet4', 0, 16, seed=1).state_dict()
    for k,v in alone[stage].items():
        assert torch.equal(a[stage][k], b[stage][k]), k
        if k.removeprefix('backbone.') not in start: # a head
            assert torch.allclose(a[stage][k], v, rtol=1e-3, atol=2e-5), k
            continue
        moved = (v - start[k.removeprefix('backbone.')]).abs().max()
        # rounding differs between the two, and an activation near zero can fall on either side of a ReLU
        assert (a[stage][k] - v).abs().max() <= .05*moved + 1e-6, k
        if k.endswith('0.0.weight'): assert moved > 1e-4, k
    assert stage != 'layers' or any(k.startswith('heads.') for k in alone[stage])

@pytest.mark.parametrize('arch', ['resnet12', 'efficientnet_lite0'])
def test_batch_norm_is_over_all_processes(both, arch):
    (grads,buffers),(grads_alone,buffers_alone) = both[1]['norms'][arch]
    scale = max(g.abs().max() for g in grads_alone.values())
    for k,g in grads_alone.items(): assert torch.allclose(grads[k], g, rtol=1e-7, atol=1e-10*scale), k
    for k,b in buffers_alone.items(): assert torch.allclose(buffers[k].double(), b.double(), rtol=1e-9), k

def test_two_processes_end_with_the_same_network_and_see_the_same_accuracy(both):
    _,a,b = both
    assert all(torch.equal(v, b['norm'][k]) for k,v in a['norm'].items())
    assert torch.equal(a['shown'][[1, -1]], b['shown'][[1, -1]]) # valid_loss and accuracy

def test_embedding_and_episodes_are_shared_and_gathered(both):
    alone,a,b = both
    assert torch.equal(a['h'], b['h']) and torch.equal(a['y'], alone['y']) and torch.allclose(a['h'], alone['h'], atol=1e-4)
    assert torch.equal(a['accuracies'], b['accuracies']) and len(a['accuracies']) == 1100
    assert (a['accuracies'] != torch.from_numpy(evaluate(a['h'], a['y'], **WORDS).episodes)).sum() == 0 # the very episodes of one process

def test_two_processes_reach_the_accuracy_of_one(both):
    "The accuracy of two processes lies within the confidence interval of one process"
    alone,a,_ = both
    assert (abs(a['accuracies'].mean() - alone['accuracies'].mean()) <= mean_ci95(alone['accuracies'])[1]
            and 0 < alone['accuracies'].mean() < 100)

@pytest.mark.parametrize('n, k, factor', [(1, 1, 1), (4, 64, 1), (4, 1, 2), (3, 64, (63/64)**.5)])
def test_the_rate_goes_with_the_root_of_the_step(n, k, factor, monkeypatch):
    monkeypatch.setattr('grdd_fastai.training.distributed.rank_world', lambda: (0, n))
    seen = []
    learn = type('L', (), dict(fit_poly=lambda _, epochs, lr: seen.append(lr)))()
    fit_function(StageOne(lr=.1), k)(learn)
    assert seen == [pytest.approx(.1*factor)] and effective_step(k) % n == 0

def test_processes_that_have_not_joined_are_a_sentence(data, monkeypatch):
    "Each would train alone"
    learn = global_learner(category_dls(data), 'convnet4')
    monkeypatch.setenv('WORLD_SIZE', '2')
    with pytest.raises(UserError, match='with processes'), learn.distrib_ctx(): pass
