"""Trains a model: `python -m mdt_jax.train --config configs/digits.py --workdir runs/digits`.

The same command resumes the run. `--config.KEY=VALUE` changes a setting. `--dry_run` shows what
would be trained, and stops. SIGTERM, SIGUSR1 and `--max_hours` save a checkpoint and end the run.
"""

import functools

from absl import app, flags, logging

from mdt_jax.parallel.command import ending_quietly
from mdt_jax.train.command import main
from mdt_jax.train.flags import define_flags
from mdt_jax.training.config_flag import parse_config_flags

if __name__ == "__main__":
    logging.set_verbosity(logging.INFO)
    define_flags(flags.FLAGS)
    with ending_quietly():
        app.run(main, flags_parser=functools.partial(parse_config_flags, required=True))
