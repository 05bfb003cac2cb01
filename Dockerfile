# An image with mdt_jax and JAX for one kind of device:
#
#   docker build --build-arg EXTRA=tpu    -t mdt_jax:tpu .
#   docker build --build-arg EXTRA=cuda13 -t mdt_jax:cuda13 .   (or cuda12, for older drivers)
#
# The CUDA wheels bring CUDA's libraries; the host needs the driver and the NVIDIA container toolkit.
FROM python:3.11-slim

ARG EXTRA=cuda13

WORKDIR /mdt_jax
COPY setup.py setup.cfg pyproject.toml README.md LICENSE ./
COPY mdt_jax mdt_jax
COPY configs configs
COPY tools tools
COPY tests/constraints.txt tests/constraints.txt
RUN pip install --no-cache-dir -e ".[${EXTRA}]"

# SIGTERM, upon which training saves, reaches the command itself: no shell in between.
CMD ["python", "-m", "mdt_jax.train", "--help"]
