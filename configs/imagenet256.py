"""ImageNet at 256 pixels, on an autoencoder's latents; any model by name.

    python -m mdt_jax.train --config configs/imagenet256.py:MDTv2-XL/2 --workdir runs/mdtv2_xl2 \\
        --config.data.path=DIR

DIR holds the training images, encoded once:

    mdt prepare-dataset --imagenet ILSVRC2012_img_train.tar --data_dir data
    mdt encode-latents --data_name tfds:imagenet2012 --data_path data --vae mse \\
        --image_size 256 --output DIR

`:MDTv2-XL/2,vae=NAME` trains on the latents of another published autoencoder than Stable
Diffusion's: "sdxl" (4 channels), "sd3" or "flux" (16), "dc-ae-f32" or "dc-ae-f64" (32 or 64 pixels
a latent). Encode with the same --vae NAME; the run keeps what its latents are, and refuses others.

The model is "MDTv2-XL/2" if none is named. Each family has its authors' recipe:

    MDT    AdamW, lr 1e-4, batch 256, mask ratio 0.3, decoder depth 2
    MDTv2  Adan, lr 3e-4, clipped to norm 1, batch 256, mask ratio 0.3 to 0.5, min-SNR weights of 5,
           decoder depth 4; S/2 as in the authors' script: lr 5e-4, decoder depth 6
    DiT    AdamW, lr 1e-4, batch 256

These recipes aim at the published FID-50K of the authors' code:

    MDT-XL/2    7.41 / 6.46 / 6.23 after 2,500k / 3,500k / 6,500k steps, unguided;
                2.15 / 2.02 / 1.79 guided (scale 3.8, power 4, 250 steps, `ema` decoder)
    MDTv2-XL/2  1.58 guided

To see FID while it trains, with the published sampling but 10,000 samples instead of 50,000, add

    --config.eval_every=50000 --config.eval.num_samples=10000 --config.eval.vae=ema \\
        --config.eval.inception=DIR --config.eval.reference=VIRTUAL_imagenet256_labeled.npz

Each evaluation takes 5,000,000 passes of the model: for XL/2 about an hour of an H200 at 40% of its
peak, by arithmetic. --config.eval.cfg_scale=1 --config.eval.steps=50 makes it a tenth of that.

No run of the published length has been made with this code. XL/2's state fits a 16 GB chip only if
it is sharded: add --config.mesh.fsdp=16, for instance.
"""

from mdt_jax.config import apply_autoencoder, apply_recipe, default_config, parse_argument

NUM_STEPS = {"MDT-XL/2": 6_500_000, "MDTv2-XL/2": 2_000_000, "DiT-XL/2": 7_000_000}


def get_config(argument: str = "", image_size: int = 256):
    given = parse_argument(argument, model="MDTv2-XL/2", vae="mse")
    model = given["model"]
    config = default_config()
    config.model.name = model
    apply_autoencoder(config, given["vae"], image_size)
    apply_recipe(config)
    if model == "MDTv2-S/2":
        config.model.decoder_depth = 6
        config.optimizer.learning_rate = 5e-4
    config.num_steps = NUM_STEPS.get(model, 400_000)
    config.data.update(name="latents", flip=True)
    config.checkpoint_every = 10_000
    config.keep_every = 500_000
    # Latents have no pixels to show before a decoder: no grids while training.
    config.sample.every = 0
    if model.startswith("DiT"):
        config.sample.update(cfg_scale=1.5, cfg_power=None)
    return config
