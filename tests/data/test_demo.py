"""The images that are drawn."""
from grdd_fastai.data.cache import few_shot_data


def test_demo_is_deterministic_and_disjoint(tmp_path):
    a,b = (few_shot_data('demo', cache=tmp_path/n) for n in 'ab')
    assert a.fingerprint == b.fingerprint and len({*a.train.vocab, *a.val.vocab, *a.test.vocab}) == 64+16+20
    assert few_shot_data('demo', cache=tmp_path/'a', seed=1).fingerprint != a.fingerprint
