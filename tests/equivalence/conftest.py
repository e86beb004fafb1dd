"""One thread for torch, and a publication cache of the tests' own."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def one_thread_and_own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPLITVEIL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["lattice", "plain"])
def engine(request: pytest.FixtureRequest) -> str:
    """Both engines: what fails with "plain" too is not the encryption's fault."""
    return request.param
