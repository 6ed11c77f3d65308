"""A trained network as a folder that timm loads: weights, config, what was measured, and a model card that says it."""
import copy
import os
import queue
import shlex
import tempfile
import threading
from pathlib import Path

from huggingface_hub import HfApi
from safetensors.torch import save
from timm.models._hub import save_config_for_hf

from ..core.errors import UserError, first_line
from ..core.storage import atomic_write, on_cpu, output_folder, read_json, user_path, write_json
from ..fewshot.stats import mean_ci95
from ..models.backbones import WEIGHTS
from ..models.pretrained import load_network
from ..runs.provenance import command, public
from ..settings import absent
from ..stage_one import StageOne
from ..stage_two import StageTwo
from .store import Trained

__all__ = ['load_trained', 'publish']


MINUTES = 10 # that a push may take
CHECK = 2000 # of the scored episodes, the first: what a quick test of the weights measures again
LICENSE = 'apache-2.0'
FILES = ['model.safetensors', 'config.json', 'measured.json', 'README.md']
CARD = '''---
license: {license}
library_name: timm
tags: [timm, image-feature-extraction, few-shot-learning, grdd]
---
# {name}

{arch} ({parameters:,} parameters, {features} features) trained by {supervision} on the {n_classes} base classes of {dataset}, for few-shot
classification of {px} px images: embed support and query images, and give a query the class whose support it has the largest mean
cosine with. The method is GRDD ([arXiv 2107.05583](https://arxiv.org/abs/2107.05583)) as grdd_fastai implements it.

```python
import timm, grdd_fastai                     # importing the package registers its architectures in timm
net = timm.create_model('{load}', pretrained=True, num_classes=0).eval()
data = timm.data.resolve_model_data_config(net)
transform = timm.data.create_transform(**data)   # [0, 1], mean {mean}, std {std}
h = net(transform(image)[None])              # (1, {features})
```

## Accuracy

5-way, 15 queries a class, mean of cosines, no fine-tuning; mean % and 95% confidence interval over {n:,} episodes.

{table}

The validation classes chose settings and epoch; the novel ones were scored at the end. `measured.json` holds these numbers, those of the
first {check:,} episodes, and all settings of the training.

## Training

{training}

## Limits

Trained from scratch on {n_base:,} images of {px} px of everyday objects and animals, and measured on others of the same kind: on images
unlike them (faces, documents, scans, fine-grained species) expect less, and measure it before you rely on it. The episodes have
balanced queries of known classes; the network knows no 'none of these'. The images are {dataset}'s, whose licence is its authors'; these
weights are under {license}.
'''


def load_trained(folder, fingerprint=None):
    """`Trained`, without its classifier, of a finished run's folder, as `NetworkStore` leaves it

    UserError if it is none, or if it was trained on other data than `fingerprint`'s.
    """
    folder = user_path(folder)
    try:
        card,began = (read_json(folder/f, keys=keys)
                      for f,keys in (('net.json', dict(fingerprint=str)), ('settings.json', dict(settings=dict))))
    except UserError as e: raise UserError(f'{folder} holds no finished training ({e}): give the folder of one') from None
    if fingerprint not in (None, card['fingerprint']):
        raise UserError(f'{folder} was trained on other data: give --data what it was trained on')
    trained = Trained(load_network(folder), folder, began['settings'])
    try: measured(trained, {})
    except UserError: raise
    except Exception as e:
        raise UserError(f'{folder}: its files do not say how the network was trained ({type(e).__name__}: {first_line(e)}): '
                        'take them from a copy') from None
    return trained


def measured(trained, scores):
    "What the card says, JSON-able: `scores` of ('val' or 'novel', shot) as `Evaluation`s, and how the network was trained"
    card,began = trained.read('net.json'),trained.read('settings.json')
    def of(e):
        check = mean_ci95(e.episodes[:CHECK])
        return dict(accuracy=round(e.accuracy, 3), ci95=round(e.ci95, 3), n=len(e.episodes), episodes=e.episode_id,
                    first=dict(n=min(CHECK, len(e.episodes)), accuracy=round(check[0], 3), ci95=round(check[1], 3)))
    found = {}
    for (split,shot),e in scores.items(): found.setdefault(split, {})[f'{shot}-shot'] = of(e)
    settings = trained.settings
    def whole(s): # also the settings whose absence in the record means their first value
        stages = {k:whole(v) for k,v in s.items() if isinstance(v, dict)}
        return absent(StageOne if 'arch' in s else StageTwo, s) | s | stages
    return dict(
        scores=found, supervision='CL' if 'student' not in settings else 'CL+GR' if settings['teacher'] else 'CL+EL',
        settings=whole(settings), run=trained.folder.name, sha256=card['sha256'], stats=card['stats'], px=card['px'],
        classes=card['classes'], fingerprint=card['fingerprint'], dataset=trained.read('data.json')['name'],
        trained={k:began.get(k) for k in ('commit','device','torch_threads','versions')} | dict(
            command=began.get('command') and command(shlex.split(began['command'])[1:])))


def publish(
    net, # timm backbone
    about, # of `measured`
    folder, # made, or written over
    name=None, # of the weights, as timm spells it: arch.tag (the folder's name)
    n_base=0, # images it was trained on
    hub=None, # also push to this Hugging Face repository: user/name
):
    """Write `model.safetensors`, timm's `config.json`, `measured.json` and the model card `README.md`

    `timm.create_model('local-dir:<folder>')` loads it, and once pushed `timm.create_model('hf-hub:user/name')`.
    """
    folder = user_path(folder, '--out')
    name = name or folder.name
    net = copy.deepcopy(net).cpu().eval()
    net.reset_classifier(0)
    mean,std = about['stats']
    cfg = dict(license=LICENSE, tag=name.partition('.')[2], input_size=(3, about['px'], about['px']))
    check_own(folder, about)
    with output_folder(folder), tempfile.TemporaryDirectory() as tmp:
        atomic_write(folder/'model.safetensors', save(on_cpu(net.state_dict()), metadata=dict(format='pt')))
        save_config_for_hf(net, Path(tmp)/'config.json', dict(pretrained_cfg=cfg), data_config=dict(mean=mean, std=std, crop_pct=1.))
        atomic_write(folder/'config.json', (Path(tmp)/'config.json').read_bytes())
        write_json(folder/'measured.json', about)
        load = f'hf-hub:{hub}' if hub else name if folder.resolve().parent == WEIGHTS else f'local-dir:{public(str(folder))}'
        atomic_write(folder/'README.md', model_card(net, about, name, load, n_base))
    if hub: push(folder, hub)
    return folder


def check_own(folder, about):
    "UserError if the folder already holds files by the names in `FILES`, unless they belong to the same weights"
    there = [f for f in FILES if os.path.lexists(folder/f)]
    if there and read_json(folder/'measured.json', dict(sha256='')).get('sha256') != about.get('sha256'):
        raise UserError(f'{folder} holds {there[0]} of something else: give --out another folder, or remove it')

def push(folder, hub, minutes=MINUTES):
    """Upload the folder to the Hugging Face repository `hub` (user/name), which is made if it is not there

    UserError if that fails or takes longer than `minutes`.
    """
    done = queue.Queue()
    def upload():
        try:
            HfApi(library_name='grdd_fastai').create_repo(hub, exist_ok=True)
            HfApi(library_name='grdd_fastai').upload_folder(repo_id=hub, folder_path=folder, allow_patterns=FILES,
                                                            commit_message='Weights, config and model card')
            done.put(None)
        except BaseException as e: done.put(first_line(e))
    threading.Thread(target=upload, daemon=True).start() # a daemon thread, so that a hanging upload ends with the process
    try: error = done.get(timeout=60*minutes)
    except queue.Empty: error = f'no answer in {minutes:g} minutes'
    if error is not None: raise UserError(f'{hub} was not pushed ({error}): log in with hf auth login and push {folder} again')

def model_card(net, about, name, load, n_base):
    "The model card's text"
    (mean,std),split = about['stats'],about['scores']
    shots = sorted({shot for of in split.values() for shot in of})
    lines = ['| classes | ' + ' | '.join(shots) + ' |', '|---' * (len(shots) + 1) + '|']
    for k,of in split.items():
        lines.append(f'| {dict(val="validation").get(k, k)} | ' +
                     ' | '.join(f"{of[s]['accuracy']:.2f} ± {of[s]['ci95']:.2f}" if s in of else '' for s in shots) + ' |')
    return CARD.format(
        license=LICENSE, name=name, load=load, arch=net.pretrained_cfg['architecture'], parameters=sum(p.numel() for p in net.parameters()),
        features=net.num_features, supervision=about['supervision'], n_classes=len(about['classes']), dataset=about['dataset'],
        px=about['px'],
        mean=mean, std=std, n=max(s['n'] for of in split.values() for s in of.values()), table='\n'.join(lines), check=CHECK, n_base=n_base,
        training=training(about))

def training(about):
    "How the network was trained, in Markdown"
    s,t = about['settings'],about['trained']
    stages = {'start':s['student'], 'teacher':s['teacher'], 'stage two':s} if 'student' in s else {'network':s}
    lines = [f'- {what}: ' + ', '.join(f'{k} {v}' for k,v in of.items() if k not in ('student','teacher'))
             for what,of in stages.items() if of]
    if t['command']: lines.append(f'- command: `OMP_NUM_THREADS={t["torch_threads"]} {t["command"]}`') # runs of before have none
    return '\n'.join([*lines,
                      f'- data: {about["dataset"]}, fingerprint `{about["fingerprint"][:16]}`; commit `{t["commit"]}`, {t["device"]}, '
                      f'{t["torch_threads"]} threads, torch {t["versions"]["torch"]}, timm {t["versions"]["timm"]}'])
