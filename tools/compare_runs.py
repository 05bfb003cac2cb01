"""The command of mdt_jax/commands/compare_runs.py, from a clone."""

import runpy

if __name__ == "__main__":
    runpy.run_module("mdt_jax.commands.compare_runs", run_name="__main__", alter_sys=True)
