"""A Ray to measure on: started on this machine, or joined; refused where it runs other software than this process.

Ray has neither its dashboard nor its usage statistics here, and says nothing: what the command prints stays its own.
"""

import hashlib
import logging
import os
import platform
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from splitveil.errors import ConfigurationError, ConnectionFailedError, VersionError

LOCAL = "local"
AUTO = "auto"
CLIENT = "ray://"
INSTALL = "pip install 'splitveil[ray]'"
REACH_SECONDS = 60.0
"""For a cluster to answer at all."""
WORKER_SECONDS = 180.0
"""For a node to start a process and import torch."""
_LOOPBACK = "127.0.0.1"
# Read when Ray is imported: where it is 0, a Ray that is started here listens on the loopback interface alone.
_REACHABLE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
_COMPARED = ("ray", "torch", "transformers", "numpy", "safetensors")
# Another process tries the address first: where no Ray answers, an attempt takes minutes and may end its process.
_TRY = """
import logging, sys, ray
try:
    ray.init(sys.argv[1], log_to_driver=False, logging_level=logging.CRITICAL)
except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
    print(type(error).__name__ + ": " + (str(error).splitlines() or [""])[0])
    sys.exit(3)
ray.shutdown()
"""


@dataclass(frozen=True)
class Cluster:
    """A Ray that this process is connected to."""

    ray: Any
    """The library."""
    cpus: int
    """Processors, and torch threads, of one task."""
    versions: Mapping[str, str]

    def nodes(self) -> list[dict[str, Any]]:
        """The nodes that are alive and have the processors for a task."""
        return [node for node in self.ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= self.cpus]

    def slots(self) -> int:
        """How many tasks fit at once."""
        return sum(int(node["Resources"]["CPU"] // self.cpus) for node in self.nodes())


def versions() -> dict[str, str]:
    """What must be equal on both sides for a row to be what it would have been here."""
    digest = hashlib.sha256()
    root = Path(__file__).resolve().parents[1]
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return {
        "python": ".".join(platform.python_version_tuple()[:2]),
        "splitveil": f"{metadata.version('splitveil')} (source {digest.hexdigest()[:12]})",
        **{name: metadata.version(name) for name in _COMPARED},
    }


def check_versions(expected: Mapping[str, str], found: Mapping[str, str], where: str) -> None:
    """Raises ``VersionError`` that names what differs."""
    differing = [f"{name} {found.get(name)}, here {version}" for name, version in expected.items()
                 if found.get(name) != version]  # fmt: skip
    if differing:
        raise VersionError(f"{where} has other software: {'; '.join(differing)}; install the same on both")


@contextmanager
def joined(address: str | None, cpus: int = 1) -> Iterator[Cluster | None]:
    """Connects to the Ray at ``address`` and checks its nodes; None for no address. Leaves it again afterwards.

    ``local`` starts one on this machine that only this user can reach, and ends it. ``auto``, ``HOST:PORT`` and
    ``ray://HOST:PORT`` join one. Raises ``ConfigurationError`` without the library, for an address that is none, and
    for a task that fits on no node; ``ConnectionFailedError`` where no Ray answers in ``REACH_SECONDS``;
    ``VersionError`` for a node with other software.
    """
    if address is None:
        yield None
        return
    if cpus < 1:
        raise ConfigurationError(f"a task takes at least one processor, got {cpus}")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    with _started(cpus) if address == LOCAL else _connected(address) as ray:
        cluster = Cluster(ray, cpus, versions())
        _check_nodes(cluster)
        yield cluster


def _library() -> Any:
    try:
        import ray
    except ImportError:
        raise ConfigurationError(f"--ray needs Ray, which is not installed: {INSTALL}") from None
    return ray


@contextmanager
def _started(cpus: int) -> Iterator[Any]:
    """A Ray of this process's own, with a token that no other user has and files that no other user reads."""
    asked = {_REACHABLE: "0", "RAY_AUTH_MODE": "token"}
    # Workers else yield to every other program, and learn less in the seconds that an attacker has.
    os.environ.setdefault("RAY_worker_niceness", "0")
    if "ray" not in sys.modules:
        os.environ.update(asked)
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    elif any(os.environ.get(name) != value for name, value in asked.items()):
        raise ConfigurationError(
            "Ray was imported before with other settings, and other users of this machine might reach it; set "
            f"{' '.join(f'{name}={value}' for name, value in asked.items())} before it is imported"
        )
    # Sockets lie in it, whose paths are short: not below a folder that a test or a system has named at length.
    folder = tempfile.mkdtemp(prefix="splitveil-ray-", dir="/tmp")
    ray = None
    try:
        ray = _library()
        _check_free(ray)
        ray.init(
            address=LOCAL,
            num_cpus=max(cpus, _processors()),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.CRITICAL,
            _node_ip_address=_LOOPBACK,
            _temp_dir=folder,
        )
        listening = {node["NodeManagerAddress"] for node in ray.nodes()}
        if listening != {_LOOPBACK}:
            raise ConfigurationError(f"this Ray listens at {', '.join(listening)} in spite of being told {_LOOPBACK}")
        yield ray
    finally:
        if ray is not None:
            ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _connected(address: str) -> Iterator[Any]:
    ray = _library()
    if ray.is_initialized() and address == AUTO:
        yield ray  # the caller's own connection, which stays
        return
    _check_free(ray)
    _reach(address)
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.CRITICAL)
    except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        raise _refusal(address, f"{type(error).__name__}: {error}") from None
    try:
        yield ray
    finally:
        ray.shutdown()


def _check_free(ray: Any) -> None:
    if ray.is_initialized():
        raise ConfigurationError(f"this process is connected to a Ray already: give {AUTO!r}, or call ray.shutdown()")


def _reach(address: str) -> None:
    """Raises ``ConnectionFailedError`` unless a Ray answers there."""
    if address != AUTO:
        host, colon, port = address.removeprefix(CLIENT).rpartition(":")
        if not (host and colon and port.isdecimal() and 0 < int(port) < 2**16):
            raise ConfigurationError(f"--ray takes {LOCAL}, {AUTO}, HOST:PORT or {CLIENT}HOST:PORT, got {address!r}")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        except OSError as error:
            raise _refusal(address, error.strerror or "no answer") from None
    try:
        done = subprocess.run(
            [sys.executable, "-c", _TRY, address],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            timeout=REACH_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise _refusal(address, f"no Ray answered in {REACH_SECONDS:.0f} s") from None
    if done.returncode:
        raise _refusal(address, done.stdout.strip() or f"Ray ended with status {done.returncode}")


def _refusal(address: str, reason: str) -> ConnectionFailedError | VersionError:
    said = next(iter(reason.strip().splitlines()), "")
    if "ersion mismatch" in said:
        return VersionError(f"the Ray at {address} has another version of Python or Ray: {said}")
    return ConnectionFailedError(
        f"no Ray cluster to join at {address}: {said}; HOST:PORT is for a machine that is one of its nodes "
        f"(ray start --address), {CLIENT}HOST:PORT for any other"
    )


def _check_nodes(cluster: Cluster) -> None:
    """Raises as ``joined`` does. One task a node says what is installed there."""
    ray, nodes = cluster.ray, cluster.nodes()
    if not nodes:
        raise ConfigurationError(f"no node of the Ray cluster has {cluster.cpus} processors for a task")
    pinned = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
    # No processor is asked for: a cluster that is busy can still say what it runs.
    ask = ray.remote(num_cpus=0, max_retries=1)(versions)
    answers = {
        node["NodeManagerAddress"] + " " + node["NodeID"][:8]: ask.options(
            scheduling_strategy=pinned(node["NodeID"], soft=False)
        ).remote()
        for node in nodes
    }
    deadline = time.monotonic() + WORKER_SECONDS
    for where, answer in answers.items():
        try:
            found = ray.get(answer, timeout=max(0.0, deadline - time.monotonic()))
        except ray.exceptions.GetTimeoutError:
            raise ConnectionFailedError(f"node {where} started no worker in {WORKER_SECONDS:.0f} s") from None
        except ray.exceptions.RayError as error:
            said = [line for line in str(error).splitlines() if line.strip()][-1:]
            raise VersionError(
                f"node {where} cannot run this audit, Splitveil must be installed there: {''.join(said).strip()}"
            ) from None
        check_versions(cluster.versions, found, f"node {where}")


def _processors() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
