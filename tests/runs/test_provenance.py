"""Commands and logs that others see: no path of a machine, and no link followed."""
import pytest
from helpers import posix, says

from grdd_fastai.runs.provenance import command, log_line, public_word


@pytest.mark.parametrize('word, shown', [('/home/alice/birds.zip', 'birds.zip'), ('--data=/home/alice/birds.zip', '--data=birds.zip'),
                                         ('~/birds', 'birds'), ('../../alice/birds', 'birds'), ('data/birds', 'data/birds'),
                                         ('/home/alice/grdd/recipes/table2.py', 'recipes/table2.py'), ('--lr', '--lr'), ('0.1', '0.1'),
                                         ('CL+EL lr=0.1', 'CL+EL lr=0.1')])
def test_commands_that_are_published_have_no_paths_of_a_machine(word, shown):
    assert public_word(word) == shown and command(['x', word]) == command(['x', shown])

@pytest.mark.parametrize('word, shown', [('./../../home/alice/x.zip', 'x.zip'), ('a/../../../home/alice/x', 'x'),
                                         ('--data=./../alice/x', '--data=x'), ('file:///home/alice/x', 'x'),
                                         ('runs/a,/home/alice/b', 'runs/a,b'), (r'C:\Users\alice\x', 'x'), ('1,5', '1,5'),
                                         ('hf-hub:user/name', 'hf-hub:user/name')])
def test_more_paths_of_a_machine(word, shown): assert public_word(word) == shown

@posix
def test_a_log_that_is_a_link_is_not_followed(tmp_path):
    (tmp_path/'novel_scorings.jsonl').symlink_to('made')
    says(lambda: log_line(tmp_path/'novel_scorings.jsonl', dict(a=1)), 'cannot be written')
    assert not (tmp_path/'made').exists()
    (tmp_path/'log.jsonl').write_bytes(b'\xff\xfe\n')
    log_line(tmp_path/'log.jsonl', dict(a=1))
    assert (tmp_path/'log.jsonl').read_bytes() == b'\xff\xfe\n{"a": 1}\n'
