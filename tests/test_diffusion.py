"""The diffusion process alone, with denoisers known in closed form; no network.

Tables, likelihoods and the DDIM encoder equal the authors'; the three prediction forms of one
denoiser agree; samplers, variances and guidance do what their equations say.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import DATA, relative_error

from mdt_jax.diffusion import (
    GaussianDiffusion,
    NoiseSchedule,
    bits_per_dimension,
    ddim_encode,
    guided,
    initial_state,
    run_steps,
    sample_steps,
)
from mdt_jax.diffusion.gaussian import discretized_gaussian_log_likelihood
from mdt_jax.diffusion.guidance import combine, power_cosine_scale
from mdt_jax.diffusion.options import SAMPLER_HELP
from mdt_jax.diffusion.samplers import SAMPLERS, ddim_step, ddpm_step, dpm_solver_step, spaced
from mdt_jax.diffusion.schedules import respace

LINEAR = NoiseSchedule.create("linear", 1000)
FORMS = ("epsilon", "x0", "velocity")


@functools.cache
def authors():
    """tests/data/diffusion.npz, images in NHWC."""
    with np.load(DATA / "diffusion.npz") as file:
        arrays = dict(file)
    return {k: np.moveaxis(v, -3, -1) if v.ndim > 3 else v for k, v in arrays.items()}


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


# The authors' tables and likelihoods


@pytest.mark.parametrize(
    ("ours", "theirs"), [("linear", "linear"), ("squared_cosine", "squaredcos_cap_v2")]
)
def test_betas_equal_the_authors(ours, theirs):
    betas = NoiseSchedule.create(ours, 1000).betas
    assert betas.dtype == np.float64
    np.testing.assert_allclose(betas, authors()[f"betas/{theirs}"], rtol=1e-10)


@pytest.mark.smoke
@pytest.mark.parametrize("spec", ["250", "50", "ddim50", "10,15,20", "27"])
def test_respaced_tables_equal_the_authors(spec):
    schedule = LINEAR.respaced(spec)
    prefix = f"respaced/{spec.replace(',', '_')}/"
    tables = [k.removeprefix(prefix) for k in authors() if k.startswith(prefix)]
    assert len(tables) == 7
    for table in tables:
        ours, theirs = getattr(schedule, table), authors()[prefix + table]
        if table == "timesteps":
            assert np.array_equal(ours, theirs)
        else:
            assert ours.dtype == np.float64
            np.testing.assert_allclose(ours, theirs, rtol=1e-10, err_msg=table)


def test_respacing_names_original_timesteps_however_often_it_is_done():
    twice = LINEAR.respaced("250").respaced("10")
    assert np.array_equal(twice.timesteps, LINEAR.timesteps[respace(1000, 250)][respace(250, 10)])
    np.testing.assert_allclose(twice.alphas_cumprod, LINEAR.alphas_cumprod[twice.timesteps])
    assert twice.num_train_timesteps == 1000
    np.testing.assert_allclose(LINEAR.respaced(1000).betas, LINEAR.betas, rtol=1e-10)


def test_respacing_rounds_ties_to_even_and_takes_ddims_stride():
    assert respace(10, 7).tolist() == [0, 2, 3, 4, 6, 8, 9]  # 1.5, 4.5 and 7.5
    assert respace(10, "1,2").tolist() == [0, 5, 9]
    assert respace(7, "1,1,1").tolist() == [0, 3, 5]  # the first section is one longer
    assert respace(10, "ddim4").tolist() == [0, 3, 6, 9]
    assert respace(10, "ddim5").tolist() == [0, 2, 4, 6, 8]


def toy_model(x, t):
    """The authors' toy: epsilon 0.3·x, variance channels sin(t/100), t the original timestep."""
    variance = jnp.sin(t / 100)[:, None, None, None] * jnp.ones_like(x)
    return jnp.concatenate([0.3 * x, variance], axis=-1)


@pytest.mark.smoke
def test_bits_per_dimension_equal_the_authors():
    reference = authors()
    noise = jnp.asarray(reference["bpd/noise"])  # in the order drawn, from the highest index down
    diffusion = GaussianDiffusion(LINEAR).respaced("20")
    ours = jax.jit(lambda x: bits_per_dimension(diffusion, toy_model, x, lambda i: noise[19 - i]))(
        jnp.asarray(reference["bpd/x_start"])
    )
    np.testing.assert_allclose(ours["total"], reference["bpd/total_bpd"], rtol=1e-5)
    np.testing.assert_allclose(ours["prior"], reference["bpd/prior_bpd"], rtol=0, atol=1e-7)
    for column, theirs in (("vb", "vb"), ("x0_mse", "xstart_mse"), ("epsilon_mse", "mse")):
        assert ours[column].shape == (2, 20)
        assert relative_error(ours[column], reference[f"bpd/{theirs}"]) < 1e-5, column


def test_the_prior_term_is_exact_where_the_authors_cancels():
    alpha_bar, x0 = LINEAR.alphas_cumprod[-1], normal(0, 3, 4, 4, 4)
    moments = np.mean(np.float64(x0) ** 2, axis=(1, 2, 3))
    exact = 0.5 * (alpha_bar * moments - alpha_bar - np.log1p(-alpha_bar)) / np.log(2)
    np.testing.assert_allclose(GaussianDiffusion(LINEAR).prior_term(x0), exact, rtol=1e-5)


def test_ddim_encoder_states_equal_the_authors():
    trajectory = authors()["ddim_reverse/trajectory"]
    diffusion = GaussianDiffusion(LINEAR).respaced("10")
    encode = jax.jit(
        lambda x, num_steps: ddim_encode(diffusion, toy_model, x, num_steps), static_argnums=1
    )
    for k in range(1, 10):
        state = encode(jnp.asarray(trajectory[0]), k)
        assert relative_error(state, trajectory[k]) < 1e-5, k
    assert np.array_equal(ddim_encode(diffusion, toy_model, jnp.asarray(trajectory[0])), state)


# One denoiser, the conditional expectations of data N(MEAN, STD²), in its three forms

MEAN, STD = 0.3 * normal(1, 16, 16, 4), 0.5
BATCH = 13
DATA_POINTS = MEAN + STD * normal(2, BATCH, 16, 16, 4)
STEPS = jnp.array([0, 1, 2, 5, 20, 100, 300, 600, 800, 950, 990, 998, 999])


def oracle(form, sign=1.0, learned=True):
    """E[form | x_t] in closed form, and variance channels that vary with x and t."""
    alpha, sigma = np.sqrt(LINEAR.alphas_cumprod), np.sqrt(1 - LINEAR.alphas_cumprod)
    variance = alpha**2 * STD**2 + sigma**2
    of_x, of_mean = {
        "epsilon": (sigma, -sigma * alpha),
        "x0": (STD**2 * alpha, sigma**2),
        "velocity": (sigma * alpha * (1 - STD**2), -sigma),
    }[form]
    tables = of_x / variance, of_mean / variance, np.sin(np.arange(1000) / 50)

    def model_fn(x, t):
        a, b, c = (jnp.asarray(sign_of * table, jnp.float32)[t][:, None, None, None]
                   for sign_of, table in zip((sign, sign, 1.0), tables, strict=True))  # fmt: skip
        value = a * x + b * MEAN
        return jnp.concatenate([value, jnp.tanh(x + c)], axis=-1) if learned else value

    return model_fn


def results(form, sign=1.0):
    """Losses, samples and bits per dimension of the oracle in one form."""
    model_fn, noise = oracle(form, sign), normal(3, BATCH, 16, 16, 4)
    step_noise = normal(4, 50, BATCH, 16, 16, 4)
    out = {}
    for loss in ("mse", "rescaled_mse", "kl", "rescaled_kl"):
        diffusion = GaussianDiffusion(LINEAR, prediction=form, loss=loss, min_snr=5.0)
        terms = diffusion.losses(model_fn, DATA_POINTS, STEPS, noise)
        out |= {f"{loss}: {term}": value for term, value in terms.items()}
    short = GaussianDiffusion(LINEAR, prediction=form).respaced("50")
    for sampler, options in (("ddpm", {}), ("ddim", {}), ("ddim", {"eta": 0.7})):
        sample = sample_steps(sampler, short, model_fn, noise, lambda i: step_noise[i], **options)
        out[f"{sampler} {options}"] = sample
    levels = jnp.clip(DATA_POINTS, -1, 1)
    for clip in (True, False):
        bits = bits_per_dimension(short, model_fn, levels, lambda i: step_noise[i], clip=clip)
        out |= {f"bits, clip {clip}: {term}": value for term, value in bits.items()}
    return out


def disagreements(a, b):
    """By result: the largest relative error of a per-sample number, or of a sample as a vector."""
    errors = {}
    for name, expected in b.items():
        x, y = (np.asarray(of, np.float64).reshape(BATCH, -1) for of in (a[name], expected))
        if expected.ndim < 3:
            errors[name] = np.max(np.abs(x - y) / np.abs(y))
        else:
            errors[name] = np.max(np.linalg.norm(x - y, axis=1) / np.linalg.norm(y, axis=1))
    return errors


@functools.cache
def epsilon_results():
    return jax.jit(lambda: results("epsilon"))()


@pytest.mark.parametrize("form", ["x0", "velocity"])
def test_all_forms_of_one_denoiser_agree(form):
    errors = disagreements(jax.jit(lambda: results(form))(), epsilon_results())
    assert len(errors) == 21
    assert max(errors.values()) < 1e-5, errors


def test_a_form_read_wrongly_shows():
    errors = disagreements(jax.jit(lambda: results("velocity", sign=-1.0))(), epsilon_results())
    exact = {name for name in errors if name.endswith("prior")}
    assert len(exact) == 2
    assert min(error for name, error in errors.items() if name not in exact) > 1e-3, errors


def test_bound_terms_are_exact_in_float32():
    """Against float64, at timesteps where both means are all but equal to the same x_i."""
    diffusion = GaussianDiffusion(LINEAR, prediction="x0")
    x = diffusion.add_noise(DATA_POINTS, STEPS, normal(3, BATCH, 16, 16, 4))

    @jax.jit
    def bound_terms():
        predicted = diffusion.predict(oracle("x0"), x, STEPS)
        return diffusion.variational_term(predicted, DATA_POINTS, x, STEPS)

    def table(values):
        return values[np.asarray(STEPS)][:, None, None, None]

    value, channels = np.split(np.float64(oracle("x0")(x, STEPS)), 2, axis=-1)
    low, high = table(LINEAR.posterior_log_variance_clipped), table(np.log(LINEAR.betas))
    log_variance = low + (channels + 1) / 2 * (high - low)
    difference = table(LINEAR.posterior_mean_coef1) * (np.float64(DATA_POINTS) - value)
    kl = log_variance - low - 1 + np.exp(low - log_variance)
    kl = (kl + difference**2 * np.exp(-log_variance)).mean(axis=(1, 2, 3)) / 2 / np.log(2)
    np.testing.assert_allclose(bound_terms()[1:], kl[1:], rtol=2e-6)


def test_mean_squared_errors_of_the_forms_differ_by_the_snr():
    noise = normal(3, BATCH, 16, 16, 4)

    def terms(form, min_snr):
        diffusion = GaussianDiffusion(LINEAR, form, "fixed_small", min_snr=min_snr)
        model_fn = oracle(form, learned=False)
        losses = jax.jit(lambda: diffusion.losses(model_fn, DATA_POINTS, STEPS, noise))()
        assert losses.keys() == {"mse", "loss"}
        assert np.array_equal(losses["mse"], losses["loss"])
        return losses["mse"]

    alpha_bar = LINEAR.alphas_cumprod[np.asarray(STEPS)]
    snr = alpha_bar / (1 - alpha_bar)
    epsilon, x0, velocity = (terms(form, None) for form in FORMS)
    np.testing.assert_allclose(x0 * snr, epsilon, rtol=1e-5)
    np.testing.assert_allclose(velocity * alpha_bar, epsilon, rtol=1e-5)
    capped = np.minimum(snr, 5)
    np.testing.assert_allclose(terms("epsilon", 5.0), epsilon * capped / snr, rtol=1e-6)
    np.testing.assert_allclose(terms("x0", 5.0), x0 * capped, rtol=1e-6)
    np.testing.assert_allclose(terms("velocity", 5.0), velocity * capped / (snr + 1), rtol=1e-6)


# Samplers


def test_encoding_is_undone_by_ddim():
    """The closed form too: the ODE carries (x0 − μ)/s to (x_T − √ᾱ·μ)/√(ᾱs² + 1 − ᾱ)."""
    model_fn, x0 = oracle("epsilon"), DATA_POINTS[:2]
    errors = []
    for num_steps in (100, 200):
        diffusion = GaussianDiffusion(LINEAR).respaced(num_steps)

        @jax.jit
        def there_and_back(x0, diffusion=diffusion):
            latent = ddim_encode(diffusion, model_fn, x0)
            back = sample_steps("ddim", diffusion, model_fn, latent, lambda i: jnp.zeros_like(x0))
            return latent, back

        latent, back = there_and_back(x0)
        errors.append(relative_error(back, x0))
        alpha_bar = diffusion.schedule.alphas_cumprod[-1]
        exact = (x0 - MEAN) / STD * np.sqrt(alpha_bar * STD**2 + 1 - alpha_bar)
        assert relative_error(latent, exact + np.sqrt(alpha_bar) * MEAN) < 0.05
    assert errors[0] < 0.05
    assert errors[1] < 0.6 * errors[0]  # a first-order method


@pytest.mark.parametrize(
    ("sampler", "options"),
    [("ddpm", {}), ("ddim", {"eta": 0.5}), ("heun", {}), ("dpm++", {}), ("dpm++sde", {})],
)
def test_samples_do_not_depend_on_chunks(sampler, options):
    diffusion, key = GaussianDiffusion(LINEAR).respaced("50"), jax.random.key(0)

    def noise_fn(i):
        return jax.random.normal(jax.random.fold_in(key, i), (2, 16, 16, 4))

    @jax.jit
    def run(state, first, last):
        fn = oracle("epsilon")
        return run_steps(sampler, diffusion, fn, state, noise_fn, first, last, **options)

    noise = normal(5, 2, 16, 16, 4)
    whole = run(initial_state(noise), 0, 50)
    for chunk in (7, 25, 1):
        state = initial_state(noise)
        for first in range(0, 50, chunk):
            state = run(state, first, min(first + chunk, 50))
        assert np.array_equal(state.x, whole.x), chunk
    assert run._cache_size() == 1


@functools.cache
def ode_error(sampler, respacing):
    """Relative error of a deterministic sampler against the ODE's closed form."""
    diffusion = GaussianDiffusion(LINEAR).respaced(respacing)
    noise = normal(3, 4, 16, 16, 4)
    silent = jnp.zeros_like(noise)
    fn = oracle("epsilon")
    sample = jax.jit(lambda x: sample_steps(sampler, diffusion, fn, x, lambda i: silent))(noise)
    alpha_bar = diffusion.schedule.alphas_cumprod[-1]
    scale = STD / np.sqrt(alpha_bar * STD**2 + 1 - alpha_bar)
    return relative_error(sample, MEAN + scale * (noise - np.sqrt(alpha_bar) * MEAN))


def test_heun_and_dpm_solver_are_of_second_order_and_ddim_of_first():
    for sampler, low, high in (("ddim", 1.8, 2.2), ("heun", 3.5, 6), ("dpm++", 3.5, 6)):
        for n in (20, 40):
            ratio = ode_error(sampler, f"logsnr{n}") / ode_error(sampler, f"logsnr{2 * n}")
            assert low < ratio < high, (sampler, n, ratio)
    assert ode_error("dpm++", "logsnr20") < 0.15 * ode_error("ddim", "logsnr20")
    assert ode_error("heun", "20") < 0.15 * ode_error("ddim", "20")  # at twice the calls


def test_heun_begins_where_nothing_is_left_of_the_image():
    """At ᾱ of 2e-9, where EDM's own time is 2e4: a first step in it errs a hundred times more."""
    diffusion = GaussianDiffusion(NoiseSchedule.create("squared_cosine"), variance="fixed_small")
    alpha_bar = jnp.asarray(diffusion.schedule.alphas_cumprod, jnp.float32)
    noise = normal(3, 4, 16, 16, 4)

    def denoiser(x, t):  # the exact one for N(MEAN, STD²)
        a = alpha_bar[t][:, None, None, None]
        return (x - jnp.sqrt(a) * MEAN) * jnp.sqrt(1 - a) / (a * STD**2 + 1 - a)

    def error(sampler, respacing):
        short = diffusion.respaced(respacing)
        silent = jnp.zeros_like(noise)
        run = jax.jit(lambda x: sample_steps(sampler, short, denoiser, x, lambda i: silent))
        return relative_error(run(noise), MEAN + STD * noise)

    assert error("heun", 10) < 0.1 * error("ddim", 10)
    assert error("heun", 20) < 0.1 * error("ddim", 20)


def test_dpm_solver_counts_its_steps_in_log_snr():
    assert spaced("dpm++", 20) == spaced("dpm++", "20") == spaced("dpm++sde", "20") == "logsnr20"
    assert spaced("dpm++", "10,15") == "10,15" and spaced("dpm++sde", "ddim20") == "ddim20"
    for sampler in ("ddpm", "ddim", "heun"):
        assert spaced(sampler, 20) == 20
    assert spaced("dpm++", 1) == 1  # one step has nothing between its ends
    even = ode_error("dpm++", spaced("dpm++", 20))
    assert even < 0.15 * ode_error("ddim", "20") < 0.15 * ode_error("dpm++", "20")


def test_a_dpm_solver_that_forgets_is_ddim():
    """Without the difference to the x0 before, its ODE step is eta 0, its SDE step eta 1."""
    diffusion = GaussianDiffusion(LINEAR, variance="fixed_small").respaced("20")
    x, noise, i = normal(6, 20, 16, 16, 4), normal(7, 20, 16, 16, 4), jnp.arange(20)
    fn = oracle("epsilon", learned=False)
    x0 = diffusion.predict(fn, x, i).x0
    for stochastic in (False, True):
        step, new_x0 = dpm_solver_step(diffusion, fn, x, x0, i, noise, stochastic=stochastic)
        assert np.array_equal(new_x0, x0)
        ddim = one_step_each(ddim_step, diffusion, False, eta=float(stochastic))
        assert relative_error(step, ddim) < 1e-5
        looked_back, _ = dpm_solver_step(
            diffusion, fn, x, x0 + 0.1, i, noise, stochastic=stochastic
        )
        changed = [k for k in range(20) if relative_error(looked_back[k], step[k]) > 1e-6]
        assert changed == list(range(1, 19))  # nothing before the first, no step after the last


def test_the_sde_solver_samples_the_datas_distribution():
    """From pure noise, mean and standard deviation of N(MEAN, STD²), up to second-order errors."""
    key, shape = jax.random.key(1), (100, 16, 16, 4)

    def moments(sampler, respacing):
        diffusion = GaussianDiffusion(LINEAR, variance="fixed_small").respaced(respacing)
        fn = oracle("epsilon", learned=False)

        def noise_fn(i):
            return jax.random.normal(jax.random.fold_in(key, i), shape)

        run = jax.jit(lambda x: sample_steps(sampler, diffusion, fn, x, noise_fn))
        sample = run(normal(8, *shape)) - MEAN
        return float(sample.mean()), float(sample.std()) / STD - 1

    mean, coarse = moments("dpm++sde", "logsnr20")
    _, fine = moments("dpm++sde", "logsnr40")
    assert abs(mean) < 0.01
    assert abs(coarse) < 0.04 and abs(fine) < 0.3 * abs(coarse)
    assert moments("ddpm", "logsnr20")[1] < -0.15  # it is of first order


def test_respacing_by_snr_is_even_in_its_logarithm():
    log_snr = np.log(LINEAR.snr)
    for n in (2, 10, 50, 250, 1000):
        kept = LINEAR.respaced(f"logsnr{n}").timesteps
        assert len(kept) == n and kept[0] == 0 and kept[-1] == 999
        assert (np.diff(kept) > 0).all()
    kept = LINEAR.respaced("logsnr10").timesteps
    np.testing.assert_allclose(log_snr[kept], np.linspace(log_snr[0], log_snr[-1], 10), atol=0.25)
    assert GaussianDiffusion(LINEAR).respaced("logsnr1000").schedule.timesteps.tolist() == [
        *range(1000)
    ]


def one_step_each(step, diffusion, learned, **options):
    """One sampler step at every index, on the same states and noise."""
    n = diffusion.num_steps
    x, noise = normal(6, n, 16, 16, 4), options.pop("noise", normal(7, n, 16, 16, 4))
    return step(diffusion, oracle("epsilon", learned=learned), x, jnp.arange(n), noise, **options)


def test_ddim_with_eta_1_is_ddpm_with_the_posterior_variance():
    diffusion = GaussianDiffusion(LINEAR, variance="fixed_small").respaced("20")
    ddim = one_step_each(ddim_step, diffusion, False, eta=1.0)
    ddpm = one_step_each(ddpm_step, diffusion, False)
    for i in range(20):
        assert relative_error(ddim[i], ddpm[i]) < 1e-5, i
    half = one_step_each(ddim_step, diffusion, False, eta=0.5)
    assert relative_error(half[1:], ddpm[1:]) > 1e-2


def test_noise_is_added_where_it_belongs():
    diffusion = GaussianDiffusion(LINEAR).respaced("20")
    silent = jnp.zeros((20, 16, 16, 4))
    for step, options, noisy in (
        (ddim_step, {"eta": 0.0}, []),
        (ddim_step, {"eta": 1.0}, range(1, 20)),
        (ddpm_step, {}, range(1, 20)),
    ):
        with_noise = one_step_each(step, diffusion, True, **options)
        without = one_step_each(step, diffusion, True, noise=silent, **options)
        changed = [i for i in range(20) if not np.array_equal(with_noise[i], without[i])]
        assert changed == list(noisy), (step.__name__, options)


def test_ddpm_noise_has_the_learned_variance():
    diffusion = GaussianDiffusion(LINEAR).respaced("20")
    x, i = normal(6, 20, 16, 16, 4), jnp.arange(20)
    predicted = diffusion.predict(oracle("epsilon"), x, i)
    added = one_step_each(ddpm_step, diffusion, True) - predicted.mean
    expected = jnp.exp(predicted.log_variance / 2) * normal(7, 20, 16, 16, 4)
    np.testing.assert_allclose(added[1:], expected[1:], atol=1e-5)


def test_clipping_bounds_x0_and_keeps_epsilon_consistent():
    diffusion, i = GaussianDiffusion(LINEAR).respaced("20"), jnp.arange(20)
    x = 2 * normal(6, 20, 16, 16, 4)
    free = diffusion.predict(oracle("epsilon"), x, i)
    clipped = diffusion.predict(oracle("epsilon"), x, i, clip=True)
    assert np.abs(free.x0).max() > 1.5
    assert np.array_equal(clipped.x0, jnp.clip(free.x0, -1, 1))
    np.testing.assert_allclose(diffusion.add_noise(clipped.x0, i, clipped.epsilon), x, atol=1e-5)
    np.testing.assert_allclose(clipped.mean, diffusion.posterior_mean(clipped.x0, x, i), atol=1e-6)


# Variances and the likelihood of levels


def log_variances(variance, channels=None):
    """The log-variance of every index of a 20-step process, (20,), for constant channels."""
    diffusion = GaussianDiffusion(LINEAR, variance=variance).respaced("20")
    x = normal(6, 20, 2, 2, 4)
    output = x if channels is None else jnp.concatenate([x, channels * jnp.ones_like(x)], axis=-1)
    log_variance = diffusion.interpret(output, x, jnp.arange(20)).log_variance
    assert log_variance.shape == x.shape
    assert np.ptp(log_variance, axis=(1, 2, 3)).max() == 0
    return np.float64(log_variance[:, 0, 0, 0]), diffusion.schedule


def test_fixed_variances():
    small, schedule = log_variances("fixed_small")
    alpha_bar, previous = schedule.alphas_cumprod, schedule.alphas_cumprod_prev
    posterior = schedule.betas * (1 - previous) / (1 - alpha_bar)
    np.testing.assert_allclose(small[1:], np.log(posterior[1:]), rtol=1e-6)
    assert small[0] == small[1]
    large, _ = log_variances("fixed_large")
    np.testing.assert_allclose(large[1:], np.log(schedule.betas[1:]), rtol=1e-6)
    assert large[0] == small[0]


def test_learned_variance_runs_from_the_posteriors_to_beta():
    low, schedule = log_variances("learned_range", -1.0)
    high, _ = log_variances("learned_range", 1.0)
    np.testing.assert_allclose(low, schedule.posterior_log_variance_clipped, rtol=1e-6)
    np.testing.assert_allclose(high, np.log(schedule.betas), rtol=1e-6)
    middle, _ = log_variances("learned_range", 0.0)
    np.testing.assert_allclose(middle, (low + high) / 2, rtol=1e-6)


def test_losses_are_scaled_by_the_number_of_steps():
    i, noise = jnp.array([0, 3, 11, 19]), normal(3, 4, 16, 16, 4)

    def terms(loss):
        diffusion = GaussianDiffusion(LINEAR, loss=loss).respaced("20")
        return jax.jit(lambda: diffusion.losses(oracle("epsilon"), DATA_POINTS[:4], i, noise))()

    mse, rescaled = terms("mse"), terms("rescaled_mse")
    assert np.array_equal(mse["mse"], rescaled["mse"])
    np.testing.assert_allclose(rescaled["vb"], 20 / 1000 * mse["vb"], rtol=1e-6)
    np.testing.assert_allclose(rescaled["loss"], rescaled["mse"] + rescaled["vb"], rtol=1e-6)
    assert terms("kl").keys() == {"loss"}
    np.testing.assert_allclose(terms("kl")["loss"], mse["vb"], rtol=1e-6)
    np.testing.assert_allclose(terms("rescaled_kl")["loss"], 20 * mse["vb"], rtol=1e-6)


@pytest.mark.parametrize("loss", ["mse", "kl"])
def test_only_the_whole_bound_trains_the_mean(loss):
    """In "mse" the bound's gradient stops at the mean, and the squared error's at the variance."""
    x0, noise, i = DATA_POINTS[:1], normal(3, 1, 16, 16, 4), jnp.array([5])

    def gradient(term):
        def value(output):
            diffusion = GaussianDiffusion(LINEAR, loss=loss)
            return diffusion.losses(lambda x, t: output, x0, i, noise)[term].sum()

        return jax.jit(jax.grad(value))(jnp.concatenate([0.5 * noise, 0.1 * noise], axis=-1))

    if loss == "mse":
        assert not gradient("vb")[..., :4].any()
        assert not gradient("mse")[..., 4:].any()
        assert gradient("vb")[..., 4:].all()
    else:
        assert gradient("loss").all()


@pytest.mark.parametrize("mean", [-1.3, -1.0, -0.31, 0.0, 0.7, 1.05])
@pytest.mark.parametrize("log_scale", [-5.0, -3.0, 0.0])
def test_probabilities_of_the_256_levels_sum_to_1(mean, log_scale):
    levels = jnp.asarray(np.arange(256) / 127.5 - 1, jnp.float32)
    args = levels, jnp.float32(mean), jnp.float32(log_scale)
    log_p = np.float64(discretized_gaussian_log_likelihood(*args))
    assert np.exp(log_p).sum() == pytest.approx(1, abs=2e-5)

    def cdf(x):
        z = (x - mean) * np.exp(-log_scale)
        return 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))

    assert np.exp(log_p[0]) == pytest.approx(cdf(-1 + 1 / 255), rel=1e-3, abs=1e-6)
    assert np.exp(log_p[255]) == pytest.approx(1 - cdf(1 - 1 / 255), rel=1e-3, abs=1e-6)
    inner = np.maximum(cdf(levels + 1 / 255) - cdf(levels - 1 / 255), 1e-12)[1:-1]
    np.testing.assert_allclose(np.exp(log_p[1:-1]), inner, rtol=1e-3, atol=1e-6)


# Guidance


def labelled_model(rows):
    """A labelled model that notes how many rows it is run on."""

    def model_fn(x, t, labels):
        rows.append(x.shape[0])
        scale = (1 + labels + t / 1000)[:, None, None, None]
        return jnp.concatenate([x * scale, jnp.sin(x + scale)], axis=-1)

    return model_fn


def test_guidance_is_combined_per_sample_on_its_channels_alone():
    x, t, labels = normal(8, 3, 2, 2, 4), jnp.array([0, 500, 999]), jnp.array([1, 4, 2])
    rows = []
    fn = labelled_model(rows)
    cond, null = fn(x, t, labels), fn(x, t, jnp.full(3, 9))
    rows.clear()
    for channels in (3, 4):
        out = guided(fn, labels, 9, scale=3.8, power=2.0, channels=channels)(x, t)
        s = power_cosine_scale(3.8, 2.0, t, 1000)[:, None, None, None]
        expected = np.array(cond)
        expected[..., :channels] = (null + s * (cond - null))[..., :channels]
        np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
        assert np.array_equal(out[..., channels:], cond[..., channels:])
    assert rows == [6, 6]


def test_scale_1_runs_the_conditional_pass_alone():
    x, t, labels, rows = normal(8, 3, 2, 2, 4), jnp.array([0, 500, 999]), jnp.arange(3), []
    fn = labelled_model(rows)
    for power in (None, 4.0):
        out = guided(fn, labels, 9, scale=1.0, power=power, channels=3)(x, t)
        assert np.array_equal(out, fn(x, t, labels))
    assert rows == [3] * 4


def test_outside_its_interval_the_null_pass_is_not_run():
    """Seen in the values: both passes run as 2B rows, one alone as B."""
    x, labels = normal(8, 3, 2, 2, 4), jnp.array([1, 4, 2])

    def rows_model(x, t, labels):  # an output that tells how many rows there were
        return labelled_model([])(x, t, labels) + x.shape[0]

    fn = labelled_model([])
    both = guided(fn, labels, 9, scale=3.8, channels=3)
    within = guided(fn, labels, 9, scale=3.8, channels=3, interval=(0.2, 0.6))
    counted = guided(rows_model, labels, 9, scale=3.8, channels=3, interval=(0.2, 0.6))
    for t, acts in ((0, False), (199, False), (200, True), (599, True), (600, False)):
        t = jnp.full(3, t)
        expected = both(x, t) if acts else fn(x, t, labels)
        np.testing.assert_allclose(within(x, t), expected, atol=1e-5)
        rows = counted(x, t)[..., 4:] - fn(x, t, labels)[..., 4:]
        np.testing.assert_allclose(rows, 6 if acts else 3, atol=1e-5)


def test_every_sampler_has_its_help():
    assert set(SAMPLERS) == set(SAMPLER_HELP)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(
    ("scale", "interval"), [(1.0, None), (3.8, None), (3.8, (0.2, 0.6)), (1.0, (0.2, 0.6))]
)
def test_a_whole_run_calls_the_model_as_often_as_it_must(sampler, scale, interval):
    """Counted as it runs: rows of every call, so that a pass that is thrown away would show."""
    diffusion, calls = GaussianDiffusion(LINEAR).respaced(10), []
    x, labels = normal(8, 3, 2, 2, 4), jnp.array([1, 4, 2])

    def model_fn(x, t, labels):
        jax.debug.callback(lambda t: calls.append((int(t[0]), len(t))), t)
        return jnp.concatenate([x, x], axis=-1)

    fn = guided(model_fn, labels, 9, scale=scale, channels=3, interval=interval)
    jax.block_until_ready(
        jax.jit(lambda x: sample_steps(sampler, diffusion, fn, x, lambda i: x))(x)
    )
    jax.effects_barrier()
    low, high = (1000 * end for end in interval or (0, 1))
    times = diffusion.schedule.timesteps.tolist()
    times = times + times[:-1] if sampler == "heun" else times  # at both ends but that of x0
    expected = [(t, 6 if scale != 1 and low <= t < high else 3) for t in times]
    assert sorted(calls) == sorted(expected)


def test_the_power_cosine_scale_runs_from_1_at_pure_noise_to_the_full_scale():
    t = jnp.array([0, 250, 500, 1000])
    for power in (0.01, 1.0, 4.0):
        s = power_cosine_scale(3.8, power, t, 1000)
        assert s[0] == pytest.approx(3.8)
        assert s[-1] == pytest.approx(1.0)
        expected = 1 + 2.8 * (1 - np.cos(np.pi * (1 - np.asarray(t) / 1000) ** power)) / 2
        np.testing.assert_allclose(s, expected, rtol=1e-6)
    assert np.array_equal(power_cosine_scale(1.0, 4.0, t, 1000), np.ones(4))
    np.testing.assert_allclose(
        power_cosine_scale(2.0, 1.0, jnp.array([25]), 100),
        power_cosine_scale(2.0, 1.0, jnp.array([250]), 1000),
    )


def test_a_constant_scale_interpolates_and_extrapolates():
    cond, null = normal(9, 2, 2, 2, 8), normal(10, 2, 2, 2, 8)
    np.testing.assert_allclose(combine(cond, null, 1.0, 4), cond, atol=1e-6)
    assert np.array_equal(combine(cond, null, 0.0, 4)[..., :4], null[..., :4])
    np.testing.assert_allclose(
        combine(cond, null, 3.0, 4)[..., :4], (3 * cond - 2 * null)[..., :4], atol=1e-5
    )


# Refusals


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: NoiseSchedule.create("cosine"),
            "noise schedule 'cosine' is unknown; known: linear, squared_cosine",
        ),
        (
            lambda: GaussianDiffusion(LINEAR, prediction="eps"),
            "prediction 'eps' is unknown; known: epsilon, x0, velocity",
        ),
        (
            lambda: GaussianDiffusion(LINEAR, variance="learned"),
            "variance 'learned' is unknown; known: learned_range, fixed_small, fixed_large",
        ),
        (
            lambda: GaussianDiffusion(LINEAR, loss="l1"),
            "loss 'l1' is unknown; known: mse, rescaled_mse, kl, rescaled_kl",
        ),
        (
            lambda: sample_steps(
                "dpm", GaussianDiffusion(LINEAR), toy_model, jnp.zeros((1, 2, 2, 4)), jnp.zeros_like
            ),
            "sampler 'dpm' is unknown; known: ddpm, ddim, heun",
        ),
        (lambda: LINEAR.respaced("logsnr1"), "'logsnr1' is not logsnrN with N from 2 to 1000"),
        (lambda: LINEAR.respaced("logsnrx"), "'logsnrx' is not logsnrN"),
        (lambda: respace(1000, 1001), "'1001' asks for 1001 of the 1000 steps of section 1; 1 to"),
        (lambda: respace(1000, 0), "'0' asks for 0 of the 1000"),
        (lambda: respace(1000, -5), "'-5' asks for -5"),
        (lambda: respace(10, "3,6,2"), "'3,6,2' asks for 6 of the 3 steps of section 2; 1 to 3"),
        (lambda: respace(1000, "ddim667"), "'ddim667': no integer stride over 1000 gives 667"),
        (lambda: respace(1000, "ddim0"), "'ddim0': no integer stride"),
        (lambda: respace(1000, "ddimx"), r"'ddimx' is not a count, counts by .*10,15,20.* ddimN"),
        (lambda: respace(1000, "fast"), "'fast' is not a count"),
        (lambda: respace(1000, ""), "'' is not a count"),
    ],
)
def test_what_cannot_work_is_refused_with_what_would(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("loss", ["mse", "kl"])
@pytest.mark.parametrize(
    ("variance", "expected", "given"),
    [("learned_range", 8, 4), ("fixed_small", 4, 8), ("fixed_large", 4, 3)],
)
def test_wrong_output_channels_are_refused(loss, variance, expected, given):
    diffusion = GaussianDiffusion(LINEAR, variance=variance, loss=loss)
    x, i = normal(6, 2, 2, 2, 4), jnp.array([3, 4])
    message = (
        f"variance '{variance}' needs {expected} output channels for inputs of 4.*gave {given}"
    )
    output = jnp.ones((2, 2, 2, given))
    with pytest.raises(ValueError, match=message):
        diffusion.interpret(output, x, i)
    with pytest.raises(ValueError, match=message):
        diffusion.losses(lambda x, t: output, x, i, x)
