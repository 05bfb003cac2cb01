"""Data: random-access sources, crops and scaling, and the pipeline to the devices."""

from typing import TYPE_CHECKING

from mdt_jax.basics.lazy_names import lazy_names

if TYPE_CHECKING:
    from mdt_jax.data.array_sources import arrays, digits, npy_directory
    from mdt_jax.data.decoding import BadImage, decode_image
    from mdt_jax.data.device_prefetch import DevicePrefetcher, prefetch_to_device
    from mdt_jax.data.folders import folder_source
    from mdt_jax.data.latent_cache import latents_source
    from mdt_jax.data.pipeline import BatchIterator, create_batches
    from mdt_jax.data.source import ExampleKind, Source
    from mdt_jax.data.sources import create_source
    from mdt_jax.data.stream import ExampleStream, example_spec
    from mdt_jax.data.tfds import tfds_source
    from mdt_jax.data.transforms import center_crop, random_crop, to_unit_range

_HOMES = {
    "BadImage": "mdt_jax.data.decoding",
    "BatchIterator": "mdt_jax.data.pipeline",
    "DevicePrefetcher": "mdt_jax.data.device_prefetch",
    "ExampleKind": "mdt_jax.data.source",
    "ExampleStream": "mdt_jax.data.stream",
    "Source": "mdt_jax.data.source",
    "arrays": "mdt_jax.data.array_sources",
    "center_crop": "mdt_jax.data.transforms",
    "create_batches": "mdt_jax.data.pipeline",
    "create_source": "mdt_jax.data.sources",
    "decode_image": "mdt_jax.data.decoding",
    "digits": "mdt_jax.data.array_sources",
    "example_spec": "mdt_jax.data.stream",
    "folder_source": "mdt_jax.data.folders",
    "latents_source": "mdt_jax.data.latent_cache",
    "npy_directory": "mdt_jax.data.array_sources",
    "prefetch_to_device": "mdt_jax.data.device_prefetch",
    "random_crop": "mdt_jax.data.transforms",
    "tfds_source": "mdt_jax.data.tfds",
    "to_unit_range": "mdt_jax.data.transforms",
}

__all__ = [
    "BadImage",
    "BatchIterator",
    "DevicePrefetcher",
    "ExampleKind",
    "ExampleStream",
    "Source",
    "arrays",
    "center_crop",
    "create_batches",
    "create_source",
    "decode_image",
    "digits",
    "example_spec",
    "folder_source",
    "latents_source",
    "npy_directory",
    "prefetch_to_device",
    "random_crop",
    "tfds_source",
    "to_unit_range",
]

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
