"""A small MDTv2 for painting holes in the digits: 16 tokens of 2 × 2 pixels, of which some hide.

    python -m mdt_jax.train --config configs/digits_inpainting.py --workdir runs/inpainting

configs/digits.py with smaller patches and half the width, so that a mask may hide a part of the
tokens: the masked pass keeps 8 to 11 of the 16. 4,000 steps, 18 minutes of CPU time. Its
average of the weights, as float16, is tests/data/inpainting_digits.safetensors.
"""

from configs.digits import get_config as digits


def get_config():
    config = digits()
    config.model.update(patch_size=2, hidden_size=64)
    config.num_steps = 4000
    config.eval_every = 1000
    return config
