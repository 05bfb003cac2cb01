"""An extractor of random projections, which compiles in no time: for tests of what is around it."""

import jax
import jax.numpy as jnp
import numpy as np

from mdt_jax.evaluation.extractors import NetworkExtractor
from mdt_jax.parallel import sharding

SIZE = 4


def create(seed=0, *, batch_size=16, devices=None, parts=("pool", "spatial", "logits"), size=SIZE):
    """12 features, 6 spatial ones and 5 classes of `size` × `size` images; parts can be left out.

    Few and small numbers, so that sums of products are the same whatever the batch's shape.
    """
    rng = np.random.default_rng(seed)
    widths = {"pool": 12, "spatial": 6, "logits": 5}
    params = {
        name: (rng.integers(-2, 3, (size * size * 3, widths[name])) / 8).astype(np.float32)
        for name in parts
    }

    def apply(params, images):
        x = jnp.broadcast_to(images, (*images.shape[:3], 3)).reshape(len(images), -1)
        x = x.astype(jnp.float32) / 128 - 1
        found = {name: x @ weights for name, weights in params.items()}
        logits = found.get("logits")
        probabilities = None if logits is None else jax.nn.softmax(logits)
        return found["pool"], found.get("spatial"), probabilities

    mesh = sharding.create_mesh(devices=devices or jax.devices()[:1])
    return NetworkExtractor("fake", apply, params, batch_size, mesh)


def random_images(count, seed, *, size=SIZE, channels=3):
    """(count, size, size, channels) uint8."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, size, size, channels)).astype(np.uint8)
