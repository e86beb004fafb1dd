"""Runs every command and every Python block of the README, in order, as a newcomer would: ``python tests/readme.py``.

The ``make`` commands are left to the caller. Bash blocks share one shell: a server started in one is there in the next.
What servers keep is in a folder of the run's own: the rows of earlier runs stay spent elsewhere. What an earlier run
left in the folders that the README names is removed first: a newcomer has none of it.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def blocks(language: str) -> list[str]:
    """All fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)


def clear() -> None:
    """Removes files and folders in /tmp that the README's commands make, by the names they have there."""
    for name in sorted(set(re.findall(r"/tmp/splitveil-[\w.-]*\w", (ROOT / "README.md").read_text()))):
        path = Path(name)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def main() -> None:
    """Raises ``CalledProcessError`` for the first command that fails."""
    shell = [block for block in blocks("bash") if not block.startswith("make ")]
    python = blocks("python")
    if not shell or not python:
        sys.exit("the README has no commands left to run")
    clear()
    with tempfile.NamedTemporaryFile("w", suffix=".sh") as script, tempfile.TemporaryDirectory() as state:
        script.write(
            "set -euo pipefail -o monitor\ntrap 'kill $(jobs -p) 2>/dev/null || true' EXIT\n" + "\n".join(shell)
        )
        script.flush()
        environment = {**os.environ, "XDG_STATE_HOME": state}
        subprocess.run(["bash", "-x", script.name], cwd=ROOT, check=True, timeout=600, env=environment)
    for block in python:
        subprocess.run([str(ROOT / ".venv/bin/python"), "-c", block], cwd=ROOT, check=True, timeout=600)
    print(f"README: {len(shell)} shell blocks and {len(python)} Python blocks ran")


if __name__ == "__main__":
    main()
