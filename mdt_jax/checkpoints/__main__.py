"""`python -m mdt_jax.checkpoints WORKDIR`: see `mdt_jax.checkpoints.listing`."""

from absl import app

from mdt_jax.checkpoints import listing

if __name__ == "__main__":
    app.run(listing.main)
