"""ImageNet at 512 pixels, on an autoencoder's latents; any model by name.

    python -m mdt_jax.train --config configs/imagenet512.py:MDTv2-XL/2 --workdir runs/512 \\
        --config.data.path=DIR --config.mesh.fsdp=16

DIR holds the training images, encoded once at 512 pixels:

    mdt encode-latents --data_name tfds:imagenet2012 --data_path data --vae mse \\
        --image_size 512 --output DIR

The recipes are those of configs/imagenet256.py, and so is `,vae=NAME`. With Stable Diffusion's
autoencoder an image is 64 × 64 latents, 1,024 tokens of 2 × 2: a step takes over four times the
work of 256 pixels, and its attention sixteen times the memory, so activations are recomputed
(model.remat). `:MDTv2-XL/2,vae=dc-ae-f32` has 16 × 16 latents, each a token: 256 tokens, as at 256
pixels with Stable Diffusion's.

The MDT authors publish no result at 512 pixels, so none is known to expect; DiT-XL/2 has FID-50K
12.03, guided 3.04 (Peebles and Xie 2023, table 3) after 3,000,000 steps of batch 256.
"""

from mdt_jax.config import config_beside, create_network

imagenet256 = config_beside(__file__, "imagenet256")


def get_config(argument: str = ""):
    config = imagenet256(argument, image_size=512)
    config.num_steps = 3_000_000
    if create_network(config).num_tokens > 256:
        config.model.remat = "full"
    return config
