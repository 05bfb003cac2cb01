"""A small MDTv2 that paints holes in the digits; an image is 16 tokens of 2 × 2 pixels.

    python -m mdt_jax.train --config configs/digits_inpainting.py --workdir runs/inpainting

It is configs/digits.py with half the width and smaller patches, so that a mask can hide a part of
the tokens: the masked pass keeps 8 to 11 of the 16. 4,000 steps take 18 minutes of CPU time. The
averaged weights of such a run, as float16, are tests/data/inpainting_digits.safetensors.
"""

from mdt_jax.config import config_beside

digits = config_beside(__file__, "digits")


def get_config():
    config = digits()
    config.model.update(patch_size=2, hidden_size=64)
    config.num_steps = 4000
    config.eval_every = 1000
    return config
