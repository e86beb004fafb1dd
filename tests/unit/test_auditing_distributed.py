"""The same rows from a real Ray cluster of two nodes; dying workers, removed nodes and interruptions in between."""

import contextlib
import json
import logging
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from auditing_support import (
    SHADOW,
    UNITS,
    VICTIMS,
    Fake,
    create_attack,
    create_defence,
    lora,
    save_tiny,
    tiny_model,
    tiny_tokenizer,
)

from splitveil.attacks import catalogue
from splitveil.attacks.attack import Progress, Recovery, silent
from splitveil.auditing import cluster as cluster_module
from splitveil.auditing import distributed, received
from splitveil.auditing.audit import audit
from splitveil.auditing.cluster import joined
from splitveil.auditing.data import Text
from splitveil.auditing.grid import Grid, Step, Unit
from splitveil.auditing.metrics import METRICS
from splitveil.auditing.outcome import Report
from splitveil.auditing.rows import Row, Store
from splitveil.auditing.setting import Setting
from splitveil.auditing.shadow import given_shadow
from splitveil.auditing.windows import take_victims
from splitveil.defences import catalogue as defences
from splitveil.errors import ConfigurationError, ConnectionFailedError, ProtocolError, VersionError
from splitveil.split import Crossing

# Not imported here: what Ray reads from the environment when it is imported must be this test's own.
pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: pip install 'splitveil[ray]'")

TESTS = Path(__file__).resolve().parents[1]
MODEL, TOKENIZER = tiny_model(), tiny_tokenizer()
MARK = "SPLITVEIL_TEST_FOLDER"
"""Names the folder in which attacks of these tests leave word of themselves."""


class Slow(Fake):
    """Says which process it is in, and waits until it may go on."""

    name: ClassVar[str] = "slow"

    def recover(self, crossing: Crossing, progress: Progress) -> Recovery:
        folder = Path(os.environ[MARK])
        (folder / f"{self.name}-{os.getpid()}-{time.time_ns()}").touch()
        deadline = time.monotonic() + 60
        while (folder / "wait").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        return super().recover(crossing, progress)


class Fatal(Fake):
    """Takes its process with it."""

    name: ClassVar[str] = "fatal"

    def recover(self, crossing: Crossing, progress: Progress) -> Recovery:
        (Path(os.environ[MARK]) / f"{self.name}-{os.getpid()}-{time.time_ns()}").touch()
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


OURS: dict[str, Any] = {one.name: one for one in (Slow, Fatal)}


def create(name: str) -> Any:
    """By reference for workers: this module is on their path."""
    return OURS[name]() if name in OURS else create_attack(name)


def run(out: Path | None = None, **changes: Any) -> Report:
    how: dict[str, Any] = {
        "shadow": SHADOW,
        "cuts": (0, 2),
        "attacks": ("fake",),
        "tokens": 12,
        "windows": 20,
        "create_attack": create,
        "create_defence": create_defence,
    }
    return audit(MODEL, TOKENIZER, VICTIMS, out=out, **(how | changes))


def plain(rows: Any) -> dict[str, Row]:
    """By key, as text for NaN to be equal, without how long it took."""
    return {row.key: repr(replace(row, seconds=0.0)) for row in rows}  # type: ignore[misc]


@pytest.fixture(scope="module")
def started() -> Iterator[Any]:
    """Two nodes of one processor each, in a folder and on ports of their own, that only this test can talk to."""
    with tempfile.TemporaryDirectory(prefix="sv-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        patch = pytest.MonkeyPatch()
        marks = Path(folder) / "marks"
        marks.mkdir()
        (Path(folder) / "ray").mkdir()
        paths = os.pathsep.join([str(TESTS), str(TESTS / "unit"), *filter(None, [os.environ.get("PYTHONPATH")])])
        for name, value in {
            "PYTHONPATH": paths,
            "OMP_NUM_THREADS": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # loopback only
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": os.urandom(32).hex(),
            # A node that has gone is missed after one second and not after thirty.
            "RAY_health_check_initial_delay_ms": "0",
            "RAY_health_check_period_ms": "500",
            "RAY_health_check_failure_threshold": "2",
            "RAY_worker_niceness": "0",  # as the test itself: it waits for them
            "RAY_TMPDIR": folder,
            MARK: str(marks),
        }.items():
            patch.setenv(name, value)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        import ray
        from ray.cluster_utils import Cluster

        cluster = Cluster(shutdown_at_exit=True)
        try:
            node = {"num_cpus": 1, "include_dashboard": False, "node_ip_address": "127.0.0.1"}
            cluster.add_node(**node)
            cluster.add_node(**node)
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()
            torch.set_num_threads(threads)
            patch.undo()


@pytest.fixture
def apart(started: Any) -> str:
    """The cluster's address, with no connection to it."""
    import ray

    ray.shutdown()
    return str(started.address)


@pytest.fixture
def connected(started: Any) -> str:
    """One connection for many audits: each would start worker processes anew, which takes most of the time."""
    import ray

    if not ray.is_initialized():
        ray.init(started.address, log_to_driver=False, logging_level=logging.CRITICAL)
    return "auto"


@pytest.fixture
def marks(started: Any) -> Iterator[Path]:
    """Where attacks leave word; empty for each test."""
    folder = Path(os.environ[MARK])
    yield folder
    for mark in folder.iterdir():
        mark.unlink()


def initialized() -> bool:
    import ray

    return bool(ray.is_initialized())


def until(there: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 60
    while not (found := there()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)
    return found


def gone(process: int) -> bool:
    """Whether it has ended, waited for or not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


class Meanwhile(threading.Thread):
    """Does something while an audit runs; what went wrong in it fails the test."""

    def __init__(self, work: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self.work = work
        self.error: Exception | None = None
        self.done = False

    def run(self) -> None:
        try:
            self.work()
        except (AssertionError, OSError) as error:
            self.error = error
        else:
            self.done = True

    def __enter__(self) -> None:
        self.start()

    def __exit__(self, *_: object) -> None:
        self.join(70)
        assert self.error is None, self.error
        assert self.done


def test_rows_are_those_of_a_local_run(apart: str, tmp_path: Path) -> None:
    how: dict[str, Any] = {
        "cuts": (1,),
        "attacks": ("lens", "nearest", "ridge", "search"),
        "defences": ("none", "gaussian:0.3"),
        "create_attack": catalogue.create,
        "create_defence": defences.create,
        "budget": 60.0,
    }
    steps: list[Step] = []
    here = run(tmp_path / "here", **how)
    there = run(tmp_path / "there", **how, ray=apart, watch=steps.append)
    assert plain(here.rows) == plain(there.rows)
    assert here.valid
    assert there.valid
    assert len(there.scores) == 2 * (UNITS + 3)
    assert sorted(map(repr, here.texts)) == sorted(map(repr, there.texts))
    assert not initialized(), "the audit leaves the cluster when it is done"
    done = [step.done for step in steps]
    assert done == sorted(done)
    assert 0.0 <= done[0] < done[-1] < 1.0
    assert {step.units for step in steps} == {len(there.scores)}
    # What attackers learnt came back: another run on these folders has nothing to teach.
    names = [{path.name for path in (tmp_path / side / "fitted").iterdir()} for side in ("here", "there")]
    assert names[0] == names[1]


@pytest.mark.parametrize("knows", ["base", "personal"])
def test_personalised_devices_and_crossing_gradients_are_those_of_a_local_run(
    connected: str, tmp_path: Path, knows: str
) -> None:
    how: dict[str, Any] = {
        "cuts": (1,),
        "attacks": ("nearest", "gradient", "search"),
        "personal": lora(tmp_path / "mine", 0.3),
        "attacker_knows": knows,
        "training": True,
        "create_attack": catalogue.create,
        "steps": 5,
    }
    here, there = run(**how), run(**how, ray=connected)
    assert not [row.error for row in there.rows if row.error]
    assert plain(here.rows) == plain(there.rows)
    read = {row.attack: row.value for row in there.scores}
    assert read["gradient"] > 0.5
    assert (read["search"] > 0.99) == (knows == "personal"), "the workers' device half is the one that was said"


def test_units_that_learn_the_same_are_not_with_workers_together() -> None:
    """The second one waits, and what the first has learnt goes with it; others go ahead of it."""

    def unit(name: str, learnt: str) -> Unit:
        return Unit(1, "none", object(), name, 1, f"{name} fit", learnt)  # type: ignore[arg-type]

    revert, beam, ridge = unit("revert", "a"), unit("beam", "a"), unit("ridge", "b")
    waiting = object.__new__(distributed._Run)
    waiting.waiting, waiting.pending = deque([revert, beam, ridge]), {}
    taken = []
    while (one := waiting.next()) is not None:
        taken.append(one)
        waiting.pending[one.attack] = one
    assert taken == [revert, ridge]
    del waiting.pending["revert"]
    assert waiting.next() is beam
    assert not waiting.waiting


def test_a_unit_that_meets_other_software_is_tried_elsewhere(
    answered: tuple[Grid, Unit, bytes], tmp_path: Path
) -> None:
    """On a node that joined after the others were asked; three times, and its row then says why."""
    import ray

    class Elsewhere:
        exceptions = ray.exceptions

        @staticmethod
        def get(_: object) -> Any:
            raise ray.exceptions.RayTaskError("measure_unit", "", VersionError("a worker has other software"))

    grid, unit, _ = answered
    run = object.__new__(distributed._Run)
    run.cluster = cluster_module.Cluster(Elsewhere, 1, {})
    run.grid, run.store, run.tries, run.waiting = grid, Store(tmp_path), {}, deque()
    kept = []
    for _ in range(distributed.TRIES):
        run.pending = {"answer": unit}
        kept.append(run.collect("answer"))
    assert kept == [False] * (distributed.TRIES - 1) + [True]
    assert list(run.waiting) == [unit] * (distributed.TRIES - 1)
    (row,) = run.store.rows()
    assert row.error is not None
    assert row.error.endswith("last with VersionError")


def test_a_killed_worker_loses_no_row(connected: str, marks: Path, tmp_path: Path) -> None:
    (marks / "wait").touch()
    killed: list[int] = []

    def kill() -> None:
        mark = until(lambda: next(marks.glob("slow-*"), None))
        killed.append(int(mark.name.split("-")[1]))
        os.kill(killed[0], signal.SIGKILL)
        until(lambda: any(int(m.name.split("-")[1]) != killed[0] for m in marks.glob("slow-*")))
        (marks / "wait").unlink()

    with Meanwhile(kill):
        there = run(tmp_path, attacks=("slow", "fake"), ray=connected)
    assert killed
    assert len(list(marks.glob("slow-*"))) == 3, "two units, and one of them again"
    assert not [row for row in there.rows if row.error]
    assert plain(there.rows) == plain(run(attacks=("slow", "fake")).rows)


def test_a_unit_that_kills_every_worker_has_an_error_row(connected: str, marks: Path, tmp_path: Path) -> None:
    there = run(tmp_path, cuts=(0,), attacks=("fatal", "fake"), ray=connected)
    (row,) = [row for row in there.rows if row.attack == "fatal"]
    assert row.error is not None
    assert row.error.startswith(f"ConnectionFailedError: its worker was lost {distributed.TRIES} times")
    assert len(list(marks.glob("fatal-*"))) == distributed.TRIES
    assert len({int(mark.name.split("-")[1]) for mark in marks.glob("fatal-*")}) == distributed.TRIES
    others = [row for row in there.rows if row.attack != "fatal"]
    assert plain(others) == plain(run(cuts=(0,)).rows)


def test_a_removed_node_loses_no_row(started: Any, connected: str, marks: Path, tmp_path: Path) -> None:
    (marks / "wait").touch()
    (node,) = started.worker_nodes

    def remove() -> None:
        until(lambda: len(list(marks.glob("slow-*"))) == 2)  # both nodes are at it
        for raylet in node.all_processes["raylet"]:
            raylet.process.kill()
            raylet.process.wait()  # its workers look for it, and would still find a zombie
        until(lambda: any(gone(int(mark.name.split("-")[1])) for mark in marks.glob("slow-*")))
        (marks / "wait").unlink()

    try:
        with Meanwhile(remove):
            there = run(tmp_path, attacks=("slow", "fake"), ray=connected)
    finally:
        started.remove_node(node, allow_graceful=False)
        started.add_node(num_cpus=1, node_ip_address="127.0.0.1", include_dashboard=False)
    assert len(list(marks.glob("slow-*"))) >= 3, "the unit on the removed node was measured again"
    assert not [row for row in there.rows if row.error]
    assert plain(there.rows) == plain(run(attacks=("slow", "fake")).rows)


def test_an_interrupted_run_measures_what_is_missing(connected: str, tmp_path: Path) -> None:
    def interrupt(step: Step) -> None:
        if step.unit == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, ray=connected, watch=interrupt)
    content = (tmp_path / "rows.jsonl").read_bytes()
    assert {json.loads(line)["metric"] for line in content.splitlines()} >= set(METRICS)
    measured = sum(json.loads(line)["metric"] == METRICS[-1] for line in content.splitlines())
    assert measured == 3
    again = run(tmp_path, ray=connected)
    assert again.meta["units"] == {"asked": 2 * UNITS, "measured": 2 * UNITS - 3}
    assert (tmp_path / "rows.jsonl").read_bytes().startswith(content)
    assert plain(again.rows) == plain(run().rows)
    before = [path.stat().st_mtime_ns for path in sorted((tmp_path / "fitted").iterdir())]
    (tmp_path / "rows.jsonl").unlink()
    third = run(tmp_path, ray=connected)  # nothing is learnt anew, and nothing of it written again
    assert [path.stat().st_mtime_ns for path in sorted((tmp_path / "fitted").iterdir())] == before
    assert [row.seconds for row in third.scores if row.attack == "fake"] != []
    next((tmp_path / "fitted").iterdir()).write_bytes(b"broken")
    (tmp_path / "rows.jsonl").unlink()
    broken = run(tmp_path, ray=connected)
    assert [str(tmp_path) in str(row.error) and "delete it" in str(row.error) for row in broken.scores].count(True) == 1


def test_failures_are_error_rows_and_defects_stop(connected: str, tmp_path: Path) -> None:
    how: dict[str, Any] = {"cuts": (0,), "attacks": ("thief", "exhausted", "short", "fake")}
    failing = how | {"defences": ("none", "failing")}
    assert plain(run(**failing, ray=connected).rows) == plain(run(**failing).rows)
    with pytest.raises(KeyError, match="a defect"):
        run(tmp_path, cuts=(0,), attacks=("fake", "defective"), ray=connected)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert "defective" not in {row["attack"] for row in rows}


def test_a_worker_with_other_software_refuses_before_it_reads_anything() -> None:
    class Unread:
        def __getitem__(self, _: object) -> Any:
            raise AssertionError("the grid was fetched")

    expected = cluster_module.versions() | {"torch": "0.0"}
    with pytest.raises(VersionError, match=r"a worker has other software: torch .*, here 0\.0"):
        distributed.measure_unit("a run", Unread(), None, None, expected, 1)  # type: ignore[arg-type]


def test_other_software_is_refused_before_anything_is_measured(
    apart: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = cluster_module.versions()
    with monkeypatch.context() as patch:
        patch.setattr(distributed, "check_versions", None)
        for name in ("python", "ray", "splitveil", "torch"):
            with pytest.raises(VersionError, match=rf"{name} .*, here 0\.0"):
                cluster_module.check_versions(ours | {name: "0.0"}, ours, "a node")
    theirs = cluster_module.check_versions
    monkeypatch.setattr(
        cluster_module, "check_versions", lambda here, there, where: theirs({**here, "torch": "0.0"}, there, where)
    )
    with pytest.raises(VersionError, match=r"node 127\.0\.0\.1 \w+ has other software: torch .*, here 0\.0; install"):
        run(tmp_path, ray=apart)
    assert not (tmp_path / "rows.jsonl").exists()
    with pytest.raises(ConfigurationError, match="no node of the Ray cluster has 2 processors"):
        run(tmp_path, ray=apart, ray_cpus=2)
    assert not (tmp_path / "rows.jsonl").exists()


@pytest.mark.parametrize(
    ("address", "error", "said"),
    [
        ("somewhere", ConfigurationError, "--ray takes local, auto, HOST:PORT"),
        ("127.0.0.1:0", ConfigurationError, "--ray takes"),
        ("127.0.0.1:1", ConnectionFailedError, "no Ray cluster to join at 127.0.0.1:1: Connection refused"),
        ("ray://127.0.0.1:1", ConnectionFailedError, "Connection refused"),
    ],
)
def test_an_address_without_ray(apart: str, tmp_path: Path, address: str, error: type[Exception], said: str) -> None:
    begun = time.monotonic()
    with pytest.raises(error, match=said):
        run(tmp_path / "out", ray=address)
    assert time.monotonic() - begun < 20
    assert not (tmp_path / "out" / "rows.jsonl").exists()


def test_a_port_with_another_program(apart: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_module, "REACH_SECONDS", 4.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ConnectionFailedError, match="no Ray answered in 4 s"), joined(f"127.0.0.1:{port}"):
            pass


@pytest.fixture(scope="module")
def answered() -> tuple[Grid, Unit, bytes]:
    """A grid, one of its units, and what a worker would answer."""
    texts = [Text(text) for text in VICTIMS]
    victims = take_victims(TOKENIZER, texts, prompts=3, tokens=12, seed=0)
    shadow = given_shadow(TOKENIZER, SHADOW, VICTIMS, tokens=12, windows=20, seed=0)
    setting = Setting("model", "data", "", "", "", 0, 1.0)
    grid = Grid(MODEL, TOKENIZER, victims, shadow, setting, create_attack, create_defence)
    unit = grid.plan((0,), ("fake",), ("none",))[-1]
    with tempfile.TemporaryDirectory() as folder:
        rows, texts = grid.measure(unit, grid.prepared(unit), Store(Path(folder)), lambda doing: silent)
    return grid, unit, json.dumps({"rows": [row.as_dict() for row in rows], "texts": texts}).encode()


def test_a_failure_is_an_answer(answered: tuple[Grid, Unit, bytes]) -> None:
    grid, unit, _ = answered
    row = grid.failed(unit, ConfigurationError("a reason"), 1.0)
    rows, texts, _ = received.checked(grid, unit, (json.dumps({"rows": [row.as_dict()], "texts": []}).encode(), None))
    assert (plain(rows), texts) == (plain([row]), [])


def test_an_answer_is_taken_as_it_is(answered: tuple[Grid, Unit, bytes]) -> None:
    grid, unit, content = answered
    rows, texts, learnt = received.checked(grid, unit, (content, None))
    assert [row.metric for row in rows][-1] == METRICS[-1]
    assert len(texts) == len(VICTIMS)
    assert learnt is None


def _first(**changes: Any) -> Callable[[Any], Any]:
    return lambda found: found | {"rows": [found["rows"][0] | changes, *found["rows"][1:]]}


def _last(**changes: Any) -> Callable[[Any], Any]:
    return lambda found: found | {"rows": [*found["rows"][:-1], found["rows"][-1] | changes]}


def _without(text: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in text.items() if key != name}


@pytest.mark.parametrize(
    "change",
    [
        _first(key="0" * 64),
        _first(cut=1),
        _first(attack="oracle"),
        _first(model="another"),
        _first(value="much"),
        _first(surprise=1),
        lambda found: found | {"rows": []},
        lambda found: found | {"rows": found["rows"][:-1]},
        lambda found: found | {"rows": [found["rows"][-1], *found["rows"]]},
        lambda found: found | {"rows": [found["rows"][0], *found["rows"]]},
        lambda found: found | {"texts": found["texts"] * 2},
        lambda found: found | {"texts": [found["texts"][0] | {"cut": 1}]},
        lambda found: found | {"texts": [found["texts"][0] | {"prompt_index": 99}]},
        lambda found: found | {"texts": ["text"]},
        lambda found: found | {"rows": None},
        lambda found: list(found),
        lambda found: found | {"more": "x" * 2**21},
        _first(value=math.inf),
        _last(value=7, low=6, high=8),
        _first(low=0.9, high=0.1),
        _first(prompts="x"),
        _first(prompts=-3),
        _first(prompts=10**6),
        _first(prompts=True),
        _first(seconds=-1e9),
        _first(seconds=None),
        _first(error={}),
        _first(error=""),
        _first(metric="Unknown metric"),
        _last(value=None, low=None, high=None),
        _last(error="a reason, and figures beside it"),
        lambda found: found | {"rows": found["rows"][-1:]},
        lambda found: found | {"texts": []},
        lambda found: found | {"texts": [_without(text, "original") for text in found["texts"]]},
        lambda found: found | {"texts": [_without(text, "recovered") for text in found["texts"]]},
        lambda found: found | {"texts": [text | {"original": text["original"][::-1]} for text in found["texts"]]},
        lambda found: found | {"texts": [text | {"recovered": [1] * 99} for text in found["texts"]]},
        lambda found: (
            found | {"texts": [text | {"correct": ["yes"] * len(text["correct"])} for text in found["texts"]]}
        ),
        lambda found: found | {"texts": [text | {"more": math.nan} for text in found["texts"]]},
        lambda found: found | {"texts": found["texts"][::-1]},
    ],
)
def test_an_answer_that_is_not_the_units_is_refused(
    answered: tuple[Grid, Unit, bytes], change: Callable[[Any], Any]
) -> None:
    grid, unit, content = answered
    with pytest.raises(ProtocolError):
        received.checked(grid, unit, (json.dumps(change(json.loads(content))).encode(), None))


@pytest.mark.parametrize("learnt", ["text", b"too long"])
def test_what_was_learnt_is_bounded(
    answered: tuple[Grid, Unit, bytes], monkeypatch: pytest.MonkeyPatch, learnt: Any
) -> None:
    grid, unit, content = answered
    monkeypatch.setattr(received, "MAX_LEARNT", 7)
    with pytest.raises(ProtocolError, match="at most 7 bytes"):
        received.checked(grid, unit, (content, learnt))
    for other in (None, (content,), ("text", None)):
        with pytest.raises(ProtocolError, match="no measurement"):
            received.checked(grid, unit, other)


def test_without_ray_the_error_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'splitveil\[ray\]'"):
        run(tmp_path, ray="auto")
    assert run(tmp_path, cuts=(0,)).valid, "the local default does without"


def test_the_command_with_a_ray_of_its_own(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("\n".join(VICTIMS))
    (tmp_path / "shadow.txt").write_text("\n".join(SHADOW))
    words = "-m splitveil audit --model model --data prompts.txt --shadow shadow.txt --cut 0 --attack lens --tokens 12"
    words += " --windows 20 --out out --ray local --json"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"OMP_NUM_THREADS": "1", "HOME": str(tmp_path)}
    begun = subprocess.Popen(
        [sys.executable, *words.split()], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    listening: set[str] = set()
    while begun.poll() is None:
        listening |= addresses(begun.pid)
        time.sleep(0.3)
    said, complained = begun.communicate()
    assert begun.returncode == 0, complained
    summary = json.loads(said)  # and nothing but it
    assert summary["valid"]
    assert len(summary["scores"]) == UNITS
    assert not complained.strip()
    assert listening
    assert listening <= {"127.0.0.1"}, "only this machine may reach it"
    assert not (tmp_path / ".ray").exists(), "no token is left behind"


def addresses(process: int) -> set[str]:
    """Where a process and those that it started listen for TCP."""
    family, found = {process}, set()
    parents = {}
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    for _ in range(6):
        family |= {child for child, parent in parents.items() if parent in family}
    sockets = set()
    for member in family:
        with contextlib.suppress(OSError):
            for descriptor in Path(f"/proc/{member}/fd").iterdir():
                with contextlib.suppress(OSError):
                    sockets.add(str(descriptor.readlink()))
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and f"socket:[{words[9]}]" in sockets:
                place = words[1].partition(":")[0]
                found.add(".".join(str(byte) for byte in reversed(bytes.fromhex(place[-8:]))))
    return found
