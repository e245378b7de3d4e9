"""Publish numbered messages to a quorum queue of its own and take them out again, until the file /tmp/stop is there.

A message counts as sent once the broker has confirmed it, and is sent again until it has. In the end a line of JSON says how many were
sent, which of them never came back, how many came more than once, and how often each side had to connect again.
broker_load.py URL AUTHORITY QUEUE
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import Counter
from pathlib import Path

from amqp import AMQPError, Message

from crucible.broker.connection import close, connect
from crucible.broker.errors import BrokerError
from crucible.broker.urls import BrokerUrl
from crucible.settings import BrokerSettings

STOP, SENT = Path("/tmp/stop"), Path("/tmp/sent")
LAST_SECONDS = 60
AGAIN_SECONDS = 0.2
PASSING = (OSError, AMQPError, BrokerError)

url = BrokerUrl.parse(sys.argv[1])
settings = BrokerSettings(ca_file=Path(sys.argv[2]))
queue = sys.argv[3]
received: Counter[int] = Counter()
connections: Counter[str] = Counter()
over = threading.Event()
sent = 0


def publish() -> None:
    """Send one after the other; what was not confirmed goes again."""
    global sent  # noqa: PLW0603 - what both threads and the end look at
    while not STOP.exists():
        connection = None
        try:
            connection = connect(url, settings)
            connections["publisher"] += 1
            channel = connection.connection.channel()
            channel.confirm_select()
            while not STOP.exists():
                channel.basic_publish_confirm(
                    Message(str(sent), delivery_mode=2), routing_key=queue, confirm_timeout=10
                )
                sent += 1
                SENT.write_text(str(sent))
        except PASSING as error:
            print("publisher:", type(error).__name__, error, flush=True)
            over.wait(AGAIN_SECONDS)
        finally:
            if connection is not None:
                close(connection)


def consume() -> None:
    """Take what comes, and say so to the broker."""
    while not over.is_set():
        connection = None
        try:
            connection = connect(url, settings)
            connections["consumer"] += 1
            channel = connection.connection.channel()
            channel.basic_qos(0, 100, False)

            def take(message: Message) -> None:
                received[int(message.body)] += 1
                message.channel.basic_ack(message.delivery_tag)

            channel.basic_consume(queue, callback=take)
            while not over.is_set():
                try:
                    connection.drain_events(timeout=1)
                except TimeoutError:
                    connection.heartbeat_check()
        except PASSING as error:
            print("consumer:", type(error).__name__, error, flush=True)
            over.wait(AGAIN_SECONDS)
        finally:
            if connection is not None:
                close(connection)


with connect(url, settings) as first:
    channel = first.connection.channel()
    channel.queue_declare(queue, durable=True, auto_delete=False, arguments={"x-queue-type": "quorum"})
threads = [threading.Thread(target=publish), threading.Thread(target=consume)]
for thread in threads:
    thread.start()
threads[0].join()
ends = time.monotonic() + LAST_SECONDS
while len(received) < sent and time.monotonic() < ends:
    over.wait(AGAIN_SECONDS)
over.set()
threads[1].join()
lost = [number for number in range(sent) if not received[number]]
again = sum(count - 1 for count in received.values())
print(json.dumps({"sent": sent, "lost": lost, "again": again, "connections": connections}), flush=True)
