"""Multiply-adds by formula, and the peaks they are held against."""

import pytest

from mdt_jax.models import create_model
from mdt_jax.models.flops import forward_macs, train_step_flops


@pytest.mark.parametrize(
    ("name", "kept", "full", "masked"),
    [("MDTv2-XL/2", 152, 129.49e9, 88.32e9), ("MDT-XL/2", 179, 118.62e9, 88.97e9)],
)
def test_multiply_adds_of_the_published_models(name, kept, full, masked):
    model = create_model(name)
    assert forward_macs(model) == pytest.approx(full, rel=5e-3)
    assert forward_macs(model, kept) == pytest.approx(masked, rel=5e-3)
    assert train_step_flops(model, 2, float(kept)) == pytest.approx(12 * (full + masked), rel=5e-3)


def test_dit_xl_2_is_the_118_6_gigaflops_its_paper_counts():
    assert forward_macs(create_model("DiT-XL/2")) == pytest.approx(118.64e9, rel=5e-3)
