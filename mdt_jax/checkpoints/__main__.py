"""`python -m mdt_jax.checkpoints WORKDIR`: see `mdt_jax.checkpoints.listing`."""

from absl import app

from mdt_jax.checkpoints import listing
from mdt_jax.parallel.command import ending_quietly
from mdt_jax.parallel.flag_parsing import parse_flags

if __name__ == "__main__":
    with ending_quietly():
        app.run(listing.main, flags_parser=parse_flags)
