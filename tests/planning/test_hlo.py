# ruff: noqa: E501
"""Costs read from a compiled module: written by hand, and counted by hand."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from big_vit.planning import hlo

COST = 'backend_config={"window_config":{"estimated_cycles":"%d"}}'


def cost(cycles):
    return COST % cycles


# Two nested loops of 3 and 4 rounds, a fusion that hides a collective, an asynchronous one,
# a conditional, and shapes with layouts whose T(8,128) is no operation.
MODULE = f"""HloModule jit_step, is_scheduled=true

%fused.1 (p0: f32[8,128]) -> f32[8,128] {{
  %p0 = f32[8,128]{{1,0:T(8,128)}} parameter(0)
  %inner = f32[8,128]{{1,0:T(8,128)}} fusion(%p0), kind=kLoop, calls=%deep, {cost(999999)}
  ROOT %all-gather.9 = f32[16,128]{{1,0:T(8,128)}} all-gather(%p0), channel_id=7, replica_groups=[2,2]<=[4], dimensions={{0}}, metadata={{op_name="jit(step)/jvp(ViT)/head/dot"}}
}}

%fused.2 (p0: f32[8,128]) -> f32[8,128] {{
  ROOT %all-gather.10 = f32[16,128]{{1,0:T(8,128)}} all-gather(%p0), channel_id=7, replica_groups=[2,2]<=[4], dimensions={{0}}, metadata={{op_name="jit(step)/jvp(ViT)/head/dot"}}
}}

%inner_condition (c: (s32[], f32[8,128])) -> pred[] {{
  %c = (s32[]{{:T(128)}}, f32[8,128]{{1,0}}) parameter(0)
  %limit = s32[]{{:T(128)}} constant(4)
  %i = s32[]{{:T(128)}} get-tuple-element(%c), index=0
  ROOT %lt = pred[]{{:T(512)}} compare(%i, %limit), direction=LT
}}

%inner_body (b: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {{
  %b = (s32[]{{:T(128)}}, f32[8,128]{{1,0}}) parameter(0)
  %work = f32[8,128]{{1,0:T(8,128)S(1)}} fusion(%b), kind=kOutput, calls=%fused.1, metadata={{op_name="jit(step)/jvp(ViT)/Transformer/while/body/encoderblock/MlpBlock_0/Dense_0/dot_general"}}, {cost(10)}
  %start = (f32[8]{{0}}, f32[8]{{0}}, u32[]) collective-permute-start(%work), channel_id=3, source_target_pairs={{{{0,1}},{{1,2}},{{2,3}},{{3,0}}}}
  %done = f32[8]{{0}} collective-permute-done(%start)
  ROOT %t = (s32[], f32[8,128]{{1,0}}) tuple(%i, %work)
}}

%outer_condition (c: (s32[])) -> pred[] {{
  %three = s32[] constant(3)
  ROOT %lt.1 = pred[] compare(%i, %three), direction=LT
}}

%outer_body (b: (s32[])) -> (s32[]) {{
  %loop = (s32[], f32[8,128]{{1,0}}) while(%b), condition=%inner_condition, body=%inner_body
  %once = bf16[2,3]{{1,0:T(8,128)(2,1)}} fusion(%loop), kind=kLoop, calls=%fused.2, metadata={{op_name="jit(step)/transpose(jvp(ViT))/Transformer/while/body/LayerNorm_0/mul"}}, {cost(100)}
  %sum = (bf16[10]{{0}}, f32[]) all-reduce(%once, %x), channel_id=1, replica_groups={{{{0,2}},{{1,3}}}}, to_apply=%add
  ROOT %t = (s32[]) tuple(%i)
}}

%yes (p: f32[]) -> f32[] {{
  ROOT %y = f32[] fusion(%p), kind=kLoop, calls=%deep, {cost(5)}
}}

%no (p: f32[]) -> f32[] {{
  ROOT %n = f32[] fusion(%p), kind=kLoop, calls=%deep, {cost(7)}
}}

%endless (c: (s32[])) -> pred[] {{
  ROOT %flag = pred[] get-tuple-element(%c), index=0
}}

%endless_body (b: (s32[])) -> (s32[]) {{
  ROOT %e = f32[] fusion(%b), kind=kLoop, calls=%deep, {cost(1)}
}}

ENTRY %main.1 (p0: f32[8,128]) -> f32[8,128] {{
  %outer = (s32[]) while(%p0), condition=%outer_condition, body=%outer_body
  %which = f32[] conditional(%p0, %a, %b), branch_computations={{%yes, %no}}
  %search = (s32[]) while(%p0), condition=%endless, body=%endless_body
  %scatter = f32[4,128]{{1,0}} reduce-scatter(%p0), replica_groups=[1,2]<=[2], dimensions={{0}}, to_apply=%add
  %send = (bf16[8]{{0}}, u32[], token[]) send(%p0, %token), channel_id=15, is_host_transfer=true, frontend_attributes={{_xla_megascale_transfer_type="ALL_REDUCE"}}
  ROOT %last = f32[8,128]{{1,0}} fusion(%outer), kind=kLoop, calls=%deep, metadata={{op_name="jit(step)/add"}}, {cost(1000)}
}}
"""


@pytest.fixture(scope='module')
def module():
    return hlo.read(MODULE, devices=4, slices=3)


def test_loops_multiply_and_the_inside_of_a_fusion_does_not_count(module):
    assert module.cycles == 3 * (4 * 10 + 100) + 5 + 7 + 1 + 1000
    times = {op.name: op.times for op in module.ops}
    assert times == {'work': 12, 'once': 3, 'y': 1, 'n': 1, 'e': 1, 'last': 1}
    assert module.unknown_loops == 1
    assert module.unknown_in == ('',)


def test_what_does_not_run_once_in_each_call_is_told_apart(module):
    always = 3 * (4 * 10 + 100) + 1000
    assert module.cycles_by_branch == {'': always, 'yes': 5, 'no': 7, 'endless_body': 1}


def test_collectives_are_counted_by_channel_with_bytes_and_groups(module):
    found = {one.kind: one for one in module.collectives if not one.network}
    assert len(module.collectives) == 5
    gather = found['all-gather']  # In two fusions, of 12 and 3 executions: one transfer.
    assert (gather.nbytes, gather.group, gather.times, gather.overlapped) == (8192, 2, 12, True)
    assert gather.source == 'jit(step)/jvp(ViT)/head/dot'
    permute = found['collective-permute']
    assert (permute.nbytes, permute.times, permute.overlapped) == (32, 12, True)
    reduce = found['all-reduce']
    assert (reduce.nbytes, reduce.group, reduce.times) == (24, 2, 3)
    assert not reduce.overlapped
    scatter = found['reduce-scatter']
    assert scatter.nbytes == 2 * 4 * 128 * 4
    (between,) = (one for one in module.collectives if one.network)
    assert (between.kind, between.nbytes, between.group) == ('all-reduce', 16, 3)
    assert [one.sent for one in (gather, permute, reduce, scatter)] == [4096, 32, 24, 2048]


@pytest.mark.parametrize(
    'shape, expected',
    [
        ('f32[2,3]{1,0:T(8,128)}', 24),
        ('(bf16[4]{0}, pred[5], s32[])', 8 + 5 + 4),
        ('f8e4m3fn[16]', 16),
        ('u32[]{:S(2)}', 4),
        ('s8[3,0,5]', 0),
    ],
)
def test_bytes_of_shapes(shape, expected):
    assert hlo.array_bytes(shape) == expected


@pytest.mark.parametrize(
    'text, expected',
    [
        ('replica_groups={{0,1,2,3},{4,5,6,7}}', 4),
        ('replica_groups=[2,4]<=[8]', 4),
        # Columns of a 2 x 4 grid: {0,4}, {1,5}, ...
        ('replica_groups=[4,2]<=[2,4]T(1,0)', 2),
        ("replica_groups=mesh['axis_0'=16,'axis_1'=4] {'axis_0'}", 16),
        ("replica_groups=mesh['axis_0'=16,'axis_1'=4] {'axis_1'}", 4),
        ("replica_groups=mesh['axis_0'=16,'axis_1'=1,'axis_2'=1] {'axis_0','axis_1'}", 16),
        ('channel_id=3', 8),
    ],
)
def test_groups(text, expected):
    assert hlo.group_size(text, 8) == expected


def test_a_real_module_of_this_backend():
    """XLA's own text: a scanned psum is found in its loop, with the loop's rounds."""
    mesh = jax.make_mesh((8,), ('x',), axis_types=(AxisType.Auto,))
    split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (('x',), ()))

    def step(w, x):
        def layer(h, w):
            return jnp.tanh(h @ w), None

        def loss(w):
            return jnp.square(jax.lax.scan(layer, x, w)[0]).sum()

        return w - jax.grad(loss)(w)

    w = jax.ShapeDtypeStruct((5, 16, 16), jnp.float32, sharding=whole)
    x = jax.ShapeDtypeStruct((32, 16), jnp.float32, sharding=split)
    text = jax.jit(step, out_shardings=whole).lower(w, x).compile().as_text()
    found = hlo.read(text, 8)
    assert found.unknown_loops == 0
    reduced = [one for one in found.collectives if one.kind == 'all-reduce']
    # Inside the loop once a layer, or once after it for all layers.
    assert sum(one.nbytes * one.times for one in reduced) == 5 * 16 * 16 * 4
    assert all(one.group == 8 for one in reduced)
    assert re.search('while', text)
