"""MDTv2-XL/2 on ImageNet 256 by the model card's step-decay recipe.

    python -m mdt_jax.train --config configs/imagenet256_step_decay.py --workdir runs/step_decay \\
        --config.data.path=DIR

The recipe is Adam, lr 1e-4 divided by 10 at 100k and 125k steps, batch 32, 150k steps. The model
card states it beside results (FID 1.79 and 1.58) that it did not produce: those took millions of
steps at batch 256, as in configs/imagenet256.py. Nobody has published a result of this recipe;
expect a far worse one. DIR is as in configs/imagenet256.py.
"""

from mdt_jax.config import config_beside

imagenet256 = config_beside(__file__, "imagenet256")


def get_config(argument: str = ""):
    config = imagenet256(argument)
    config.optimizer.update(name="adam", learning_rate=1e-4, clip_norm=None)
    config.schedule.update(name="step", boundaries=(100_000, 125_000), factor=0.1)
    config.batch_size = 32
    config.num_steps = 150_000
    return config
