"""The table of networks and classifiers that is made from their features."""
import json
import threading
from pathlib import Path

import pandas as pd
import pytest
from helpers import NO_FOLDER, recipe

from grdd_fastai.core.errors import UserError
from grdd_fastai.data.blocks import plain_dl
from grdd_fastai.data.cache import few_shot_data
from grdd_fastai.fewshot.embed import embed
from grdd_fastai.fewshot.evaluate import evaluate
from grdd_fastai.models.create import create_backbone
from grdd_fastai.models.pretrained import load_network, save_weights


def test_the_table_is_what_evaluate_gives(two_nets, faint, faint_data, cache, tmp_path, capsys):
    nets = [str(two_nets/'student_cl'), str(two_nets/'student_grdd')]
    recipe('evaluate_weights')(*nets, data=str(faint), score='novel', ways='3,5', shots='1,2', queries='4',
                               classifiers='cosine,simpleshot_cl2n,tim_adm', test_episodes=50,
                               out=str(tmp_path/'out'), results=str(tmp_path/'results'), cache=str(cache))
    said = json.loads(capsys.readouterr().out)
    table,record = pd.read_csv(said['csv']),json.loads(Path(said['record']).read_text())
    assert (len(table) == 2*4*3 and said['rows'] == 24 and len(record['scores']) == 24 and record['command']
            and record['data']['fingerprint'] == faint_data.fingerprint)
    h = [embed(load_network(n), plain_dl(faint_data, 'test')) for n in nets]
    of = table.set_index(['network','way','shot','classifier']).accuracy
    for n,(x,y) in zip(nets, h): assert of[n, 3, 2, 'cosine'] == pytest.approx(evaluate(x, y, 3, 2, 4, 50).accuracy, abs=1e-3)
    pairs = pd.read_csv(said['csv'].replace('.csv', '_pairs.csv')).set_index(['way','shot','classifier'])
    assert (pairs.difference[5, 1, 'cosine']
            == pytest.approx(evaluate(*h[1], 5, 1, 4, 50).accuracy - evaluate(*h[0], 5, 1, 4, 50).accuracy, abs=1e-3))
    assert (len((tmp_path/'results'/'novel_scorings.jsonl').read_text().splitlines()) == 24
            and len(list((tmp_path/'results').glob('inference-*.json'))) == 1)

@pytest.mark.parametrize('wrong, sentence', [
    (dict(score='test'), "--score is 'test'"), (dict(seed=-1), '--seed is -1'),
    (dict(out=NO_FOLDER), 'cannot be written'), (dict(classifiers='cosine,magic'), "unknown classifier 'magic'"),
    (dict(query_distribution='odd'), "--query-distribution is 'odd'"), (dict(ways='7'), 'too few for 7-way'),
    (dict(shots='x'), "--shots is 'x'"), (dict(support_views=-1), '--support-views is -1')])
def test_wrong_settings_get_a_sentence(two_nets, faint, cache, tmp_path, wrong, sentence):
    with pytest.raises(UserError, match=sentence):
        recipe('evaluate_weights')(str(two_nets/'student_cl'), **dict(data=str(faint), cache=str(cache), out=str(tmp_path)) | wrong)

def test_three_evaluations_at_one_out_are_all_there(csv_set, cache, tmp_path):
    run = tmp_path/'nets'
    run.mkdir()
    data = few_shot_data(csv_set, 32, cache)
    for i in range(3): save_weights(create_backbone('convnet4', 0, seed=i), run/f'n{i}', arch='convnet4', px=32, stats=data.stats)
    errors = []
    def work(i):
        try:
            recipe('evaluate_weights')(str(run/f'n{i}'), data=str(csv_set), cache=str(cache), out=str(tmp_path/'out'), shots='1',
                                       queries='3', test_episodes=20)
        except BaseException as e: errors.append(e)
    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for t in threads: t.start()
    for t in threads: t.join()
    records = [json.loads(f.read_text()) for f in (tmp_path/'out').glob('*.json')]
    assert (not errors and sorted(next(iter(r['weights'])) for r in records) == sorted(str(run/f'n{i}') for i in range(3))
            and len(list((tmp_path/'out').glob('*.csv'))) == 3)
