"""LSUN bedrooms at 256 pixels, unconditional, on latents; any model by name.

    python -m mdt_jax.train --config configs/lsun_bedroom256.py:MDTv2-B/2 --workdir runs/bedroom \\
        --config.data.path=DIR

DIR holds the 3,033,042 bedrooms, encoded once:

    mdt prepare-dataset --lmdb bedroom_train_lmdb --data_dir data
    mdt encode-latents --data_name tfds:lsun/bedroom --data_path data --vae mse \\
        --image_size 256 --output DIR

The recipe is that of configs/imagenet256.py for the same model, for 400,000 steps, without labels
and guidance. The MDT authors publish no result on this set, so none is known to expect.
"""

from mdt_jax.config import config_beside, parse_argument

imagenet256 = config_beside(__file__, "imagenet256")


def get_config(argument: str = ""):
    given = parse_argument(argument, model="MDTv2-B/2", vae="mse")
    config = imagenet256(f"{given['model']},vae={given['vae']}")
    config.model.num_classes = 0
    config.label_dropout = 0.0
    config.num_steps = 400_000
    config.sample.update(cfg_scale=1.0)
    return config
