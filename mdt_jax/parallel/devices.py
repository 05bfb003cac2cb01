"""A device's memory and its peak FLOP/s, and how much of them is used."""

from __future__ import annotations

import os

import jax


def device_memory() -> dict[str, int]:
    """Bytes in use on this process's first device, now and at most; {} if it does not tell."""
    stats = jax.local_devices()[0].memory_stats() or {}
    names = {"bytes_in_use": "device_memory_bytes", "peak_bytes_in_use": "device_memory_peak_bytes"}
    return {name: stats[key] for key, name in names.items() if key in stats}


# Dense peak FLOP/s of one JAX device, by `jax.Device.device_kind`, of matrix multiplications in
# bfloat16 and in float32. float32 is IEEE's, which matmul precision `highest` asks for: on a GPU
# the rate of CUDA cores, not TF32's; Google documents none for TPUs, which split a product into
# bfloat16 passes. NVIDIA prints tensor-core rates with 2:4 sparsity, twice the dense ones given
# here. A slice of a GPU (MIG) has a name of its own, and is not listed.
_PEAK_FLOPS: dict[str, dict[str, float]] = {
    # https://cloud.google.com/tpu/docs/v4, v5e, v5p, v6e: "peak compute per chip"; on these
    # generations a chip is one JAX device.
    "TPU v4": {"bfloat16": 275e12},
    "TPU v5 lite": {"bfloat16": 197e12},
    "TPU v5e": {"bfloat16": 197e12},
    "TPU v5": {"bfloat16": 459e12},
    "TPU v5p": {"bfloat16": 459e12},
    "TPU v6 lite": {"bfloat16": 918e12},
    "TPU v6e": {"bfloat16": 918e12},
    # https://cloud.google.com/tpu/docs/tpu7x: 2307e12 a chip, which is two devices.
    "TPU7x": {"bfloat16": 2307e12 / 2},
    # NVIDIA A100 Tensor Core GPU datasheet (40 GB and 80 GB, SXM and PCIe alike).
    "NVIDIA A100-SXM4-40GB": {"bfloat16": 312e12, "float32": 19.5e12},
    "NVIDIA A100-SXM4-80GB": {"bfloat16": 312e12, "float32": 19.5e12},
    "NVIDIA A100-PCIE-40GB": {"bfloat16": 312e12, "float32": 19.5e12},
    "NVIDIA A100 80GB PCIe": {"bfloat16": 312e12, "float32": 19.5e12},
    # NVIDIA H100 Tensor Core GPU datasheet and architecture whitepaper: SXM5, PCIe, NVL.
    "NVIDIA H100 80GB HBM3": {"bfloat16": 989e12, "float32": 67e12},
    "NVIDIA H100 PCIe": {"bfloat16": 756e12, "float32": 51e12},
    "NVIDIA H100 NVL": {"bfloat16": 835e12, "float32": 60e12},
    # NVIDIA H200 Tensor Core GPU datasheet: SXM, NVL.
    "NVIDIA H200": {"bfloat16": 989e12, "float32": 67e12},
    "NVIDIA H200 NVL": {"bfloat16": 835e12, "float32": 60e12},
    # NVIDIA DGX B200 datasheet: 72e15 in sparse FP8 on eight GPUs; a quarter in bfloat16.
    "NVIDIA B200": {"bfloat16": 2250e12},
    # NVIDIA GB200 NVL72 datasheet: 360e15 in sparse bfloat16 on 72 GPUs.
    "NVIDIA GB200": {"bfloat16": 2500e12},
}


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """The dense peak FLOP/s of one device in matrix multiplications of `dtype`.

    Args:
      device_kind: JAX's name for the device, `jax.devices()[0].device_kind`.
      dtype: "bfloat16" or "float32", the model's compute dtype.

    Returns:
      FLOP/s, a multiply-add counted as two; None if no published number is known (CPUs, unlisted
      accelerators, float32 on TPUs).

    Raises:
      ValueError: `dtype` is neither.
    """
    if dtype not in ("bfloat16", "float32"):
        raise ValueError(f'dtype {dtype!r} has no peak FLOP/s: give "bfloat16" or "float32"')
    return _PEAK_FLOPS.get(device_kind, {}).get(dtype)


def mfu(
    flops_per_step: float | int,
    seconds_per_step: float | int,
    num_devices: int,
    device_kind: str,
    dtype: str,
) -> float | None:
    """Model FLOP/s utilisation (PaLM, arXiv:2204.02311, appendix B).

    Args:
      flops_per_step: FLOPs of the model's forward and backward passes over the whole global batch,
        without rematerialisation; a multiply-add counts as two.
      seconds_per_step: wall-clock seconds, above 0.
      num_devices: devices of the run, over all processes.
      device_kind: `jax.devices()[0].device_kind`.
      dtype: "bfloat16" or "float32".

    Returns:
      A fraction, 1 for every device at its peak; None if `peak_flops` is not known.

    Raises:
      ValueError: `dtype` is neither.
    """
    peak = peak_flops(device_kind, dtype)
    return None if peak is None else flops_per_step / seconds_per_step / (num_devices * peak)


def memory_bytes(device: jax.Device) -> int | None:
    """The memory of a device: what it reports, a CPU's share of the machine's; None if unknown."""
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if limit is None and device.platform == "cpu" and hasattr(os, "sysconf"):
        machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        limit = machine // max(jax.local_device_count(), 1)
    return limit
