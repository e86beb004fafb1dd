"""The gauge key: made once, kept, the same for all, and for nobody else's eyes."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from splitveil.embedded import folder
from splitveil.errors import ConfigurationError
from splitveil.lattice.randomness import derived_key, secret_bytes, secret_normals
from splitveil.private.core import LayerSpec, gauged
from splitveil.serving.gauge_key import SIZE, default_path, gauge_key
from splitveil.serving.serve import serve


def test_it_is_made_once_and_kept(tmp_path: Path) -> None:
    file = tmp_path / "state" / "gauge.key"
    key = gauge_key(file)
    assert len(key) == SIZE
    assert gauge_key(file) == key == file.read_bytes()
    assert file.stat().st_mode & 0o777 == 0o600
    assert [entry.name for entry in file.parent.iterdir()] == ["gauge.key"]
    assert gauge_key(tmp_path / "other") != key


def test_servers_that_start_together_get_the_same(tmp_path: Path) -> None:
    with ThreadPoolExecutor(16) as threads:
        keys = list(threads.map(lambda _: gauge_key(tmp_path / "gauge.key"), range(64)))
    assert len(set(keys)) == 1


def test_its_default_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    assert default_path() == tmp_path / "state/splitveil/gauge.key"
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_path() == tmp_path / ".local/state/splitveil/gauge.key"


def test_what_is_no_key_is_refused_and_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "gauge.key"
    file.write_bytes(b"short")
    file.chmod(0o600)
    with pytest.raises(ConfigurationError, match="has 5 bytes, expected 32"):
        gauge_key(file)
    assert file.read_bytes() == b"short"
    file.write_bytes(os.urandom(32))
    file.chmod(0o644)
    with pytest.raises(ConfigurationError, match="may be read by others"):
        gauge_key(file)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigurationError, match="--gauge-key"):
        gauge_key(tmp_path / "file" / "gauge.key")
    with pytest.raises(ConfigurationError):
        gauge_key(tmp_path)


def test_a_server_publishes_the_same_weights_in_the_same_gauge_at_every_start(tmp_path: Path) -> None:
    def started(key: Path) -> list[tuple[bytes | None, int, float]]:
        with serve({"clinic": folder("clinic")}, "127.0.0.1:0", gauge_key=key) as server:
            layers = server._service.adapters["clinic"].publication.layers
            return [(None if one.Q is None else one.Q.tobytes(), one.norm_bound, one.step) for one in layers]

    first = started(tmp_path / "one")
    assert started(tmp_path / "one") == first
    other = started(tmp_path / "two")
    assert all(a[0] != b[0] for a, b in zip(first, other, strict=True))
    assert [a[1] for a in first] != [b[1] for b in other]


def test_the_gauge_is_a_function_of_the_key_and_of_all_of_the_weights() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(3, 16)).astype(np.float32), rng.normal(size=(8, 3)).astype(np.float32)
    key, other = bytes(32), bytes(31) + b"\x01"

    def frame(a: np.ndarray, b: np.ndarray, scale: float, key: bytes | None) -> bytes:
        q, core = gauged(LayerSpec(a, b, scale, (("m", 8),)), key)
        assert q is not None
        np.testing.assert_allclose(q @ core, scale * b.astype(np.float64) @ a, atol=1e-10)
        np.testing.assert_allclose(q.T @ q, np.eye(3), atol=1e-12)
        return q.tobytes()

    nudged_a, nudged_b = a.copy(), b.copy()
    nudged_a[2, 5] = np.nextafter(nudged_a[2, 5], np.float32(9))
    nudged_b[7, 2] = np.nextafter(nudged_b[7, 2], np.float32(9))
    frames = [
        frame(a, b, 1.0, key),
        frame(a, b, 1.0, other),
        frame(a, b, 2.0, key),
        frame(nudged_a, b, 1.0, key),
        frame(a, nudged_b, 1.0, key),
        frame(a, b, 1.0, None),
        frame(a, b, 1.0, None),
    ]
    assert len(set(frames)) == len(frames)
    assert frame(a, b, 1.0, key) == frames[0]


def test_derived_keys() -> None:
    master = bytes(32)
    keys = {derived_key(master, *case) for case in ((b"a", b"bc"), (b"ab", b"c"), (b"a", b""), (b"", b"abc"))}
    assert len(keys) == 4
    assert all(len(key) == 32 for key in keys)
    with pytest.raises(ValueError, match="32 bytes"):
        derived_key(b"short", b"a", b"b")
    key = derived_key(master, b"a", b"b")
    assert np.array_equal(secret_normals(7, key), secret_normals(7, key))
    assert not np.array_equal(secret_bytes(64, key), secret_bytes(64))
