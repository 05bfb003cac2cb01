"""Workdirs of an earlier version work here: the same bits, the same samples, the same training."""

import json

import numpy as np
import old_workdirs
import pytest
from fixtures import DATA, relative_error
from old_workdirs import NAMES

STORED = dict(np.load(DATA / old_workdirs.ARRAYS))


@pytest.fixture(params=NAMES)
def workdir(request, tmp_path):
    """One of the stored workdirs, to be used up."""
    old_workdirs.unpack(DATA, tmp_path)
    return tmp_path / request.param


def test_training_restores_the_same_bits(workdir):
    expected = json.loads(str(STORED[f"{workdir.name}/restored"]))
    assert len(expected) > 100
    assert old_workdirs.restored(workdir) == expected


def test_the_same_bits_go_back_to_pytorch(workdir):
    expected = json.loads(str(STORED[f"{workdir.name}/exported"]))
    assert len(expected) > 70
    assert old_workdirs.exported(workdir) == expected


def test_sampling_draws_the_same_samples(workdir):
    found, expected = old_workdirs.samples(workdir), STORED[f"{workdir.name}/samples"]
    assert found.shape == (8, 8, 8, 1)
    assert relative_error(found, expected) < 1e-6


def test_training_goes_on_to_the_same_parameters(workdir):
    found = old_workdirs.go_on(workdir)
    assert {f"{workdir.name}/after/{part}" for part in found} <= set(STORED)
    for part, array in found.items():
        expected = STORED[f"{workdir.name}/after/{part}"]
        assert array.shape == expected.shape
        assert relative_error(array, expected) < 1e-6, part
        if part != "grad_norm":  # its size is 10
            np.testing.assert_allclose(array, expected, rtol=0, atol=1e-6, err_msg=part)
