#!/usr/bin/env bash
# Trains on a Cloud TPU slice, made again as often as it is preempted, until training is done.
#
#   tools/launch/tpu_pod.sh [--dry_run] --name NAME --zone ZONE --type v4-512 --setup COMMAND
#       [--project PROJECT] [--version tpu-ubuntu2204-base] [--spot] [--retries N] -- COMMAND...
#
#   tools/launch/tpu_pod.sh --name xl2 --zone us-central2-b --type v4-512 --spot \
#       --setup 'git clone REPOSITORY mdt_jax && cd mdt_jax && pip install -e ".[tpu]"' \
#       -- python3 -m mdt_jax.train --config configs/imagenet256.py:MDTv2-XL/2 \
#       --workdir /mnt/bucket/xl2 --config.data.path=/mnt/disk/latents --config.mesh.fsdp=16
#
# --setup runs on every host of a new slice; it must leave the clone in ~/mdt_jax, with Python 3.11 or
# later, and mount what the workdir and the data are on: the workdir must be one folder that all
# hosts see. COMMAND then runs there on every host. Where it stopped early, saved, or the slice is
# gone, all is done again. A command that fails on a slice that is still there is run N (3) more
# times. The slice is left standing at the end: delete it when you are done.
set -u

usage() {
  sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' "$0" >&2
  exit 2
}

dry_run='' name='' type='' setup='' retries=3 version=tpu-ubuntu2204-base
place=() options=() zone=''
while (($#)); do
  case $1 in
    --dry_run) dry_run=yes ;;
    --spot) options+=(--spot) ;;
    --name) name=${2-} && shift ;;
    --zone) zone=${2-} && place+=("--zone=$zone") && shift ;;
    --project) place+=("--project=${2-}") && shift ;;
    --type) type=${2-} && shift ;;
    --version) version=${2-} && shift ;;
    --setup) setup=${2-} && shift ;;
    --retries) retries=${2-} && shift ;;
    --) shift && break ;;
    *) usage ;;
  esac
  shift
done
if ! [[ $name && $zone && $type && $setup && $retries =~ ^[0-9]+$ ]] || (($# == 0)); then
  usage
fi

tpu=(gcloud compute tpus tpu-vm)
create=("${tpu[@]}" create "$name" "${place[@]}" "--accelerator-type=$type" "--version=$version"
  "${options[@]}")
delete=("${tpu[@]}" delete "$name" "${place[@]}" --quiet)
ssh=("${tpu[@]}" ssh "$name" "${place[@]}" --worker=all)
# What an interrupted connection left running would hold the TPU. The brackets keep the pattern from
# matching the shell that carries it.
clear_hosts="pkill -KILL -f '[m]dt_jax[.]train' || true"
train="cd mdt_jax && bash tools/launch/until_done.sh $(printf '%q ' "$@")"

if [[ $dry_run ]]; then
  for part in create delete; do
    declare -n words=$part
    printf '%q ' "${words[@]}"
    echo
  done
  for remote in "$setup" "$clear_hosts" "$train"; do
    printf '%q ' "${ssh[@]}" "--command=$remote"
    echo
  done
  exit 0
fi

state() {
  "${tpu[@]}" describe "$name" "${place[@]}" '--format=value(state)' 2>/dev/null
}

log=$(mktemp)
trap 'rm -f "$log"' EXIT
while true; do
  case $(state) in
    READY) ;;
    '')
      if ! "${create[@]}" || ! "${ssh[@]}" "--command=$setup"; then
        sleep 60
        "${delete[@]}"
        continue
      fi
      ;;
    CREATING | STARTING | RESTARTING | REPAIRING)
      sleep 30
      continue
      ;;
    *)
      "${delete[@]}"
      continue
      ;;
  esac
  "${ssh[@]}" "--command=$clear_hosts"
  # gcloud has statuses of its own, so that until_done.sh's is seen in what it says.
  "${ssh[@]}" "--command=$train" 2>&1 | tee "$log"
  status=${PIPESTATUS[0]}
  if ! grep -q 'run it again' "$log"; then
    if ((status == 0)); then
      exit 0
    fi
    if [[ $(state) == READY ]] && ((retries-- == 0)); then
      exit "$status"
    fi
  fi
  echo "ended with status $status; going on in 30 s" >&2
  sleep 30
done
