#!/bin/sh
# Erlang wants the cookie in a file that nobody but its user may read, which a mounted secret never is.
set -eu
umask 077
rm -f "$HOME/.erlang.cookie"
cat /run/secrets/rabbitmq/erlang-cookie >"$HOME/.erlang.cookie"
chmod 400 "$HOME/.erlang.cookie"
exec rabbitmq-server
