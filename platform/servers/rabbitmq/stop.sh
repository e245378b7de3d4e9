#!/bin/sh
# Leaves without anybody noticing: not while a queue's majority depends on this node, and after its leaders have moved.
rabbitmq-upgrade await_online_quorum_plus_one --timeout 40 || true
rabbitmq-upgrade drain --timeout 20 || true
