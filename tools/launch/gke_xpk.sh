#!/usr/bin/env bash
# Trains on TPU slices of a GKE cluster, by XPK (pip install xpk), restarted as often as needed.
#
#   tools/launch/gke_xpk.sh [--dry_run] --cluster CLUSTER --zone ZONE --workload NAME --image IMAGE
#       --type v5litepod-256 [--slices 1] [--project PROJECT] [--restarts 50] -- COMMAND...
#
#   tools/launch/gke_xpk.sh --cluster tpus --zone us-west4-a --workload xl2 --type v5litepod-256 \
#       --slices 4 --image REGISTRY/mdt_jax:tpu -- python -m mdt_jax.train \
#       --config configs/imagenet256.py:MDTv2-XL/2 --workdir /mnt/bucket/xl2 \
#       --config.data.path=/mnt/bucket/latents --config.mesh.fsdp=16
#
# IMAGE is made of the Dockerfile, and the workdir on a volume that every pod of the cluster mounts
# (`xpk storage`). A pod that is evicted saves within its grace period and ends with status 75; one
# that lost another ends with 1. After either, and after being killed, all pods are started again, up
# to --restarts times. So is a command that cannot work: try it with --dry_run first.
set -u

usage() {
  sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' "$0" >&2
  exit 2
}

dry_run='' slices=1 restarts=50
cluster='' zone='' workload='' image='' type='' options=()
while (($#)); do
  case $1 in
    --dry_run) dry_run=yes ;;
    --cluster) cluster=${2-} && shift ;;
    --zone) zone=${2-} && shift ;;
    --project) options+=("--project=${2-}") && shift ;;
    --workload) workload=${2-} && shift ;;
    --image) image=${2-} && shift ;;
    --type) type=${2-} && shift ;;
    --slices) slices=${2-} && shift ;;
    --restarts) restarts=${2-} && shift ;;
    --) shift && break ;;
    *) usage ;;
  esac
  shift
done
if ! [[ $cluster && $zone && $workload && $image && $type ]] || (($# == 0)); then
  usage
fi

create=(
  xpk workload create "--cluster=$cluster" "--zone=$zone" "${options[@]}" "--workload=$workload"
  "--docker-image=$image" "--tpu-type=$type" "--num-slices=$slices" "--max-restarts=$restarts"
  "--restart-on-exit-codes=1,75" --termination-grace-period-seconds=60
  "--command=bash tools/launch/until_done.sh $(printf '%q ' "$@")"
)
if [[ $dry_run ]]; then
  printf '%q ' "${create[@]}"
  echo
  exit 0
fi
exec "${create[@]}"
