"""GRDD from raw data to an accuracy: the program behind the recipes, read top to bottom."""
from types import SimpleNamespace

from .core.distributed import processes
from .core.errors import UserError
from .data.blocks import plain_dl
from .data.cache import few_shot_data
from .data.episodes import check_episode
from .fewshot.classifiers import get_classifier, with_base_mean
from .fewshot.embed import embed, feature_bank
from .fewshot.evaluate import evaluate
from .models.create import check_backbone, create_backbone, external_weights
from .runs.checkpoint import Stopped
from .runs.run import Run, default_out
from .stages import STAGE_ONE, check_settings, stage_one, stage_two, stage_two_settings

__all__ = ['PAPER', 'DEMO', 'grdd']


PAPER = dict(teacher='resnet12', student='resnet12', epochs=90, test_episodes=10_000)
DEMO  = dict(teacher='convnet4', student='convnet4', epochs=2, test_episodes=2000, meta_epochs=2, episodes=50)
DEMO_PX = 32
# of a reading, and what they are called here
META = dict(epochs='meta_epochs', schedule='meta_schedule', lr='meta_lr', way='meta_way', query='meta_query', episodes='episodes',
            per_step='per_step', T='T', gamma='gamma', scale='scale', teacher_view='teacher_view', opt='meta_opt')


@processes()
def grdd(
    way:int=5, # C, classes an episode
    shot:int=1, # K, support images a class
    px:int=32, # side of the images
    name:str='grdd', # the recipe's name, which names the folder if no --out is given
    data:str=None, # raw data set in any layout of data/README.md (none: fetch CIFAR-FS)
    out:str=None, # folder for results, histories and weights (runs/ and the recipe's name; demo: with -demo after it)
    cache:str=None, # folder for decoded images (none: ~/.cache/grdd_fastai)
    allow_large:bool=False, # also decode photos of 90 to 179 megapixels
    teacher:str=None, # global learner phi, a timm model (resnet12; demo: convnet4)
    student:str=None, # meta-learner psi, a timm model (resnet12; demo: convnet4)
    # start both from timm's default weights for their names; a name with a tag, as resnet18.a1_in1k, has its weights anyway
    pretrained:bool=False,
    epochs:int=None, # of stage one (90; demo: 2)
    schedule:str='poly', # of stage one: poly, step or one_cycle
    lr:float=0.05, # initial or highest rate of stage one
    bs:int=None, # images per batch of stage one, before rotation (64; 1% of fewer than 6400 base images, at least 16)
    classifier:str='linear', # of stage one, FC3: linear or cosine
    smoothing:float=0., # of stage one's category labels
    jitter:bool=True, # leave out both stages' colour jitter
    augment:str='batch', # both stages' images: a batch at once, or one by one by albumentations
    opt:str='sgd', # of stage one: sgd or muon
    meta_opt:str=None, # of stage two: sgd or muon (the reading's)
    reading:str='best', # of stage two, best, muon or paper: what is not given below, see docs/readings.md
    meta_epochs:int=None, # of stage two (the reading's; demo: 2)
    meta_schedule:str=None, # of stage two: poly, step or one_cycle (the reading's)
    meta_lr:float=None, # initial or highest rate of stage two (the reading's)
    meta_way:int=None, # classes an episode of stage two (the reading's, or all there are)
    meta_query:int=None, # query images per class and episode of stage two (the reading's, or all there are)
    episodes:int=None, # per epoch of stage two (the reading's; demo: 50)
    per_step:int=None, # episodes per optimiser step (the reading's)
    T:float=None, # temperature; divides the cosines (the reading's)
    gamma:float=None, # weight of L_rt (the reading's)
    scale:float=None, # logit scale of L_rt (the reading's)
    teacher_view:str=None, # the teacher sees the same augmented images as the student, or clean ones, embedded once (the reading's)
    query:int=15, # query images per class and episode of the novel classes
    test_episodes:int=None, # of the novel classes (10000; demo: 2000)
    classifiers:str='cosine', # that score the novel classes, separated by commas; the first's are `accuracy` and `gain`
    seed:int=0, # of weights, batches, episodes, augmentation and of a random split
    rotation:bool=True, # leave out stage one's rotation task
    independent_teacher:bool=False, # train the teacher apart where it has the student's architecture
    fp32:bool=False, # float32 instead of bfloat16 or float16
    channels_last:bool=True, # leave out the channels_last memory format
    compile:bool=False, # networks by torch.compile: slower on a CPU
    deterministic:bool=False, # deterministic CUDA kernels, to repeat and resume a run to the bit; a CPU does so anyway
    demo:bool=False, # small settings, and the embedded data set unless --data is given
    resume:bool=False, # go on with the run in --out; begin it where there is none
    overwrite:bool=False, # delete the run that --out holds, its weights and its result, and begin anew
    max_minutes:float=None, # stop after this long with everything saved, for --resume
):
    "Train the global learner and the meta-learner and score the novel classes"
    if demo: px = DEMO_PX
    if out is None: out = default_out(name, demo)
    defaults,given = (DEMO if demo else PAPER,
                      {k:v for k,v in locals().items() if k not in ('name','out','cache','resume','overwrite','max_minutes','allow_large')})
    settings = given | {k:given[k] if given[k] is not None else v for k,v in defaults.items()}
    two = stage_two_settings(reading, shot=shot, **{k:settings[name] for k,name in META.items()}, jitter=jitter, augment=augment, seed=seed)
    settings |= {name:two[k] for k,name in META.items()}
    s = SimpleNamespace(**settings)
    check_settings(settings | dict(max_minutes=max_minutes))
    if not isinstance(classifiers, str): raise UserError(f'--classifiers is {classifiers!r}: give names separated by commas')
    for name in classifiers.split(','): get_classifier(name)
    for arch in {s.teacher, s.student}: check_backbone(arch, px, pretrained)
    share = s.teacher == s.student and not independent_teacher
    plan = ['student_cl'] + ([] if share else ['teacher']) + ['student_grdd', 'evaluation']
    with Run(out, settings, resume, max_minutes, plan, overwrite=overwrite) as run:
        if run.result: return run.print(run.result)
        try: return _stages(run, s, two, share, cache, allow_large)
        except Stopped as stop: return run.stopped(stop)


def _stages(run, s, two, share, cache, allow_large):
    "Data, stage one, stage two and the novel classes, for settings `s`"
    if s.demo or s.data == 'demo':
        run.say('*** DEMO: small settings' + (' on drawn characters' if s.data is None else '') + '; not a result about GRDD ***')
    data = few_shot_data('demo' if s.demo and s.data is None else s.data, s.px, cache, s.seed, allow_large)
    for split in (data.train, data.val, data.test): check_episode(split, s.way, s.shot, s.query)
    run.begin(data)
    common = dict(amp=not s.fp32, channels_last=s.channels_last, compile=s.compile, valid=dict(n_way=s.way, k_shot=s.shot, n_query=s.query))
    card = dict(classes=data.train.vocab, px=s.px, stats=data.stats, fingerprint=data.fingerprint,
                settings={k:v for k,v in run.settings.items() if k != 'data'})

    # stage one: global category knowledge, Eq. 2-9
    def train(name, arch, seed):
        run.say(f'stage one: {name}, {arch}')
        one = STAGE_ONE | dict(arch=arch, pretrained=s.pretrained, epochs=s.epochs, schedule=s.schedule, lr=s.lr, rotation=s.rotation,
                               classifier=s.classifier, smoothing=s.smoothing,
                           jitter=s.jitter, augment=s.augment, opt=s.opt, bs=s.bs, seed=seed)
        return run.stage(name, *stage_one(data, one, **common), arch=arch, **card)
    student_cl,val_cl = train('student_cl', s.student, s.seed)
    teacher = student_cl if share else train('teacher', s.teacher, s.seed + (s.teacher == s.student))[0]

    # stage two: relatedness decoupled-distillation, Eq. 10-15
    run.say(f'stage two: {s.student} from {s.teacher}')
    bank = feature_bank(teacher, data, 'train', stats=data.stats, cache=cache)[0] if two['teacher_view'] == 'clean' else None
    student,val = run.stage('student_grdd', *stage_two(data, two, student_cl, teacher, bank, **common), arch=s.student, **card)

    # the novel classes, the same episodes for all three and for every seed
    novel,scores,names = plain_dl(data, 'test'),{},s.classifiers.split(',')
    weights = {k:external_weights(arch, s.pretrained) for k,arch in dict(teacher=s.teacher, student=s.student).items()}
    at_first = 'pretrained' if weights['student'] else 'untrained'
    start = create_backbone(s.student, len(data.train.vocab), s.px, s.seed, s.pretrained).to(novel.device)
    for name,net in {at_first:start, 'cl':student_cl, 'grdd':student}.items():
        scores[name] = evaluate(*embed(net, novel, shared=True), s.way, s.shot, s.query, s.test_episodes, shared=True,
                                classifier=with_base_mean(names, lambda net=net: embed(net, plain_dl(data, 'train'), shared=True)[0]))
        for k,e in scores[name].items():
            run.log_novel(what=name, classifier=k, accuracy=e.accuracy, ci95=e.ci95, test_episodes=s.test_episodes)
            run.say(f'{name:>10}, {k}: {e}')
    others = {k:dict(accuracy=round(e.accuracy, 3), ci95=round(e.ci95, 3), accuracy_cl=round(scores['cl'][k].accuracy, 3))
              for k,e in scores['grdd'].items() if k != names[0]}
    scores = {name:of[names[0]] for name,of in scores.items()}
    gain = scores['grdd'] - scores['cl']
    return run.finish(
        dataset=data.name, way=s.way, shot=s.shot, query=s.query, teacher=s.teacher, student=s.student, epochs=s.epochs,
        meta_epochs=s.meta_epochs, episodes=s.episodes, test_episodes=s.test_episodes,
        accuracy=round(scores['grdd'].accuracy, 3), ci95=round(scores['grdd'].ci95, 3),
        accuracy_cl=round(scores['cl'].accuracy, 3), ci95_cl=round(scores['cl'].ci95, 3),
        gain=round(gain.mean, 3), ci95_gain=round(gain.ci95, 3), **{f'accuracy_{at_first}':round(scores[at_first].accuracy, 3)},
        initial_weights={k:v or 'random' for k,v in weights.items()}, classifier=names[0], others=others,
        val_accuracy=round(val, 3), val_accuracy_cl=round(val_cl, 3), seed=s.seed, demo=s.demo)
