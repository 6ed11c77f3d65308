"""Publish a trained network as a folder that timm loads: weights, config, measured accuracies and a model card."""
import os
import queue
import shlex
import threading

from huggingface_hub import HfApi

from ..core.errors import UserError, first_line
from ..core.storage import atomic_write, output_folder, read_json, user_path, write_json
from ..fewshot.stats import mean_ci95
from ..models.backbone import WEIGHTS
from ..models.pretrained import load_network, save_network
from ..runs.provenance import command, public_word
from ..settings import absent
from ..stage_one import StageOne
from ..stage_two import StageTwo
from .report.markdown import accuracy_text, markdown_table
from .store import Trained, supervision

__all__ = ['load_trained', 'publish']


MINUTES = 10 # longest time of a push
CHECK = 2000 # number of the first scored episodes, whose accuracy a quick test of the weights measures again
LICENSE = 'apache-2.0'
FILES = ['model.safetensors', 'config.json', 'measured.json', 'README.md']
CARD = '''---
license: {license}
library_name: timm
tags: [timm, image-feature-extraction, few-shot-learning, grdd]
---
# {name}

{arch} ({parameters:,} parameters, {features} features) was trained by {supervision} on the {n_classes} base classes of {dataset}. It is for
few-shot classification of {px} px images: embed the support and the query images, and give each query the class whose support images have
the largest mean cosine with it. The method is GRDD ([arXiv 2107.05583](https://arxiv.org/abs/2107.05583)) as grdd_fastai implements it.

```python
import timm, grdd_fastai                     # importing the package registers its architectures in timm
net = timm.create_model('{load}', pretrained=True, num_classes=0).eval()
data = timm.data.resolve_model_data_config(net)
transform = timm.data.create_transform(**data)   # [0, 1], mean {mean}, std {std}
h = net(transform(image)[None])              # (1, {features})
```

## Accuracy

The episodes are 5-way with 15 queries per class. The classifier is the mean cosine, without fine-tuning. The table shows the mean accuracy
in percent and its 95% confidence interval over {n:,} episodes.

{table}

The settings and the epoch were chosen on the validation classes; the novel classes were scored at the end. `measured.json` holds these
numbers, those of the first {check:,} episodes, and all settings of the training.

## Training

{training}

## Limits

The network was trained from scratch on {n_base:,} images of {px} px of everyday objects and animals, and measured on images of the same
kind. On other images (faces, documents, scans, fine-grained species) expect a lower accuracy, and measure it before you rely on it. The
episodes have balanced queries of known classes; the network has no answer 'none of these'. The images are those of {dataset}, under the
licence of its authors; these weights are under {license}.
'''


def load_trained(folder, fingerprint=None):
    """The `Trained` network, without its classifier, in the folder of a finished run of `NetworkStore`

    UserError if the folder holds no such run, or if the network was trained on data with another fingerprint than `fingerprint`.
    """
    folder = user_path(folder)
    try:
        card = read_json(folder/'net.json', keys=dict(fingerprint=str))
        began = read_json(folder/'settings.json', keys=dict(settings=dict))
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
    """What the card says as a dict for JSON: the accuracies, and how the network was trained

    `scores` are the `Evaluation`s by classes, 'val' or 'novel', and shot.
    """
    card,began = trained.read('net.json'),trained.read('settings.json')
    def summary(e):
        accuracy,ci95 = mean_ci95(e.episodes[:CHECK])
        return dict(accuracy=round(e.accuracy, 3), ci95=round(e.ci95, 3), n=len(e.episodes), episodes=e.episode_id,
                    first=dict(n=min(CHECK, len(e.episodes)), accuracy=round(accuracy, 3), ci95=round(ci95, 3)))
    found = {}
    for (split,shot),e in scores.items(): found.setdefault(split, {})[f'{shot}-shot'] = summary(e)
    settings = trained.settings
    def whole(s): # with the settings that the record leaves out because their absence means a value
        if s.keys() == {'arch'}: return s # a network of random weights
        stages = {k:whole(v) for k,v in s.items() if isinstance(v, dict)}
        return absent(StageOne if 'arch' in s else StageTwo, s) | s | stages
    made = {k:began.get(k) for k in ('commit','device','torch_threads','versions')}
    made['command'] = began.get('command') and command(shlex.split(began['command'])[1:])
    return dict(
        scores=found, supervision=supervision(settings), settings=whole(settings), run=trained.folder.name, sha256=card['sha256'],
        stats=card['stats'], px=card['px'], crop=card.get('crop', {}), classes=card['classes'], fingerprint=card['fingerprint'],
        dataset=trained.read('data.json')['name'], trained=made)


def publish(
    net, # timm backbone
    about, # dict that `measured` returns
    folder, # folder to make; files of the same weights are written over
    name=None, # name of the weights in timm's form arch.tag (the folder's name)
    n_base=0, # number of images that the network was trained on
    hub=None, # also push to this Hugging Face repository: user/name
):
    """Write `model.safetensors`, timm's `config.json`, `measured.json` and the model card `README.md`; return the folder

    `timm.create_model('local-dir:<folder>')` loads the network, and after a push `timm.create_model('hf-hub:user/name')` does so too.
    UserError if the folder holds other weights or cannot be written, or if the push fails.
    """
    folder = user_path(folder, '--out')
    name = name or folder.name
    check_own(folder, about)
    with output_folder(folder):
        save_network(net, folder, about['px'], *about['stats'], **about.get('crop', {}), license=LICENSE, tag=name.partition('.')[2])
        write_json(folder/'measured.json', about)
        shipped = folder.resolve().parent == WEIGHTS
        load = f'hf-hub:{hub}' if hub else name if shipped else f'local-dir:{public_word(str(folder))}'
        atomic_write(folder/'README.md', model_card(net, about, name, load, n_base))
    if hub: push(folder, hub)
    return folder


def check_own(folder, about):
    "Raise UserError if the folder holds files with the names in `FILES` that do not belong to the same weights"
    there = [f for f in FILES if os.path.lexists(folder/f)]
    if there and read_json(folder/'measured.json', dict(sha256='')).get('sha256') != about.get('sha256'):
        raise UserError(f'{folder} holds {there[0]} of something else: give --out another folder, or remove it')

def push(folder, hub, minutes=MINUTES):
    """Upload the folder to the Hugging Face repository `hub` (user/name), which is made if it does not exist

    UserError if the upload fails or takes longer than `minutes`.
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
    "Text of the model card"
    mean,std = about['stats']
    scores = about['scores']
    shots = sorted({shot for by_shot in scores.values() for shot in by_shot})
    rows = [[dict(val='validation').get(split, split), *(accuracy_text(by_shot[k]) if k in by_shot else '' for k in shots)]
            for split,by_shot in scores.items()]
    return CARD.format(
        license=LICENSE, name=name, load=load, arch=net.pretrained_cfg['architecture'], parameters=sum(p.numel() for p in net.parameters()),
        features=net.num_features, supervision=about['supervision'], n_classes=len(about['classes']), dataset=about['dataset'],
        px=about['px'], mean=mean, std=std, n=max(e['n'] for by_shot in scores.values() for e in by_shot.values()),
        table=markdown_table(['classes', *shots], rows), check=CHECK, n_base=n_base, training=training(about))

def stages_of(settings, of=None):
    "A dict from each stage of the training to its recorded settings; the teacher's stages come before the student's stage two"
    if 'student' not in settings: return {of or 'network':settings}
    prefix = f"{of}'s " if of else ''
    teacher = stages_of(settings['teacher'], f'{prefix}teacher') if settings['teacher'] else {}
    return {f'{prefix}start':settings['student']} | teacher | {f'{prefix}stage two':settings}

def training(about):
    "Markdown list that says how the network was trained"
    made = about['trained']
    lines = []
    for stage,used in stages_of(about['settings']).items():
        words = ', '.join(f'{k} {v}' for k,v in used.items() if k not in ('student','teacher'))
        lines.append(f'- {stage}: {words}')
    if made['command']: lines.append(f'- command: `OMP_NUM_THREADS={made["torch_threads"]} {made["command"]}`') # older runs have none
    lines.append(f'- data: {about["dataset"]}, fingerprint `{about["fingerprint"][:16]}`; commit `{made["commit"]}`, {made["device"]}, '
                 f'{made["torch_threads"]} threads, torch {made["versions"]["torch"]}, timm {made["versions"]["timm"]}')
    return '\n'.join(lines)
