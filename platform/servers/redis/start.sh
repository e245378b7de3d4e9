#!/bin/sh
# The password goes in by a file, where no list of processes shows it.
set -eu
umask 077
cat /etc/redis/redis.conf >/run/redis/redis.conf
printf 'requirepass %s\n' "$(cat /run/secrets/redis/password)" >>/run/redis/redis.conf
exec redis-server /run/redis/redis.conf
