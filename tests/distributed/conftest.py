"""The pools of worker processes, one per number of ranks, shared by all tests of this folder."""

from collections.abc import Callable, Iterator

import pytest

from tests.distributed.pool import Pool


@pytest.fixture(scope="session")
def _pools() -> Iterator[dict[int, Pool]]:
    pools: dict[int, Pool] = {}
    yield pools
    for pool in pools.values():
        pool.end()


@pytest.fixture
def ranks(_pools: dict[int, Pool]) -> Callable[[int], Pool]:
    """Return the pool of so many ranks, started or still running."""

    def pool(count: int) -> Pool:
        if count not in _pools or not _pools[count].alive:
            _pools[count] = Pool(count)
        return _pools[count]

    return pool
