"""The command of mdt_jax/commands/samples_report.py, from a clone."""

import runpy

if __name__ == "__main__":
    runpy.run_module("mdt_jax.commands.samples_report", run_name="__main__", alter_sys=True)
