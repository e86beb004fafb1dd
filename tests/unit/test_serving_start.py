"""What a server says when it starts about what it does not protect, and the one set of weights under two names."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from splitveil.embedded import folder
from splitveil.errors import ConfigurationError, DataError
from splitveil.metering import Database
from splitveil.metering.storage.sites import in_force
from splitveil.serving.directions import FILE
from splitveil.serving.serve import reload, serve
from splitveil.serving.server import Server

ATTACK = 127
"""Rows after which the best known attack has a layer of the embedded adapter within 10 %, of 256 inputs."""
WEIGHTS = "adapter_model.safetensors"

Warned = Callable[[], list[str]]


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'ledger.sqlite'}"


@pytest.fixture
def warned(caplog: pytest.LogCaptureFixture) -> Warned:
    """The events that were warned of since the last call, each of them one line."""

    def found() -> list[str]:
        events = []
        for record in caplog.records:
            if hasattr(record, "event") and record.levelname == "WARNING":
                assert len(record.getMessage().splitlines()) == 1
                events.append(record.event)
        caplog.clear()
        return events

    return found


def started(**how: object) -> Server:
    return serve({"clinic": folder("clinic")}, "127.0.0.1:0", **how)  # type: ignore[arg-type]


def test_a_server_that_counts_nothing_says_so_at_every_start(warned: Warned, url: str) -> None:
    for _ in range(2):
        started().close()
        assert warned() == ["rows_not_counted"]
    started(ledger=url).close()
    assert warned() == []


def test_a_limit_within_which_a_layer_is_learned_is_warned_of(
    warned: Warned, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    started(ledger=url, limit=ATTACK - 1).close()
    assert warned() == []
    started(ledger=url, limit=ATTACK).close()
    assert "a limit of 127 rows does not protect adapter clinic: after 127 its" in caplog.text
    assert warned() == ["limit_too_high"]
    started(ledger=url, limit=255, noise=3.0).close()
    assert warned() == [], "with much noise no attack needs less than d rows"
    started(ledger=url, limit=256, noise=3.0).close()
    assert warned() == ["limit_too_high"]


def test_directions_that_were_not_measured_are_warned_of(tmp_path: Path, warned: Warned, url: str) -> None:
    """The ledger's figure is then that of an attacker without the base model. Measured ones are declared, and heard."""
    adapter = tmp_path / "adapter"
    shutil.copytree(folder("clinic"), adapter)
    kept = (adapter / FILE).read_bytes()
    (adapter / FILE).unlink()
    folders = {"clinic": adapter}
    with serve(folders, "127.0.0.1:0", ledger=url) as server:
        assert warned() == ["directions_not_measured"]
        with Database(url) as database:
            assert not any("directions" in facts.facts for facts in in_force(database).values())
            (adapter / FILE).write_bytes(kept)
            reload(server, folders)
            assert all("directions" in facts.facts for facts in in_force(database).values())
    serve(folders, "127.0.0.1:0", engine="sealed", ledger=url).close()
    assert warned() == [], "of the sealed engine no figure is given"


def test_directions_of_other_layers_are_refused(tmp_path: Path, url: str) -> None:
    adapter = shutil.copytree(folder("clinic"), tmp_path / "adapter")
    kept = json.loads((adapter / FILE).read_text())
    first = next(iter(kept["layers"]))
    for layers in (
        {},
        {name: curves for name, curves in kept["layers"].items() if name != first},
        kept["layers"] | {first: []},
        kept["layers"] | {first: [{"counts": [64], "outside": [0.5], "peak": 1.0}]},
        kept["layers"] | {"other": kept["layers"][first]},
    ):
        (adapter / FILE).write_text(json.dumps(kept | {"layers": layers}))
        with pytest.raises(DataError, match="no curve of all inputs"):
            serve({"clinic": adapter}, "127.0.0.1:0", ledger=url)


def test_directions_of_other_weights_are_refused(tmp_path: Path, url: str, warned: Warned) -> None:
    adapter = shutil.copytree(folder("clinic"), tmp_path / "adapter")
    folders = {"clinic": adapter}
    with serve(folders, "127.0.0.1:0", ledger=url) as server:
        before = server.source("clinic")
        save_file({name: np.negative(one) for name, one in load_file(adapter / WEIGHTS).items()}, adapter / WEIGHTS)
        reload(server, folders)
        assert server.source("clinic") == before
    with pytest.raises(DataError, match="measured of other weights"):
        serve(folders, "127.0.0.1:0", ledger=url)


def test_one_adapter_under_two_names_is_refused_where_rows_are_counted(tmp_path: Path, url: str) -> None:
    copy = shutil.copytree(folder("clinic"), tmp_path / "copy")
    twice = {"clinic": folder("clinic"), "law": copy}
    for counted in ({"limit": 10}, {}):
        with pytest.raises(ConfigurationError, match=r"'clinic' and 'law' are one adapter.*one name"):
            serve(twice, "127.0.0.1:0", ledger=url, **counted)
    serve(twice, "127.0.0.1:0").close()


def test_nor_does_an_adapter_become_another(tmp_path: Path, url: str, warned: Warned) -> None:
    """By replacing one adapter with the weights of another that is served."""
    other = shutil.copytree(folder("clinic"), tmp_path / "other", ignore=shutil.ignore_patterns(FILE))
    save_file({name: np.negative(tensor) for name, tensor in load_file(other / WEIGHTS).items()}, other / WEIGHTS)
    folders = {"clinic": folder("clinic"), "law": other}
    with serve(folders, "127.0.0.1:0", ledger=url, limit=10) as server:
        before = server.source("law")
        shutil.copy(folder("clinic") / WEIGHTS, other / WEIGHTS)
        reload(server, folders)
        assert server.source("law") == before
        with pytest.raises(ConfigurationError, match="are one adapter"):
            server.replace("law", server._service.adapters["clinic"])
        server.replace("clinic", server._service.adapters["clinic"])  # its own again
