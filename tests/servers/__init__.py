"""Real servers that the tests start by themselves: a RabbitMQ cluster and a Redis, on any Linux, with or without root.

The programs are Debian's own, fetched once by `scripts/server-root`; each runs under bubblewrap with processes of its own, so
that killing it takes everything away at once, as a power cut does, while its data stays to be started from again. As root each
RabbitMQ node has a network of its own too, so that it can be cut off. `python -m tests.servers` runs them for people.
"""
