"""For all tests of the command line."""

from pathlib import Path

import pytest
from command_line import Here


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Here:
    monkeypatch.setenv("SPLITVEIL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("splitveil.serving.operations.logs.configure", lambda **_: None)  # the log is the tests'
    return Here(monkeypatch, capfd)
