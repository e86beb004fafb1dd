"""Keys that a client uploads before its first query, for engines that compute under them."""

from collections.abc import Iterator
from dataclasses import replace

from splitveil.errors import ProtocolError
from splitveil.serving.publishing import ServedAdapter
from splitveil.wire import codec


def opened(adapter: ServedAdapter, requests: Iterator[bytes]) -> ServedAdapter:
    """The adapter as one session uses it, after reading that session's keys, if its engine wants any.

    All chunks but the last are full: crumbs would keep a session busy without end. A client that leaves before its
    first chunk gets the adapter as it is, which nobody will ask anything. Raises ``ProtocolError`` for anything else.
    """
    keyed = adapter.keyed
    if keyed is None:
        return adapter
    keys, total = bytearray(), keyed.key_size
    while len(keys) < total:
        raw = next(requests, None)
        if raw is None and not keys:
            return adapter
        message = None if raw is None else codec.decode_client(raw)
        size = min(codec.CHUNK, total - len(keys))
        if not isinstance(message, codec.KeyChunk) or (message.offset, len(message.data)) != (len(keys), size):
            raise ProtocolError(f"{total} bytes of keys come before the first query, in full chunks; got {len(keys)}")
        keys += message.data
    return replace(adapter, half=keyed.opened(bytes(keys)), keyed=None)
