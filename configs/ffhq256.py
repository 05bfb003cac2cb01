"""FFHQ faces at 256 pixels, unconditional, on latents; any model by name.

    python -m mdt_jax.train --config configs/ffhq256.py:MDTv2-B/2 --workdir runs/ffhq \\
        --config.data.path=DIR

DIR holds the 70,000 faces, encoded once (tools/prepare_dataset.py says how to get FFHQ):

    python tools/prepare_dataset.py --folder images1024x1024 --labels none --name ffhq \\
        --data_dir data
    python tools/encode_latents.py --data_name tfds:ffhq --data_path data --vae mse \\
        --image_size 256 --output DIR

At batch 256 an epoch is 273 steps, so the run is shorter than ImageNet's: 200,000 steps. The MDT
authors publish no result on this set, so none is known to expect.
"""

from configs.lsun_bedroom256 import get_config as unconditional


def get_config(argument: str = ""):
    config = unconditional(argument)
    config.num_steps = 200_000
    return config
