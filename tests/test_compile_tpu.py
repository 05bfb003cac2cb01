"""Compiling for TPUs: names of slices, reading HLO, what fits, and the compiler itself."""

import dataclasses
import json
import math
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from configs.imagenet256 import get_config  # noqa: E402
from mdt_jax.compilers import advice, estimate, hlo, programs, report, topologies
from mdt_jax.compilers.estimate import Estimate
from mdt_jax.compilers.programs import Memory, Program, TrainingJob
from mdt_jax.models import create_model, flops
from mdt_jax.models.blocks import Block
from mdt_jax.parallel import sharding
from mdt_jax.sampling.sampler import SAMPLING_SCOPE

# A program as the TPU compiler writes it: an outer loop of two turns, in it one of four turns that
# counts by two to a bound of eight; a fusion with a product, a gather of weights, a copy beside the
# core, a kernel without an estimate.
STEP = """HloModule jit_step, is_scheduled=true

%fused_dot (p.0: bf16[16,64,32], p.1: bf16[32,128]) -> bf16[16,64,128] {
  %p.0 = bf16[16,64,32]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p.1 = bf16[32,128]{1,0:T(8,128)(2,1)} parameter(1)
  %w = bf16[32,128,1]{1,0,2} bitcast(%p.1)
  ROOT %convolution.1 = bf16[16,64,128]{2,1,0} convolution(%p.0, %w), window={size=1}, dim_labels=b0f_io0->b0f, metadata={op_name="jit(step)/jvp(MDT)/blocks/while/body/mlp/fc1/dot_general"}
}

%inner_cond (s.0: (u32[], bf16[16,64,32], bf16[32,128])) -> pred[] {
  %s.0 = (u32[]{:T(128)}, bf16[16,64,32]{2,1,0}, /*index=2*/bf16[32,128]{1,0}) parameter(0)
  %bound = u32[]{:T(128)} constant(8)
  %i.0 = u32[]{:T(128)} get-tuple-element(%s.0), index=0
  ROOT %lt.0 = pred[]{:T(512)} compare(%i.0, %bound), direction=LT
}

%inner_body (s.1: (u32[], bf16[16,64,32], bf16[32,128])) -> (u32[], bf16[16,64,32], bf16[32,128]) {
  %s.1 = (u32[]{:T(128)}, bf16[16,64,32]{2,1,0}, /*index=2*/bf16[32,128]{1,0}) parameter(0)
  %i.1 = u32[]{:T(128)} get-tuple-element(%s.1), index=0
  %x.1 = bf16[16,64,32]{2,1,0} get-tuple-element(%s.1), index=1
  %w.1 = bf16[32,128]{1,0} get-tuple-element(%s.1), index=2
  %two = u32[]{:T(128)} constant(2)
  %fusion.dot = bf16[16,64,128]{2,1,0} fusion(%x.1, %w.1), kind=kOutput, calls=%fused_dot, metadata={op_name="jit(step)/jvp(MDT)/blocks/while/body/mlp/mul"}, backend_config={"window_config":{},"estimated_cycles":"1000"}
  %next.1 = u32[]{:T(128)} add(%i.1, %two)
  ROOT %state.1 = (u32[]{:T(128)}, bf16[16,64,32]{2,1,0}, bf16[32,128]{1,0}) tuple(%next.1, %x.1, %w.1)
}

%outer_cond (s.2: (s32[], bf16[16,64,32], s32[])) -> pred[] {
  %s.2 = (s32[]{:T(128)}, bf16[16,64,32]{2,1,0}, s32[]{:T(128)}) parameter(0)
  %i.2 = s32[]{:T(128)} get-tuple-element(%s.2), index=0
  %n.2 = s32[]{:T(128)} get-tuple-element(%s.2), index=2
  ROOT %lt.2 = pred[]{:T(512)} compare(%i.2, %n.2), direction=LT
}

%outer_body (s.3: (s32[], bf16[16,64,32], s32[])) -> (s32[], bf16[16,64,32], s32[]) {
  %s.3 = (s32[]{:T(128)}, bf16[16,64,32]{2,1,0}, s32[]{:T(128)}) parameter(0)
  %i.3 = s32[]{:T(128)} get-tuple-element(%s.3), index=0
  %x.3 = bf16[16,64,32]{2,1,0} get-tuple-element(%s.3), index=1
  %n.3 = s32[]{:T(128)} get-tuple-element(%s.3), index=2
  %one = s32[]{:T(128)} constant(1)
  %zero = u32[]{:T(128)} constant(0)
  %shard = bf16[8,128]{1,0} constant({...})
  %all-gather-start.1 = (bf16[8,128]{1,0}, bf16[32,128]{1,0}) all-gather-start(%shard), channel_id=1, replica_groups=[4,4]<=[16], dimensions={0}, use_global_device_ids=true
  %all-gather-done.1 = bf16[32,128]{1,0} all-gather-done(%all-gather-start.1)
  %start = (u32[]{:T(128)}, bf16[16,64,32]{2,1,0}, bf16[32,128]{1,0}) tuple(%zero, %x.3, %all-gather-done.1)
  %while.inner = (u32[]{:T(128)}, bf16[16,64,32]{2,1,0}, bf16[32,128]{1,0}) while(%start), condition=%inner_cond, body=%inner_body
  %softmax = bf16[16,64,32]{2,1,0} exponential(%x.3), metadata={op_name="jit(step)/jvp(MDT)/blocks/while/body/attn/exp"}, backend_config={"estimated_cycles":"300"}
  %next.3 = s32[]{:T(128)} add(%i.3, %one)
  ROOT %state.3 = (s32[]{:T(128)}, bf16[16,64,32]{2,1,0}, s32[]{:T(128)}) tuple(%next.3, %softmax, %n.3)
}

ENTRY %main.1 (param.0: bf16[16,64,32]) -> bf16[16,64,32] {
  %param.0 = bf16[16,64,32]{2,1,0} parameter(0)
  %first = s32[]{:T(128)} constant(0)
  %last = s32[]{:T(128)} constant(2)
  %init = (s32[]{:T(128)}, bf16[16,64,32]{2,1,0}, s32[]{:T(128)}) tuple(%first, %param.0, %last)
  %while.outer = (s32[]{:T(128)}, bf16[16,64,32]{2,1,0}, s32[]{:T(128)}) while(%init), condition=%outer_cond, body=%outer_body
  %out = bf16[16,64,32]{2,1,0} get-tuple-element(%while.outer), index=1
  %copy-start.1 = (bf16[16,64,32]{2,1,0:S(1)}, bf16[16,64,32]{2,1,0}, u32[]{:S(2)}) copy-start(%out)
  %copy-done.1 = bf16[16,64,32]{2,1,0:S(1)} copy-done(%copy-start.1)
  %kernel = bf16[16,64,32]{2,1,0} custom-call(%copy-done.1), custom_call_target="tpu_custom_call"
  %all-reduce.1 = bf16[16,64,32]{2,1,0} all-reduce(%kernel), channel_id=2, replica_groups=mesh['axis_0'=4,'axis_1'=4] {'axis_0'}, to_apply=%inner_cond
  ROOT %adan = bf16[16,64,32]{2,1,0} multiply(%all-reduce.1, %all-reduce.1), metadata={op_name="jit(step)/mul"}, backend_config={"estimated_cycles":"70"}
}
"""  # noqa: E501


def test_loops_bodies_count_as_often_as_they_run():
    found = estimate.estimate_program(STEP)
    assert found.cycles == 2 * (4 * 1000 + 300) + 70
    assert found.loops_counted_once == ()


def test_a_loop_with_another_bound_gives_another_count():
    assert estimate.estimate_program(STEP.replace("constant(8)", "constant(16)")).cycles == 16_670


def test_a_loop_whose_bound_is_an_argument_counts_once_and_is_named():
    traced = STEP.replace(
        "%last = s32[]{:T(128)} constant(2)", "%last = s32[]{:T(128)} parameter(1)"
    )
    found = estimate.estimate_program(traced)
    assert found.cycles == 4 * 1000 + 300 + 70
    assert found.loops_counted_once == ("while.outer",)


def test_the_insides_of_a_fusion_are_not_counted_again():
    marked = STEP.replace(
        'fc1/dot_general"}', 'fc1/dot_general"}, backend_config={"estimated_cycles":"999"}'
    )
    assert marked != STEP
    assert estimate.estimate_program(marked).cycles == estimate.estimate_program(STEP).cycles


def test_cycles_go_to_the_kind_of_work_they_are_for():
    kinds = estimate.estimate_program(STEP).by_kind
    assert {k: v for k, v in kinds.items() if v} == {
        "dense": 8000,
        "attention": 600,
        "optimiser": 70,
    }


@pytest.mark.parametrize("kernels", ["plain", "pallas"])
def test_attentions_linear_maps_are_dense_and_its_own_products_are_not(kernels):
    """By the names that a block's modules and their methods give to what they compute."""
    sizes = {"hidden_size": 32, "depth": 4, "num_heads": 2, "decoder_depth": 2}
    model = create_model("MDTv2", **sizes, kernels=kernels)
    block, packing = Block(model.block_settings), model.whole
    x, c = jnp.zeros((2, 256, 32)), jnp.zeros((2, 1, 32))
    params = nn.unbox(jax.eval_shape(block.init, jax.random.key(0), x, c, packing))
    apply = lambda params, x, c: block.apply(params, x, c, packing)  # noqa: E731
    scopes = {str(e.source_info.name_stack) for e in jax.make_jaxpr(apply)(params, x, c).eqns}
    scopes = {scope for scope in scopes if "/attn" in scope}
    linear = {scope for scope in scopes if "/qkv" in scope or "/proj" in scope}
    assert len(linear) >= 2 and linear < scopes

    module = hlo.parse_module(STEP)
    _, one, _ = next(module.executed())
    for scope in scopes:
        where = f'metadata={{op_name="jit(f)/{scope}/dot_general"}}'
        product = dataclasses.replace(one, opcode="dot", attributes=where)
        assert estimate.kind_of(module, product) == ("dense" if scope in linear else "attention")


def test_flops_of_the_products_in_the_loops():
    assert estimate.estimate_program(STEP).flops == 2 * 4 * 2 * (16 * 64) * 32 * 128


def test_a_kernel_without_cycles_is_told_of_and_what_runs_beside_the_core_is_not():
    assert estimate.estimate_program(STEP).not_estimated == {
        "custom-call tpu_custom_call": 16 * 64 * 32 * 2
    }


def test_collectives_with_their_bytes():
    found = {c.opcode: c for c in estimate.estimate_program(STEP).collectives}
    gather, reduce = found["all-gather"], found["all-reduce"]
    assert (gather.count, gather.group, gather.bytes) == (2, 4, 2 * 32 * 128 * 2)
    assert gather.wire_bytes == gather.bytes * 3 // 4
    assert (reduce.count, reduce.group, reduce.bytes) == (1, 4, 16 * 64 * 32 * 2)
    assert reduce.wire_bytes == 2 * reduce.bytes * 3 // 4


def test_what_slices_send_each_other_has_no_group():
    text = """HloModule m

ENTRY %main (p.0: f32[64,32]) -> token[] {
  %p.0 = f32[64,32]{1,0} parameter(0)
  %token = token[] after-all()
  %send.1 = (f32[64,32], u32[], token[]) send(%p.0, %token), channel_id=3, is_host_transfer=true
  ROOT %done = token[] send-done(%send.1), channel_id=3, is_host_transfer=true
}
"""
    (sent,) = estimate.estimate_program(text, chips_per_slice=4).collectives
    assert (sent.opcode, sent.group, sent.across_slices) == ("send", 0, True)
    assert sent.wire_bytes == sent.bytes >= 64 * 32 * 4


def test_an_all_reduce_whose_result_is_sliced_in_one_fusion_is_a_reduce_scatter():
    text = """HloModule m

%sum (a.1: f32[], b.1: f32[]) -> f32[] {
  %a.1 = f32[] parameter(0)
  %b.1 = f32[] parameter(1)
  ROOT %add.1 = f32[] add(%a.1, %b.1)
}

%all-reduce-scatter.3 (input.3: f32[1152,3456]) -> f32[288,3456] {
  %input.3 = f32[1152,3456]{1,0} parameter(0)
  %all-reduce.51 = f32[1152,3456]{1,0} all-reduce(%input.3), channel_id=16, replica_groups={{0,1,2,3}}, to_apply=%sum
  %start = s32[] constant(0)
  ROOT %slice.1 = f32[288,3456]{1,0} dynamic-slice(%all-reduce.51, %start, %start), dynamic_slice_sizes={288,3456}
}

ENTRY %main (p.0: f32[1152,3456]) -> f32[288,3456] {
  %p.0 = f32[1152,3456]{1,0} parameter(0)
  ROOT %fusion.3 = f32[288,3456]{1,0} fusion(%p.0), kind=kCustom, calls=%all-reduce-scatter.3
}
"""  # noqa: E501
    (found,) = estimate.estimate_program(text).collectives
    assert (found.opcode, found.group, found.bytes) == ("reduce-scatter", 4, 1152 * 3456 * 4)
    assert found.wire_bytes == found.bytes * 3 // 4
    (plain,) = estimate.estimate_program(
        text.replace("%all-reduce-scatter.3", "%fused.3")
    ).collectives
    assert (plain.opcode, plain.wire_bytes) == ("all-reduce", 2 * found.wire_bytes)


@pytest.mark.parametrize(
    ("attributes", "size", "across"),
    [
        ("replica_groups={{0,1},{2,3}}", 2, False),
        ("replica_groups={{0,2},{1,3}}", 2, True),
        ("replica_groups=[2,2]<=[4]", 2, False),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", 2, True),
        ("source_target_pairs={{0,1},{1,0}}", 2, False),
        ("source_target_pairs={{1,2},{2,1}}", 2, True),
        ("replica_groups=mesh['x'=2,'y'=2] {'y'}, use_global", 2, False),
        ("replica_groups=mesh['x'=2,'y'=2] {'x'}, use_global", 2, True),
        ("replica_groups=mesh['x'=4,'y'=1] {'x'}", 4, True),
        ("replica_groups=mesh['x'=2,'y'=2], device_ids=([2,2]T(1,0)) {'y'}", 2, True),
        ("replica_groups=mesh['x'=2,'y'=2], device_ids=([2,2]T(1,0)) {'x'}", 2, False),
        ("replica_groups=mesh['x'=2,'y'=2], device_ids=(0,2,1,3) {'x'}", 2, False),
        ("replica_groups=mesh['x'=2,'y'=2], device_ids=(0,2,1,3) {'y'}", 2, True),
        ("replica_groups=mesh['x'=4] {'x':(1)2}", 2, True),
        ("replica_groups=mesh['x'=4] {'x':(2)2}", 2, False),
        ("channel_id=1", 0, False),
    ],
)
def test_groups_of_chips_and_whether_they_span_slices_of_two(attributes, size, across):
    assert estimate.replica_group(attributes, chips_per_slice=2) == (size, across)


def test_a_transfer_written_again_where_it_is_driven_counts_once():
    line = next(x for x in STEP.splitlines() if "all-reduce(" in x)
    driven = line + ', frontend_attributes={chain_id="7"}'
    again = driven.replace("%all-reduce.1 =", "%all-reduce.2 =")
    (once,) = [c for c in estimate.estimate_program(STEP).collectives if c.opcode == "all-reduce"]

    def counted(*lines):
        found = estimate.estimate_program(STEP.replace(line, "\n".join(lines))).collectives
        return next(c for c in found if c.opcode == "all-reduce")

    assert counted(driven, again) == once
    # In another chain, or without one, it is another transfer, though layers may share a channel.
    for other in (again.replace('"7"', '"8"'), line.replace("%all-reduce.1 =", "%all-reduce.2 =")):
        assert counted(driven, other).count == 2 * once.count
        assert counted(driven, other).bytes == 2 * once.bytes


def test_a_batched_product_written_as_a_dilated_convolution_counts_what_is_multiplied():
    # 6 products of 4 × 8 by 8 × 5: the batch is a spatial axis whose window meets one element each.
    text = """HloModule m

ENTRY %main (a: f32[6,4,8], b: f32[6,5,8]) -> f32[6,4,5] {
  %a = f32[6,4,8]{2,1,0} parameter(0)
  %b = f32[6,5,8]{2,1,0} parameter(1)
  ROOT %c = f32[6,4,5]{2,1,0} convolution(%a, %b), window={size=6 stride=5 pad=0_0 lhs_dilate=6}, dim_labels=0bf_0oi->0bf
}
"""  # noqa: E501
    assert estimate.estimate_program(text).flops == 2 * 6 * 4 * 8 * 5


def test_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        hlo.parse_module("HloModule nothing")


@pytest.mark.parametrize(
    ("name", "topology", "chips"),
    [
        ("v4-512", "v4:4x8x8", 256),
        ("v5p-32", "v5p:2x2x4", 16),
        ("v5litepod-16", "v5e:4x4", 16),
        ("v6e-16", "v6e:4x4", 16),
        ("v5e:2x4", "v5e:2x4", 8),
        ("v5p:8x8x16", "v5p:8x8x16", 1024),
        ("v5e:16x16 x 4 slices", "v5e:16x16 x 4 slices", 1024),
    ],
)
def test_names_people_type(name, topology, chips):
    found = topologies.parse_topology(name)
    assert (str(found), found.num_chips) == (topology, chips)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("v3-8", "known: v4, v5e, v5p, v6e"),
        ("v4-6", "v4-8, v4-16"),
        ("v5e:2x2x4", "2 dimensions"),
        ("v5e:3x4", "must be even"),
        ("pod", "v5litepod-16"),
        ("v5e-16 x 0 slices", "below 1"),
    ],
)
def test_other_names_are_refused_with_those_that_work(name, says):
    with pytest.raises(ValueError, match=says):
        topologies.parse_topology(name)


@pytest.mark.parametrize(
    ("name", "gigahertz"), [("v4", 1.05), ("v5e", 1.5), ("v5p", 1.75), ("v6e", 1.75)]
)
def test_clocks_follow_from_the_peaks(name, gigahertz):
    assert topologies.CHIPS[name].clock / 1e9 == pytest.approx(gigahertz, rel=5e-3)


def test_a_refusal_for_want_of_memory_is_read():
    short = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (22.81G) exceeds available HBM (15.75G)."
    )
    memory = Memory.of_failure(short, 2**30)
    assert memory.peak == 2**30 + round(22.81 * 2**30)
    assert memory.available == round(15.75 * 2**30)
    long = (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space "
        "hbm. Used 22.06G of 15.75G hbm. Exceeded hbm capacity by 6.31G.\n\nTotal hbm usage >= "
        "22.31G:\n    reserved 258.00M\n    program 5.33G\n    arguments 16.73G\n"
    )
    memory = Memory.of_failure(long, 17 * 2**30)
    assert memory.peak == round(22.06 * 2**30)
    assert memory.temporaries == round(5.33 * 2**30)
    assert programs.is_out_of_memory(long) and programs.is_out_of_memory(short)
    assert not programs.is_out_of_memory("INVALID_ARGUMENT: something of hbm")


@pytest.fixture
def eight_chips(monkeypatch):
    """A v5e:2x4 whose devices are this machine's, so that no compiler is needed."""
    monkeypatch.setattr(topologies, "devices", lambda topology: jax.devices()[: topology.num_chips])
    return topologies.parse_topology("v5e:2x4")


def tiny_config(model="MDTv2-S/2", **settings):
    config = get_config(model)
    config.model.update(hidden_size=64, depth=4, num_heads=2, input_size=32, num_classes=10)
    if model.startswith("MDT"):
        config.model.decoder_depth = 2
    config.update_from_flattened_dict({"batch_size": 64, "num_steps": 1000} | settings)
    return config


def test_only_the_data_axis_crosses_slices(monkeypatch, eight_chips):
    mesh = topologies.create_topology_mesh(
        topologies.parse_topology("v5e:2x2 x 2 slices"), data=-1, fsdp=2
    )
    slices = [{d.id // 4 for d in row.flat} for row in mesh.devices]
    assert mesh.shape == {"data": 4, "fsdp": 2, "tensor": 1}
    assert slices == [{0}, {0}, {1}, {1}]
    with pytest.raises(ValueError, match="2 slices"):
        topologies.create_topology_mesh(
            topologies.parse_topology("v5e:2x2 x 2 slices"), data=1, fsdp=8
        )


def test_the_job_computes_as_a_tpu_would(eight_chips):
    assert TrainingJob(tiny_config(), eight_chips).trainer.model.dtype == jnp.bfloat16


@pytest.mark.parametrize("sampler", ["ddpm", "dpm++"])
def test_the_sampler_takes_what_it_is_compiled_for(eight_chips, monkeypatch, sampler):
    compiled = []

    def trace(name, function, arguments, topology):
        compiled.append((arguments[1], jax.eval_shape(function, *arguments)))
        return a_program(name, 10**7)

    monkeypatch.setattr(programs, "compile_program", trace)
    job = TrainingJob(tiny_config("DiT-S/2", **{"sample.sampler": sampler}), eight_chips)
    job.compile_sampler(16)
    ((state, stepped),) = compiled
    assert state.x.shape == stepped.x.shape == (16, 32, 32, 4)
    assert state.x.sharding.shard_shape(state.x.shape) == (2, 32, 32, 4)


def test_every_operation_of_a_sampler_is_under_the_scope_that_estimates_look_for(
    eight_chips, monkeypatch
):
    lowered = []

    def trace(name, function, arguments, topology):
        lowered.append(function.lower(*arguments).as_text(dialect="hlo", debug_info=True))
        return a_program(name, 10**7)

    monkeypatch.setattr(programs, "compile_program", trace)
    TrainingJob(tiny_config("DiT-S/2", **{"model.depth": 1}), eight_chips).compile_sampler(16)
    operations = re.findall(r'op_name="(jit\([^"]*/[^"]*)"', *lowered)
    assert len(operations) > 100
    assert [name for name in operations if SAMPLING_SCOPE not in name] == []


def test_work_under_a_samplers_scope_is_none_of_an_optimiser():
    sampler = STEP.replace("jit(step)/mul", f"jit(steps)/{SAMPLING_SCOPE}/mul")
    found = estimate.estimate_program(sampler).by_kind
    assert (found["optimiser"], found["elementwise"]) == (0, 70)


def test_model_flops_of_a_step_take_every_kept_count_by_its_probability(eight_chips):
    job = TrainingJob(tiny_config(), eight_chips)
    assert job.kept_tokens.counts == (128, 144, 160, 176)
    by_hand = sum(
        6 * 64 * (flops.forward_macs(job.trainer.model) + flops.forward_macs(job.trainer.model, n))
        for n in job.kept_tokens.counts
    )
    assert report.step_flops(job) == pytest.approx(by_hand / 4)


def a_program(name, cycles, fits=True):
    kinds = dict.fromkeys(estimate.KINDS, 0) | {"dense": cycles}
    moved = estimate.Collective("all-gather", 8, 10, 10**9, 4 * 10**8)
    work = Estimate(cycles, kinds, 10**12, (moved,), {}, ())
    memory = Memory(2**30, 2**30, 2**30, 3 * 2**30, 2**20, 4 * 2**30)
    if fits:
        return Program(name, True, memory, work, 1.0)
    refused = Memory(2**30, temporaries=20 * 2**30, peak=21 * 2**30, available=15 * 2**30)
    return Program(name, False, refused, None, 1.0, "no room")


def test_a_report_weighs_the_variants_and_says_when_it_is_not_calibrated(eight_chips):
    job = TrainingJob(tiny_config(), eight_chips)
    steps = tuple(a_program(f"step {n}", c) for n, c in ((128, 15_000_000), (176, 45_000_000)))
    made = report.create_report(job, steps, (0.5, 0.5), sampler=None, calibration=0.7)
    clock = topologies.CHIPS["v5e"].clock
    assert made.step_seconds == pytest.approx(30_000_000 / clock)
    assert made.wire_seconds == pytest.approx(4e8 / 200e9)
    assert made.mfu(0.02) == pytest.approx(made.step_flops / 0.02 / (8 * 197e12))
    text = "\n".join(made.lines())
    assert "UNCALIBRATED" in text and "verdict        fits" in text
    record = json.loads(json.dumps(made.as_json()))
    assert record["fits"] and not record["calibrated"]
    assert record["chip_hours"] == pytest.approx(record["days"] * 24 * 8)
    trusted = report.create_report(job, steps, (0.5, 0.5), sampler=None, calibration=0.88)
    assert "UNCALIBRATED" not in "\n".join(trusted.lines())


def test_a_run_that_does_not_fit_is_told_what_would_help(eight_chips):
    job = TrainingJob(tiny_config("DiT-S/2"), eight_chips)
    refused = a_program("step", 0, fits=False)
    lines = advice.advice_lines(job, refused)
    assert any("mesh.fsdp=8" in line for line in lines)
    assert any("model.remat" in line and "20.00 GiB" in line for line in lines)
    assert any("accumulation_steps=2" in line for line in lines)
    made = report.create_report(
        job, (refused,), (1.0,), sampler=None, calibration=None, advice=tuple(lines)
    )
    assert json.loads(json.dumps(made.as_json()))["fits"] is False
    assert "verdict        does not fit" in made.lines()


def test_what_is_tried_shards_first_then_recomputes_then_cuts_the_batch(eight_chips):
    job = TrainingJob(tiny_config("DiT-S/2"), eight_chips)
    tried = [levers for levers, _ in advice.attempts(job)]
    assert [(t.fsdp, t.remat, t.accumulation_steps) for t in tried] == [
        (8, "none", 1),
        (8, "dots", 1),
        (8, "full", 1),
        (8, "full", 2),
        (8, "full", 4),
        (8, "full", 8),
    ]


def test_what_was_found_to_fit_is_not_compiled_again(eight_chips, monkeypatch):
    from mdt_jax.compilers import command

    compiled = []

    def compile_step(job, count):
        settings = job.mesh.shape["fsdp"], job.config.model.remat
        compiled.append((*settings, count))
        return a_program(f"step {count}", 10**7, fits=settings == (8, "dots"))

    monkeypatch.setattr(TrainingJob, "compile_step", compile_step)
    job = TrainingJob(tiny_config(), eight_chips)
    arguments = SimpleNamespace(quick=False, sampler=False, calibration=False, sample_batch_size=8)
    found, known, tried = command.find_fitting(job, arguments)
    most, *others = sorted(job.kept_tokens.counts, reverse=True)
    assert compiled == [(1, "none", most), (8, "none", most), (8, "dots", most)]
    assert [": fits" in line for line in tried] == [False, False, True]
    made = command.compile_job(found, arguments, known)
    assert compiled[3:] == [(8, "dots", count) for count in others]
    assert [step.name for step in made.steps] == [f"step {n}" for n in (most, *others)]

    # If nothing fits, the report is on the first, the job as given.
    monkeypatch.setattr(
        TrainingJob,
        "compile_step",
        lambda job, n: a_program(f"fsdp {job.mesh.shape['fsdp']}", 0, False),
    )
    found, known, _ = command.find_fitting(job, arguments)
    assert found is job and [program.name for program in known.values()] == ["fsdp 1"]


def test_without_the_compiler_one_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(topologies.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'pip install "mdt_jax\[tpu\]"'):
        topologies.devices(topologies.parse_topology("v5e:4x4"))


@pytest.mark.tpu
def test_a_lone_product_calibrates_the_arithmetic():
    assert 0.85 < programs.calibrate(topologies.parse_topology("v5e:4x4")) < 1


@pytest.mark.tpu
def test_the_compiler_itself_on_a_scan_over_sharded_layers():
    topology = topologies.parse_topology("v5litepod-4")
    mesh = topologies.create_topology_mesh(topology, fsdp=4)
    weights = jax.ShapeDtypeStruct(
        (3, 256, 256),
        jnp.float32,
        sharding=jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "fsdp")),
    )
    x = jax.ShapeDtypeStruct((64, 256), jnp.bfloat16, sharding=sharding.batch_sharding(mesh))

    def forward(weights, x):
        def layer(h, w):
            return jnp.tanh(h @ w.astype(h.dtype)), None

        return jax.lax.scan(layer, x, weights)[0]

    step = jax.jit(forward, out_shardings=sharding.batch_sharding(mesh))
    program = programs.compile_program("scan", step, (weights, x), topology)
    assert program.fits and program.memory.arguments == math.prod((3, 64, 256)) * 4 + 16 * 256 * 2
    assert program.estimate.flops == 3 * 2 * 16 * 256 * 256
    assert program.estimate.cycles > 0 and program.estimate.collectives
    assert program.estimate.loops_counted_once == ()


@pytest.mark.tpu
def test_the_compiler_itself_on_a_small_run():
    config = tiny_config("DiT-S/2", **{"batch_size": 32, "model.depth": 2, "mesh.fsdp": 4})
    job = TrainingJob(config, topologies.parse_topology("v5e:2x2"))
    step = job.compile_step(None)
    made = report.create_report(job, (step,), (1.0,), sampler=None, calibration=0.88)
    work = step.estimate
    assert made.fits and step.memory.arguments >= job.state_bytes
    # The formula counts gradients of the embeddings' inputs, which are never computed: some per
    # cent in a model as narrow as this one.
    assert 0.9 < 4 * work.flops / made.step_flops < 1
    assert all(work.by_kind[kind] > 0 for kind in ("dense", "attention", "optimiser"))
    assert all(c.group in (2, 4) for c in work.collectives) and work.collectives
    assert 0 < made.mfu(made.step_seconds) < 1
    sampler = job.compile_sampler(8)
    assert sampler.fits and 0 < sampler.estimate.cycles < work.cycles
