#!/usr/bin/env bash
# Stop what s3_up.sh started. The data stay in $S3_DIR until the next start.
set -uo pipefail
DIR=${S3_DIR:-/tmp/granary-s3}
for name in client.rgw osd.0 mon.a; do
  file=$DIR/run/$name.pid
  [ -f "$file" ] || continue
  pid=$(cat "$file")
  # only if that number still is a Ceph daemon of this folder
  if [ -d "/proc/$pid" ] && tr "\0" " " <"/proc/$pid/cmdline" 2>/dev/null | grep -qF "$DIR/ceph.conf"; then
    kill "$pid" 2>/dev/null
    for _ in $(seq 50); do [ -d "/proc/$pid" ] || break; sleep 0.1; done
    kill -9 "$pid" 2>/dev/null
  fi
  rm -f "$file"
done
exit 0
