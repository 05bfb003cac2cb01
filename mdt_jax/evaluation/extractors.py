"""Extractors, which compute features of images: their interface, and networks as extractors."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float32, UInt8

from mdt_jax.models.inception import InceptionV3
from mdt_jax.parallel import sharding
from mdt_jax.weights import inception


@dataclasses.dataclass(frozen=True, eq=False)
class Features:
    """The features of a batch of images.

    Attributes:
      pool: features for FID, precision and recall.
      spatial: features for sFID, with positions kept and flattened; None where there are none.
      probabilities: class probabilities for the Inception Score; None where there are no classes.
    """

    pool: Float32[np.ndarray, "n d"]
    spatial: Float32[np.ndarray, "n s"] | None = None
    probabilities: Float32[np.ndarray, "n k"] | None = None


@runtime_checkable
class Extractor(Protocol):
    """Computes features of images, which do not depend on the rest of the batch.

    Attributes:
      name: its name in messages and reports.
      digest: the digest of its weights; statistics of other weights cannot be compared.
    """

    name: str
    digest: str

    def extract(self, images: UInt8[np.ndarray, "n h w c"]) -> Features:
        """The features of a batch, one row for each image."""


def check_finite(found: Features, name: str, first: int) -> None:
    """Refuses, with ValueError, features that are not finite.

    Args:
      found: the features of a batch.
      name: the images' name, for the message.
      first: the index of the batch's first image.
    """
    for part in (found.pool, found.spatial, found.probabilities):
        finite = True if part is None else np.isfinite(part).all(axis=1)
        if not np.all(finite):
            raise ValueError(
                f"{name}: image {first + int(np.argmin(finite))} has features that are not finite: "
                "the extractor's weights are damaged, or not of this network"
            )


# A network's pass, (parameters, uint8 images) → (pool, spatial or None, probabilities or None).
Apply = Callable[[Any, Array], tuple[Array, Array | None, Array | None]]


class NetworkExtractor:
    """A network on this process's devices; batches are padded to one size, so it compiles once.

    Each process has all parameters and its own images, and none waits for another.
    """

    def __init__(
        self, name: str, apply: Apply, params: Any, batch_size: int = 64, mesh: Mesh | None = None
    ):
        """
        Args:
          name: see `Extractor`.
          apply: a pure function of parameters and images.
          params: a tree of arrays.
          batch_size: images at a time, rounded up to a multiple of the devices.
          mesh: a mesh of this process's devices, all of them by default.

        Raises:
          ValueError: a batch size below 1.
        """
        if batch_size < 1:
            raise ValueError(f"--batch_size {batch_size} is below 1")
        self.name = name
        self.digest = digest(params)
        self._mesh = sharding.create_mesh(devices=jax.local_devices()) if mesh is None else mesh
        shards = sharding.batch_shards(self._mesh)
        self.batch_size = -(-batch_size // shards) * shards
        self._params = jax.device_put(params, sharding.replicated(self._mesh))
        self._apply = jax.jit(apply, out_shardings=sharding.batch_sharding(self._mesh))

    def extract(self, images: UInt8[np.ndarray, "n h w c"]) -> Features:
        """As `Extractor.extract`, for any number of images."""
        parts = []
        for first in range(0, len(images), self.batch_size):
            rows = images[first : first + self.batch_size]
            batch = np.zeros((self.batch_size, *images.shape[1:]), np.uint8)
            batch[: len(rows)] = rows
            outputs = self._apply(
                self._params, jax.device_put(batch, sharding.batch_sharding(self._mesh))
            )
            parts.append([None if out is None else np.asarray(out)[: len(rows)] for out in outputs])
        return Features(
            *(None if out[0] is None else np.concatenate(out) for out in zip(*parts, strict=True))
        )


def load_inception(
    source: str | Path, batch_size: int = 64, mesh: Mesh | None = None
) -> NetworkExtractor:
    """The FID Inception-v3: pool_3, the 2023 spatial features and class probabilities.

    Probabilities are the softmax of the logits without their bias, as ADM's Inception Score has
    them. Gray images are repeated over three channels.

    Args:
      source: as `mdt_jax.weights.inception.load_network` takes it.
      batch_size, mesh: as `NetworkExtractor` has them.

    Raises:
      WeightsError: no such weights; the message says where to get them.
    """
    network, params = inception.load_network(source)

    def apply(params: Any, images: Array) -> tuple[Array, Array, Array]:
        return inception_features(network, params, images)

    return NetworkExtractor("inception-2015-12-05", apply, params, batch_size, mesh)


def inception_features(
    network: InceptionV3, params: Any, images: Array
) -> tuple[Array, Array, Array]:
    """Inception's pool and spatial features and class probabilities of uint8 images."""
    out = network.apply({"params": params}, images)
    spatial = out.spatial.reshape(len(images), -1)
    return out.pool_3, spatial, jax.nn.softmax(out.logits_unbiased.astype(jnp.float32))


def digest(params: Any) -> str:
    """The BLAKE2b digest of a tree of arrays: their paths, shapes and numbers as float32."""
    found = hashlib.blake2b(digest_size=16)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        found.update(f"{name} {np.shape(leaf)}\n".encode())
        found.update(np.ascontiguousarray(leaf, "<f4").data)
    return found.hexdigest()
