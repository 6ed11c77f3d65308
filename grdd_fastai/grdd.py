"""GRDD (arXiv 2107.05583) on one page: the data, stage one, stage two, and the accuracy on the novel classes."""
from dataclasses import asdict
from functools import partial
from typing import Annotated

from .core.distributed import log, processes, rank_world
from .data.blocks import plain_dl
from .data.episodes import check_episode
from .fewshot.classifiers import split_names, with_base_mean
from .fewshot.embed import embed
from .fewshot.evaluate import evaluate
from .models.create import check_backbone, create_backbone, pretrained_tag
from .runs.checkpoint import Stopped
from .runs.loggers import LogOptions
from .runs.options import ComputeOptions, DataOptions
from .runs.report import write_run_report
from .runs.run import Run, default_out
from .settings import at_least, between, checked, from_flags, positive, with_flags
from .stage_one import StageOne, TeacherEpochs, stage_one
from .stage_two import PRESETS, Preset, check_teacher, get_preset, known_features, stage_two

__all__ = ['grdd']


def method(
    run, # `Run`, which trains a network once and keeps what is finished
    data, # `FewShotData`: base, validation and novel classes
    psi, # settings of stage one (`StageOne`) of the student
    phi, # settings of stage one of the teacher; None where the student's network is its own teacher
    two, # settings of stage two (`StageTwo`)
    episode, # n_way, k_shot and n_query of the validation and the novel classes
    n_episodes, # episodes of the novel classes
    classifiers, # names of the classifiers that score them
    **compute # of `few_shot_learner`
):
    """The whole method

    Returns the scores on the novel classes, the two best accuracies on the validation classes, the features of the novel classes and the
    teacher.
    """
    # stage one, the global learner (Eq. 2-9): categories and rotations of the base classes
    student_cl,val_cl = run.train('student_cl', *stage_one(data, psi, valid=episode, **compute), psi.arch)
    teacher = student_cl if phi is None else run.train('teacher', *stage_one(data, phi, valid=episode, **compute), phi.arch)[0]

    # stage two, the meta-learner (Eq. 10-15): the student's relatedness on episodes of base classes follows the frozen teacher's
    known = partial(known_features, teacher, data, two, run.cache, compute.get('amp', True), run.stop_if_due)
    meta = stage_two(data, two, student_cl, teacher, known, valid=episode, **compute)
    student,val = run.train('student_grdd', *meta, psi.arch)

    # the novel classes: score the student three times on the same episodes: untrained, after stage one, after stage two
    novel = plain_dl(data, 'test')
    start = create_backbone(psi.arch, len(data.train.vocab), data.px, psi.seed, psi.pretrained).to(novel.device)
    before = 'pretrained' if pretrained_tag(psi.arch, psi.pretrained) else 'untrained'
    scores,features = {},{}
    for stage,net in {before:start, 'cl':student_cl, 'grdd':student}.items():
        known = with_base_mean(classifiers, lambda net=net: embed(net, plain_dl(data, 'train'), distributed=True)[0])
        features[stage],y = embed(net, novel, distributed=True)
        scores[stage] = evaluate(features[stage], y, **episode, n_episodes=n_episodes, classifier=known, distributed=True)
        for name,e in scores[stage].items():
            run.log_novel(what=stage, classifier=name, accuracy=e.accuracy, ci95=e.ci95, test_episodes=n_episodes)
            log(f'{stage:>10}, {name}: {e}')
    return scores,val,val_cl,features,teacher


# ---- the program behind the recipes -----------------------------------------------------------------------------------

PAPER = dict(teacher='resnet12', student='resnet12', one=StageOne(), two={}, test_episodes=10_000)
DEMO = dict(teacher='convnet4', student='convnet4', one=StageOne(epochs=2), two=dict(epochs=2, n_episodes=50), test_episodes=2000, px=32)


@processes()
@checked
@with_flags(files=DataOptions, one=dict(default=PAPER['one'], demo=DEMO['one']),
            two=PRESETS | dict(demo=PRESETS['best'].but(**DEMO['two'])), compute=ComputeOptions, follow=LogOptions)
def grdd(
    way:Annotated[int, 'C, classes per episode', at_least(2)]=5,
    shot:Annotated[int, 'K, support images per class', at_least(1)]=1,
    px:int=32, # side of the images in pixels; the demo always uses 32
    name:str='grdd', # name of the recipe, which names the folder if no --out is given
    query:Annotated[int, 'query images per class and episode of the novel classes', between(1, 10**6)]=15,
    files=None, # the given `DataOptions`
    out:str=None, # folder for results, histories and weights (runs/ and the recipe's name; demo: with -demo after it)
    teacher:str=None, # network of the global learner phi, a timm model (resnet12; demo: convnet4)
    student:str=None, # network of the meta-learner psi, a timm model (resnet12; demo: convnet4)
    one=None, # the given settings of `StageOne`
    teacher_epochs:TeacherEpochs=None,
    independent_teacher:bool=False, # train the teacher apart where it has the student's architecture
    preset:Preset='best',
    two=None, # the given settings of `StageTwo`
    test_episodes:Annotated[int, 'episodes of the novel classes (10000; demo: 2000)', between(1, 10**8)]=None,
    classifiers:str='cosine', # classifiers that score the novel classes, separated by commas; `accuracy` and `gain` are the first one's
    compute=None, # the given `ComputeOptions`
    follow=None, # the given `LogOptions`
    demo:bool=False, # small settings, on the embedded data set unless --data is given
    resume:bool=False, # go on with the run in --out; begin it where there is none
    overwrite:bool=False, # delete the run that --out holds, its weights and its result, and begin anew
    max_minutes:Annotated[float, 'stop after this many minutes with everything saved, for --resume', positive]=None,
) -> dict:
    "Train the global learner and the meta-learner, and score the novel classes"
    default = DEMO if demo else PAPER
    px = default.get('px', px)
    files,compute,follow = (from_flags(o(), given) for o,given in ((DataOptions, files), (ComputeOptions, compute), (LogOptions, follow)))
    psi = from_flags(default['one'], one).but(arch=default['student'] if student is None else student)
    phi = psi.but(arch=default['teacher'] if teacher is None else teacher, epochs=teacher_epochs or psi.epochs)
    shared = phi == psi and not independent_teacher # one network is the student's start and its teacher
    if phi.arch == psi.arch and not shared: phi = phi.but(seed=phi.seed + 1)
    two = from_flags(get_preset(preset).but(k_shot=shot, **default['two']), two)
    test_episodes = test_episodes or default['test_episodes']
    names = split_names(classifiers)
    for s in (psi, phi): check_backbone(s.arch, px, s.pretrained)

    check_teacher(phi, two)
    settings = dict(way=way, shot=shot, query=query, px=px, **files.identity(), student=psi.values(), teacher=phi.values(),
                    independent_teacher=independent_teacher, stage_two=two.values(), test_episodes=test_episodes, classifiers=classifiers,
                    **asdict(compute), demo=demo)
    plan = ['student_cl', *([] if shared else ['teacher']), 'student_grdd', 'evaluation']
    episode = dict(n_way=way, k_shot=shot, n_query=query)
    with Run(default_out(name, demo) if out is None else out, settings, resume, max_minutes, plan, overwrite=overwrite,
             loggers=follow.loggers) as run:
        if run.result: return run.print(run.result)
        try:
            files.warn_of_demo(demo)
            data = files.load(px, demo, psi.seed)
            for split in (data.train, data.val, data.test): check_episode(split, **episode)
            check_episode(data.train, 2, two.k_shot, 1)
            run.begin(data, files.cache)
            *found,features,network = method(run, data, psi, None if shared else phi, two, episode, test_episodes, names,
                                             **compute.for_learner())
            values = dict(dataset=data.name, image_fingerprint=data.image_fingerprint, resize=data.resize, way=way, shot=shot,
                          query=query, teacher=phi.arch, student=psi.arch, epochs=psi.epochs,
                          meta_epochs=two.epochs, episodes=two.n_episodes, test_episodes=test_episodes, **result(*found),
                          initial_weights={role:pretrained_tag(s.arch, s.pretrained) or 'random' for role,s in
                                           dict(teacher=phi, student=psi).items()}, seed=psi.seed, demo=demo)
            done = run.finish(**values)
            if rank_world()[0] == 0: log(f'{write_run_report(run.out, done, data, features, network, episode, names[0])} shows the run')
            return done
        except Stopped as stop: return run.stopped(stop)


def result(scores, val, val_cl):
    "What `method` returns, as the entries of the result; docs/recipes.md says what each means"
    (before,start),(_,cl),(_,grdd) = scores.items()
    first,*others = grdd
    gain = grdd[first] - cl[first]
    def rounded(**numbers): return {k:round(v, 3) for k,v in numbers.items()}
    return rounded(accuracy=grdd[first].accuracy, ci95=grdd[first].ci95, accuracy_cl=cl[first].accuracy, ci95_cl=cl[first].ci95,
                   gain=gain.mean, ci95_gain=gain.ci95, **{f'accuracy_{before}':start[first].accuracy},
                   val_accuracy=val, val_accuracy_cl=val_cl) | dict(
        classifier=first, others={k:rounded(accuracy=grdd[k].accuracy, ci95=grdd[k].ci95, accuracy_cl=cl[k].accuracy) for k in others})
