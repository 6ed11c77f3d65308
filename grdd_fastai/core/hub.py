"""The Hugging Face hub: a machine that cannot reach it is noticed at once."""
import socket
from contextlib import contextmanager
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from huggingface_hub import constants

__all__ = ['hub_host', 'quick_offline']


TIMEOUT = 5 # seconds


def hub_host() -> str:
    "Name of the hub's host, such as huggingface.co"
    return urlsplit(constants.ENDPOINT).hostname

def reachable():
    "Whether a connection can be made to the hub, or to the proxy that leads there"
    to = urlsplit(constants.ENDPOINT)
    proxy = None if proxy_bypass(to.hostname) else getproxies().get(to.scheme)
    url = urlsplit(proxy if proxy and '://' in proxy else f'http://{proxy}') if proxy else to
    try:
        with socket.create_connection((url.hostname, url.port or dict(http=80).get(url.scheme, 443)), TIMEOUT): return True
    except OSError: return False

@contextmanager
def quick_offline():
    """A block in which files of the hub come from its cache alone, if the hub cannot be reached; the block gets whether it can be

    The hub's client would otherwise try again for three quarters of a minute before it looks into the cache or gives up.
    """
    before = constants.HF_HUB_OFFLINE
    online = not before and reachable()
    constants.HF_HUB_OFFLINE = not online
    try: yield online
    finally: constants.HF_HUB_OFFLINE = before
