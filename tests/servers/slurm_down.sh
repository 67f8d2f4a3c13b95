#!/usr/bin/env bash
# Stop the cluster that slurm_up.sh FOLDER started, its jobs first. munged stays.
set -uo pipefail
folder=$(realpath -m "$1")
export SLURM_CONF=$folder/slurm.conf
[ -s "$SLURM_CONF" ] || exit 0
timeout 20 scancel --user="$(id -un)" 2> /dev/null
for _ in $(seq 40); do
  [ -z "$(timeout 20 squeue -h 2> /dev/null)" ] && break
  sleep 0.5
done
for file in "$folder"/run/slurmd_*.pid "$folder"/run/slurmctld.pid; do
  [ -s "$file" ] && kill "$(cat "$file")" 2> /dev/null
done
exit 0
