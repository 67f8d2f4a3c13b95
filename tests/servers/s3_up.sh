#!/usr/bin/env bash
# A real S3 server for tests: Ceph monitor, one OSD and the RADOS Gateway on 127.0.0.1, in about 20 seconds.
#   s3_up.sh            start all of it, from nothing
#   s3_up.sh gateway    start the gateway alone again (tests kill it to see what a client does)
# Debian packages: ceph-mon ceph-osd ceph-common radosgw. Access key test, secret key testsecret, any bucket.
set -euo pipefail
DIR=${S3_DIR:-/tmp/granary-s3}
PORT=${S3_PORT:-18080}
CONF=$DIR/ceph.conf

need() { command -v "$1" >/dev/null || { echo "s3_up.sh: $1 is missing: apt-get install ceph-mon ceph-osd ceph-common radosgw" >&2; exit 3; }; }
for program in ceph ceph-mon ceph-osd ceph-authtool monmaptool radosgw radosgw-admin curl; do need $program; done

gateway() {
  radosgw -n client.rgw -c "$CONF"
  for _ in $(seq 120); do
    if curl -s -o /dev/null "http://127.0.0.1:$PORT/"; then return; fi
    sleep 0.5
  done
  echo "s3_up.sh: the gateway does not answer: see $DIR/log" >&2
  exit 1
}

if [ "${1:-}" = gateway ]; then gateway; exit; fi

"$(dirname "$0")/s3_down.sh"
rm -rf "$DIR"
mkdir -p "$DIR"/{mon,osd,rgw,run,log}
FSID=$(cat /proc/sys/kernel/random/uuid)
cat > "$CONF" <<C
[global]
fsid = $FSID
mon_host = [v2:127.0.0.1:13300/0,v1:127.0.0.1:16789/0]
mon_initial_members = a
public_network = 127.0.0.0/8
cluster_network = 127.0.0.0/8
ms_bind_port_min = 17000
ms_bind_port_max = 17300
# with authentication off the gateway hangs, so keyrings it is
auth_cluster_required = cephx
auth_service_required = cephx
auth_client_required = cephx
keyring = $DIR/keyring
auth_allow_insecure_global_id_reclaim = false
run_dir = $DIR/run
admin_socket = $DIR/run/\$cluster-\$name.asok
pid_file = $DIR/run/\$name.pid
log_file = $DIR/log/\$name.log
mon_cluster_log_file = $DIR/log/cluster.log
osd_pool_default_size = 1
osd_pool_default_min_size = 1
mon_allow_pool_size_one = true
osd_crush_chooseleaf_type = 0
osd_pool_default_pg_num = 8
osd_pool_default_pgp_num = 8
osd_pool_default_pg_autoscale_mode = off
mon_max_pg_per_osd = 500
osd_objectstore = bluestore
bluestore_block_size = 12884901888
bluestore_block_create = true
osd_memory_target = 1073741824
osd_max_object_name_len = 256
osd_max_object_namespace_len = 64
[mon.a]
mon_data = $DIR/mon
host = localhost
[osd.0]
osd_data = $DIR/osd
host = localhost
[client.rgw]
rgw_frontends = beast endpoint=127.0.0.1:$PORT
rgw_data = $DIR/rgw
rgw_thread_pool_size = 32
rgw_dynamic_resharding = false
# deleted objects free their room after seconds, not after two hours
rgw_gc_obj_min_wait = 5
rgw_gc_processor_period = 10
rgw_gc_processor_max_time = 10
C
monmaptool --create --clobber --addv a '[v2:127.0.0.1:13300,v1:127.0.0.1:16789]' --fsid "$FSID" "$DIR/monmap" >/dev/null
ceph-authtool --create-keyring "$DIR/keyring" --gen-key -n mon. --cap mon 'allow *' >/dev/null
ceph-authtool "$DIR/keyring" --gen-key -n client.admin --cap mon 'allow *' --cap osd 'allow *' >/dev/null
ceph-authtool "$DIR/keyring" --gen-key -n client.rgw --cap mon 'allow *' --cap osd 'allow *' >/dev/null
ceph-authtool "$DIR/keyring" --gen-key -n osd.0 --cap mon 'allow profile osd' --cap osd 'allow *' >/dev/null
ceph-mon --mkfs -i a --monmap "$DIR/monmap" -c "$CONF" --keyring "$DIR/keyring"
ceph-mon -i a -c "$CONF"
OSD=$(cat /proc/sys/kernel/random/uuid)
for attempt in 1 2 3; do timeout 60 ceph -c "$CONF" osd new "$OSD" >/dev/null 2>&1 && break; [ "$attempt" = 3 ] && exit 1; sleep 1; done
ceph-osd -i 0 --mkfs --osd-uuid "$OSD" -c "$CONF" >/dev/null 2>&1
timeout 60 ceph -c "$CONF" osd crush add osd.0 1.0 root=default host=localhost >/dev/null 2>&1
ceph-osd -i 0 -c "$CONF" >/dev/null
timeout 120 radosgw-admin -c "$CONF" user create --uid=t --display-name=t --access-key=test --secret-key=testsecret >/dev/null 2>&1
gateway
echo "S3 at http://127.0.0.1:$PORT"
