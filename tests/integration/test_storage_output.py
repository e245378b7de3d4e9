"""Output: kept whole and in order, the streams apart, from nothing to 100 MB, without ever being held in memory whole."""

from __future__ import annotations

import asyncio
import hashlib
import random
import shutil
from typing import TYPE_CHECKING

import psutil
import pytest

from crucible import contracts as c
from crucible.evaluation import Reason, State
from crucible.events import EventType
from crucible.frames import HEADER, MAX_PAYLOAD, Frame, Kind, encode_all
from crucible.limits import Limits
from crucible.resilience import CallFailedError
from tests.support.storage import Bench, running_storage

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

pytestmark = pytest.mark.integration

MIB = 1024 * 1024


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    async with running_storage() as bench:
        yield bench


async def running(bench: Bench) -> str:
    record = await bench.submit()
    await bench.claim_one()
    await bench.start(record.id)
    return record.id


async def ship(bench: Bench, evaluation_id: str, batches: Sequence[Sequence[Frame]], *, attempt: int = 1) -> None:
    told = 0
    for batch in batches:
        told += len(batch)
        present = await bench.client.append_output(evaluation_id, batch, attempt=attempt, frame=told - len(batch))
        assert present == told


async def all_frames(bench: Bench, evaluation_id: str, limit: int = 1000) -> list[Frame]:
    frames: list[Frame] = []
    after = 0
    while True:
        more, after = await bench.client.frames(evaluation_id, after=after, limit=limit)
        if not more:
            return frames
        frames += more
        assert after == len(frames)


async def objects_of(bench: Bench) -> int:
    return int((await bench.sql("SELECT count(*) AS n FROM objects"))[0]["n"])


def streams(frames: Sequence[Frame]) -> tuple[bytes, bytes]:
    out, err = (b"".join(f.payload for f in frames if f.kind is kind) for kind in (Kind.STDOUT, Kind.STDERR))
    return out, err


def random_frames(seed: int, total: int, largest: int) -> list[Frame]:
    """Frames of both streams with random bytes, NUL and invalid UTF-8 among them."""
    chance = random.Random(seed)
    frames = []
    size = 0
    while size < total:
        payload = chance.randbytes(chance.randint(1, largest))
        frames.append(Frame(chance.choice([Kind.STDOUT, Kind.STDERR]), len(frames), payload))
        size += len(payload)
    return frames


def split(frames: Sequence[Frame], per_batch: int) -> list[list[Frame]]:
    return [list(frames[start : start + per_batch]) for start in range(0, len(frames), per_batch)]


# -- small


async def test_both_streams_are_kept_apart_and_their_order_too(bench: Bench) -> None:
    evaluation_id = await running(bench)
    frames = [
        Frame(Kind.STDOUT, 1, b"one\n"),
        Frame(Kind.STDERR, 2, b"two\n"),
        Frame(Kind.STDERR, 2, b""),
        Frame(Kind.STDOUT, 9, "שלוש\x00".encode()),
    ]
    await ship(bench, evaluation_id, [frames[:2], frames[2:]])
    out, err = streams(frames)
    assert await bench.client.output(evaluation_id, "stdout") == (out, len(out))
    assert await bench.client.output(evaluation_id, "stderr") == (err, len(err))
    assert await all_frames(bench, evaluation_id) == frames
    record = await bench.client.get(evaluation_id)
    assert (record.stdout, record.stderr) == (c.OutputInfo(size=len(out)), c.OutputInfo(size=len(err)))
    final = await bench.finish(evaluation_id)
    assert final.stdout == c.OutputInfo(size=len(out), sha256=hashlib.sha256(out).hexdigest())
    assert final.stderr == c.OutputInfo(size=len(err), sha256=hashlib.sha256(err).hexdigest())
    assert await objects_of(bench) == 0


async def test_no_output_is_empty_output(bench: Bench) -> None:
    final = await bench.run_one()
    empty = c.OutputInfo(size=0, sha256=hashlib.sha256(b"").hexdigest())
    assert (final.stdout, final.stderr) == (empty, empty)
    assert await bench.client.output(final.id, "stdout") == (b"", 0)
    assert await bench.client.frames(final.id) == ([], 0)


async def test_a_frame_sent_again_is_ignored(bench: Bench) -> None:
    evaluation_id = await running(bench)
    present = 0
    for number in (0, 0, 1, 0, 1, 2, 2):
        present = max(present, number + 1)
        frames = [Frame(Kind.STDOUT, 0, f"{number}".encode())]
        assert await bench.client.append_output(evaluation_id, frames, attempt=1, frame=number) == present
    assert await bench.client.output(evaluation_id, "stdout") == (b"012", 3)


async def test_of_frames_that_overlap_only_the_new_ones_are_taken(bench: Bench) -> None:
    evaluation_id = await running(bench)
    frames = random_frames(11, 40_000, 500)
    chance = random.Random(12)
    present = 0
    while present < len(frames):
        first = chance.randint(max(0, present - 9), present)
        last = min(len(frames), first + chance.randint(0, 20))
        present = max(present, last)
        assert await bench.client.append_output(evaluation_id, frames[first:last], attempt=1, frame=first) == present
    assert await all_frames(bench, evaluation_id) == frames
    final = await bench.finish(evaluation_id)
    assert final.stdout.sha256 == hashlib.sha256(streams(frames)[0]).hexdigest()


async def test_two_who_ship_the_same_output_at_once_ship_it_once(bench: Bench) -> None:
    evaluation_id = await running(bench)
    frames = random_frames(13, 6 * MIB, 60_000)

    async def ship_by(most: int, seed: int) -> None:
        chance = random.Random(seed)
        position = 0
        while position < len(frames):
            count = chance.randint(1, most)
            await bench.client.append_output(
                evaluation_id, frames[position : position + count], attempt=1, frame=position
            )
            position += count

    await asyncio.gather(ship_by(3, 1), ship_by(7, 2), ship_by(20, 3))
    assert await all_frames(bench, evaluation_id) == frames


async def test_no_frames_ask_how_many_there_are(bench: Bench) -> None:
    evaluation_id = await running(bench)
    assert await bench.client.append_output(evaluation_id, [], attempt=1, frame=0) == 0
    await ship(bench, evaluation_id, split(random_frames(14, 3000, 90), 7))
    present = len(await all_frames(bench, evaluation_id))
    assert await bench.client.append_output(evaluation_id, [], attempt=1, frame=0) == present
    with pytest.raises(CallFailedError) as caught:
        await bench.client.append_output(evaluation_id, [], attempt=2, frame=0)
    assert caught.value.slug == "stale-attempt"


async def test_frames_sent_twenty_times_at_once_counts_once(bench: Bench) -> None:
    evaluation_id = await running(bench)
    batch = [Frame(Kind.STDOUT, 0, b"once")]
    await asyncio.gather(*(bench.client.append_output(evaluation_id, batch, attempt=1, frame=0) for _ in range(20)))
    assert await bench.client.output(evaluation_id, "stdout") == (b"once", 4)


async def test_a_gap_between_frames_is_refused(bench: Bench) -> None:
    evaluation_id = await running(bench)
    with pytest.raises(CallFailedError, match="frame 1 came before frame 0") as caught:
        await bench.client.append_output(evaluation_id, [Frame(Kind.STDOUT, 0, b"x")], attempt=1, frame=1)
    assert caught.value.slug == "conflict"


@pytest.mark.parametrize("body", [b"junk", encode_all([Frame(Kind.STDOUT, 0, b"abc")])[:-1], HEADER.pack(9, 0, 0)])
async def test_what_is_not_frames_is_refused(bench: Bench, body: bytes) -> None:
    evaluation_id = await running(bench)
    response = await bench.client._http.post(
        f"/internal/evaluations/{evaluation_id}/output", params={"attempt": 1, "frame": 0}, content=body
    )
    assert (response.status_code, response.json()["type"]) == (422, "/problems/invalid-request")


@pytest.mark.parametrize("kind", [Kind.STARTED, Kind.REPORT])
async def test_frames_that_are_no_output_are_refused(bench: Bench, kind: Kind) -> None:
    evaluation_id = await running(bench)
    with pytest.raises(CallFailedError) as caught:
        await bench.client.append_output(evaluation_id, [Frame(kind, 0, b"{}")], attempt=1, frame=0)
    assert caught.value.slug == "invalid-request"


async def test_a_body_beyond_all_measure_is_refused_before_it_is_read_whole(bench: Bench) -> None:
    evaluation_id = await running(bench)
    body = encode_all([Frame(Kind.STDOUT, 0, bytes(MAX_PAYLOAD)) for _ in range(17)])
    response = await bench.client._http.post(
        f"/internal/evaluations/{evaluation_id}/output", params={"attempt": 1, "frame": 0}, content=body
    )
    assert response.status_code == 413


async def test_followers_hear_that_there_is_more_to_read(bench: Bench) -> None:
    evaluation_id = await running(bench)
    with bench.bus.subscribe(lambda event: event.type is EventType.OUTPUT) as heard:
        await bench.client.append_output(evaluation_id, [Frame(Kind.STDERR, 0, b"abc")], attempt=1, frame=0)
        await bench.client.append_output(evaluation_id, [], attempt=1, frame=1)
        event = heard.get_nowait()
        assert heard.empty()
    assert (event.evaluation_id, event.seq, event.state, event.owner) == (evaluation_id, 4, State.RUNNING, "ada")
    assert event.data == {"stdout_bytes": 0, "stderr_bytes": 3, "frames": 1}
    assert len(await bench.events(evaluation_id)) == 4


async def test_output_of_a_lost_attempt_is_never_shown(bench: Bench) -> None:
    evaluation_id = await running(bench)
    frames = random_frames(1, 5 * MIB, 300_000)
    await ship(bench, evaluation_id, split(frames, 4))
    assert await objects_of(bench) == 1
    await bench.finish(evaluation_id, Reason.NODE_LOST)
    queued = await bench.client.get(evaluation_id)
    assert (queued.stdout.size, queued.stderr.size) == (0, 0)
    assert await bench.client.output(evaluation_id, "stdout") == (b"", 0)
    assert await all_frames(bench, evaluation_id) == []
    await bench.claim_one()
    await ship(bench, evaluation_id, [[Frame(Kind.STDOUT, 0, b"second")]], attempt=2)
    await bench.finish(evaluation_id, attempt=2)
    assert await bench.client.output(evaluation_id, "stdout") == (b"second", 6)
    await bench.storage.objects.sweep()
    assert await objects_of(bench) == 0
    assert [path for path in (bench.data_dir / "objects").rglob("*") if path.is_file()] == []


# -- ranges


@pytest.mark.parametrize("flushed", [False, True])
async def test_any_range_of_either_stream_is_what_was_written(flushed: bool) -> None:
    limits = Limits(inline_output_bytes=1) if flushed else Limits()
    async with running_storage(limits=limits) as bench:
        evaluation_id = await running(bench)
        frames = random_frames(2, 60_000, 900)
        await ship(bench, evaluation_id, split(frames, 7))
        await bench.finish(evaluation_id)
        assert (await objects_of(bench) > 0) == flushed
        chance = random.Random(3)
        whole: dict[str, bytes] = dict(zip(("stdout", "stderr"), streams(frames), strict=True))
        for _ in range(60):
            stream = chance.choice(["stdout", "stderr"])
            start, length = chance.randint(0, 40_000), chance.choice([0, 1, 100, 5_000, 100_000, None])
            data, size = await bench.client.output(evaluation_id, stream, start=start, length=length)
            end = None if length is None else start + length
            assert (data, size) == (whole[stream][start:end], len(whole[stream]))
        for after in (0, 1, 13, len(frames) - 1, len(frames), len(frames) + 5):
            found, following = await bench.client.frames(evaluation_id, after=after, limit=10)
            assert found == frames[after : after + 10]
            assert following == max(after, min(after + 10, len(frames))) if found else following == after


async def test_output_can_be_read_while_it_is_written(bench: Bench) -> None:
    evaluation_id = await running(bench)
    frames = random_frames(4, 9 * MIB, 200_000)
    whole = streams(frames)[0]
    writing = asyncio.create_task(ship(bench, evaluation_id, split(frames, 3)))
    read = b""
    while not writing.done() or len(read) < len(whole):
        piece, size = await bench.client.output(evaluation_id, "stdout", start=len(read), length=MIB)
        read += piece
        assert size >= len(read)
    await writing
    assert read == whole


# -- large


async def test_two_megabytes_of_exact_json_come_back_as_they_were(bench: Bench) -> None:
    text = ("[" + ",".join(f'{{"n": {n}, "text": "žluťoučký kůň 🐎 \\u0000"}}' for n in range(40_000)) + "]").encode()
    assert len(text) > MIB
    evaluation_id = await running(bench)
    pieces = [text[start : start + 65_536] for start in range(0, len(text), 65_536)]
    await ship(bench, evaluation_id, [[Frame(Kind.STDOUT, n, piece)] for n, piece in enumerate(pieces)])
    final = await bench.finish(evaluation_id)
    assert await bench.client.output(evaluation_id, "stdout") == (text, len(text))
    assert final.stdout.sha256 == hashlib.sha256(text).hexdigest()
    assert await objects_of(bench) == 1
    assert (await bench.sql("SELECT count(*) AS n FROM output_chunks WHERE object_id IS NULL"))[0]["n"] == 0


@pytest.mark.slow
async def test_100_megabytes_make_the_round_trip_without_being_held_in_memory(bench: Bench) -> None:
    evaluation_id = await running(bench)
    process = psutil.Process()
    chance = random.Random(6)
    blocks = [chance.randbytes(512 * 1024) for _ in range(8)]
    digests = {Kind.STDOUT: hashlib.sha256(), Kind.STDERR: hashlib.sha256()}
    before = process.memory_info().rss
    peak = 0
    rows = 0
    for number in range(100):
        frames = [
            Frame(kind, number, blocks[(number + place) % 8]) for place, kind in enumerate((Kind.STDOUT, Kind.STDERR))
        ]
        for frame in frames:
            digests[frame.kind].update(frame.payload)
        await bench.client.append_output(evaluation_id, frames, attempt=1, frame=2 * number)
        peak = max(peak, process.memory_info().rss - before)
        rows = max(rows, (await bench.sql("SELECT inline_bytes FROM evaluations"))[0]["inline_bytes"])
    final = await bench.finish(evaluation_id)
    peak = max(peak, process.memory_info().rss - before)
    assert final.stdout == c.OutputInfo(size=50 * MIB, sha256=digests[Kind.STDOUT].hexdigest())
    assert final.stderr == c.OutputInfo(size=50 * MIB, sha256=digests[Kind.STDERR].hexdigest())
    assert rows <= 5 * MIB
    read = hashlib.sha256()
    for start in range(0, 50 * MIB, 3 * MIB):
        data, size = await bench.client.output(evaluation_id, "stderr", start=start, length=3 * MIB)
        assert size == 50 * MIB
        read.update(data)
        peak = max(peak, process.memory_info().rss - before)
    assert read.hexdigest() == final.stderr.sha256
    assert peak < 64 * MIB, f"{peak / MIB:.0f} MiB for 100 MiB of output"
    largest = await bench.sql("SELECT max(size) AS size FROM objects")
    assert largest[0]["size"] < 6 * MIB


# -- the object store away


async def test_a_result_does_not_wait_for_the_object_store(bench: Bench) -> None:
    evaluation_id = await running(bench)
    frames = random_frames(7, 2 * MIB, 100_000)
    await ship(bench, evaluation_id, split(frames, 5))
    folder = bench.data_dir / "objects"
    folder.rename(bench.data_dir / "away")
    folder.write_text("not a folder")
    final = await bench.finish(evaluation_id)
    assert final.state is State.COMPLETED
    assert final.stdout.sha256 == hashlib.sha256(streams(frames)[0]).hexdigest()
    assert (await bench.client.output(evaluation_id, "stdout"))[0] == streams(frames)[0]
    folder.unlink()
    (bench.data_dir / "away").rename(folder)
    assert await bench.storage.outputs.settle() == 1
    assert await objects_of(bench) == 1
    assert await all_frames(bench, evaluation_id) == frames
    assert await bench.storage.outputs.settle() == 0


async def test_output_goes_on_while_the_object_store_is_away_and_moves_there_once_it_is_back(bench: Bench) -> None:
    evaluation_id = await running(bench)
    folder = bench.data_dir / "objects"
    shutil.rmtree(folder)
    folder.write_text("not a folder")
    frames = random_frames(8, 9 * MIB, 500_000)
    batches = split(frames, 2)
    await ship(bench, evaluation_id, batches[:-1])
    assert await objects_of(bench) == 0
    folder.unlink()
    await bench.client.append_output(evaluation_id, batches[-1], attempt=1, frame=2 * (len(batches) - 1))
    assert await objects_of(bench) >= 2
    await bench.finish(evaluation_id)
    assert await all_frames(bench, evaluation_id) == frames


@pytest.mark.parametrize("harm", ["changed", "cut short", "gone"])
async def test_no_hash_is_told_of_output_that_was_damaged(bench: Bench, harm: str) -> None:
    evaluation_id = await running(bench)
    await ship(bench, evaluation_id, split(random_frames(9, 5 * MIB, 300_000), 3))
    (path,) = (path for path in (bench.data_dir / "objects").rglob("*") if path.is_file())
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    match harm:
        case "changed":
            path.write_bytes(content)
        case "cut short":
            path.write_bytes(content[:500])
        case _:
            path.unlink()
    final = await bench.finish(evaluation_id, Reason.EXIT_NONZERO)
    assert (final.state, final.exit_code, final.stdout.sha256, final.stderr.sha256) == (State.FAILED, 1, None, None)
