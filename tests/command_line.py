"""The command line in this process: the same without the seconds that a process takes to begin."""

import io
import subprocess
import sys

import pytest

from splitveil import cli


class Here:
    """Runs commands as a shell would; a traceback is an exception in the test."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capfd = monkeypatch, capfd

    def run(self, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        self._monkeypatch.setattr(sys, "argv", ["splitveil", *arguments])
        self._monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        self._capfd.readouterr()
        status = cli._run()
        return subprocess.CompletedProcess(arguments, status, *self._capfd.readouterr())


def one_line_error(done: "subprocess.CompletedProcess[str]", *parts: str) -> None:
    """Exit status 1, one line on stderr that says what is wrong, no traceback."""
    assert done.returncode == 1, done
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("splitveil: ")
    for part in parts:
        assert part in lines[0]
