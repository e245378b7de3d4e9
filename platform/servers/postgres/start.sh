#!/bin/sh
# Makes the database cluster at the first start, whole or not at all, and becomes the server.
set -eu
data=/data/postgres
if [ ! -e "$data" ]; then
  rm -rf "$data.new"
  initdb --pgdata "$data.new" --username crucible --pwfile /run/secrets/postgres/password \
    --auth-local trust --auth-host scram-sha-256 --encoding UTF8 --locale C --no-instructions
  echo 'CREATE DATABASE crucible;' | postgres --single -D "$data.new" -c unix_socket_directories=/run/postgres postgres
  mv "$data.new" "$data"
fi
exec postgres -D "$data" -c config_file=/etc/postgres/postgres.conf
