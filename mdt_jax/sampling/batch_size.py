"""The batch size of sampling where none is given: as many samples as the devices' memory takes."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mdt_jax.models import LatentTransformer
from mdt_jax.parallel import sharding
from mdt_jax.parallel.distributed import gather_json

# A larger batch keeps no device busier, and the progress bar and a killed job wait for all of it.
MOST_PER_DEVICE = 256
# The batch over all devices where they report no memory limit: CPUs, which share their memory.
UNKNOWN = 256
# The share of the memory beside the parameters that activations may take. The rest is for what
# `row_bytes` does not count: the sampler's own arrays, copies that a compiler makes, an autoencoder
# that decodes the samples.
SHARE = 0.5


def fitting(network: LatentTransformer, params: Any, mesh: Mesh, guided: bool) -> int:
    """The largest batch, over all devices, that is a power of two on each and fits there.

    It depends on how much memory the devices have, not on how much of it is free just now, so that
    a job that is started again goes on with the batches it began. All processes get the same one.

    Args:
      network: the model that is sampled.
      params: its parameters as they lie on the mesh; arrays elsewhere count as a copy a device.
      mesh: the devices.
      guided: whether each sample takes two rows of the network.
    """
    stats = [device.memory_stats() or {} for device in mesh.local_devices]
    limit = min((each["bytes_limit"] for each in stats if "bytes_limit" in each), default=0)
    limit = min(gather_json("memory of the devices", limit))
    if not limit:
        return UNKNOWN
    room = SHARE * (limit - parameter_bytes(network, params))
    count = int(room / (row_bytes(network) * (2 if guided else 1)))
    # At least one sample: if it does not fit, the device's own error says by how much.
    per_device = 2 ** int(np.log2(min(max(count, 1), MOST_PER_DEVICE)))
    return per_device * sharding.batch_shards(mesh)


def parameter_bytes(network: LatentTransformer, params: Any) -> int:
    """Bytes of the parameters on one device, and of a copy of them in the network's dtype."""

    def on_one_device(leaf: Any) -> int:
        shape = leaf.sharding.shard_shape(leaf.shape) if isinstance(leaf, jax.Array) else leaf.shape
        size = int(np.prod(shape))
        return size * (leaf.dtype.itemsize + np.dtype(network.dtype).itemsize)

    return sum(map(on_one_device, jax.tree.leaves(params)))


def row_bytes(network: LatentTransformer) -> int:
    """Bytes of one image's activations in a forward pass: a block's, and those kept across blocks.

    Attention counts with its logits in memory, whether or not this device keeps them there.
    """
    tokens, width = network.num_tokens, network.hidden_size
    itemsize = np.dtype(network.dtype).itemsize
    stream = tokens * width * itemsize
    logits = network.num_heads * tokens**2
    attention = 4 * stream + logits * (4 + itemsize)  # q, k, v, output; logits, their softmax
    mlp = 2 * network.mlp_ratio * stream  # before and after the activation
    norm = 2 * tokens * width * 4  # in float32
    block = 3 * stream + norm + max(attention, mlp)  # the residual stream, the embedded input
    return int(block + 2 * network.num_shortcuts * stream)  # outputs, and the same last first
