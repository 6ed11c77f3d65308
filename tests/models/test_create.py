"""Backbones by name and seed."""
import pytest
from helpers import net, same_state

from grdd_fastai.core.errors import UserError
from grdd_fastai.models.create import create_backbone


def test_unknown_backbone_is_one_sentence():
    with pytest.raises(UserError, match="unknown backbone 'convnet5'.*convnet4"): create_backbone('convnet5')

def test_backbone_seed():
    assert same_state(net(3).state_dict(), net(3).state_dict()) and not same_state(net(3).state_dict(), net(4).state_dict())
