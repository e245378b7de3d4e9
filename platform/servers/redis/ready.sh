#!/bin/sh
# Answers only once it has read its data, and has it show the certificate that is there now: Redis reads one when it is told to.
set -eu
REDISCLI_AUTH=$(cat /run/secrets/redis/password)
export REDISCLI_AUTH
there=/run/certificates used=/run/redis/certificate
ask() { redis-cli --tls --cacert "$there/ca.crt" "$@"; }
[ "$(ask ping)" = PONG ]
if [ "$(cat "$there/tls.crt")" != "$(cat "$used" 2>/dev/null)" ]; then
  [ "$(ask config set tls-ca-cert-file "$there/ca.crt" tls-cert-file "$there/tls.crt" tls-key-file "$there/tls.key")" = OK ]
  cat "$there/tls.crt" >"$used"
fi
