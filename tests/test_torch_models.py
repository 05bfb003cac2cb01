"""The PyTorch networks and training that conversions are tested against are the authors'."""

import argparse
import functools

import numpy as np
import pytest
from fixtures import FAMILIES, reference, relative_error

from mdt_jax.convert.architecture import Architecture

torch = pytest.importorskip("torch")
import torch_models  # noqa: E402

pytestmark = pytest.mark.torch

MASKED = ("mdt_v1", "mdt_v2")
ARGUMENTS = argparse.Namespace(model="DiT-S/2", image_size=64, num_classes=10)
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4


def architecture(name):
    r = reference(name)
    sizes = {k: v for k, v in r.settings.items() if k not in ("kind", "mask_ratio", "decode_layer")}
    sizes |= {"family": r.family, "decoder_depth": r.settings.get("decode_layer", 0)}
    return Architecture(**sizes, mlp_ratio=4.0, null_class=True, learn_variance=True)


def array(name, key):
    return torch.from_numpy(np.array(reference(name).arrays[key]))


def state(name, prefix="param/"):
    keys = [k for k in reference(name).arrays if k.startswith(prefix)]
    return {k.removeprefix(prefix): array(name, k) for k in keys}


def authors_model(name):
    model = torch_models.build(architecture(name))
    model.load_state_dict(state(name), strict=True)
    return model


def min_snr(name):
    return 5.0 if name == "mdt_v2" else None


@pytest.mark.parametrize("name", FAMILIES)
def test_state_dict_is_the_authors_in_names_order_shapes_and_types(name):
    ours, theirs = torch_models.build(architecture(name)).state_dict(), state(name)
    assert [(k, v.shape, v.dtype) for k, v in ours.items()] == [
        (k, v.shape, v.dtype) for k, v in theirs.items()
    ]
    buffers = [k for k in ours if k.endswith("relative_position_index")]
    assert bool(buffers) == reference(name).masks
    assert all(torch.equal(ours[k], theirs[k]) for k in buffers)


@pytest.mark.parametrize(
    ("name", "output"),
    [(name, "out/eval") for name in FAMILIES] + [(name, "out/masked") for name in MASKED],
)
@torch.no_grad()
def test_outputs_equal_the_authors(name, output):
    ids = [array(name, "mask/ids_keep")] if output == "out/masked" else []
    inputs = [array(name, f"in/{k}") for k in "xty"]
    ours = authors_model(name)(*inputs, *ids)
    assert relative_error(ours, reference(name)[output]) < 1e-5


@functools.cache
def losses_and_gradients(name):
    """The loss terms of each pass, their total, and the gradients by name."""
    model = authors_model(name)
    inputs = [array(name, k) for k in ("in/x", "loss/t", "loss/noise", "in/y")]
    passes = {"full": None} | ({"masked": array(name, "mask/ids_keep")} if model.masks else {})
    terms = {
        f"{which}_{term}": value.detach()
        for which, ids in passes.items()
        for term, value in torch_models.losses(model, *inputs, ids, min_snr(name)).items()
    }
    total = torch_models.training_loss(model, *inputs, passes.get("masked"), min_snr(name))
    total.backward()
    terms["total"] = total.detach()
    return terms, {k: p.grad for k, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", FAMILIES)
def test_losses_equal_the_authors(name):
    terms, _ = losses_and_gradients(name)
    theirs = state(name, "loss/")
    assert terms.keys() == theirs.keys() - {"t", "noise"}
    errors = {k: (v / theirs[k] - 1).abs().max().item() for k, v in terms.items()}
    assert max(errors.values()) < LOSS_TOLERANCE, errors


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_equal_the_authors(name):
    _, gradients = losses_and_gradients(name)
    theirs = state(name, "grad/")
    assert gradients.keys() == theirs.keys()
    vectors = [torch.cat([g[k].flatten() for k in theirs]) for g in (gradients, theirs)]
    assert relative_error(*vectors) < GRADIENT_TOLERANCE
    # The bound's gradient drowns in the rest, so the variance's rows are compared by themselves.
    r = reference(name)
    channels = 2 * r.settings["in_channels"]
    for k in ("final_layer.linear.weight", "final_layer.linear.bias"):
        rows = torch.arange(len(theirs[k])) % channels >= channels // 2
        assert relative_error(gradients[k][rows], theirs[k][rows]) < 20 * GRADIENT_TOLERANCE


@functools.cache
def trained(name):
    """Model, EMA and optimiser after the fixture's three steps, and the loss before each."""
    model = authors_model(name)
    ema, optimizer = torch_models.ema_of(model), torch_models.create_optimizer(model)
    history = [torch_models.update(model, ema, optimizer, step_loss(name, model, k)) for k in STEPS]
    return model, ema, optimizer, history


STEPS = range(3)


def step_loss(name, model, k):
    """The loss of the fixture's step k."""
    inputs = {what: array(name, f"train/{k}/{what}") for what in ("x", "t", "noise")}
    ids = None
    if model.masks:
        ratio = float(array(name, f"train/{k}/mask_ratio"))
        ids = torch_models.kept_ids(array(name, f"train/{k}/mask_noise"), ratio)
    y = array(name, "in/y")
    return torch_models.training_loss(model, *inputs.values(), y, ids, min_snr(name))


@pytest.mark.parametrize("name", FAMILIES)
def test_losses_of_three_steps_equal_the_authors(name):
    *_, history = trained(name)
    theirs = [float(array(name, f"train/{k}/loss")) for k in STEPS]
    assert history == pytest.approx(theirs, rel=LOSS_TOLERANCE)


def movement(name, model, prefix):
    """Our and the authors' movement from `param/` as vectors, without key biases.

    The true gradient of a key's bias is zero, so that Adam moves it by the sign of rounding errors.
    """
    before, after, moved = state(name), state(name, prefix), ([], [])
    for weight, value in model.named_parameters():
        keep = torch.ones(value.shape, dtype=torch.bool)
        if weight.endswith("qkv.bias"):
            keep.chunk(3)[1][:] = False
        for into, end in zip(moved, (value.detach(), after[weight]), strict=True):
            into.append((end.double() - before[weight])[keep])
    return [torch.cat(v) for v in moved]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("which", "tolerance"), [("param", 3e-4), ("ema", 3e-3)])
def test_three_steps_move_the_weights_as_the_authors(name, which, tolerance):
    model, ema, *_ = trained(name)
    moved = movement(name, model if which == "param" else ema, f"train/{which}/")
    assert relative_error(*moved) < tolerance


@pytest.mark.parametrize("name", ["mdt_v1", "dit"])
def test_adamw_counts_steps_by_parameter_and_skips_what_is_not_trained(name):
    model, _, optimizer, _ = trained(name)
    layout, count = optimizer.state_dict(), len(list(model.parameters()))
    assert layout["param_groups"][0]["params"] == list(range(count))
    frozen = {0} if name == "dit" else set()
    assert layout["state"].keys() == set(range(count)) - frozen
    for moments in layout["state"].values():
        assert moments.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert moments["step"].dtype == torch.float32 and moments["step"] == 3


def test_adan_counts_steps_by_group_and_keeps_minus_the_clipped_gradient():
    model, _, optimizer, _ = trained("mdt_v2")
    layout = optimizer.state_dict()
    assert layout["param_groups"][0]["step"] == 3
    assert layout["state"].keys() == set(range(len(list(model.parameters()))))
    assert {frozenset(moments) for moments in layout["state"].values()} == {
        frozenset(("exp_avg", "exp_avg_sq", "exp_avg_diff", "neg_pre_grad"))
    }
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    kept = torch.cat([m["neg_pre_grad"].flatten() for m in layout["state"].values()])
    assert gradient.norm() > 1
    assert relative_error(kept, -gradient / gradient.norm()) < 1e-5


def saved_files(name, folder):
    """Weights, EMA and optimiser's state that a run saved after the fixture's steps, read again."""
    model, ema, optimizer, _ = trained(name)
    if name == "dit":
        path = folder / "0000003.pt"
        torch_models.save_dit_run(path, model, ema, optimizer, ARGUMENTS)
        with torch.serialization.safe_globals([argparse.Namespace]):
            file = torch.load(path, weights_only=True)
        return file["model"], file["ema"], file["opt"]
    torch_models.save_run(folder, model, ema, optimizer, 2)
    files = ("model000002.pt", "ema_0.9999_000002.pt", "opt000002.pt")
    return [torch.load(folder / file, weights_only=True) for file in files]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_saved_run_goes_on_where_it_stopped(name, tmp_path):
    weights, average, moments = saved_files(name, tmp_path)
    again = torch_models.build(architecture(name), seed=1)
    optimizer = torch_models.create_optimizer(again)
    again.load_state_dict(weights, strict=True)
    ema = torch_models.ema_of(again)
    ema.load_state_dict(average, strict=True)
    optimizer.load_state_dict(moments)
    torch_models.update(again, ema, optimizer, step_loss(name, again, 0))

    model = authors_model(name)
    straight_ema, optimizer = torch_models.ema_of(model), torch_models.create_optimizer(model)
    for k in (*STEPS, 0):
        torch_models.update(model, straight_ema, optimizer, step_loss(name, model, k))
    for ours, straight in ((again, model), (ema, straight_ema)):
        for a, b in zip(ours.parameters(), straight.parameters(), strict=True):
            assert torch.equal(a, b)


def test_a_dit_file_is_refused_by_weights_only_for_its_arguments(tmp_path):
    model, ema, optimizer, _ = trained("dit")
    torch_models.save_dit_run(tmp_path / "run.pt", model, ema, optimizer, ARGUMENTS)
    with pytest.raises(Exception, match=r"argparse\.Namespace"):
        torch.load(tmp_path / "run.pt", weights_only=True)


def test_layer_norm_epsilon_is_1e_6():
    # The fixtures hardly tell it from PyTorch's 1e-5; a row as small as its square root does.
    x = 1e-3 * torch.tensor([1.0, -1.0, 1.0, -1.0])
    torch.testing.assert_close(torch_models.norm(x), x / np.sqrt(2e-6))
