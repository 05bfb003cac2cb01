"""Fine-tunes a pretrained model on a folder of your own pictures, with a sub-folder for each class.

    mdt encode-latents --data_name folder --data_path PICTURES --vae mse \\
        --image_size 256 --output LATENTS
    python -m mdt_jax.train --config configs/finetune_folder.py:MDTv2-XL/2 --workdir runs/mine \\
        --config.init_from=mdt_xl2_v2_ckpt.pt --config.data.path=LATENTS
    python -m mdt_jax.sample --workdir runs/mine --vae ema --num_samples 16 --output runs/mine/grid

init_from is a .pt or .safetensors file, hf://OWNER/REPO/FILE or a workdir. The model gets the
folder's number of classes: the rows of the label table are random, except for the null row, and all
other weights start as they were. The log lists them. Pictures without sub-folders have no classes,
and use the null row. For 512 pixels encode at 512 and add --config.model.input_size=64: the tables
of positions and attention biases are resized. Weights that were trained on another autoencoder's
latents need pictures encoded by it, and `:MODEL,vae=NAME` as in configs/imagenet256.py.

The recipe is the family's own with a third of its learning rate and a faster average. 10,000 steps
of 64 pictures are a starting point for some thousand pictures, not a tuned figure. XL/2 with Adan
has 17.8 GB of state: --config.mesh.fsdp=N spreads it over N devices.
"""

from mdt_jax.config import apply_autoencoder, apply_recipe, default_config, parse_argument


def get_config(argument: str = ""):
    given = parse_argument(argument, model="MDTv2-XL/2", vae="mse")
    model = given["model"]
    config = default_config()
    config.model.name = model
    apply_autoencoder(config, given["vae"], image_size=256)
    config.model.num_classes = -1  # the data's
    apply_recipe(config)
    config.optimizer.learning_rate /= 3
    config.schedule.warmup_steps = 200
    config.num_steps = 10_000
    config.batch_size = 64
    config.ema_rates = (0.999,)
    config.data.update(name="latents", flip=True)
    config.checkpoint_every = 1_000
    # Latents have no pixels to show before a decoder: no grids while training.
    config.sample.every = 0
    config.sample.cfg_scale = 2.0
    config.sample.cfg_power = None
    if model.startswith("DiT"):
        config.sample.cfg_scale = 1.5
    return config
