"""GRDD from raw data to an accuracy: the program behind the recipes, read top to bottom."""
from .data import category_dls, check_episode, episodic_dls, plain_dl
from .errors import UserError
from .evaluate import embed, evaluate
from .learners import check_backbone, create_backbone, global_learner, meta_learner
from .pack import few_shot_data
from .run import Run, save_weights

__all__ = ['grdd', 'PAPER', 'DEMO']

PAPER = dict(teacher='resnet12', student='resnet12', epochs=90, meta_epochs=15, episodes=400, test_episodes=10_000)
DEMO  = dict(teacher='convnet4', student='convnet4', epochs=6, meta_epochs=2, episodes=100, test_episodes=2000)
DEMO_PX = 32


def grdd(
    way:int=5, # C, classes an episode
    shot:int=1, # K, support images a class
    px:int=32, # side of the images
    data:str=None, # raw data set in any layout of data/README.md (none: fetch CIFAR-FS)
    out:str='runs/grdd', # folder for results, histories and weights
    cache:str=None, # folder for decoded images (none: ~/.cache/grdd_fastai)
    teacher:str=None, # global learner phi, a timm model (resnet12; demo: convnet4)
    student:str=None, # meta-learner psi, a timm model (resnet12; demo: convnet4)
    epochs:int=None, # of stage one (90; demo: 6)
    meta_epochs:int=None, # of stage two (15; demo: 2)
    episodes:int=None, # per epoch of stage two (400; demo: 100)
    test_episodes:int=None, # of the novel classes (10000; demo: 2000)
    query:int=15, # query images per class and episode
    per_step:int=1, # episodes per optimiser step
    bs:int=None, # images per batch of stage one, before rotation (64; 1% of fewer than 6400 base images, at least 16)
    lr:float=0.05, # initial rate of stage one, 'poly'
    meta_lr:float=1e-3, # rate of stage two, x0.1 for its last third
    T:float=4., # temperature; divides the cosines
    gamma:float=0.2, # weight of L_rt
    scale:float=10., # logit scale of L_rt
    seed:int=0, # of weights, batches, episodes, augmentation and of a random split
    rotation:bool=True, # leave out stage one's rotation task
    independent_teacher:bool=False, # train the teacher apart where it has the student's architecture
    fp32:bool=False, # float32 instead of bfloat16
    demo:bool=False, # small settings, and the embedded data set unless --data is given
):
    "Train the global learner and the meta-learner and score the novel classes"
    if demo: px = DEMO_PX
    defaults,given = DEMO if demo else PAPER,locals()
    s = {k:given[k] if given[k] is not None else v for k,v in defaults.items()}
    settings = {k:v for k,v in given.items() if k != 'defaults'} | s
    for arch in (s['teacher'], s['student']): check_backbone(arch)
    for k in ('epochs','meta_epochs','episodes','test_episodes','query','per_step','bs'):
        if settings[k] is not None and settings[k] < 1: raise UserError(f'--{k.replace("_", "-")} is {settings[k]}: it must be at least 1')
    with Run(out, settings) as run:
        if demo: run.say('*** DEMO: small settings' + (' on drawn characters' if data is None else '') + '; not a result about GRDD ***')
        data = few_shot_data('demo' if demo and data is None else data, px, cache, seed)
        run.say(f'{data}')
        for split in (data.train, data.val, data.test): check_episode(split, way, shot, query)
        run.write('data.json', dict(name=data.name, px=px, fingerprint=data.fingerprint, stats=data.stats))
        valid = dict(n_way=way, k_shot=shot, n_query=query)

        # stage one: global category knowledge, Eq. 2-9
        def stage_one(arch, name, seed):
            learn = global_learner(category_dls(data, bs=bs, seed=seed), arch, rotation=rotation, seed=seed, amp=not fp32, valid=valid)
            run.say(f'stage one: {name}, {arch}')
            run.fit(learn, name, lambda learn: learn.fit_poly(s['epochs'], lr))
            save_weights(learn.model.backbone, run.out/name, arch=arch, classes=data.train.vocab, px=px, stats=data.stats,
                         fingerprint=data.fingerprint)
            return learn.model.backbone,learn.keep_best.best
        student_cl,val_cl = stage_one(s['student'], 'student_cl', seed)
        share = s['teacher'] == s['student'] and not independent_teacher
        teacher_net = student_cl if share else stage_one(s['teacher'], 'teacher', seed + (s['teacher'] == s['student']))[0]

        # stage two: relatedness decoupled-distillation, Eq. 10-15
        dls = episodic_dls(data, way, shot, query, s['episodes'], per_step, seed=seed)
        learn = meta_learner(dls, student_cl, teacher_net, T, gamma, scale, seed=seed, amp=not fp32, valid=valid)
        run.say(f'stage two: {s["student"]} from {s["teacher"]}')
        run.fit(learn, 'student_grdd', lambda learn: learn.fit_step(s['meta_epochs'], meta_lr))
        save_weights(learn.model, run.out/'student_grdd', arch=s['student'], px=px, stats=data.stats, fingerprint=data.fingerprint)

        # the novel classes, the same episodes for all three and for every seed
        novel,scores = plain_dl(data, 'test'),{}
        untrained = create_backbone(s['student'], 0, px, seed).to(dls.device)
        for name,net in dict(untrained=untrained, cl=student_cl, grdd=learn.model).items():
            scores[name] = evaluate(*embed(net, novel), way, shot, query, s['test_episodes'])
            run.log_novel(what=name, accuracy=scores[name].accuracy, ci95=scores[name].ci95, test_episodes=s['test_episodes'])
            run.say(f'{name:>10}: {scores[name]}')
        gain = scores['grdd'] - scores['cl']
        return run.finish(
            dataset=data.name, way=way, shot=shot, query=query, teacher=s['teacher'], student=s['student'], epochs=s['epochs'],
            meta_epochs=s['meta_epochs'], episodes=s['episodes'], test_episodes=s['test_episodes'],
            accuracy=round(scores['grdd'].accuracy, 3), ci95=round(scores['grdd'].ci95, 3),
            accuracy_cl=round(scores['cl'].accuracy, 3), ci95_cl=round(scores['cl'].ci95, 3),
            gain=round(gain.accuracy, 3), ci95_gain=round(gain.ci95, 3), accuracy_untrained=round(scores['untrained'].accuracy, 3),
            val_accuracy=round(learn.keep_best.best, 3), val_accuracy_cl=round(val_cl, 3), seed=seed, demo=demo)
