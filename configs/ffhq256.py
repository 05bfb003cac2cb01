"""FFHQ faces at 256 pixels, unconditional, on latents; any model by name.

    python -m mdt_jax.train --config configs/ffhq256.py:MDTv2-B/2 --workdir runs/ffhq \\
        --config.data.path=DIR

DIR holds the 70,000 faces, encoded once (mdt prepare-dataset says how to get FFHQ):

    mdt prepare-dataset --folder images1024x1024 --labels none --name ffhq \\
        --data_dir data
    mdt encode-latents --data_name tfds:ffhq --data_path data --vae mse \\
        --image_size 256 --output DIR

At batch 256 an epoch is 273 steps, so the run is shorter than ImageNet's: 200,000 steps. The MDT
authors publish no result on this set, so none is known to expect.
"""

from mdt_jax.config import config_beside

unconditional = config_beside(__file__, "lsun_bedroom256")


def get_config(argument: str = ""):
    config = unconditional(argument)
    config.num_steps = 200_000
    return config
