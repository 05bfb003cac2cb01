"""The command of mdt_jax/commands/push_to_hub.py, from a clone."""

import runpy

if __name__ == "__main__":
    runpy.run_module("mdt_jax.commands.push_to_hub", run_name="__main__", alter_sys=True)
