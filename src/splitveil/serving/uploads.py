"""Keys that a client uploads before its first query, for engines that compute under them."""

from collections.abc import Callable, Iterator
from dataclasses import replace

from splitveil.errors import ProtocolError
from splitveil.serving.operations.threshold import deadline
from splitveil.serving.publishing import ServedAdapter
from splitveil.wire import codec

KEYS_SECONDS = 60.0
"""A session whose keys are not there by then is ended: until they are, it holds its place without being counted."""


def opened(adapter: ServedAdapter, requests: Iterator[bytes], hang_up: Callable[[], object]) -> ServedAdapter:
    """The adapter as one session uses it, after reading that session's keys, if its engine wants any.

    All chunks but the last are full: crumbs would keep a session busy without end. A client that leaves before its
    first chunk gets the adapter as it is, which nobody will ask anything. Raises ``ProtocolError`` for anything else.
    ``hang_up()`` is called after ``KEYS_SECONDS``, and ends ``requests``.
    """
    keyed = adapter.keyed
    if keyed is None:
        return adapter
    with deadline(KEYS_SECONDS, hang_up):
        keys = _received(requests, keyed.key_size)
    return adapter if keys is None else replace(adapter, half=keyed.opened(keys), keyed=None)


def _received(requests: Iterator[bytes], total: int) -> bytes | None:
    """The keys; None from a client that left before the first of them. Raises ``ProtocolError``."""
    keys = bytearray()
    while len(keys) < total:
        raw = next(requests, None)
        if raw is None and not keys:
            return None
        message = None if raw is None else codec.decode_client(raw)
        size = min(codec.CHUNK, total - len(keys))
        if not isinstance(message, codec.KeyChunk) or (message.offset, len(message.data)) != (len(keys), size):
            raise ProtocolError(f"{total} bytes of keys come before the first query, in full chunks; got {len(keys)}")
        keys += message.data
    return bytes(keys)
