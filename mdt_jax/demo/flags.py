"""The flags of `python -m mdt_jax.demo`."""

from __future__ import annotations

from absl import flags

flags.disclaim_key_flags()  # they are the command's, whose --help lists them

LOOPBACK = ("127.0.0.1", "localhost", "::1")

# Each flag: absl's function that defines it, name, default, help.
DEMO_FLAGS = (
    (flags.DEFINE_string, "workdir", None, "The run whose model is tried."),
    (flags.DEFINE_string, "checkpoint", None, "Or PyTorch weights: .pt, .safetensors, hf://O/R/F."),
    (flags.DEFINE_string, "vae", None, "Decoder of latents: ema, mse, …, a file or folder."),
    (flags.DEFINE_float, "ema_rate", None, "Which average; the run's first by default."),
    (flags.DEFINE_integer, "step", None, "Which checkpoint; the newest by default."),
    (flags.DEFINE_integer, "decode_layers", None, "Decoder depth of an MDT v1 of PyTorch's."),
    (flags.DEFINE_integer, "num_heads", None, "Heads of a DiT of PyTorch's of unknown width."),
    (flags.DEFINE_integer, "num_classes", None, "Settles whether their last label is a class."),
    (flags.DEFINE_integer, "input_size", None, "Side of the latents of diffusers' DiT."),
    (
        flags.DEFINE_string,
        "host",
        LOOPBACK[0],
        "The address that is served: this machine alone by default. 0.0.0.0 is every network that "
        "it is on: whoever reaches the port can then use its devices and see nothing else; there "
        "is no password and no encryption, which a proxy before it can add.",
    ),
    (flags.DEFINE_integer, "port", 7860, "The port; 0 takes one that is free."),
    (flags.DEFINE_integer, "most_pictures", 16, "Most pictures of one request."),
    (flags.DEFINE_integer, "most_steps", 250, "Most steps of one request's sampler."),
    (flags.DEFINE_integer, "most_waiting", 8, "Requests that may wait; others are told busy."),
    (flags.DEFINE_integer, "mesh_fsdp", 1, "Devices that share one copy of the parameters."),
    (flags.DEFINE_integer, "mesh_tensor", 1, "Devices that share each head and hidden layer."),
)


GROUPS = {
    "The model": (
        "workdir", "ema_rate", "step", "checkpoint", "decode_layers", "num_heads", "num_classes",
        "input_size", "vae",
    ),
    "Where it is served": ("host", "port"),
    "Limits of a request": ("most_pictures", "most_steps", "most_waiting"),
    "Devices": ("mesh_fsdp", "mesh_tensor"),
}  # fmt: skip


def define_flags(f: flags.FlagValues) -> None:
    """The command's flags."""
    for define, name, default, text in DEMO_FLAGS:
        define(name, default, help=text, flag_values=f)
