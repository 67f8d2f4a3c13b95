#!/usr/bin/env bash
# A Slurm cluster of virtual nodes on this machine, for tests: slurm_up.sh FOLDER [NODES]. Stop it with slurm_down.sh.
# Needs root and Debian's packages slurm-wlm and munge. No accounting. Two partitions: jobs of `urgent` pre-empt those of
# `batch`, which are requeued. Afterwards: export SLURM_CONF=FOLDER/slurm.conf
set -euo pipefail
folder=$(realpath -m "$1") nodes=${2:-2}
host=$(hostname -s) port=${GRANARY_SLURM_PORT:-27300}
for program in slurmctld slurmd munged; do
  command -v "$program" > /dev/null || { echo "slurm_up: no $program: apt-get install slurm-wlm munge" >&2; exit 3; }
done
[ "$(id -u)" = 0 ] || { echo "slurm_up: starting Slurm's daemons needs root" >&2; exit 3; }
mkdir -p "$folder"/{state,log,run}

if ! munge -n > /dev/null 2>&1; then
  mkdir -p /run/munge /var/log/munge /var/lib/munge /etc/munge
  [ -s /etc/munge/munge.key ] || (umask 077; head -c 1024 /dev/urandom > /etc/munge/munge.key)
  chown -R munge: /etc/munge /var/log/munge /var/lib/munge /run/munge
  rm -f /run/munge/munge.socket*
  runuser -u munge -- munged --force
fi

cat > "$folder/slurm.conf" <<CONF
ClusterName=granary
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=cred_expire=10
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
ReturnToService=2
SlurmctldPort=$port
SlurmctldPidFile=$folder/run/slurmctld.pid
SlurmdPidFile=$folder/run/slurmd_%n.pid
SlurmdSpoolDir=$folder/spool_%n
StateSaveLocation=$folder/state
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd_%n.log
SlurmctldTimeout=300
SlurmdTimeout=300
KillWait=30
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=5,sched_interval=5,requeue_delay=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
NodeName=$host[1-$nodes] NodeHostname=$host NodeAddr=127.0.0.1 Port=[$((port + 1))-$((port + nodes))] CPUs=$(nproc) State=UNKNOWN
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=20
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10
CONF
export SLURM_CONF=$folder/slurm.conf
slurmctld -c
for number in $(seq "$nodes"); do
  mkdir -p "$folder/spool_$host$number"
  slurmd -N "$host$number"
done
for _ in $(seq 60); do
  [ "$(sinfo -h -N -p batch -o %T 2> /dev/null | grep -c idle)" = "$nodes" ] && exit 0
  sleep 0.5
done
echo "slurm_up: the nodes did not come up, see $folder/log" >&2
exit 1
