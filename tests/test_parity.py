"""Guidance, losses, gradients and samples equal the authors', and deliberate faults show.

Everything runs in float32 on the authors' random weights; forward passes are in test_models.py.
"""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import FAMILIES, reference, relative_error

from mdt_jax.convert.transformers import to_torch
from mdt_jax.diffusion import GaussianDiffusion, NoiseSchedule, gaussian, guided, sample_steps
from mdt_jax.diffusion.guidance import combine, power_cosine_scale
from mdt_jax.models import computation

GUIDED_CHANNELS = 3  # as the authors' code guides, whatever the latents' channels
LOSS_TOLERANCE, GRADIENT_TOLERANCE, SAMPLE_TOLERANCE = 1e-5, 1e-4, 1e-4


def process(name, **changes):
    """The authors' process: linear, learned range; min-SNR weighting in v2 alone."""
    settings = {"min_snr": 5.0 if name == "mdt_v2" else None} | changes
    return GaussianDiffusion(NoiseSchedule.create("linear", 1000), **settings)


def guidance(r):
    """Scale and power: MDT's is power-cosine, DiT's constant."""
    return float(r.arrays["cfg/scale"]), float(r.arrays["cfg/pow"]) if r.masks else None


def model_fn(r, params):
    """(x, t, labels) → output."""
    return lambda x, t, labels: r.model().apply({"params": params}, x, t, labels)


def total_loss(r, diffusion):
    """params → the training loss of a full and a masked pass, and the per-sample terms of each."""
    model, x0, noise = r.model(), r.nhwc("in/x"), r.nhwc("loss/noise")
    passes = {"full": ()} | ({"masked": (r["mask/ids_keep"],)} if r.masks else {})

    def total(params):
        terms = {
            which: diffusion.losses(
                lambda x, t, extra=extra: model.apply({"params": params}, x, t, r["in/y"], *extra),
                x0,
                r["loss/t"],
                noise,
            )
            for which, extra in passes.items()
        }
        return sum(t["loss"].mean() for t in terms.values()), terms

    return total


def losses_and_gradients(name):
    """(loss, terms) and the gradients by PyTorch name, computed afresh."""
    r = reference(name)
    differentiated = jax.jit(jax.value_and_grad(total_loss(r, process(name)), has_aux=True))
    values, gradients = differentiated(r.tree("param/"))
    return values, to_torch(
        gradients,
        family=r.family,
        depth=r.settings["depth"],
        decoder_depth=r.settings.get("decode_layer", 0),
    )


right = functools.cache(losses_and_gradients)


def loss_errors(name, total, terms):
    """The relative errors of the total and of every per-sample term."""
    r = reference(name)
    ours = {"total": total} | {
        f"{which}_{term}": value for which, of in terms.items() for term, value in of.items()
    }
    assert {f"loss/{k}" for k in ours} == {
        k for k in r.arrays if k.startswith("loss/") and k not in ("loss/t", "loss/noise")
    }
    return {k: np.max(np.abs(np.float64(v) / r.arrays[f"loss/{k}"] - 1)) for k, v in ours.items()}


def variance_rows(r):
    """Which outputs of the final layer, (p_row, p_col, 2C), are variance channels."""
    channels = r.settings["in_channels"]
    features = np.arange(2 * channels * r.settings["patch_size"] ** 2)
    return features % (2 * channels) >= channels


def gradient_errors(name, gradients):
    """Relative error per tensor, and of the final layer's mean and variance rows by themselves."""
    r = reference(name)
    theirs = {k.removeprefix("grad/"): v for k, v in r.arrays.items() if k.startswith("grad/")}
    norm = np.sqrt(sum(np.sum(np.float64(g) ** 2) for g in theirs.values()))
    errors = {
        k: np.linalg.norm(np.float64(gradients[k]) - g) / max(np.linalg.norm(g), 1e-6 * norm)
        for k, g in theirs.items()
    }
    rows = variance_rows(r)
    for k in ("final_layer.linear.weight", "final_layer.linear.bias"):
        errors[f"{k} of the variance"] = relative_error(gradients[k][rows], theirs[k][rows])
        errors[f"{k} of the mean"] = relative_error(gradients[k][~rows], theirs[k][~rows])
    return errors


@pytest.mark.smoke
@pytest.mark.parametrize("name", FAMILIES)
def test_losses_equal_the_authors(name):
    (total, terms), _ = right(name)
    errors = loss_errors(name, total, terms)
    assert max(errors.values()) < LOSS_TOLERANCE, errors


@pytest.mark.smoke
@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_equal_the_authors(name):
    _, gradients = right(name)
    errors = gradient_errors(name, gradients)
    assert max(errors.values()) < GRADIENT_TOLERANCE, errors
    untrained = gradients.keys() - errors.keys()
    assert untrained == (set() if reference(name).masks else {"pos_embed"})
    assert all(not gradients[k].any() for k in untrained)


@pytest.mark.smoke
@pytest.mark.parametrize("name", FAMILIES)
def test_guided_output_equals_the_authors(name):
    r = reference(name)
    x, t, labels, null = r.nhwc("in/x"), r["in/t"], r["in/y"], r.settings["num_classes"]
    scale, power = guidance(r)
    fn = jax.jit(model_fn(r, r.tree("param/")))
    expected = r.nhwc("out/cfg")

    labels_and_null = jnp.concatenate([labels, jnp.full_like(labels, null)])
    cond, uncond = jnp.split(fn(jnp.tile(x, (2, 1, 1, 1)), jnp.tile(t, 2), labels_and_null), 2)
    s = scale if power is None else power_cosine_scale(scale, power, t, 1000)
    half = combine(cond, uncond, s, GUIDED_CHANNELS)
    assert relative_error(half, expected[: len(x)]) < 1e-5
    other = jnp.concatenate([half[..., :GUIDED_CHANNELS], uncond[..., GUIDED_CHANNELS:]], axis=-1)
    assert relative_error(other, expected[len(x) :]) < 1e-5

    ours = guided(fn, labels, null, scale=scale, power=power, channels=GUIDED_CHANNELS)(x, t)
    assert relative_error(ours, expected[: len(x)]) < 1e-5
    all_channels = guided(fn, labels, null, scale=scale, power=power, channels=4)(x, t)
    assert relative_error(all_channels, expected[: len(x)]) > 1e-3


@pytest.mark.smoke
@pytest.mark.parametrize("name", FAMILIES)
def test_guided_samples_equal_the_authors(name):
    r = reference(name)
    params, labels, null = r.tree("param/"), r["in/y"], r.settings["num_classes"]
    scale, power = guidance(r)
    fn = guided(
        model_fn(r, params), labels, null, scale=scale, power=power, channels=GUIDED_CHANNELS
    )
    diffusion = process(name).respaced("10")
    # Listed in the order drawn, from the highest index down.
    noise = {s: r.nhwc(f"{s}/noise")[::-1, : len(labels)] for s in ("ddpm", "ddim")}

    @jax.jit
    def samples():
        return {
            sampler: sample_steps(
                sampler,
                diffusion,
                fn,
                r.nhwc(f"{sampler}/start")[: len(labels)],
                lambda i, sampler=sampler: noise[sampler][i],
            )
            for sampler in noise
        }

    for sampler, sample in samples().items():
        assert np.array_equal(diffusion.schedule.timesteps, r.arrays[f"{sampler}/timesteps"])
        expected = r.nhwc(f"{sampler}/sample")[: len(labels)]
        assert relative_error(sample, expected) < SAMPLE_TOLERANCE, sampler


def test_a_bound_that_trains_the_mean_shows(monkeypatch):
    unfrozen = types.SimpleNamespace(lax=types.SimpleNamespace(stop_gradient=lambda x: x))
    monkeypatch.setattr(gaussian, "jax", unfrozen)
    (total, terms), gradients = losses_and_gradients("dit")
    assert max(loss_errors("dit", total, terms).values()) < LOSS_TOLERANCE
    errors = gradient_errors("dit", gradients)
    assert errors["final_layer.linear.weight of the mean"] > 100 * GRADIENT_TOLERANCE
    assert errors["final_layer.linear.weight of the variance"] < GRADIENT_TOLERANCE


def test_a_transposed_relative_bias_shows(monkeypatch):
    right_index = computation.relative_position_index
    monkeypatch.setattr(computation, "relative_position_index", lambda side: right_index(side).T)
    r = reference("mdt_v1")
    total, terms = jax.jit(total_loss(r, process("mdt_v1")))(r.tree("param/"))
    errors = loss_errors("mdt_v1", total, terms)
    assert min(errors["full_mse"], errors["masked_mse"]) > 10 * LOSS_TOLERANCE, errors


def test_a_missing_min_snr_weight_shows():
    r = reference("mdt_v2")
    total, terms = jax.jit(total_loss(r, process("mdt_v2", min_snr=None)))(r.tree("param/"))
    errors = loss_errors("mdt_v2", total, terms)
    assert min(errors["full_mse"], errors["masked_mse"], errors["total"]) > 0.1, errors
    assert max(errors["full_vb"], errors["masked_vb"]) < LOSS_TOLERANCE
