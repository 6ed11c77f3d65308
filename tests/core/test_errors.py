"""Every message is one line."""
import pytest

from grdd_fastai.core.errors import UserError
from grdd_fastai.data.sources import open_source


def test_a_sentence_is_one_line_whatever_it_quotes(root):
    (root/'train.csv').write_text('"file\nname\x1b[31m",' + ','.join(f'c{i}' for i in range(5000)) + '\n1,2\n')
    with pytest.raises(UserError) as e: open_source(root)
    assert str(e.value).isprintable() and len(str(e.value)) < 700
