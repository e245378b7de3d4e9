"""What integration tests share: scratch folders, fresh databases, and real servers that start when the first test asks for one.

Most of these tests wait for a server or for a time to pass, so two processes run them (`pytest --numprocesses 2`), a file at a time and
each with servers of its own. Those that make a load of their own and judge how fast it is carried come first and one after another.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from xdist.scheduler import LoadFileScheduling

from tests.support.folders import scratch_dir

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from xdist.remote import Producer

    from tests.servers.rabbitmq import RabbitCluster
    from tests.servers.redis import RedisServer

LOADS = {"test_storm.py", "test_worker_celery.py", "test_priority_under_load.py", "test_kill_nine.py"}


class OneLoadAtATime(LoadFileScheduling):
    """Gives each process a file at a time, and all of `LOADS` to one."""

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return "loads" if Path(file).name in LOADS else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> OneLoadAtATime:
    """Decide how several processes share the tests."""
    # By the number of a file's tests, which is its default, the longest would come last, when nothing is left to run beside them.
    config.option.loadscopereorder = False
    return OneLoadAtATime(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let what takes longest come first."""
    items.sort(key=lambda item: (item.path.name not in LOADS, item.get_closest_marker("slow") is None))


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder of the test's own, gone after it."""
    yield from scratch_dir()


@pytest.fixture
async def database() -> AsyncIterator[str]:
    """The URL of an empty, migrated database of the test's own."""
    from tests.support.postgres import fresh_database

    async with fresh_database() as url:
        yield url


@pytest.fixture(scope="session")
def _rabbitmq_of_this_run() -> Iterator[RabbitCluster]:
    from tests.servers.rabbitmq import RabbitCluster

    for folder in scratch_dir():
        with RabbitCluster(folder) as cluster:
            yield cluster


@pytest.fixture
def rabbitmq(_rabbitmq_of_this_run: RabbitCluster) -> Iterator[RabbitCluster]:
    """A cluster of three, healthy before the test and after it, whatever the test does to it."""
    _rabbitmq_of_this_run.restore()
    yield _rabbitmq_of_this_run
    _rabbitmq_of_this_run.restore()


@pytest.fixture
def rabbit_vhost(rabbitmq: RabbitCluster) -> Iterator[str]:
    """A virtual host of the test's own."""
    name = rabbitmq.new_vhost()
    yield name
    rabbitmq.restore()
    rabbitmq.delete_vhost(name)


@pytest.fixture(scope="module")
def _redis_of_this_module() -> Iterator[RedisServer]:
    from tests.servers.redis import RedisServer

    for folder in scratch_dir():
        with RedisServer(folder) as server:
            yield server


@pytest.fixture
def redis_server(_redis_of_this_module: RedisServer) -> RedisServer:
    """A Redis that runs; other tests of the module have left their data in it."""
    _redis_of_this_module.start()
    return _redis_of_this_module
