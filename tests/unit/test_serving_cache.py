"""Publications on disk: kept whole or not at all, believed only if the server names their digest, never an obstacle."""

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from splitveil.lattice.parameters import INSECURE_TEST
from splitveil.private.core import LayerSpec
from splitveil.private.layer import publish
from splitveil.private.published import digest
from splitveil.serving import cache as cache_module
from splitveil.serving.cache import PublicationCache, default_folder
from splitveil.serving.publishing import ServedAdapter
from splitveil.serving.server import Server
from splitveil.serving.session import Session

ADDRESS = "127.0.0.1:7433"


def adapter(seed: int) -> ServedAdapter:
    draw = np.random.default_rng(seed)
    a, b = (draw.normal(size=shape).astype(np.float32) for shape in ((2, 16), (16, 2)))
    half, public = publish([LayerSpec(a, b, 1.0, (("m", 16),))], parameters=INSECURE_TEST, allow_insecure=True)
    data = public.to_bytes()
    return ServedAdapter(half, public, data, digest(data), 1024)


@pytest.fixture(scope="module")
def served() -> ServedAdapter:
    return adapter(0)


@pytest.fixture(scope="module")
def server(served: ServedAdapter) -> Iterator[Server]:
    with Server({"clinic": served, "other": adapter(1)}, "127.0.0.1:0") as running:
        yield running


@pytest.fixture
def cache(tmp_path: Path) -> PublicationCache:
    return PublicationCache(tmp_path / "cache")


def received(server: Server, cache: PublicationCache | None, name: str = "clinic") -> tuple[int, bytes]:
    """(bytes received, publication) of a session's opening."""
    pieces: list[int] = []
    session = Session(
        server.address, name, cache=cache, progress=lambda done, total: pieces.append(done), allow_insecure=True
    )
    session.close()
    return (pieces[-1] if pieces else 0), session.publication.id


def test_what_is_stored_is_loaded(cache: PublicationCache) -> None:
    assert cache.load(ADDRESS, "clinic") is None
    cache.store(ADDRESS, "clinic", b"first")
    cache.store(ADDRESS, "clinic", b"second")
    cache.store(ADDRESS, "other", b"third")
    assert cache.load(ADDRESS, "clinic") == b"second"
    assert cache.load(ADDRESS, "other") == b"third"
    assert cache.load("127.0.0.1:7434", "clinic") is None


def test_names_do_not_reach_the_file_system(tmp_path: Path) -> None:
    cache = PublicationCache(tmp_path / "cache")
    for name in ("../../escape", "/absolute", "nul\x00", "a" * 128, "ключ"):
        cache.store(ADDRESS, name, name.encode())
        assert cache.load(ADDRESS, name) == name.encode()
    assert {path.parent for path in tmp_path.rglob("*.safetensors")} == {tmp_path / "cache"}


def test_the_same_digest_is_not_downloaded_again(
    server: Server, served: ServedAdapter, cache: PublicationCache
) -> None:
    first = received(server, cache)
    assert first == (len(served.published), served.publication.id)
    assert received(server, cache) == (0, served.publication.id)
    assert received(server, None) == first
    assert received(server, cache, "other")[0] > 0


@pytest.mark.parametrize("kept", ["damaged", "truncated", "empty", "another's"])
def test_another_digest_is_downloaded_again(
    kept: str, server: Server, served: ServedAdapter, cache: PublicationCache
) -> None:
    data = served.published
    cache.store(
        server.address,
        "clinic",
        {"damaged": data[:-1] + b"\xff", "truncated": data[:99], "empty": b"", "another's": adapter(2).published}[kept],
    )
    assert received(server, cache) == (len(data), served.publication.id)
    assert received(server, cache) == (0, served.publication.id)


def test_a_broken_write_leaves_the_old_file(
    tmp_path: Path, cache: PublicationCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.store(ADDRESS, "clinic", b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_module.Path, "replace", full)
    cache.store(ADDRESS, "clinic", b"new")
    monkeypatch.undo()
    assert cache.load(ADDRESS, "clinic") == b"old"
    assert len(list((tmp_path / "cache").iterdir())) == 1, "no temporary files stay behind"


def test_readers_see_whole_files_while_others_write(tmp_path: Path, cache: PublicationCache) -> None:
    contents = [bytes([i]) * 300_000 for i in range(4)]
    cache.store(ADDRESS, "clinic", contents[0])
    seen: set[bytes | None] = set()

    def write(content: bytes) -> None:
        for _ in range(10):
            cache.store(ADDRESS, "clinic", content)

    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        seen.add(cache.load(ADDRESS, "clinic"))
    assert seen <= set(contents)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_folder_that_cannot_be_used_is_no_error(server: Server, served: ServedAdapter, tmp_path: Path) -> None:
    """A file in the folder's place, for one: that works for root too."""
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/none")):
        for _ in range(2):
            assert received(server, PublicationCache(folder)) == (len(served.published), served.publication.id)


def test_a_folder_in_the_files_place_is_no_error(server: Server, served: ServedAdapter, tmp_path: Path) -> None:
    cache = PublicationCache(tmp_path)
    cache.store(server.address, "clinic", b"x")
    (path,) = tmp_path.iterdir()
    path.unlink()
    (path / "sub").mkdir(parents=True)
    assert received(server, cache) == (len(served.published), served.publication.id)


def test_a_giant_file_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = PublicationCache(tmp_path)
    cache.store(ADDRESS, "clinic", bytes(101))
    monkeypatch.setattr(cache_module.codec, "MAX_PUBLICATION", 100)
    assert cache.load(ADDRESS, "clinic") is None


def test_where_publications_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPLITVEIL_CACHE", str(tmp_path / "own"))
    assert default_folder() == tmp_path / "own"
    monkeypatch.delenv("SPLITVEIL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_folder() == tmp_path / "xdg" / "splitveil"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_folder() == tmp_path / ".cache" / "splitveil"


def test_a_user_without_a_home_gets_no_cache(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("SPLITVEIL_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cache_module.Path, "home", homeless)
    assert default_folder() is None
    assert received(server, PublicationCache())[0] > 0
