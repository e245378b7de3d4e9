"""`make demo BROKER=rabbitmq`: the same demo through three nodes of RabbitMQ, one of which is killed while evaluations wait.

The node is the one that leads the queue, and it dies as in a power cut. It is started again once the queue has moved on without
it. The verdict and the exit code are the demo's own, except that a demo during which nothing could be killed is no success.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from crucible.broker.errors import BrokerError
from crucible.broker.publisher import Publisher
from crucible.broker.topology import VHOST, queue_name
from crucible.broker.urls import BrokerUrl
from crucible.limits import SizeClass
from crucible.settings import BrokerSettings
from tests.servers.process import ServerRootError
from tests.servers.rabbitmq import RabbitCluster
from tests.support.waits import WaitTimeoutError, wait_until

# So many of the demo's evaluations have to wait when the node is killed.
WAITING = 8
PATIENCE_SECONDS = 60
NOT_COMPLETED, UNAVAILABLE, INTERRUPTED = 1, 69, 130


def say(text: str) -> None:
    """Tell people what goes on, in one write, since the demo's lines come between."""
    sys.stdout.write(f"  == {text}\n")
    sys.stdout.flush()


def forward(demo: subprocess.Popen[str]) -> None:
    """Pass on what the demo prints, a line at a time."""
    assert demo.stdout is not None
    for line in demo.stdout:
        sys.stdout.write(line)
        sys.stdout.flush()


def kill_the_leader(cluster: RabbitCluster, demo: subprocess.Popen[str]) -> None:
    """Kill the node that leads the queue of small evaluations while some wait, and start it again once others have left.

    Raises:
        WaitTimeoutError: it did not come to that.
    """
    queue = queue_name(SizeClass.SMALL)
    with Publisher(BrokerUrl.parse(cluster.url(vhost=VHOST)), BrokerSettings()) as publisher:

        def waiting() -> int:
            if demo.poll() is not None:
                raise WaitTimeoutError("the demo ended before")
            return publisher.depths()[SizeClass.SMALL].ready

        wait_until(
            lambda: waiting() >= WAITING,
            timeout=PATIENCE_SECONDS,
            describe=f"{WAITING} evaluations to wait in {queue}",
            tolerate=(BrokerError,),
        )
        leader = cluster.leader_of(queue, VHOST)
        before = waiting()
        leader.kill()
        killed = time.monotonic()
        say(f"killed {leader.name}, which led {queue}, with {before} messages in it (SIGKILL of all its processes)")
        wait_until(
            lambda: cluster.leader_of(queue, VHOST) is not leader,
            timeout=PATIENCE_SECONDS,
            describe=f"another node to lead {queue}",
        )
        say(f"{time.monotonic() - killed:.1f} s later {cluster.leader_of(queue, VHOST).name} leads it")
        # A queue whose new leader is not known everywhere is told to be empty.
        wait_until(
            lambda: 0 < waiting() < before,
            timeout=PATIENCE_SECONDS,
            describe=f"{queue} to move on without {leader.name}",
            tolerate=(BrokerError,),
        )
        say(f"{time.monotonic() - killed:.1f} s after the kill evaluations leave the queue again")
        leader.start()
        say(f"started {leader.name} again; it serves {time.monotonic() - killed:.1f} s after its death")


def main() -> int:
    """Run the demo; the exit status is its own, or 1 if no node could be killed meanwhile."""
    say("starting three nodes of RabbitMQ (the first time they are fetched, which takes about a minute)")
    try:
        with (
            tempfile.TemporaryDirectory(prefix="crucible-demo-servers-") as folder,
            RabbitCluster(Path(folder)) as cluster,
        ):
            cluster.make_vhost(VHOST)
            say(f"a cluster of {len(cluster.nodes)}: {', '.join(node.name for node in cluster.nodes)}")
            return run(cluster)
    except ServerRootError as error:
        print(error, file=sys.stderr)
        return UNAVAILABLE
    except KeyboardInterrupt:
        return INTERRUPTED


def run(cluster: RabbitCluster) -> int:
    """Run the demo on a cluster and kill a node meanwhile."""
    environment = os.environ | {"CRUCIBLE_BROKER_URL": cluster.url(vhost=VHOST)}
    command = [sys.executable, "-m", "crucible.cli.main", "demo", *sys.argv[1:]]
    demo = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    printing = threading.Thread(target=forward, args=(demo,))
    printing.start()
    try:
        kill_the_leader(cluster, demo)
    except WaitTimeoutError as error:
        say(f"NOT shown: a node was to be killed while evaluations wait, but {error}")
        return demo.wait() or NOT_COMPLETED
    finally:
        # A Ctrl-C at the terminal is the demo's too, which then stops in good order.
        demo.wait()
        printing.join()
    return demo.returncode


if __name__ == "__main__":
    sys.exit(main())
