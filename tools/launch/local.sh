#!/usr/bin/env bash
# Runs a command as a job of N processes on this machine: several hosts in miniature.
#
#   tools/launch/local.sh [--dry_run] [--devices D] [--grace SECONDS] N -- COMMAND...
#
#   tools/launch/local.sh --devices 4 2 -- python -m mdt_jax.train --config configs/digits.py \
#       --workdir runs/two
#
# Each process has D (1) CPU devices and talks to the others by gloo. JAX_PLATFORMS=cuda keeps the
# GPUs instead; then every process needs CUDA_VISIBLE_DEVICES of its own. SIGTERM, SIGUSR1 and Ctrl-C
# (as SIGTERM) are passed on to all processes. When one fails, the others are given SECONDS (10) to
# end by themselves and are then killed. The exit status is that of the first process to fail, or 0.
set -u

usage() {
  sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' "$0" >&2
  exit 2
}

dry_run='' devices=1 grace=10 n=''
while (($#)); do
  case $1 in
    --dry_run) dry_run=yes ;;
    --devices) devices=${2-} && shift ;;
    --grace) grace=${2-} && shift ;;
    --) shift && break ;;
    --*) usage ;;
    *) n=$1 ;;
  esac
  shift
done
if ! [[ $n =~ ^[1-9][0-9]*$ && $devices =~ ^[1-9][0-9]*$ && $grace =~ ^[0-9]+$ ]] || (($# == 0)); then
  usage
fi

port=0
while ((port == 0)) || (exec 3<>"/dev/tcp/localhost/$port") 2>/dev/null; do
  port=$((20000 + RANDOM % 10000))
done
export JAX_COORDINATOR_ADDRESS=localhost:$port JAX_NUM_PROCESSES=$n
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
export XLA_FLAGS="${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$devices"

if [[ $dry_run ]]; then
  for ((k = 0; k < n; k++)); do
    printf '%q ' JAX_PROCESS_ID="$k" JAX_COORDINATOR_ADDRESS="$JAX_COORDINATOR_ADDRESS" \
      JAX_NUM_PROCESSES="$n" JAX_PLATFORMS="$JAX_PLATFORMS" XLA_FLAGS="$XLA_FLAGS" "$@"
    echo
  done
  exit 0
fi

pids=()
pass_on() {
  ((${#pids[@]} == 0)) || kill -s "$1" "${pids[@]}" 2>/dev/null
}
trap 'pass_on TERM' TERM INT
trap 'pass_on USR1' USR1
for ((k = 0; k < n; k++)); do
  JAX_PROCESS_ID=$k "$@" > >(trap '' INT TERM USR1 && exec sed -u "s/^/[$k] /") 2>&1 &
  pids[k]=$!
done

first_status=0 deadline=''
while ((${#pids[@]})); do
  for k in "${!pids[@]}"; do
    kill -0 "${pids[k]}" 2>/dev/null && continue
    wait "${pids[k]}"
    status=$?
    unset 'pids[k]'
    if ((status && !first_status)); then
      first_status=$status
      deadline=$((SECONDS + grace))
      echo "process $k ended with status $status; the others have $grace s to end" >&2
    fi
  done
  if [[ $deadline ]] && ((SECONDS >= deadline)); then
    pass_on KILL
  fi
  sleep 0.2
done
exit "$first_status"
