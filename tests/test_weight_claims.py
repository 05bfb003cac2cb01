"""Weights of another kind of model in a DiT's shapes are refused by what their files say."""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import re

import pytest
from test_weight_names import TINY, save

from mdt_jax.convert.architecture import UnknownWeights
from mdt_jax.weights import claims, descriptions, pretrained
from mdt_jax.weights import files as weight_files

torch = pytest.importorskip("torch")
import torch_models  # noqa: E402

pytestmark = pytest.mark.torch


@functools.cache
def network(learn_variance=True, num_classes=10, null_class=True):
    changes = {"learn_variance": learn_variance, "num_classes": num_classes}
    changes |= {"family": "DiT", "decoder_depth": 0, "null_class": null_class}
    state = torch_models.build(dataclasses.replace(TINY, **changes)).state_dict()
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(t.shape, generator=generator) for name, t in state.items()}


def read(path, content, arguments=None, key="args", **options):
    if arguments is not None:
        arguments = argparse.Namespace(**arguments) if key == "args" else arguments
        content = {"model": content, "ema": content, "opt": {"state": {}}, key: arguments}
    return pretrained.read_pretrained(save(path, content), num_heads=4, **options)


SIT = {"model": "SiT-XL/2", "path_type": "Linear", "prediction": "velocity", "loss_weight": None}
SIT |= {"train_eps": 1e-5, "sample_eps": 1e-3, "num_classes": 10, "image_size": 64}
DIT = {"model": "DiT-XL/2", "num_classes": 10, "image_size": 64, "epochs": 1400, "vae": "ema"}
# The flags of MDT's training script.
MDT = {"schedule_sampler": "uniform", "lr_anneal_steps": 0, "ema_rate": "0.9999", "use_fp16": False}
MDT |= {"image_size": 64, "mask_ratio": 0.3, "decode_layer": 2, "num_classes": 10, "model": "DiT"}
MDT |= {"learn_sigma": True, "diffusion_steps": 1000, "noise_schedule": "linear", "use_kl": False}
MDT |= {"timestep_respacing": "", "predict_xstart": False, "rescale_timesteps": False, "log": ""}


# Settings, by what is said of them.
SAID = {
    ": a flow model": [
        {"model": "REPA-SiT-XL/2"}, {"model": "FlowDiT-B/2"}, {"model": "lightningdit-xl"},
        {"objective": "rectified_flow"}, {"loss_type": "flow_matching"}, {"method": "flow"},
        {"scheduler": "FlowMatchEulerDiscreteScheduler"}, {"sampler_type": "ODE"},
        {"flow_matching": 1}, {"rectified_flow": "True"}, {"kind": "Flow-Matching"},
    ],
    "; weights": [
        {"framework": "edm"}, {"sigma_data": 0.5}, {"predict_v": 1}, {"predict_v": "True"},
        {"num_timesteps": 500}, {"beta_start": 0.00085}, {"beta_end": 0.012},
        {"output": "velocity"}, {"loss": "v-prediction"},
    ],
}  # fmt: skip


@pytest.mark.parametrize("learn_variance", [True, False])
@pytest.mark.parametrize(
    ("key", "arguments", "said"),
    [
        ("args", SIT, "path_type Linear: a flow model such as SiT"),
        ("args", {"path_type": "GVP"}, "path_type GVP: a flow model"),
        ("args", {"path-type": "VP", "prediction": "noise"}, "path_type VP: a flow model"),
        ("args", {"model": "SiT-B/4"}, "model SiT-B/4: a flow model"),
        ("args", DIT | {"prediction": "v"}, "prediction v; weights from PyTorch are sampled"),
        ("args", DIT | {"prediction": "velocity"}, "prediction velocity; weights"),
        ("args", DIT | {"predict_xstart": True}, "predict_xstart True; weights"),
        ("args", DIT | {"noise_schedule": "cosine"}, "noise_schedule cosine; weights"),
        ("args", DIT | {"diffusion_steps": 4000}, "diffusion_steps 4000; weights"),
        ("config", {"transport": {"path_type": "Linear", "prediction": "velocity"}}, "path_type"),
        ("config", {"transport": {"use_lognorm": True}}, "transport: a flow model"),
        ("hyper_parameters", {"model": {"flow_matching": True}}, "flow_matching True: a flow"),
        ("cfg", {"diffusion": {"objective": "pred_v"}}, "objective pred_v; weights"),
        ("hparams", {"parameterization": "x0"}, "parameterization x0; weights"),
        *(
            (key, DIT | said, f"{name} {re.escape(str(value))}{end}")
            for end, all_said in SAID.items()
            for key, said in zip(itertools.cycle(["args", "train_args", "opt_args"]), all_said)
            for name, value in [*said.items()][-1:]
        ),
        ("config", {"diffusion": {"type": "flow"}}, "type flow: a flow model"),
        ("config", {"path": {"_target_": "flow_matching.path.CondOT"}}, "_target_ flow_matching"),
    ],
)
def test_another_process_is_refused_by_its_arguments(
    key, arguments, said, learn_variance, tmp_path
):
    with pytest.raises(UnknownWeights, match=f"a.pt: its training arguments say {said}") as told:
        read(tmp_path / "a.pt", network(learn_variance), arguments, key)
    assert len(str(told.value).splitlines()) == 1


def test_a_safetensors_files_text_is_an_argument_too(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "a.safetensors"
    save_file({k: v.clone() for k, v in network().items()}, path, {"path_type": "Linear"})
    with pytest.raises(UnknownWeights, match="path_type Linear: a flow model"):
        pretrained.read_pretrained(path, num_heads=4)


@pytest.mark.parametrize(
    "arguments",
    [
        DIT,
        DIT | {"prediction": "epsilon", "predict_xstart": False, "noise_schedule": "linear"},
        DIT | {"parameterization": "eps", "diffusion_steps": "1000", "flow_matching": False},
        {"config": {"params": {"target": "ldm.modules.DiT"}}, "learn_sigma": True},
        {"predict_v": 0, "rectified_flow": "False", "sigma_data": None, "flow_matching": 0},
        DIT | {"num_timesteps": "1000", "beta_start": "1e-4", "beta_end": 0.02, "method": "ddpm"},
        DIT | {"data_path": "flow", "exp_name": "velocity", "results_dir": "rectified_flow"},
        DIT | {"lr_schedule": "cosine", "framework": "pytorch", "loss_type": "l2", "seed": 0},
        DIT | {"feature_path": "features", "global_batch_size": 256, "ckpt_every": 50_000},
        MDT,
    ],
)
def test_a_dits_own_arguments_are_let_through(arguments, tmp_path, caplog):
    assert read(tmp_path / "a.pt", network(), arguments).architecture.family == "DiT"
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert [said for said in warnings if "model DiT-XL/2" not in said] == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"num_classes": 1000}, "num_classes 1000, its label table has 10 classes"),
        ({"image_size": 256}, "image_size 256, its positions are of 8 × 8 latents"),
        ({"learn_sigma": False}, "learn_sigma False, its outputs differ"),
        ({"schedule": "cosine"}, "schedule cosine, the authors' is linear"),
    ],
)
def test_arguments_that_the_shapes_contradict_are_told(arguments, said, tmp_path, caplog):
    read(tmp_path / "a.pt", network(), arguments)
    assert said in caplog.text and "taken as its shapes are" in caplog.text


def test_a_published_size_that_is_not_the_shapes_is_told():
    xl = dataclasses.replace(TINY, family="DiT", hidden_size=1152, depth=28, num_heads=16)
    xl = dataclasses.replace(xl, mlp_ratio=4.0, decoder_depth=0)
    assert xl.name == "DiT-XL/2"
    assert claims._contradictions({"model": "DiT-XL/2"}, xl) == []
    (said,) = claims._contradictions({"model": "DiT-B/4"}, xl)
    assert said == "its training arguments say model DiT-B/4, its shapes are of DiT-XL/2"


def test_the_number_of_classes_that_a_table_does_not_show_is_taken_from_the_arguments(tmp_path):
    """A table of ten rows is of nine classes and a null row, unless something says ten."""
    weights = network(num_classes=10, null_class=False)
    assert read(tmp_path / "a.pt", weights, {}).architecture.num_classes == 9
    found = read(tmp_path / "a.pt", weights, {"num_classes": 10}).architecture
    assert (found.num_classes, found.null_class) == (10, False)
    assert read(tmp_path / "a.pt", weights, {"num_classes": 10}, num_classes=9).architecture == (
        dataclasses.replace(found, num_classes=9, null_class=True)
    )


def test_without_arguments_what_is_assumed_is_told_where_it_may_be_a_sit(tmp_path, caplog):
    read(tmp_path / "a.pt", network())
    assert not caplog.records
    read(tmp_path / "a.pt", network(learn_variance=False))
    assert "no outputs for a variance, and does not say how it was trained; taken" in caplog.text
    caplog.clear()
    read(tmp_path / "SiT-XL-2-256.pt", network())
    assert "its name says SiT; taken for a DiT that predicts noise" in caplog.text
    caplog.clear()
    content = dict(network())
    kernel = content["final_layer.linear.weight"].clone().reshape(4, 2, 4, -1)
    kernel[:, 1] = 0  # as SiT's training leaves them
    content["final_layer.linear.weight"] = kernel.reshape(32, -1)
    read(tmp_path / "a.pt", content)
    assert "its outputs for a variance are 0, as they were initialised" in caplog.text
    caplog.clear()
    read(tmp_path / "a.pt", network(learn_variance=False), DIT | {"learn_sigma": False})
    assert "SiT" not in caplog.text


@pytest.mark.parametrize(
    "name", ["sit_xl2.pt", "lightningdit-xl.pt", "dit_flow_b.pt", "REPA-xl.pt", "RectifiedFlow.pt"]
)
def test_a_name_of_a_flow_model_is_told_in_any_case(name, tmp_path, caplog):
    read(tmp_path / name, network())
    assert "its name says" in caplog.text and "taken for a DiT that predicts noise" in caplog.text
    assert len(caplog.records) == 1


@pytest.mark.parametrize("name", ["situation.pt", "workflow.pt", "repair.pt", "dit_xl2.pt"])
def test_other_names_are_not_told_of(name, tmp_path, caplog):
    read(tmp_path / name, network())
    assert not caplog.records


def test_text_beside_the_weights_is_an_argument(tmp_path):
    content = {"model": network(), "path_type": "Linear"}
    with pytest.raises(UnknownWeights, match="path_type Linear: a flow model"):
        read(tmp_path / "a.pt", content)
    content = {"model": network(learn_variance=False), "version": "1.0"}
    assert read(tmp_path / "a.pt", content).architecture.family == "DiT"


DIFFUSERS = {"_class_name": "DiTTransformer2DModel", "num_attention_heads": 4}
DIFFUSERS |= {"attention_head_dim": 4, "num_layers": 2, "in_channels": 4, "patch_size": 2}
SHAPES = {"pos_embed.proj.weight": (16, 4, 2, 2)}
SHAPES |= {f"transformer_blocks.{i}.norm1.linear.weight": (96, 16) for i in (0, 1)}
SCHEDULER = {"_class_name": "DDIMScheduler", "beta_schedule": "linear", "clip_sample": False}
SCHEDULER |= {"num_train_timesteps": 1000, "prediction_type": "epsilon"}


@pytest.mark.parametrize(
    ("settings", "scheduler", "said"),
    [
        ({}, {}, None),
        ({"_class_name": "Transformer2DModel"}, {}, None),
        ({"_class_name": "SD3Transformer2DModel"}, {}, "of a SD3Transformer2DModel, and its"),
        ({"num_layers": 28}, {}, "beside it says num_layers 28, it has 2"),
        ({"in_channels": 16}, {}, "beside it says in_channels 16, it has 4"),
        ({"attention_head_dim": 72}, {}, "beside it says width 288, it has 16"),
        ({}, {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "flow_matching True: a flow"),
        ({}, {"prediction_type": "v_prediction"}, "prediction_type v_prediction; weights"),
        ({}, {"prediction_type": "sample"}, "prediction_type sample; weights"),
        ({}, {"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule squaredcos_cap_v2; weights"),
        ({}, {"num_train_timesteps": 4000}, "num_train_timesteps 4000; weights"),
    ],
)
def test_diffusers_settings_of_another_model_are_refused(settings, scheduler, said, tmp_path):
    (tmp_path / "scheduler").mkdir()
    file = tmp_path / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(SCHEDULER | scheduler))
    check = functools.partial(
        claims.check_diffusers,
        tmp_path / "transformer" / "a.safetensors",
        DIFFUSERS | settings,
        SHAPES,
    )
    with pytest.raises(UnknownWeights, match=said) if said else contextlib.nullcontext():
        check()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("architecture", "learn_variance", False), "say learn_variance False, its arrays True"),
        (("architecture", "depth", 7), "say depth 7, its arrays 4"),
        (("architecture", "input_size", 16), "say input_size 16, its arrays 8"),
        (("config", "input_size", 32), "say input_size 8, and 32 in their config"),
    ],
)
def test_our_own_files_whose_metadata_and_arrays_differ_are_refused(change, said, tmp_path):
    weights = read(tmp_path / "a.pt", network())
    arrays = {name: tensor.numpy() for name, tensor in network().items()}
    metadata = descriptions.file_metadata(weights.config, (), 7)
    own = json.loads(metadata["mdt_jax"])
    part, key, value = change
    (own["config"]["model"] if part == "config" else own["architecture"])[key] = value
    for content, refused in ((metadata, False), ({"mdt_jax": json.dumps(own)}, True)):
        path = tmp_path / "a.safetensors"
        weight_files.write_weights(path, arrays, content)
        if refused:
            with pytest.raises(UnknownWeights, match=said):
                pretrained.read_pretrained(path)
        else:
            assert pretrained.read_pretrained(path).step == 7


@pytest.mark.parametrize(
    ("source", "known"),
    [
        ("hf://shgao/MDT-XL2/mdt_xl2_v2_ckpt.pt", True),
        ("hf://facebook/DiT-XL-2-256/transformer/diffusion_pytorch_model.safetensors", True),
        ("weights/mdt_xl2_v1_ckpt.pt", True),
        ("DiT-XL-2-512x512.pt", True),
        ("my_mdt_xl2_v2_ckpt.pt", False),
        ("runs/mdt_xl2_v2_ckpt_sdxl/model.pt", False),
        ("ema_0.9999_500000.pt", False),
    ],
)
def test_published_files_are_known_by_their_whole_name(source, known):
    assert bool(descriptions._PUBLISHED.fullmatch(source)) == known
