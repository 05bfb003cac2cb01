"""Joining the other processes of a job, where there is a job of several."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping

import jax

# Seconds after which a silent peer counts as dead; JAX's default of 100 is slow to notice one.
HEARTBEAT_TIMEOUT = 30


def is_cluster(environment: Mapping[str, str]) -> bool:
    """Whether the environment says that this process is one of several."""
    for variable in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "JAX_NUM_PROCESSES"):
        if int(environment.get(variable) or 1) > 1:
            return True
    # Cloud TPU slices of several hosts, single or several slices.
    workers = environment.get("TPU_WORKER_HOSTNAMES", "").split(",")
    return len(workers) > 1 or "MEGASCALE_COORDINATOR_ADDRESS" in environment


def initialize_distributed(environment: Mapping[str, str] = os.environ) -> None:
    """Calls `jax.distributed.initialize` where there is a cluster; every command's first call.

    SLURM, Open MPI and TPU slices are recognised by JAX itself. Elsewhere JAX_COORDINATOR_ADDRESS,
    JAX_NUM_PROCESSES and JAX_PROCESS_ID say who is who.

    Raises:
      ValueError: JAX_NUM_PROCESSES without the two others.
    """
    # At absl's INFO level it would tell at length which accelerators are not there.
    logging.getLogger("jax._src.xla_bridge").setLevel(logging.WARNING)
    if not is_cluster(environment):
        return
    explicit = {}
    if int(environment.get("JAX_NUM_PROCESSES") or 1) > 1:
        for variable in ("JAX_COORDINATOR_ADDRESS", "JAX_PROCESS_ID"):
            if not environment.get(variable):
                raise ValueError(f"JAX_NUM_PROCESSES is set, {variable} is not")
        explicit = {
            "coordinator_address": environment["JAX_COORDINATOR_ADDRESS"],
            "num_processes": int(environment["JAX_NUM_PROCESSES"]),
            "process_id": int(environment["JAX_PROCESS_ID"]),
        }
    jax.distributed.initialize(**explicit, heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT)
