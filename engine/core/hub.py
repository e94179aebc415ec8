"""Whether the Hugging Face hub can be reached: asked once and quickly, where its own client retries
for half a minute.
"""

from __future__ import annotations

import functools
import os
import socket
import sys
from urllib.parse import urlsplit

TIMEOUT = 5.0  # seconds for a connection
PROXIES = ("http_proxy", "https_proxy", "all_proxy")


def use_cache_if_unreachable() -> str:
    """Before a name on the hub is looked up: without the hub, only the local cache is asked.

    Returns what to add to an error about that name, or ''.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return "; HF_HUB_OFFLINE is set, so only the local cache was asked"
    reason = unreachable()
    if not reason:
        return ""
    os.environ["HF_HUB_OFFLINE"] = "1"  # for processes to come, and libraries not yet imported
    for name in ("huggingface_hub.constants", "datasets.config"):
        if name in sys.modules:
            vars(sys.modules[name])["HF_HUB_OFFLINE"] = True
    return f"; {reason}, so only the local cache was asked"


@functools.cache
def unreachable() -> str:
    """Why no connection to the hub can be made, or ''. Behind a proxy it is not tried."""
    if any(os.environ.get(name) or os.environ.get(name.upper()) for name in PROXIES):
        return ""
    url = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    port = 80 if url.scheme == "http" else 443
    try:
        socket.create_connection((url.hostname or "", url.port or port), TIMEOUT).close()
    except (OSError, ValueError) as error:
        return f"{url.hostname} cannot be reached ({error})"
    return ""
