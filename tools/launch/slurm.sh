#!/usr/bin/env bash
#SBATCH --job-name=mdt_jax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#
# Trains under SLURM, one task for each GPU, job after job until it is done.
#
#   sbatch [--nodes=4 ...] tools/launch/slurm.sh COMMAND...
#   tools/launch/slurm.sh --dry_run COMMAND...
#
#   sbatch --nodes=4 tools/launch/slurm.sh python -m mdt_jax.train \
#       --config configs/imagenet256.py:MDTv2-XL/2 --workdir /shared/xl2 --config.data.path=/shared/latents
#
# From the root of the clone, in an environment that all nodes see; the workdir must be one that all
# see, too. As many tasks a node as it has GPUs, and no --gpus-per-task: JAX gives local task k the
# node's GPU k, and so every task must see them all. 300 s before the time is over SLURM sends
# SIGUSR1; training saves and ends, and the job queues again. Preempted jobs and those of lost nodes
# are queued again by SLURM itself (--requeue). A job that failed is not.
#
# With CONTAINER_IMAGE (an enroot .sqsh file, or a registry's name) the tasks run in that image, by
# pyxis' srun plugin; CONTAINER_MOUNTS are the folders that it sees beside this clone, such as
# /shared:/shared. NCCL's and JAX's variables are taken from the environment that sbatch is called
# in; docs/scaling.md has those that matter.
set -u

dry_run=''
if [[ ${1-} == --dry_run ]]; then
  dry_run=yes
  shift
fi
if (($# == 0)) || [[ $1 == --help ]]; then
  sed -n '/^# Trains/,/^set/{/^set/!s/^# \{0,1\}//p}' "$0" >&2
  exit 2
fi

# SLURM runs a copy of this file, from the folder that it was submitted in.
container=()
if [[ ${CONTAINER_IMAGE-} ]]; then
  mounts=$PWD:$PWD${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}
  container=(--container-image="$CONTAINER_IMAGE" --container-mounts="$mounts"
    --container-workdir="$PWD")
fi
step=(srun --kill-on-bad-exit=1 --label ${container[@]+"${container[@]}"}
  bash tools/launch/until_done.sh "$@")
again=(scontrol requeue "${SLURM_JOB_ID-JOB}")
if [[ $dry_run ]]; then
  grep '^#SBATCH' "$0"
  printf '%q ' "${step[@]}"
  printf '\nwith status 75: '
  printf '%q ' "${again[@]}"
  echo
  exit 0
fi

"${step[@]}"
status=$?
if ((status == 75)); then
  "${again[@]}"
  exit
fi
exit "$status"
