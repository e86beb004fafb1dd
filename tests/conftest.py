"""For all tests: one thread each, and what a server keeps between starts goes into a folder of the tests' own."""

import os
from collections.abc import Iterator

import pytest

# Before torch and numpy are there, for the processes that tests start, too. Several workers with several
# threads each would wait for each other's.
for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(name, "1")


@pytest.fixture(scope="session", autouse=True)
def state_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield
