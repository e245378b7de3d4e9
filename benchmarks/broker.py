"""`make bench-broker`: what the platform's way of using a broker costs beside raw kombu, on the same cluster, in the same run.

Starts three real RabbitMQ nodes and a Redis of its own. Ours and the reference take turns, several rounds each, and each figure is the
median of its rounds, so that a busy moment of the machine hits both. Nothing here is a test, and nothing fails for being slow.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import kombu
from amqp.exceptions import AMQPError
from kombu.entity import Exchange, Queue

from benchmarks.figures import Figure, show
from crucible.broker.connection import close, connect
from crucible.broker.publisher import Hint, Publisher
from crucible.broker.topology import EXCHANGE, TASK, queue_name, routing_key
from crucible.broker.urls import BrokerUrl
from crucible.contracts import ClaimAnswer, ClaimOne
from crucible.evaluation import State
from crucible.limits import SizeClass
from crucible.settings import BrokerSettings, TracingSettings, WorkerSettings
from crucible.tracing import Tracing
from crucible.worker.celery_worker import CeleryWorker
from crucible.worker.holding import Holding
from tests.servers.rabbitmq import RabbitCluster
from tests.servers.redis import RedisServer
from tests.support.waits import wait_until_async

if TYPE_CHECKING:
    from collections.abc import Iterator

SETTINGS = BrokerSettings()
SMALL = queue_name(SizeClass.SMALL)
BATCH = 500
SLOTS = 16
_CONFIRM_SECONDS = 60.0


def hints(count: int, start: int = 0) -> list[Hint]:
    """Return hints over all priorities."""
    return [Hint(f"ev-{start + number:026d}", SizeClass.SMALL, number % 11) for number in range(count)]


# --- publishing -----------------------------------------------------------------------------------------------------------------


def publish_all(publisher: Publisher, batch: list[Hint]) -> None:
    """Publish, and end the run if not all are confirmed: a rate of lost messages says nothing."""
    confirmed = sum(publisher.publish(batch, _CONFIRM_SECONDS))
    if confirmed < len(batch):
        raise SystemExit(f"only {confirmed} of {len(batch)} messages were confirmed")


def publish_ours(url: BrokerUrl, count: int) -> float:
    """Return messages per second through the platform's publisher, each confirmed."""
    with Publisher(url, SETTINGS) as publisher:
        publisher.publish(hints(1), _CONFIRM_SECONDS)
        started = time.perf_counter()
        for start in range(0, count, BATCH):
            publish_all(publisher, hints(BATCH, start))
        return count / (time.perf_counter() - started)


def _task_body(hint: Hint) -> tuple[Any, dict[str, Any]]:
    """The same task message, as short as a program may make it."""
    body = ([hint.evaluation_id], {}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None})
    return body, {"task": TASK, "id": hint.evaluation_id, "lang": "py"}


def publish_raw(url: BrokerUrl, count: int) -> float:
    """Return the same through `kombu.Producer`, its confirms awaited a batch at a time as ours are."""
    with kombu.Connection(url.nodes[0]) as connection:
        channel: Any = connection.channel()
        waiting: set[int] = set()

        def settle(tag: int, multiple: bool) -> None:
            waiting.difference_update([found for found in waiting if found <= tag] if multiple else [tag])

        channel.confirm_select()
        channel.events["basic_ack"].add(settle)
        producer = kombu.Producer(channel, serializer="json")
        tag = 0
        started = time.perf_counter()
        for start in range(0, count, BATCH):
            for hint in hints(BATCH, start):
                tag += 1
                waiting.add(tag)
                body, headers = _task_body(hint)
                producer.publish(
                    body,
                    exchange=EXCHANGE,
                    routing_key=routing_key(SizeClass.SMALL),
                    priority=hint.priority,
                    headers=headers,
                    correlation_id=hint.evaluation_id,
                    mandatory=True,
                    delivery_mode=2,
                )
            while waiting:
                connection.drain_events(timeout=_CONFIRM_SECONDS)
        return count / (time.perf_counter() - started)


def publish_one_by_one(url: BrokerUrl, count: int) -> float:
    """Return the same with kombu's own confirms, which wait for each message."""
    with kombu.Connection(url.nodes[0], transport_options={"confirm_publish": True}) as connection:
        producer = kombu.Producer(connection.channel(), serializer="json")
        started = time.perf_counter()
        for hint in hints(count):
            body, headers = _task_body(hint)
            producer.publish(
                body,
                exchange=EXCHANGE,
                routing_key=routing_key(SizeClass.SMALL),
                priority=hint.priority,
                headers=headers,
                mandatory=True,
                delivery_mode=2,
            )
        return count / (time.perf_counter() - started)


# --- consuming: a process each, as a worker has ------------------------------------------------------------------------------------


class Count:
    """Counts messages from the first on, and calls back at the last."""

    def __init__(self, wanted: int, done: Callable[[], None]) -> None:
        self._wanted = wanted
        self._done = done
        self._lock = threading.Lock()
        self._seen = 0
        self._started = self.seconds = 0.0

    def one(self) -> None:
        """Note one message."""
        with self._lock:
            self._seen += 1
            if self._seen == 1:
                self._started = time.perf_counter()
            if self._seen == self._wanted:
                self.seconds = time.perf_counter() - self._started
                self._done()


class _Forgetful:
    """Stands for storage, in which no evaluation waits any more: what is measured is the way of the message."""

    def __init__(self, counted: Count) -> None:
        self._counted = counted

    async def claim_one(self, evaluation_id: str, request: ClaimOne) -> ClaimAnswer:  # noqa: ARG002 - the client's signature
        """Count, and hand out nothing."""
        self._counted.one()
        return ClaimAnswer(claim=None, state=State.COMPLETED)


def consume_ours(url: BrokerUrl, count: int) -> float:
    """Return messages per second through the worker, each acknowledged once storage has answered."""

    async def run() -> float:
        finished, loop = asyncio.Event(), asyncio.get_running_loop()
        counted = Count(count, lambda: loop.call_soon_threadsafe(finished.set))
        storage: Any = _Forgetful(counted)
        tracing = Tracing(TracingSettings(), "bench")
        holding = Holding(WorkerSettings(slots=SLOTS), storage, storage, instance="bench", tracing=tracing)
        worker = CeleryWorker(url, SETTINGS, storage, holding)
        await worker.start()
        await finished.wait()
        await worker.drain()
        return (count - 1) / counted.seconds

    return asyncio.run(run())


def consume_raw(url: BrokerUrl, count: int) -> float:
    """Return the same through `kombu.Consumer`, each message acknowledged where it arrives."""
    finished = threading.Event()
    counted = Count(count, finished.set)

    def received(_: object, message: Any) -> None:
        counted.one()
        message.ack()

    connection = connect(url, SETTINGS)
    exchange = Exchange("") if url.kind == "redis" else Exchange(EXCHANGE, type="topic")
    queue = Queue(SMALL, exchange, SMALL, no_declare=True)
    with kombu.Consumer(connection.channel(), [queue], callbacks=[received], prefetch_count=SLOTS, accept=["json"]):
        while not finished.is_set():
            connection.drain_events(timeout=_CONFIRM_SECONDS)
    close(connection)
    return (count - 1) / counted.seconds


def consume_stock(url: BrokerUrl, count: int) -> float:
    """Return the same through Celery's own worker, as its documentation sets it up for quorum queues."""
    from celery import Celery  # noqa: PLC0415 - Celery keeps state per process; this role has one of its own
    from celery.worker import WorkController  # noqa: PLC0415
    from celery.worker import state as celery_state  # noqa: PLC0415

    def stop() -> None:
        celery_state.should_stop = 0

    counted = Count(count, stop)
    app = Celery("bench", broker=url.nodes[0])
    exchange = Exchange(EXCHANGE, type="topic")
    app.conf.task_queues = [Queue(SMALL, exchange, SMALL, queue_arguments={"x-queue-type": "quorum"}, no_declare=True)]
    app.conf.update(task_acks_late=True, worker_prefetch_multiplier=1, worker_enable_remote_control=False)

    def task(evaluation_id: str) -> None:  # noqa: ARG001 - the task's signature
        counted.one()

    app.task(task, name=TASK, ignore_result=True)
    WorkController(
        app=app,
        pool_cls="threads",
        concurrency=SLOTS,
        queues=[SMALL],
        without_gossip=True,
        without_mingle=True,
        without_heartbeat=True,
        loglevel="WARNING",
    ).start()
    return (count - 1) / counted.seconds


ROLES: dict[str, Callable[[BrokerUrl, int], float]] = {
    "ours": consume_ours,
    "raw": consume_raw,
    "stock": consume_stock,
}


def consume(role: str, url: BrokerUrl, count: int) -> float:
    """Fill the queue and consume it in a process of its own."""
    with Publisher(url, SETTINGS) as publisher:
        publisher.purge()
        for start in range(0, count, BATCH):
            publish_all(publisher, hints(BATCH, start))
    # On standard input: a command line is there for everyone to read.
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.broker", "--role", role, "--count", str(count)],
        input=",".join(url.nodes),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    if done.returncode != 0:
        raise SystemExit(f"{role} failed:\n{done.stdout}{done.stderr}")
    return float(done.stdout.split()[-1])


# --- from a submission to a consumer --------------------------------------------------------------------------------------------------


@contextmanager
def arrivals(url: BrokerUrl) -> Iterator[dict[str, float]]:
    """Consume in a thread; the moments at which messages arrived, by evaluation."""
    seen: dict[str, float] = {}
    stopping = threading.Event()
    connection = connect(url, SETTINGS)
    channel: Any = connection.channel()

    def received(message: Any) -> None:
        seen.setdefault(message.headers["id"], time.perf_counter())
        channel.basic_ack(message.delivery_tag)

    def run() -> None:
        channel.basic_qos(0, SLOTS, False)
        channel.basic_consume(SMALL, callback=received)
        while not stopping.is_set():
            try:
                connection.drain_events(timeout=0.1)
            except TimeoutError:
                connection.heartbeat_check()
            except (OSError, AMQPError):
                return

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield seen
    finally:
        stopping.set()
        thread.join()
        close(connection)


async def relay_latency(url: BrokerUrl, count: int, per_second: int) -> list[float]:
    """Return the seconds from each submission's commit to its message's delivery, at a steady rate."""
    from crucible.storage.hints import Brokers  # noqa: PLC0415 - PostgreSQL starts only for this
    from tests.support.storage import running_storage  # noqa: PLC0415

    # Nobody claims here, so what was consumed would be told again as lost.
    settings = SETTINGS.model_copy(update={"reconcile_seconds": 3600.0})
    committed: dict[str, float] = {}
    with arrivals(url) as seen:
        async with running_storage(brokers=Brokers(url, None, settings)) as storage:
            await storage.submit()
            begin = asyncio.get_running_loop().time()
            for number in range(count):
                await asyncio.sleep(max(0.0, begin + number / per_second - asyncio.get_running_loop().time()))
                started = time.perf_counter()
                record = await storage.submit()
                # The commit is near the end of the call; half of the call is the error to either side.
                committed[record.id] = (started + time.perf_counter()) / 2
            await wait_until_async(
                lambda: committed.keys() <= seen.keys(), timeout=10, describe="every submission to be delivered"
            )
    return [seen[name] - moment for name, moment in committed.items()]


# --- the run ------------------------------------------------------------------------------------------------------------------------


def in_turns(rounds: int, *measures: Callable[[], float]) -> list[float]:
    """Return the median of each measure, taken in turns so that all see the same machine."""
    taken: list[list[float]] = [[] for _ in measures]
    for _ in range(rounds):
        for results, measure in zip(taken, measures, strict=True):
            results.append(measure())
    return [statistics.median(results) for results in taken]


def rate(value: float) -> str:
    """Print messages per second."""
    return f"{value:,.0f} /s"


def compared(name: str, ours: float, reference: float, said: str, goal: str = "") -> Figure:
    """Return a line with the ratio of two rates."""
    return Figure(name, rate(ours), f"{rate(reference)} ({said})", f"{ours / reference:.2f}x", goal)


def measure(rabbitmq: BrokerUrl, redis: BrokerUrl, *, quick: bool) -> list[Figure]:
    """Take every figure."""
    rounds, count = (1, 2000) if quick else (5, 10_000)
    with Publisher(rabbitmq, SETTINGS) as publisher:
        publisher.declare()

        def emptied(function: Callable[[BrokerUrl, int], float], url: BrokerUrl, number: int) -> Callable[[], float]:
            def run() -> float:
                publisher.purge()
                return function(url, number)

            return run

        ours, raw, single, legacy = in_turns(
            rounds,
            emptied(publish_ours, rabbitmq, count),
            emptied(publish_raw, rabbitmq, count),
            emptied(publish_one_by_one, rabbitmq, count // 10),
            emptied(publish_ours, redis, count // 4),
        )
        figures = [
            compared(
                "publish, confirmed by a majority of 3 nodes", ours, raw, "raw kombu, confirms by the batch", ">= 0.8x"
            ),
            compared("  the same", ours, single, "raw kombu, its own confirm of each message"),
            compared("  the same", ours, legacy, "Redis, each write on disk"),
        ]
        ours, raw, stock, legacy = in_turns(
            rounds,
            lambda: consume("ours", rabbitmq, count // 2),
            lambda: consume("raw", rabbitmq, count // 2),
            lambda: consume("stock", rabbitmq, count // 2),
            lambda: consume("ours", redis, count // 4),
        )
        figures += [
            compared(f"consume with {SLOTS} slots through the worker", ours, raw, "raw kombu, no threads", ">= 0.8x"),
            compared("  the same", ours, stock, "Celery's own worker, a task that does nothing"),
            compared("  the same", ours, legacy, "the worker over Redis"),
        ]
        publisher.purge()
    latencies = sorted(asyncio.run(relay_latency(rabbitmq, 100 if quick else 1000, 50)))
    p50, p95 = (latencies[int(share * (len(latencies) - 1))] * 1000 for share in (0.5, 0.95))
    figures.append(Figure("commit to delivery at 50 /s, median", f"{p50:.1f} ms"))
    figures.append(Figure("commit to delivery at 50 /s, p95", f"{p95:.1f} ms", goal="< 50 ms"))
    return figures


def main() -> None:
    """Run everything, or one consumer of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one short round")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--role", choices=ROLES, help=argparse.SUPPRESS)
    parser.add_argument("--count", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role:
        print(ROLES[options.role](BrokerUrl.parse(sys.stdin.read()), options.count))
        return
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="crucible-bench-")))
        cluster = stack.enter_context(RabbitCluster(folder / "rabbitmq"))
        redis = stack.enter_context(RedisServer(folder / "redis"))
        rabbitmq = BrokerUrl.parse(cluster.url(vhost=cluster.new_vhost()))
        show(measure(rabbitmq, BrokerUrl.parse(f"{redis.url}/0"), quick=options.quick), as_json=options.json)


if __name__ == "__main__":
    main()
