"""The recipes beside GRDD itself: prepared data, experiments and figures, and RESULTS.md, which is what the records say."""
import json
import re
import runpy
import shlex
import shutil

import numpy as np
import pandas as pd
import pytest
from fastcore.script import anno_parser
from helpers import ROOT, recipe

from grdd_fastai.experiments.report.classifiers import chosen_on_validation
from grdd_fastai.experiments.report.photos import trust_table
from grdd_fastai.stage_two import PRESETS


def test_prepare_data_recipe(csv_set, tmp_path, capsys):
    recipe('prepare_data')(data=str(csv_set), out=str(tmp_path/'out'))
    assert capsys.readouterr().out.strip() == str(tmp_path/'out') and (tmp_path/'out'/'images').is_dir()

@pytest.mark.parametrize('name, rows, n', [('table2', None, 8), ('ablations', None, 6), ('sweep', 'CL,gamma=0,T=1,T=4', 5),
                                           ('pairs', None, 5), ('distillations', None, 12), ('teachers', None, 10)])
def test_each_experiment_writes_its_table_and_its_figure(small, tmp_path, name, rows, n):
    recipe(name)(out=str(tmp_path), rows=rows, **small)
    assert len(pd.read_csv(tmp_path/f'{name}_val.csv')) == n and (tmp_path/f'{name}_val.png').stat().st_size > 5000

@pytest.mark.parametrize('pairs, groups', [('episode', 20), ('all', 20*(1 + 6))])
def test_the_whole_matrix_at_matched_weight_has_the_weight_of_all_groups(pairs, groups):
    "Each group of Eq. 12 is a row of the relatedness: a support image, or any image of the episode"
    two = PRESETS['best'].but(n_way=20, k_shot=1, n_query=6, pairs=pairs)
    rows = runpy.run_path(str(ROOT/'recipes'/'ablations.py'))['ablations'](two, 64)
    alone,matched = (rows[f'w/o RDD{k}']['stage_two']['kl_weight'] for k in ('', ' matched weight'))
    assert alone == pytest.approx(two.distill.kl_weight/groups) and matched == pytest.approx(two.distill.kl_weight)

def test_a_row_may_use_a_flag_that_has_no_effect_without_what_it_sets(small, tmp_path):
    "`--views` belongs to the known views, which the rows of this recipe ask for"
    recipe('pairs')(out=str(tmp_path), rows='all pairs', views=3, **small)
    views, = tmp_path.glob('cl-*/features')
    settings = json.loads(next(tmp_path.glob('gr-*/settings.json')).read_text())['settings']
    assert len(list(views.glob('*.npy'))) == 3 and settings['views'] == 3

def test_figures_shows_the_same_images_in_each_panel(small, tmp_path):
    recipe('figures')(out=str(tmp_path), images=8, **small)
    tsne,relatedness = pd.read_csv(tmp_path/'figure3.csv'),pd.read_csv(tmp_path/'figure5.csv')
    rows = [of.row.tolist() for _,of in tsne.groupby('network')]
    assert len(rows) == 3 and rows[0] == rows[1] == rows[2] and len(set(rows[0])) == 40 and tsne.groupby('label').size().eq(24).all()
    by_support = relatedness.groupby(['softmax','T','support']).weight.sum()
    assert np.allclose(by_support['decoupled'], 1, atol=1e-5) and np.allclose(by_support['whole'].groupby('T').sum(), 1, atol=1e-5)
    assert all((tmp_path/f'figure{i}.png').stat().st_size > 5000 for i in (3, 5)) and not (tmp_path/'novel_scorings.jsonl').exists()


# ---- report: made-up records ------------------------------------------------------------------------------------------

START = dict(arch='convnet4', epochs=8, schedule='poly', lr=.1, bs=64, rotation=True, rotation_from='logits', seed=0)

def score(accuracy, ci95=.2): return dict(accuracy=accuracy, ci95=ci95, n=10_000, episodes='')
def versus(difference, ci95=.1):
    return {'CL':{'1-shot':dict(difference=difference, ci95=ci95, p=.01, clear=(difference > ci95) - (difference < -ci95))}}

def made_up(row, seed, accuracy, vs=None, order=0, split='novel', paper=None, same='x', minutes=30.):
    net = dict(run=f'{row}-{seed}', device='cpu', torch_threads=1, versions=dict(torch='2'), minutes=minutes)
    return dict(experiment='table2', row=row, seed=seed, split=split, supervision='CL', phi=None, psi='convnet4',
                paper=paper and {'1-shot':paper}, scores={'1-shot':score(accuracy)},
                settings=dict(student=START | dict(seed=seed)) if vs else START | dict(seed=seed),
                versus=vs or {}, order=order, same=same, file=f'{row.lower()}-{same}-s{seed}-{split}.json',
                data=dict(name='d', fingerprint='f'*64),
                networks=dict(net=net, teacher=net | dict(run='teacher')))

@pytest.fixture
def checkout(tmp_path):
    "A checkout with nothing but docs and these records"
    def make(records):
        for r in records:
            (tmp_path/'results'/r['experiment']).mkdir(parents=True, exist_ok=True)
            (tmp_path/'results'/r['experiment']/r['file']).write_text(json.dumps(r))
        (tmp_path/'docs').mkdir()
        for page in ('method.md', 'photos.md', 'recipes.md'): shutil.copy(ROOT/'docs'/page, tmp_path/'docs')
        shutil.copy(ROOT/'README.md', tmp_path)
        recipe('report')(root=str(tmp_path))
        return (tmp_path/'RESULTS.md').read_text()
    return make

def row_of(text, name):
    return [c.strip() for c in next(line for line in text.splitlines() if line.startswith(f'| {name} |')).strip('|').split('|')]

def test_means_over_seeds_and_the_papers_number_by_hand(checkout):
    text = checkout([made_up('CL', 0, 60., paper=64.6), made_up('CL', 1, 62., paper=64.6), made_up('GRDD', 0, 63.3, versus(3.3), 1),
                     made_up('GRDD', 1, 64.3, versus(2.3), 1)])
    assert row_of(text, 'CL')[2:5] == ['61.00 (sd 1.41)', '64.6', '-3.6']
    assert (row_of(text, 'GRDD')[5] == 'CL **+2.80 (sd 0.71)**'
            and row_of(text, 'GRDD')[6] == '[0](results/table2/grdd-x-s0-novel.json) [1](results/table2/grdd-x-s1-novel.json)')
    assert '5 networks, 2.5 hours' in text # the teacher once

def test_the_resnet12_that_did_best_on_the_validation_classes_stands_beside_the_published_ones(checkout):
    "Of Table 2, by the mean over both shots; its novel accuracies chose nothing"
    def of(row, split, one, five):
        r = made_up(row, 0, one, split=split)
        return r | dict(psi='resnet12', same=row, scores={'1-shot':score(one), '5-shot':score(five)})
    text = checkout([of('a', 'val', 60., 75.), of('a', 'novel', 70., 80.), of('b', 'val', 61., 73.), of('b', 'novel', 75., 85.),
                     made_up('c', 0, 99.), made_up('c', 0, 99., split='val')])
    assert row_of(text, '`a` of Table 2, ours')[1:5] == ['ResNet-12', 'cosine', '70.00 ± 0.20', '80.00 ± 0.20']
    assert '`b` of Table 2' not in text and text.index('`a` of Table 2') < text.index('## How to read')

@pytest.mark.parametrize('second, bold', [(2., True), (.05, False), (-2., False)])
def test_an_order_is_bold_only_if_it_holds_in_every_seed(checkout, second, bold):
    text = checkout([made_up('CL', 0, 60.), made_up('CL', 1, 60.), made_up('GRDD', 0, 63., versus(3.), 1),
                     made_up('GRDD', 1, 60 + second, versus(second), 1)])
    assert ('**' in row_of(text, 'GRDD')[3]) == bold

def test_on_validation_classes_nothing_is_subtracted_from_the_papers_novel_number(checkout):
    assert row_of(checkout([made_up('CL', 0, 60., split='val', paper=64.6)]), 'CL')[2:5] == ['60.00 ± 0.20', '64.6', '']

def test_other_settings_are_another_line_and_one_seed_is_never_bold(checkout):
    text = checkout([made_up('CL', 0, 60.), made_up('GRDD', 0, 63., versus(3.), 1), made_up('GRDD', 1, 61., versus(1.), 1, same='y')])
    assert text.count('| GRDD |') == 2 and '**' not in text.split('## Table 2')[1]

def test_rows_from_other_starts_are_tables_of_their_own(checkout):
    longer = [made_up('CL', 0, 65., order=0, same='y'), made_up('GRDD', 0, 66., versus(1.), 1, same='y')]
    for r in longer: r['settings'].get('student', r['settings']).update(epochs=24, opt='muon')
    text = checkout([made_up('CL', 0, 60.), made_up('GRDD', 0, 63., versus(3.), 1), *longer])
    tables = text.split('Stage one of psi: ')
    assert (len(tables) == 3 and tables[1].startswith('convnet4, 24 epochs, poly, lr 0.1, muon')
            and tables[2].startswith('convnet4, 8 epochs, poly, lr 0.1, sgd'))
    assert (row_of(tables[1], 'GRDD')[2] == '66.00 ± 0.20' and row_of(tables[2], 'GRDD')[2] == '63.00 ± 0.20'
            and tables[1].count('\n| ') == 3)

def test_classifiers_of_a_record_by_hand(checkout, tmp_path):
    (tmp_path/'results').mkdir()
    def line(name, shot, acc, transductive, balanced):
        return dict(network='net', classifier=name, way=5, query=15, shot=shot, accuracy=acc, ci95=.2, n=10_000, transductive=transductive,
                    balanced=balanced)
    (tmp_path/'results'/'inference-net.json').write_text(json.dumps(dict(
        split='novel', queries='balanced', support_views=0, data=dict(name='cifar_fs'), commit='c'*40, device='cpu', scores=[
        line('cosine', 1, 60., False, False), line('cosine', 5, 70., False, False), line('tim_adm', 1, 65.5, True, True),
        line('tim_adm', 5, 72., True, True)])))
    text = checkout([])
    assert ('| net | tim_adm | all, taken to be balanced | 65.50 ± 0.20 | 72.00 ± 0.20 |' in text
            and '| net | cosine | one | 60.00 ± 0.20 | 70.00 ± 0.20 |' in text)
    assert 'GRDD-TIM, ConvNet-4, the paper | tim | all, taken to be balanced | 79.9' in text

def test_the_classifier_that_did_best_on_the_validation_classes_stands_beside_the_card(tmp_path):
    "By the mean over both shots, of inductive ones, on these very weights, which are not those of the record's other network"
    n = iter(range(100))
    def record(split, mirror=False, weights='mine', **accuracies): # classifier -> accuracies of 1 and 5 shots
        scores = [dict(network=network, classifier=k, way=5, query=15, shot=shot, accuracy=acc, ci95=.2, n=10_000,
                       transductive=k.startswith('tim'))
                  for network,more in (('net', 0.), ('another', 9.)) for k,both in accuracies.items()
                  for shot,acc in zip((1, 5), (v + more for v in both), strict=True)]
        (tmp_path/f'inference-{next(n)}.json').write_text(json.dumps(dict(split=split, queries='balanced', support_views=0, mirror=mirror,
                                                                           weights=dict(net=weights, another='x'), scores=scores)))
    record('val', cosine=(60., 70.), ridge=(59., 73.), tim_adm=(70., 80.))
    record('val', mirror=True, cosine=(61., 70.5))
    record('val', weights='others', ridge=(90., 90.))
    assert chosen_on_validation(tmp_path, 'net', 'mine') is None
    record('novel', cosine=(65., 75.), ridge=(64., 78.), tim_adm=(75., 85.))
    link = '[record](results/inference-3.json)'
    assert chosen_on_validation(tmp_path, 'net', 'mine') == ('`ridge`', ['64.00 ± 0.20', '78.00 ± 0.20'], link)
    record('val', mirror=True, logistic=(62., 75.))
    record('novel', mirror=True, logistic=(66., 79.))
    assert chosen_on_validation(tmp_path, 'net', 'mine')[0] == '`logistic`, features averaged with those of the mirror image'
    assert chosen_on_validation(tmp_path, 'net', 'unknown') is None
    assert chosen_on_validation(tmp_path, 'net', 'mine', (5,), transductive=True) == ('`tim_adm`', ['85.00 ± 0.20'], link)

def test_the_table_of_trust_has_the_default_classifier_and_the_others_for_five_photos(tmp_path):
    rows = [dict(classifier=k, way=5, shot=shot, accuracy=80.12, expected=79., covered=95., width=20., ece=2., ece_before=50.)
            for k in ('simpleshot_l2n', 'lda') for shot in (2, 5)]
    rows[1] |= dict(lost=9.5, found=50., auroc=82.)
    (tmp_path/'trust-net.json').write_text(json.dumps(dict(data=dict(name='birds'), split='novel', rows=rows)))
    head,_,*lines = trust_table(tmp_path).splitlines()
    link = '[birds, novel classes](../results/trust-net.json)'
    assert lines == [f'| {link} | `simpleshot_l2n` | 5 x 2 | 80.1 | 79.0 | 95.0 | 2.0 | 50.0 |  |  |  |',
                     '|  | `simpleshot_l2n` | 5 x 5 | 80.1 | 79.0 | 95.0 | 2.0 | 50.0 | 9.5 | 50.0 | 82.0 |',
                     '|  | `lda` | 5 x 5 | 80.1 | 79.0 | 95.0 | 2.0 | 50.0 |  |  |  |'] and head.count('|') == 12

def test_the_head_of_the_results_has_a_table_for_each_way_to_see_the_queries(checkout, tmp_path):
    "Each shot has its own transductive classifier, teachers have a table of their own, and then comes what was learnt"
    (tmp_path/'results').mkdir()
    (tmp_path/'results'/'LEARNT.md').write_text('## What was learnt\n')
    for folder,name,shots in (('grdd_fastai/weights', 'convnet4.x', (1., 2.)), ('weights', 'resnet12.y', (3., 4.))):
        (tmp_path/folder/name).mkdir(parents=True)
        (tmp_path/folder/name/'measured.json').write_text(json.dumps(dict(sha256='mine', scores=dict(novel={
            f'{k}-shot':score(v) for k,v in zip((1, 5), shots)}))))
    for split,add in (('val', 0.), ('novel', 10.)):
        scores = [dict(network='convnet4.x', classifier=k, way=5, query=15, shot=shot, accuracy=acc + add, ci95=.2, n=10_000,
                       transductive=True, balanced=True)
                  for k,both in {'tim_adm(scale=6)':(60., 61.), 'pt_map':(59., 63.)}.items() for shot,acc in zip((1, 5), both)]
        (tmp_path/'results'/f'inference-{split}.json').write_text(json.dumps(dict(
            split=split, queries='balanced', support_views=0, mirror=True, weights={'convnet4.x':'mine'}, data=dict(name='cifar_fs'),
            commit='c'*40, device='cpu', scores=scores)))
    head = checkout([]).split('## How to read the tables')[0]
    lines = [[c.strip() for c in line.strip('|').split('|')] for line in head.splitlines() if line.startswith('| `')]
    mirrored = ', features averaged with those of the mirror image'
    assert [line[2:5] for line in lines] == [['`tim_adm(scale=6)`' + mirrored, '70.00 ± 0.20', ''],
                                             ['`pt_map`' + mirrored, '', '73.00 ± 0.20'], ['cosine', '3.00 ± 0.20', '4.00 ± 0.20']]
    assert head.index('GRDD-TIM, the paper') < head.index('`resnet12.y`') < head.index('## What was learnt')


# ---- report: what is committed ----------------------------------------------------------------------------------------

RECORDS = sorted((ROOT/'results').glob('*/*.json'))

@pytest.mark.skipif(not RECORDS, reason='no records in results/')
def test_what_is_committed_is_what_the_records_say(tmp_path):
    for f in ('results','docs','benchmarks','grdd_fastai/weights','weights'):
        shutil.copytree(ROOT/f, tmp_path/f, ignore=shutil.ignore_patterns('*.safetensors'))
    shutil.copy(ROOT/'README.md', tmp_path)
    recipe('report')(root=str(tmp_path))
    for f in ('RESULTS.md','README.md','docs/method.md','docs/photos.md','docs/recipes.md','benchmarks/README.md'):
        assert (tmp_path/f).read_text() == (ROOT/f).read_text(), f'{f} is out of date: python recipes/report.py'

# Flags that were called otherwise at the commit of some records
FORMER_FLAGS = {'--classifier':'--head', '--reading':'--preset', '--per-step':'--episodes-per-step'}

@pytest.mark.parametrize('path', RECORDS, ids=lambda p: f'{p.parent.name}/{p.stem}')
def test_a_record_names_a_clean_commit_and_a_command_that_parses(path):
    r = json.loads(path.read_text())
    scored = [r['scored']] if 'commit' in r['scored'] else r['scored'].values() # by shot
    for o in (*scored, *r['networks'].values()): assert re.fullmatch('[0-9a-f]{40}', o['commit'])
    assert path.name == r['file'] and len(r['data']['fingerprint']) == 64
    assert all(n['device'] and n['minutes'] > 0 and len(n['weights']) == 64 for n in r['networks'].values())
    for shot,command in (r['command'] if isinstance(r['command'], dict) else dict.fromkeys(r['scores'], r['command'])).items():
        assert 'demo' not in command
        words = [FORMER_FLAGS.get(w, w) for w in shlex.split(command) if not re.fullmatch(r'[A-Z_]+=\d+', w)]
        assert words[0] == 'python' and words[1] == f'recipes/{r["experiment"]}.py'
        args = vars(anno_parser(runpy.run_path(str(ROOT/words[1]))['main'].__wrapped__).parse_args(words[2:]))
        seeds = [*args['seeds'].split(','), str(args.get('stage_one_seed'))] # a row without stage two has the seed of stage one
        assert args['score'] == r['split'] and str(r['seed']) in seeds and shot in r['scores']
    for scores in r['scores'].values(): assert scores['n'] >= 10_000 and 20 < scores['accuracy'] < 100 and 0 < scores['ci95'] < 1

def test_every_novel_record_is_in_the_log():
    log = ROOT/'results'/'novel_scorings.jsonl'
    logged = {(o['what'], round(o['accuracy'], 3)) for o in map(json.loads, log.read_text().splitlines())} if log.exists() else set()
    accuracies = {a for _,a in logged}
    for r in map(lambda p: json.loads(p.read_text()), RECORDS):
        if r['split'] == 'novel': assert all(s['accuracy'] in accuracies for s in r['scores'].values()), r['file']
