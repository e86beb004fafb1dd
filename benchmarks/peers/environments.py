"""A virtual environment for each peer's package, made once and kept; a peer without one has a reason."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from peers.catalogue import Peer

INSTALL_SECONDS = 600
SINGLE = {
    f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL", "RAYON", "NUMBA", "VECLIB", "NUMEXPR")
}
"""One thread each."""


class UnavailableError(Exception):
    """This peer cannot be measured here; the text says why."""


class Environments:
    """Interpreters in which the peers' packages are installed, under ``folder``."""

    def __init__(self, folder: Path, pythons: dict[str, str]) -> None:
        self._folder = folder
        self._pythons = pythons
        self._known: dict[str, Path | UnavailableError] = {}

    def python(self, peer: Peer) -> Path:
        """The interpreter for this peer; its environment is made if need be. Raises ``UnavailableError``."""
        if peer.pin is None:
            if peer.module is not None and importlib.util.find_spec(peer.module) is None:
                raise UnavailableError(f"{peer.package} is not installed: pip install {peer.package}")
            return Path(sys.executable)
        if peer.package not in self._known:
            try:
                self._known[peer.package] = self._made(peer)
            except UnavailableError as error:
                self._known[peer.package] = error
        known = self._known[peer.package]
        if isinstance(known, UnavailableError):
            raise known
        return known

    def _made(self, peer: Peer) -> Path:
        base = self._interpreter(peer)
        label = command([base, "-c", "import sys; print('py%d.%d' % sys.version_info[:2])"], "does not run", 60)
        folder = self._folder / f"{peer.package}-{peer.pin}-{label.strip()}"
        python, ready = folder / "bin" / "python", folder / "ready"
        if not ready.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            command([base, "-m", "venv", "--clear", str(folder)], "no virtual environment", INSTALL_SECONDS)
            install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--only-binary", ":all:"]
            command(
                [str(python), *install, f"{peer.package}=={peer.pin}", "numpy>=2,<3"], "not installed", INSTALL_SECONDS
            )
            ready.touch()
        command([str(python), "-c", f"import {peer.module}"], f"its wheel does not import on {label.strip()}", 120)
        return python

    def _interpreter(self, peer: Peer) -> str:
        if peer.package in self._pythons:
            return self._pythons[peer.package]
        for name in peer.pythons:
            found = shutil.which(name)
            # A version manager's stand-in may be on the path for a version that it does not offer.
            if found and subprocess.run([found, "-c", ""], capture_output=True, check=False).returncode == 0:
                return found
        return sys.executable


def command(words: list[str], failure: str, seconds: float) -> str:
    """Standard output of a command, one thread. Raises ``UnavailableError`` with what went wrong."""
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=seconds, check=False, env={**os.environ, **SINGLE}
        )
    except subprocess.TimeoutExpired:
        raise UnavailableError(f"{failure}: not finished within {seconds:g} s") from None
    except OSError as error:
        raise UnavailableError(f"{failure}: {error.strerror or error}") from None
    if done.returncode < 0:
        raise UnavailableError(f"{failure}: ended by signal {-done.returncode}")
    if done.returncode > 0:
        lines = done.stderr.strip().splitlines()
        raise UnavailableError(f"{failure}: {lines[-1].strip()[:200] if lines else f'exit status {done.returncode}'}")
    return done.stdout
