#!/bin/sh
# Answers only once it has read its data.
set -eu
REDISCLI_AUTH=$(cat /run/secrets/redis/password)
export REDISCLI_AUTH
[ "$(redis-cli ping)" = PONG ]
