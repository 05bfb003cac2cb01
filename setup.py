"""What setup.cfg cannot say: configs/, which is beside the package, is a part of it in a wheel."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["mdt_jax", "mdt_jax.*"]), "mdt_jax.configs"],
    package_dir={"mdt_jax.configs": "configs"},
)
