"""Compiling for GPUs: names of nodes, cards, bytes and time from HLO, and the compiler itself."""

import json
import re
from types import SimpleNamespace

import jax
import pytest
from test_compile_tpu import tiny_config

from mdt_jax.compilers import (
    advice,
    collectives,
    command,
    estimate,
    gpu_estimate,
    gpus,
    hlo,
    programs,
    report,
)
from mdt_jax.compilers.gpu_estimate import GpuCollective, GpuEstimate, LoneProducts
from mdt_jax.compilers.gpu_report import GpuReport
from mdt_jax.compilers.programs import Memory, Program, TrainingJob
from mdt_jax.compilers.traffic import traffic
from mdt_jax.parallel import devices

H100 = gpus.CARDS["h100"]
EIGHT = gpus.Nodes(H100, 8)
# A program as the compiler for CUDA writes it. In a loop of three turns weights are gathered beside
# a product of bfloat16, a weight's gradient with a float32 result is made and scattered, a fusion
# writes its part of a stack in place. After it cuDNN's attention, backward, and a call of cuBLAS.
STEP = """HloModule jit_step, is_scheduled=true

%dot_computation (p.0: bf16[1024,512], p.1: bf16[512,256]) -> bf16[1024,256] {
  %p.0 = bf16[1024,512]{1,0} parameter(0)
  %p.1 = bf16[512,256]{1,0} parameter(1)
  ROOT %dot.0 = bf16[1024,256]{1,0} dot(%p.0, %p.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%gradient_computation (p.2: bf16[1024,512], p.3: bf16[1024,256]) -> f32[512,256] {
  %p.2 = bf16[1024,512]{1,0} parameter(0)
  %p.3 = bf16[1024,256]{1,0} parameter(1)
  ROOT %dot.1 = f32[512,256]{1,0} dot(%p.2, %p.3), lhs_contracting_dims={0}, rhs_contracting_dims={0}
}

%update_computation (p.4: bf16[3,1024,256], p.5: bf16[1024,256], p.6: s32[]) -> bf16[3,1024,256] {
  %p.4 = bf16[3,1024,256]{2,1,0} parameter(0)
  %p.5 = bf16[1024,256]{1,0} parameter(1)
  %p.6 = s32[] parameter(2)
  %exp.0 = bf16[1024,256]{1,0} exponential(%p.5)
  %part = bf16[1,1024,256]{2,1,0} bitcast(%exp.0)
  %zero = s32[] constant(0)
  ROOT %updated = bf16[3,1024,256]{2,1,0} dynamic-update-slice(%p.4, %part, %p.6, %zero, %zero)
}

%sum (a.1: f32[], b.1: f32[]) -> f32[] {
  %a.1 = f32[] parameter(0)
  %b.1 = f32[] parameter(1)
  ROOT %add.1 = f32[] add(%a.1, %b.1)
}

%condition (s.0: (s32[], bf16[3,1024,256])) -> pred[] {
  %s.0 = (s32[], bf16[3,1024,256]{2,1,0}) parameter(0)
  %i.0 = s32[] get-tuple-element(%s.0), index=0
  %three = s32[] constant(3)
  ROOT %less = pred[] compare(%i.0, %three), direction=LT
}

%body (s.1: (s32[], bf16[3,1024,256])) -> (s32[], bf16[3,1024,256]) {
  %s.1 = (s32[], bf16[3,1024,256]{2,1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%s.1), index=0
  %stack = bf16[3,1024,256]{2,1,0} get-tuple-element(%s.1), index=1
  %x = bf16[1024,512]{1,0} constant({...})
  %w = bf16[512,256]{1,0} constant({...})
  %shard = bf16[64,512]{1,0} constant({...})
  %all-gather-start.1 = (bf16[64,512]{1,0}, bf16[512,512]{1,0}) all-gather-start(%shard), replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}, backend_config={"reification_cost":[{"end_to_end_cycles":0,"exec_time_us":50,"compute_time_us":0,"memory_access_time_us":0,"name":"sol"}]}
  %product = bf16[1024,256]{1,0} fusion(%x, %w), kind=kCustom, calls=%dot_computation, metadata={op_name="jit(step)/jvp(model)/while/body/mlp/fc1/dot_general"}, backend_config={"reification_cost":[{"exec_time_us":9,"name":""},{"end_to_end_cycles":0,"exec_time_us":20,"compute_time_us":0,"memory_access_time_us":0,"name":"sol"}]}
  %gradient = f32[512,256]{1,0} fusion(%x, %product), kind=kCustom, calls=%gradient_computation, metadata={op_name="jit(step)/transpose(jvp(model))/while/body/mlp/fc1/dot_general"}, backend_config={"reification_cost":[{"exec_time_us":7000,"name":"sol"}]}
  %all-gather-done.1 = bf16[512,512]{1,0} all-gather-done(%all-gather-start.1)
  %reduce-scatter-start.1 = ((f32[512,256]{1,0}), f32[64,256]{1,0}) reduce-scatter-start(%gradient), replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}, to_apply=%sum
  %reduce-scatter-done.1 = f32[64,256]{1,0} reduce-scatter-done(%reduce-scatter-start.1)
  %written = bf16[3,1024,256]{2,1,0} fusion(%stack, %product, %i.1), kind=kLoop, calls=%update_computation, metadata={op_name="jit(step)/jvp(model)/while/body/mlp/exp"}
  %one = s32[] constant(1)
  %next = s32[] add(%i.1, %one)
  ROOT %state.1 = (s32[], bf16[3,1024,256]{2,1,0}) tuple(%next, %written)
}

ENTRY %main (stack.0: bf16[3,1024,256], q: bf16[4,256,6,64]) -> bf16[3,1024,256] {
  %stack.0 = bf16[3,1024,256]{2,1,0} parameter(0)
  %q = bf16[4,256,6,64]{3,2,1,0} parameter(1)
  %first = s32[] constant(0)
  %init = (s32[], bf16[3,1024,256]{2,1,0}) tuple(%first, %stack.0)
  %loop = (s32[], bf16[3,1024,256]{2,1,0}) while(%init), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %attention = (bf16[4,6,256,64]{3,1,2,0}, bf16[4,6,256,64]{3,1,2,0}, bf16[4,6,256,64]{3,1,2,0}, u8[0]{0}) custom-call(%q, %q, %q, %q), custom_call_target="__cudnn$fmhaScaleBiasSoftmaxBackward", metadata={op_name="jit(step)/transpose(jvp(model))/layers/attn/shard_map/dot_product_attention_bwd"}, backend_config={"cudnn_fmha_backend_config": {"fmha_scale": 0.125, "intermediate_tensor_shape": {"element_type": "BF16", "dimensions": ["4", "6", "256", "256"], "tuple_shapes": []}}}
  %left = f32[64,384]{1,0} constant({...})
  %right = f32[384,32]{1,0} constant({...})
  %blas = (f32[64,32]{1,0}, s8[1024]{0}) custom-call(%left, %right), custom_call_target="__cublas$lt$matmul", metadata={op_name="jit(step)/jvp(model)/final_layer/dot_general"}, backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"],"lhs_batch_dimensions":[],"rhs_batch_dimensions":[]}}}
  ROOT %out = bf16[3,1024,256]{2,1,0} get-tuple-element(%loop), index=1
}
"""  # noqa: E501
FORWARD, GRADIENT = (1, 1024, 256, 512), (1, 512, 256, 1024)
LONE = LoneProducts({FORWARD: 20e-6, GRADIENT: 30e-6}, 700e12, 0.71)
ATTENTION_FLOPS = 5 * 2 * 4 * 6 * 256 * 256 * 64
UPDATE_BYTES = 2 * 2 * 1024 * 256


def estimated(text=STEP, nodes=EIGHT, lone=LONE):
    return gpu_estimate.estimate_program(text, nodes, lone)


def traffic_of(text, name):
    module = hlo.parse_module(text)
    return next(traffic(module, c, one) for c, one, _ in module.executed() if one.name == name)


@pytest.mark.parametrize(
    ("name", "nodes", "says", "gpus_"),
    [
        ("h100x8", None, "h100x8", 8),
        ("H100 x 8", None, "h100x8", 8),
        ("h100", None, "h100x1", 1),
        ("h200x8", 4, "h200x8 x 4 nodes", 32),
        ("a100-40gbx4", None, "a100-40gbx4", 4),
        ("b200×8 x 2 nodes", None, "b200x8 x 2 nodes", 16),
        ("gb200x4", 1, "gb200x4", 4),
    ],
)
def test_names_people_type(name, nodes, says, gpus_):
    found = gpus.parse_gpus(name, nodes)
    assert (str(found), found.num_chips) == (says, gpus_)


@pytest.mark.parametrize(
    ("name", "nodes", "says"),
    [
        ("v100x8", None, "known: a100, a100-40gb, h100, h200, b200, gb200"),
        ("8xh100", None, "such as h100x8"),
        ("", None, "such as h100x8"),
        ("h100x16", None, "1 to 8 of h100; for more give --num_nodes"),
        ("gb200x8", None, "1 to 4 of gb200"),
        ("h100x0", None, "1 to 8 of h100"),
        ("h100x8", 0, "0 nodes are below 1"),
        ("h100x8 x 2 nodes", 4, "has 2 nodes, num_nodes is 4"),
    ],
)
def test_other_names_are_refused_with_those_that_work(name, nodes, says):
    with pytest.raises(ValueError, match=re.escape(says)) as error:
        gpus.parse_gpus(name, nodes)
    assert repr(name) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("card", gpus.CARDS.values(), ids=lambda card: card.name)
def test_a_cards_figures_agree_with_each_other(card):
    assert card.peak_flops == devices.peak_flops(card.device_kind, "bfloat16") > 0
    # Capability 8 does 1,024 multiply-adds of bfloat16 a clock and core, 9 twice and 10 four times
    # that, at clocks up to the highest.
    each = {8: 1024, 9: 2048, 10: 4096}[card.capability[0]]
    assert 0.9 < card.peak_flops / (2 * each * card.cores * card.clock_ghz * 1e9) < 1.01
    assert 0.9 < card.usable_bytes / card.hbm_bytes < 0.95
    assert card.node_bandwidth <= card.nvlink_bandwidth < card.hbm_bandwidth


def test_the_compiler_is_told_the_cards_facts_once_each():
    text = H100.target_config
    assert text.count("{") == text.count("}") == 4
    for line in (
        "core_count: 132",
        "memory_bandwidth: 3352320000000",
        "device_memory_size: 84942979072",
        "major: 9 minor: 0",
        'device_description_str: "NVIDIA H100 80GB HBM3"',
    ):
        assert text.count(line) == 1


@pytest.mark.parametrize(
    ("group", "bandwidth"),
    [
        ((0, 1, 2, 3), 450e9),
        ((8, 9, 14, 15), 450e9),
        (tuple(range(32)), 400e9),
        ((0, 8, 16, 24), 50e9),
        ((0, 1, 8, 9), 100e9),
    ],
)
def test_a_ring_between_nodes_uses_the_network_cards_of_its_gpus(group, bandwidth):
    assert gpus.Nodes(H100, 8, 4).link_bandwidth(group) == bandwidth


@pytest.mark.parametrize(
    ("missing", "kernels", "says"),
    [
        ("jax_plugins", "auto", 'pip install "mdt_jax[gpu-compiler]" (no GPU needed)'),
        ("jax_plugins", "cudnn", 'pip install "mdt_jax[gpu-compiler]" (no GPU needed)'),
        ("nvidia", "cudnn", "--config.model.kernels=plain"),
        ("nvidia", "auto", "--config.model.kernels=plain"),
        ("nvidia", "plain", None),
    ],
)
def test_without_the_compiler_one_line_says_what_to_install(monkeypatch, missing, kernels, says):
    def find(name):
        if name.startswith(missing):
            raise ModuleNotFoundError(name)
        return object()

    monkeypatch.setattr(gpus.importlib.util, "find_spec", find)
    monkeypatch.setattr(gpus.ctypes.util, "find_library", lambda name: None)
    if says is None:
        gpus.check_compiler(kernels)
        return
    with pytest.raises(ValueError, match=re.escape(says)) as error:
        gpus.check_compiler(kernels)
    assert "\n" not in str(error.value)


def test_a_product_is_looked_up_by_its_shape_and_float32_entries_are_not_read():
    assert gpu_estimate.table_seconds(STEP) == {FORWARD: 20e-6}
    assert gpu_estimate.product_shapes(STEP) == {FORWARD, GRADIENT, (1, 64, 32, 384)}
    found = estimated()
    assert found.untabled_flops == 2 * 64 * 32 * 384
    by_rate = 2 * 64 * 32 * 384 / 700e12
    by_bytes = (4 * (64 * 384 + 384 * 32 + 64 * 32) + 1024) / H100.hbm_bandwidth
    assert found.seconds_by_kind["dense"] == pytest.approx(3 * 50e-6 + max(by_rate, by_bytes))


def test_the_floor_of_a_product_is_flops_at_the_peak_or_its_bytes():
    found = estimated(STEP.replace('"n":"3"', '"n":"1"'))
    flops = 2 * 1024 * 256 * 512
    bytes_ = 2 * (1024 * 512 + 512 * 256 + 1024 * 256), 2 * (1024 * 768) + 4 * 512 * 256
    blas = (4 * (64 * 384 + 384 * 32 + 64 * 32) + 1024) / H100.hbm_bandwidth
    by_hand = sum(max(flops / H100.peak_flops, b / H100.hbm_bandwidth) for b in bytes_)
    assert found.floor_by_kind["dense"] == pytest.approx(by_hand + blas)


def test_flops_count_every_turn_and_attentions_five_products():
    assert found_flops(STEP) == 3 * 2 * 2 * 1024 * 256 * 512 + ATTENTION_FLOPS + 2 * 64 * 32 * 384
    forward = STEP.replace("SoftmaxBackward", "Softmax")
    assert found_flops(STEP) - found_flops(forward) == ATTENTION_FLOPS * 3 // 5


def found_flops(text):
    return estimated(text).flops


def test_attention_is_both_its_flops_and_its_bytes_in_the_estimate_and_the_larger_in_the_floor():
    found, size = estimated(), 4 * 2 * 4 * 256 * 6 * 64  # q once, three results
    flops = ATTENTION_FLOPS
    assert found.floor_by_kind["attention"] == pytest.approx(
        max(flops / H100.peak_flops, size / H100.hbm_bandwidth)
    )
    assert found.seconds_by_kind["attention"] == pytest.approx(
        flops / 700e12 + size / H100.hbm_bandwidth
    )
    assert found.kernels["cuDNN attention backward"] == 1
    assert found.kernels["cuBLAS"] == 1 and found.kernels["product by Triton"] == 6


def test_elementwise_bytes_are_of_all_but_products_cudnn_and_transfers():
    # The loop's counter is an addition of 12 bytes.
    assert traffic_of(STEP, "written") == UPDATE_BYTES + 4
    assert sum(estimated().elementwise_bytes.values()) == 3 * (UPDATE_BYTES + 4 + 12)


def test_what_work_does_not_hide_of_a_transfer_is_exposed():
    """The gather takes 50 µs of the table and has 50 µs of products beside it; the scatter none."""
    found = estimated()
    scatter = 4 * 512 * 256 * 7 / 8 / 450e9
    assert found.seconds_by_kind["collectives"] == pytest.approx(3 * scatter)
    slower = STEP.replace('"exec_time_us":50,', '"exec_time_us":80,')
    assert estimated(slower).seconds_by_kind["collectives"] == pytest.approx(3 * (30e-6 + scatter))
    gather, scattered = found.collectives
    assert (gather.opcode, gather.count, gather.overlapped) == ("all-gather", 3, 3)
    assert gather.seconds == pytest.approx(150e-6)
    assert (scattered.opcode, scattered.count, scattered.overlapped) == ("reduce-scatter", 3, 0)
    assert scattered.bytes == 3 * 4 * 512 * 256
    assert found.estimated_seconds == pytest.approx(sum(found.seconds_by_kind.values()))


def test_between_nodes_a_transfer_takes_its_bytes_over_the_network():
    two = gpus.Nodes(H100, 4, 2)  # the table is of one node
    gather = next(c for c in estimated(nodes=two).collectives if c.opcode == "all-gather")
    assert gather.across_slices
    assert gather.seconds == pytest.approx(3 * 2 * 512 * 512 * 7 / 8 / (4 * 50e9))


def test_the_floor_hides_transfers_behind_work_or_work_behind_transfers():
    found = estimated()
    work = sum(s for kind, s in found.floor_by_kind.items() if kind != "collectives")
    assert found.floor_seconds == max(work, found.floor_by_kind["collectives"])
    assert found.floor_seconds < found.estimated_seconds


@pytest.mark.parametrize(
    ("fused", "size"),
    [
        # Of a stack that is only sliced, the slices are read: here two of them, the same once.
        ("dynamic-slice(%a, %i, %i), dynamic_slice_sizes={8,16}", 2 * 4 * 8 * 16 + 4),
        ("slice(%a), slice={[0:8], [0:16]}", 2 * 4 * 8 * 16),
        ("gather(%a, %i), offset_dims={0,1}", 2 * 4 * 8 * 16 + 4),
        # A sum reads all of it.
        ("reduce(%a, %i), dimensions={0}, to_apply=%sum", 4 * 64 * 16 + 4 * 8 * 16 + 4),
    ],
)
def test_a_fusion_reads_what_its_results_need(fused, size):
    text = f"""HloModule m

%inside (a: f32[64,16], i: s32[]) -> f32[8,16] {{
  %a = f32[64,16]{{1,0}} parameter(0)
  %i = s32[] parameter(1)
  ROOT %r = f32[8,16]{{1,0}} {fused}
}}

ENTRY %main (x: f32[64,16], n: s32[]) -> f32[8,16] {{
  %x = f32[64,16]{{1,0}} parameter(0)
  %n = s32[] parameter(1)
  ROOT %f = f32[8,16]{{1,0}} fusion(%x, %n), kind=kLoop, calls=%inside
}}
"""
    assert traffic_of(text, "f") == size


def test_a_chain_of_elementwise_operations_before_a_slice_reads_the_slice():
    text = """HloModule m

%inside (a: bf16[64,16], b: f32[64,16]) -> (f32[8,16], f32[8,16]) {
  %a = bf16[64,16]{1,0} parameter(0)
  %b = f32[64,16]{1,0} parameter(1)
  %wide = f32[64,16]{1,0} convert(%a)
  %sum = f32[64,16]{1,0} add(%wide, %b)
  %first = f32[8,16]{1,0} slice(%sum), slice={[0:8], [0:16]}
  %second = f32[8,16]{1,0} slice(%sum), slice={[8:16], [0:16]}
  ROOT %t = (f32[8,16]{1,0}, f32[8,16]{1,0}) tuple(%first, %second)
}

ENTRY %main (x: bf16[64,16], y: f32[64,16]) -> (f32[8,16], f32[8,16]) {
  %x = bf16[64,16]{1,0} parameter(0)
  %y = f32[64,16]{1,0} parameter(1)
  ROOT %f = (f32[8,16]{1,0}, f32[8,16]{1,0}) fusion(%x, %y), kind=kLoop, calls=%inside
}
"""
    assert traffic_of(text, "f") == (2 + 4 + 4) * 16 * 16


def test_groups_are_listed_as_they_are_written():
    listed = collectives.replica_groups("replica_groups={{0,1},{2,3}}, dimensions={0}")
    assert listed == collectives.replica_groups("replica_groups=[2,2]<=[4]") == [[0, 1], [2, 3]]
    assert collectives.replica_groups("channel_id=1") == []


@pytest.fixture
def eight_gpus(monkeypatch):
    """An h100x8 whose devices are this machine's, so that no compiler is needed."""
    monkeypatch.setattr(gpus, "devices", lambda nodes: jax.devices()[: nodes.num_chips])
    monkeypatch.setattr(gpus, "check_compiler", lambda kernels="auto": None)
    return EIGHT


def a_program(name, seconds, peak=8 * 2**30, fits=True):
    kinds = dict.fromkeys(estimate.KINDS, 0.0) | {"dense": seconds, "collectives": seconds / 10}
    bytes_ = dict.fromkeys(estimate.KINDS, 0) | {"elementwise": 2**30, "optimiser": 2**29}
    moved = GpuCollective("reduce-scatter", 8, 10, 10**9, 8 * 10**8, False, 10, 2e-3)
    work = GpuEstimate(kinds, kinds, bytes_, 10**12, (moved,), {"elementwise": 5}, 0, ())
    return Program(name, fits, Memory(2**30, temporaries=peak - 2**30, peak=peak), work, 1.0)


def test_a_report_keeps_floor_and_estimate_apart(eight_gpus):
    job = TrainingJob(tiny_config(), eight_gpus)
    steps = tuple(a_program(f"step {n}", s) for n, s in ((128, 0.02), (176, 0.04)))
    made = report.create_report(job, steps, (0.5, 0.5), GpuReport, sampler=None, calibration=0.79)
    assert made.step_seconds == pytest.approx(0.033) and made.floor_seconds == pytest.approx(0.03)
    text = "\n".join(made.lines())
    assert "floor          30.0 ms" in text and "estimate       33.0 ms" in text
    assert "no GPU has confirmed" in text and "UNCALIBRATED" not in text
    assert "1.50 GiB" in text and "10 beside other work" in text
    record = json.loads(json.dumps(made.as_json()))
    assert record["mfu_at_floor"] / record["mfu_estimated"] == pytest.approx(1.1)
    assert record["elementwise_bytes"] == 1.5 * 2**30 and record["needs_memory_fraction"] is None
    assert record["confirmed_by_a_gpu"] is False
    cells = made.table_row().strip("| ").split(" | ")
    assert len(cells) == len(made.table_header) and cells[4:6] == ["30.0", "33.0"]


@pytest.mark.parametrize("share", [None, 0.5, 0.97])
def test_a_lone_product_outside_its_range_says_so(eight_gpus, share):
    job = TrainingJob(tiny_config(), eight_gpus)
    made = report.create_report(
        job, (a_program("step", 0.02),), (1.0,), GpuReport, sampler=None, calibration=share
    )
    assert "UNCALIBRATED" in "\n".join(made.lines()) and not made.as_json()["calibrated"]


def test_more_memory_than_jax_takes_by_default_names_the_variable(eight_gpus):
    job = TrainingJob(tiny_config(), eight_gpus)
    step = a_program("step", 0.02, peak=round(0.85 * H100.hbm_bytes))
    made = report.create_report(job, (step,), (1.0,), GpuReport, sampler=None, calibration=0.79)
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION=0.8" in "\n".join(made.lines())
    assert 0.85 <= made.as_json()["needs_memory_fraction"] <= 0.86


def test_a_run_that_does_not_fit_is_told_what_would_help(eight_gpus, monkeypatch):
    job = TrainingJob(tiny_config("DiT-S/2"), eight_gpus)
    refused = a_program("step", 0.02, peak=100 * 2**30, fits=False)
    lines = advice.advice_lines(job, refused)
    assert any("mesh.fsdp=8" in line and "GiB a GPU" in line for line in lines)
    assert any("model.kernels=cudnn" in line for line in lines)
    monkeypatch.setattr(TrainingJob, "compile_step", lambda job, count: refused)
    monkeypatch.setattr(programs, "calibrate", lambda topology: 0.79)
    arguments = SimpleNamespace(quick=True, sampler=True, calibration=True, sample_batch_size=8)
    made = command.compile_job(job, arguments, kind=GpuReport)
    assert made.sampler is None and made.as_json()["fits"] is False
    assert "verdict        does not fit" in made.lines()
    assert "does not fit" in made.table_row()


def test_the_tools_table_has_a_row_for_each_model_and_kind_of_nodes(
    eight_gpus, monkeypatch, capsys
):
    from mdt_jax.commands import compile_gpu

    step = a_program("step", 0.02)
    monkeypatch.setattr(TrainingJob, "compile_step", lambda job, count: step)
    monkeypatch.setattr(programs, "calibrate", lambda topology: None)
    flags = {"all": True, "gpus": None, "models": ["DiT-S/2"], "all_gpus": ["h100x8", "a100x4"]}
    flags |= {"output": None, "unroll": 1, "kernels": "plain", "quick": True, "sampler": False}
    flags |= {"calibration": True, "calibrate": False, "sample_batch_size": None, "config": None}
    made = compile_gpu.run_compilation(SimpleNamespace(**flags))
    lines = capsys.readouterr().out.splitlines()
    assert [record["topology"] for record in made] == ["h100x8", "a100x4"]
    assert {line.count("|") for line in lines} == {len(GpuReport.table_header) + 1}
    assert "kernels plain" in lines[2] and "(uncalibrated)" in lines[3]

    compile_gpu.run_compilation(
        SimpleNamespace(**flags | {"all": False, "gpus": "a100", "calibrate": True, "num_nodes": 1})
    )
    assert "nothing known of the peak  UNCALIBRATED" in capsys.readouterr().out
    for missing, says in (("gpus", "--gpus is missing"), ("config", "--config is missing")):
        given = flags | {"all": False, "gpus": "h100x8", "num_nodes": None} | {missing: None}
        with pytest.raises(ValueError, match=says):
            compile_gpu.run_compilation(SimpleNamespace(**given))


def test_the_tools_table_goes_on_where_it_was_left(eight_gpus, monkeypatch, capsys, tmp_path):
    compiled_, jobs = [], {}

    def job_of(config, topology):  # a job once, as making one takes a second
        key = str(topology), config.model.scan_unroll
        if key not in jobs:
            jobs[key] = TrainingJob(config, topology)
        return jobs[key]

    monkeypatch.setattr(command, "TrainingJob", job_of)

    def compile_step(job, count):
        compiled_.append((job.config.model.name, str(job.topology)))
        if len(compiled_) == 2:
            raise KeyboardInterrupt
        return a_program("step", 0.02)

    monkeypatch.setattr(TrainingJob, "compile_step", compile_step)
    monkeypatch.setattr(TrainingJob, "compile_sampler", lambda job, n: a_program("sampler", 0.01))
    monkeypatch.setattr(programs, "calibrate", lambda topology: 0.79)
    arguments = SimpleNamespace(
        models=["DiT-S/2"], quick=True, sampler=False, calibration=True, sample_batch_size=None,
        output=str(tmp_path / "sub" / "rows.json"),
    )  # fmt: skip
    nodes = [EIGHT, gpus.parse_gpus("a100x4")]

    def rows(unroll=1):
        made = command.compile_all(
            arguments, nodes, lambda m, n: command.imagenet_config(m, n, unroll), GpuReport
        )
        return [row["topology"] for row in made], capsys.readouterr().out.splitlines()[2:]

    with pytest.raises(KeyboardInterrupt):
        rows()
    (first,) = capsys.readouterr().out.splitlines()[2:]
    found, lines = rows()
    assert found == ["h100x8", "a100x4"] and lines[0] == first
    assert [where for _, where in compiled_] == ["h100x8", "a100x4", "a100x4"]
    written = json.loads((tmp_path / "sub" / "rows.json").read_text())["rows"]
    assert [row["table_row"] for row in written] == lines
    assert written[0]["asked"]["scan_unroll"] == 1 and written[0]["versions"]["jax"]
    # Other settings are other rows; a sampler that is not there yet takes the row's place.
    rows(unroll=2)
    arguments.sampler = True
    rows()
    assert len(compiled_) == 7
    arguments.sampler = False
    assert len(rows()[0]) == 2 and len(compiled_) == 7
    assert len(command.read_rows(arguments.output)) == 4


@pytest.mark.parametrize("text", ["", "[]", '{"rows": [{"name": "train step"}]}', '{"rows": 1}'])
def test_a_file_that_is_no_table_is_not_overwritten(tmp_path, text):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="is no table of --all") as error:
        command.read_rows(str(path))
    assert repr(str(path)) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kinds", "processes", "says"),
    [
        ("NVIDIA H100 80GB HBM3", [0] * 8, "h100x8"),
        ("NVIDIA A100-SXM4-80GB", [0, 0, 1, 1], "a100x2 x 2 nodes"),
        ("NVIDIA H200", list(range(16)), "h200x8 x 2 nodes"),
        ("NVIDIA GeForce RTX 4090", [0], "None"),
    ],
)
def test_the_gpus_that_are_here_are_known_by_their_kind(kinds, processes, says):
    here = [SimpleNamespace(device_kind=kinds, platform="gpu", process_index=i) for i in processes]
    assert str(gpus.nodes_of(here)) == says


# What the compiler itself makes of a run. Bytes are of jaxlib 0.10.2.


def compiled(gpus_, model="MDTv2-S/2", tiny=True, **settings):
    """A job and its step at the mean number of kept tokens; settings by their keys with dots."""
    nodes = gpus.parse_gpus(gpus_)
    config = tiny_config(model) if tiny else command.imagenet_config(model, nodes, 1)
    config.mesh.fsdp = 1
    config.update_from_flattened_dict(settings)
    job = TrainingJob(config, nodes)
    return job, job.compile_step(job.kept_tokens.nearest_to_mean)


def gradient_bytes(job):
    """The bytes of all gradients, whole, in float32."""
    return sum(4 * leaf.size for leaf in jax.tree.leaves(job.abstract.params))


def bias_bytes(job):
    """The most bytes of sums of the biases' gradients, which are of all pairs of tokens."""
    model = job.trainer.model
    return 4 * (model.depth + 1) * model.num_heads * model.num_tokens**2


def transferred(step, opcode, across=False):
    """The bytes of a program's transfers of one kind, inside nodes or across them."""
    return sum(
        one.bytes
        for one in step.estimate.collectives
        if one.opcode == opcode and one.across_slices == across
    )


@pytest.mark.gpu
@pytest.mark.parametrize(("card", "calibrated"), [("h100", True), ("b200", False)])
def test_a_lone_product_calibrates_the_arithmetic(card, calibrated):
    share = programs.calibrate(gpus.Nodes(gpus.CARDS[card], 1))
    assert gpus.CARDS[card].is_calibrated(share) is calibrated and 0.5 < share < 1


@pytest.mark.gpu
def test_a_card_that_is_in_no_table_compiles_and_is_uncalibrated():
    job, step = compiled("a100", "DiT-S/2", **{"model.depth": 1})
    assert step.fits and programs.calibrate(job.topology) is None
    assert step.estimate.untabled_flops > 0 and step.estimate.collectives == ()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("gpus_", "kernels", "peak_mib"), [("h100", "plain", 894.8), ("h100x8", "plain", 128.3)]
)
def test_a_replicated_tiny_run(gpus_, kernels, peak_mib):
    job, step = compiled(gpus_, **{"model.kernels": kernels})
    found = step.estimate
    assert step.fits and found.loops_counted_once == ()
    sums = transferred(step, "all-reduce")
    assert transferred(step, "reduce-scatter") == transferred(step, "all-gather") == 0
    # Replicated gradients are summed whole, once; the biases' before they go into their tables.
    whole = gradient_bytes(job)
    assert sums == 0 if job.mesh.size == 1 else whole < sums < 1.1 * whole + bias_bytes(job)
    assert not any("cuDNN" in name for name in found.kernels)
    assert step.memory.peak / 2**20 == pytest.approx(peak_mib, rel=0.05)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("tiny", "kernels", "peak_mib"),
    [(True, "cudnn", 63.3), (False, "cudnn", 3260.8), (False, "plain", 4834.2)],
    ids=["tiny, cudnn", "S/2, cudnn", "S/2, plain"],
)
def test_sharded_gradients_are_summed_once_and_scattered(tiny, kernels, peak_mib):
    job, step = compiled("h100x8", tiny=tiny, **{"model.kernels": kernels, "mesh.fsdp": 8})
    found, whole = step.estimate, gradient_bytes(job)
    assert step.fits and found.loops_counted_once == ()
    scattered = transferred(step, "reduce-scatter")
    assert 0.9 < scattered / whole < 1
    assert transferred(step, "all-reduce") < 0.1 * whole + bias_bytes(job)
    # Weights in bfloat16, once on the way there and once on the way back, and no activations.
    assert 0.9 < transferred(step, "all-gather") / whole < 1.5
    for one in found.collectives:
        if one.opcode == "reduce-scatter":
            assert one.overlapped > 0.9 * one.count
    calls = [found.kernels.get(f"cuDNN attention {way}", 0) for way in ("forward", "backward")]
    assert calls == ([0, 0] if kernels == "plain" else [calls[0]] * 2)
    assert kernels == "plain" or calls[0] > job.trainer.model.depth
    assert 0.95 < job.mesh.size * found.flops / report.step_flops(job) < 1.15
    assert found.floor_seconds < found.estimated_seconds
    assert step.memory.peak / 2**20 == pytest.approx(peak_mib, rel=0.05)


@pytest.mark.gpu
def test_between_nodes_only_parts_of_gradients_are_summed():
    job, step = compiled("h100x4 x 2 nodes", "DiT-S/2", **{"mesh.fsdp": 4, "model.depth": 2})
    whole = gradient_bytes(job)
    assert transferred(step, "reduce-scatter", across=True) == 0
    assert 0.7 < transferred(step, "reduce-scatter") / whole <= 1
    assert transferred(step, "all-reduce", across=True) < 0.5 * whole


@pytest.mark.gpu
def test_a_model_too_large_for_a_card_says_so_and_what_would_help():
    job, step = compiled("a100-40gb", "DiT-S/2", **{"batch_size": 2**15, "model.depth": 2})
    assert not step.fits and step.memory.peak > gpus.CARDS["a100-40gb"].hbm_bytes
    lines = advice.advice_lines(job, step)
    assert any("remat" in line for line in lines) and any("microbatch" in line for line in lines)
