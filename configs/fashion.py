"""A small MDTv2 on Fashion-MNIST, class-conditional, in pixel space.

    apt-get install dataset-fashion-mnist
    python -m mdt_jax.train --config configs/fashion.py --workdir runs/fashion

60,000 real photographs of products, 28 × 28 gray, padded to 32 × 32: T-shirts, trousers, pullovers,
dresses, coats, sandals, shirts, sneakers, bags and ankle boots. Without Debian's package,
--config.data.path names the folder of the four IDX files.

Patches of 4 leave 64 tokens; `--config.model.patch_size=2` makes them 256, as many as latents of
256-pixel images have, for about five times the work. `configs/fashion.py:MDT` and `:DiT` train the
others, of the same width and depth, each with its family's optimiser and loss weights.
`mdt samples-report --workdir runs/fashion` says what share of its guided samples a classifier
of the real pictures reads as the class asked for, 0.8 at least, and draws a grid of them.

Layers are unrolled: a small model's step on a CPU is shorter, and takes longer to compile.
`--config.model.scan_unroll=1` is the loop.

As for the digits, the schedule is the squared cosine and the model predicts velocity, since the
linear schedule destroys small images early.
"""

from mdt_jax.config import apply_recipe, default_config


def get_config(model: str = "MDTv2"):
    config = default_config()
    config.model.update(
        name=model,
        input_size=32,
        in_channels=1,
        num_classes=10,
        patch_size=4,
        hidden_size=96,
        depth=6,
        num_heads=4,
        decoder_depth=None if model == "DiT" else 2,
        scan_unroll=6,
    )
    apply_recipe(config)
    config.diffusion.update(schedule="squared_cosine", prediction="velocity")
    config.optimizer.learning_rate = 1e-3
    config.schedule.warmup_steps = 100
    config.num_steps = 20_000
    config.batch_size = 128
    config.ema_rates = (0.999, 0.99)

    config.data.update(name="fashion_mnist", split="train", flip=False)
    config.log_every = 100
    config.checkpoint_every = 1_000
    config.sample.update(
        every=2_000,
        num_samples=100,
        sampler="dpm++",
        steps=25,
        cfg_scale=2.0,
        cfg_power=None,
        guided_channels=None,
        clip=True,
    )
    # Without guidance, so that samples have the distribution of the data.
    config.eval_every = 2_000
    config.eval.update(num_samples=1_000, steps=25, cfg_scale=1.0)
    return config
