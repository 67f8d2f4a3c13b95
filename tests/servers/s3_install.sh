#!/usr/bin/env bash
# The Debian packages of s3_up.sh, where they are missing and this may install them.
set -euo pipefail
PACKAGES="ceph-mon ceph-osd ceph-common radosgw curl"
missing=0
for program in ceph ceph-mon ceph-osd radosgw radosgw-admin curl; do command -v "$program" >/dev/null || missing=1; done
[ "$missing" = 1 ] || exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
  echo "the S3 tests need the Debian packages $PACKAGES: install them as root (apt-get install $PACKAGES)" >&2
  exit 3
fi
apt-get update -qq
# shellcheck disable=SC2086
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $PACKAGES >/dev/null
