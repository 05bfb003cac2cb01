"""What a run takes and refuses of a checkpoint before it makes its state."""

import functools

import pytest
from settings_drawn import small_config, tiny_config, with_settings

from mdt_jax import config as config_lib
from mdt_jax.checkpoints import Checkpoints
from mdt_jax.models.masking import KeptTokens
from mdt_jax.training.run import Run


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        ("adamw", "adan", "optimizer.name: adamw, now adan"),
        ("adan", "adamw", "optimizer.name: adan, now adamw"),
        ("adan", "adam", "optimizer.name: adan, now adam"),
        ("adam", "adamw", ""),
        ("adamw", "adamw", ""),
    ],
)
@pytest.mark.parametrize("kind", [{}, {"weights": {"items": ["state", "ema_0.99"], "source": "x"}}])
def test_going_on_with_an_optimiser_of_another_state_is_refused(before, now, said, kind):
    saved = config_lib.to_json(with_settings(tiny_config(), {"optimizer.name": before}))
    run = Run(with_settings(tiny_config(), {"optimizer.name": now}), "runs/x")
    check = functools.partial(run._check_same_run, {"config": saved, **kind})
    if not said:
        check()
        return
    with pytest.raises(ValueError, match=rf"^runs/x holds a run .*\({said}\); [^\n]*--workdir"):
        check()


def test_a_state_beyond_the_memory_is_refused_before_it_is_made(tmp_path):
    config = tiny_config()
    config.model.update(hidden_size=2**14, depth=512, num_heads=64)
    run, told = (
        Run(config, tmp_path),
        r"^the state .* takes [0-9,.]+ GiB a device, which has [^\n]*$",
    )
    with Checkpoints(tmp_path) as store, pytest.raises(ValueError, match=told):
        run.restore(store)


@pytest.mark.parametrize("ratio", [0.3, 0.6])
def test_a_run_goes_on_with_its_numbers_of_kept_tokens_unless_the_masking_is_another(ratio):
    config = small_config()
    config.model.patch_size = 2
    began = KeptTokens((9, 10), (0.5, 0.5))
    meta = {"config": config_lib.to_json(config), "kept_tokens": began.to_json()}
    run = Run(with_settings(config, {"masking.ratio": ratio}), "runs/x", ["masking.ratio"])
    run._check_same_run(meta)
    assert run._kept_tokens_of(meta) == (began if ratio == 0.3 else run.kept_tokens) != ()


@pytest.mark.parametrize("items", [["state", "ema_0.99"], ["ema_0.99"]])
def test_of_a_run_from_pytorch_its_optimiser_alone_is_told(items):
    config = tiny_config()
    meta = {"config": config_lib.to_json(config), "weights": {"items": items, "source": "x"}}
    now = with_settings(config, {"batch_size": 16, "optimizer.eps": 1e-6, "optimizer.betas": None})
    told = [change.key for change in Run(now, "runs/x")._told_changes(meta)]
    assert told == (["optimizer.eps"] if "state" in items else [])
