"""A machine without a connection to the Hugging Face hub: one sentence at once, and what is in the cache is used."""
import socket

import pytest
import torch
from helpers import says
from huggingface_hub import constants

from grdd_fastai.core import hub
from grdd_fastai.core.hub import hub_host, quick_offline
from grdd_fastai.models.create import create_backbone
from grdd_fastai.models.pretrained import load_network, save_network


@pytest.fixture
def offline(monkeypatch, tmp_path):
    "No connection can be made, and the cache is empty"
    tried = []
    def refuse(address, timeout=None, *args, **kwargs):
        tried.append((address, timeout))
        raise socket.gaierror(-2, 'Name or service not known')
    monkeypatch.setattr(socket, 'create_connection', refuse)
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path/'cache'))
    monkeypatch.setattr(hub, 'getproxies', dict)
    return tried

@pytest.mark.parametrize('name', ['vit_small_patch14_dinov2.lvd142m', 'resnet18', 'hf-hub:me/mine'])
def test_weights_that_would_be_downloaded(offline, name):
    says(lambda: load_network(name), 'not on this machine', f'{hub_host()} cannot be reached', 'convnet4.grdd_cifarfs')
    assert offline == [((hub_host(), 443), hub.TIMEOUT)] and not constants.HF_HUB_OFFLINE

def test_the_packages_weights_need_no_connection(offline):
    load_network('convnet4.grdd_cifarfs')
    assert offline == []

def test_what_is_in_the_cache_is_used(offline, tmp_path):
    net = create_backbone('convnet4', 0, seed=5)
    there = tmp_path/'cache'/'models--me--mine'
    save_network(net, there/'snapshots'/'0123', 32, (.5,)*3, (.2,)*3)
    (there/'refs').mkdir()
    (there/'refs'/'main').write_text('0123')
    again = load_network('hf-hub:me/mine')
    for k,v in net.state_dict().items(): assert torch.equal(again.state_dict()[k], v), k

@pytest.mark.parametrize('proxy', ['http://proxy.example:3128', 'proxy.example:3128'])
def test_a_proxy_is_asked_instead(offline, monkeypatch, proxy):
    monkeypatch.setattr(hub, 'getproxies', lambda: dict(https=proxy))
    with quick_offline() as online: assert not online and constants.HF_HUB_OFFLINE
    monkeypatch.setattr(hub, 'proxy_bypass', lambda host: host == hub_host())
    with quick_offline(): pass
    assert [address for address,_ in offline] == [('proxy.example', 3128), (hub_host(), 443)]

def test_a_connection_changes_nothing(monkeypatch):
    with socket.create_server(('localhost', 0)) as server:
        monkeypatch.setattr(constants, 'ENDPOINT', f'http://localhost:{server.getsockname()[1]}')
        monkeypatch.setattr(hub, 'getproxies', dict)
        with quick_offline() as online: assert online and not constants.HF_HUB_OFFLINE
        monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True) # the user's own choice
        with quick_offline() as online: assert not online and constants.HF_HUB_OFFLINE
        assert constants.HF_HUB_OFFLINE
