"""Parameters cut into stacks of blocks and joined again, on the trees of real models."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gate import mostly_slow

from big_vit import trees
from big_vit.models import variants
from big_vit.models.encoder import stack_blocks
from big_vit.models.vit import make_vit
from big_vit.optim import blocks, matrices


def shapes_of(size=None, scan=True, pool='map', **fields):
    """Shapes by name of a published size, or of a tiny model whose every side is another number."""
    tiny = dict(width=24, depth=3, mlp_dim=40, num_heads=2, patch_size=(4, 3))
    fields = {**(variants.parse(size) if size else tiny), 'num_classes': 1000, **fields}
    rows, columns = fields['patch_size']
    vit = make_vit(**fields, pool=pool, posemb='learned', scan=scan)
    image = jax.ShapeDtypeStruct((1, 2 * rows, 2 * columns, 3), jnp.float32)
    params = jax.eval_shape(vit.init, jax.random.key(0), image)['params']
    return {name: leaf.shape for name, leaf in trees.flatten(params).items()}


def numbered(shapes):
    """Arrays in which no two numbers are the same and none is 0."""
    arrays, start = {}, 1
    for name, shape in shapes.items():
        size = math.prod(shape)
        arrays[name] = np.arange(start, start + size, dtype=np.float32).reshape(shape)
        start += size
    assert start < 2**24  # Or float32 would round.
    return arrays


def view(name, array):
    """[layers, rows, columns] of a kernel as the model multiplies with it, else None."""
    layers = array.shape[0] if 'encoderblock/' in name else 1
    if not name.endswith('kernel'):
        return None
    rest = array.shape[1:] if 'encoderblock/' in name else array.shape
    outputs = 2 if name.split('/')[-2] in ('query', 'key', 'value') and len(rest) == 3 else 1
    return array.reshape(layers, -1, math.prod(rest[-outputs:]))


def blocks_of(matrix, cut):
    """Equal parts, down first as told, some turned on their side."""
    rows, columns = matrix.shape
    high, wide = math.ceil(rows / cut.down), math.ceil(columns / cut.across)
    parts = [
        matrix[i : i + high, j : j + wide]
        for i in range(0, rows, high)
        for j in range(0, columns, wide)
    ]
    return [part.T if cut.flipped else part for part in parts]


def cut_and_joined(shapes, block, extra=0):
    """(plan, arrays, stacks, arrays again)."""
    plan, arrays = blocks.plan(shapes, block), numbered(shapes)

    @jax.jit
    def there_and_back(arrays):
        stacks = blocks.cut(plan, arrays)
        # Blocks behind the last, such as those that make a stack divide by devices, are no one's.
        fill = ((0, extra), (0, 0), (0, 0))
        longer = {n: jnp.pad(x, fill, constant_values=-1) for n, x in stacks.items()}
        return stacks, blocks.join(plan, longer, arrays)

    stacks, again = jax.tree.map(np.asarray, there_and_back(arrays))
    return plan, arrays, stacks, again


def check_round_trip(shapes, block, extra=0):
    plan, arrays, stacks, again = cut_and_joined(shapes, block, extra)
    assert set(again) == set(plan.cuts)
    for name, x in again.items():
        assert x.shape == shapes[name] and x.dtype == arrays[name].dtype
        np.testing.assert_array_equal(x, arrays[name])
    # Each stack is as long as planned, and all that is no parameter's in it is zero.
    for name, x in stacks.items():
        assert x.shape == (plan.stacks[name].blocks, *plan.stacks[name][:2])
    held = np.concatenate([x[x != 0] for x in stacks.values()]) if stacks else np.zeros(0)
    wanted = np.concatenate([arrays[name].ravel() for name in plan.cuts]) if stacks else held
    np.testing.assert_array_equal(np.sort(held), np.sort(wanted))
    return plan, arrays, stacks


@pytest.mark.parametrize('scan, block', [(True, 8), (True, 1024), (False, 16)])
def test_every_kernel_of_a_vit_is_cut_and_joined_again(scan, block):
    shapes = shapes_of(scan=scan)
    plan, arrays, stacks = check_round_trip(shapes, block, extra=3)
    assert set(plan.cuts) == {name for name in shapes if name.endswith('kernel')}
    # Blocks lie layer by layer, along rows first, each in the corner of zeros.
    for name, cut in plan.cuts.items():
        parts = [part for layer in view(name, arrays[name]) for part in blocks_of(layer, cut)]
        found = stacks[cut.stack][cut.first : cut.first + cut.blocks]
        for part, x in zip(parts, found, strict=True):
            rows, columns = part.shape
            np.testing.assert_array_equal(x[:rows, :columns], part)
            assert not x[rows:].any() and not x[:, columns:].any()


def test_every_block_of_a_stack_belongs_to_just_one_parameter():
    plan = blocks.plan(shapes_of(scan=False), 16)
    for name, stack in plan.stacks.items():
        cuts = [cut for cut in plan.cuts.values() if cut.stack == name]
        taken = [i for cut in cuts for i in range(cut.first, cut.first + cut.blocks)]
        assert sorted(taken) == list(range(stack.blocks))


SIDES = (4304, 1408, 6144, 1152, 1000, 1025, 97, 2)


@pytest.mark.parametrize('columns', mostly_slow([2, 65, 600], 65))
def test_sides_that_no_block_divides_are_cut_and_joined_again(columns):
    plan, _, _ = check_round_trip({f'{rows}/kernel': (rows, columns) for rows in SIDES}, 512)
    for cut in plan.cuts.values():
        for side, parts in ((cut.rows, cut.down), (cut.columns, cut.across)):
            assert math.ceil(side / 512) <= parts <= 4 * math.ceil(side / 512)


@pytest.mark.parametrize('seed', range(8))
def test_any_shapes_are_cut_and_joined_again(seed):
    random = np.random.default_rng(seed)

    def sides(count):
        return tuple(int(side) for side in random.integers(1, 50, count))

    shapes = {f'{i}/kernel': sides(random.integers(2, 4)) for i in range(5)}
    shapes |= {'encoderblock/a/kernel': sides(3), 'encoderblock/query/kernel': sides(4)}
    shapes |= {'out/kernel': sides(3), 'out/bias': sides(1)}
    check_round_trip(shapes, int(random.integers(1, 40)), extra=int(random.integers(3)))


@pytest.mark.parametrize(
    'shape, cut',
    [((1, 1), False), ((1, 9), False), ((9, 1), False), ((2, 2), True), ((3, 1, 1, 2), True)],
)
def test_a_single_row_or_column_is_a_vector(shape, cut):
    plan, _, _ = check_round_trip({'a/kernel': shape}, 4)
    assert bool(plan.cuts) == bool(plan.stacks) == cut


def test_scanned_layers_are_so_many_matrices_not_one():
    plan = blocks.plan({'encoderblock/a/kernel': (5, 2, 3), 'encoderblock/b/kernel': (0, 2, 3)}, 8)
    assert plan.stacks == {'2x3': blocks.BlockStack(2, 3, 5)} and len(plan.cuts) == 1


def test_biases_norms_tokens_and_positions_are_in_no_cut():
    shapes = shapes_of()
    rest = set(shapes) - set(blocks.plan(shapes, 16).cuts)
    assert {name.rpartition('/')[2] for name in rest} == {'bias', 'scale', 'pos_embedding', 'probe'}


def test_a_tree_without_matrices_has_no_stacks():
    plan, _, stacks = check_round_trip({'a/bias': (4,), 'encoderblock/b/scale': (3, 4)}, 8)
    assert plan == blocks.Plan({}, {}) and stacks == {}


def test_a_function_says_what_is_a_matrix():
    whole = blocks.plan({'w': (4, 2, 3)}, 8, lambda name, ndim: matrices.Matrix(0, 1, ndim - 1))
    assert whole.cuts['w'][:5] == (1, 4, 6, 1, 1)
    assert not blocks.plan({'a/kernel': (4, 4)}, 8, lambda name, ndim: None).cuts


# Layers scanned or not.


@pytest.mark.parametrize('depth, block', [(1, 16), (3, 8), (12, 16)])
def test_blocks_and_their_order_do_not_depend_on_scanned_layers(depth, block):
    # More than ten layers, whose names sort otherwise than their numbers.
    arrays = numbered(shapes_of(scan=False, depth=depth, num_classes=10))
    scanned = trees.flatten(stack_blocks(trees.unflatten(arrays)))
    cuts = []
    for flat in (arrays, scanned):
        plan = blocks.plan({name: x.shape for name, x in flat.items()}, block)
        cuts.append((plan, jax.jit(functools.partial(blocks.cut, plan))(flat)))
    (one, unrolled), (other, stacked) = cuts
    assert list(one.stacks.items()) == list(other.stacks.items())
    for name, x in unrolled.items():
        np.testing.assert_array_equal(x, stacked[name])


def test_the_order_of_names_does_not_matter():
    shapes = shapes_of(scan=False)
    turned = dict(reversed(shapes.items()))
    assert blocks.plan(shapes, 16) == blocks.plan(turned, 16)


# Sizes of published models.


@pytest.mark.parametrize('pool', ['gap', 'map'])
@pytest.mark.parametrize('block', [512, 1024])
@pytest.mark.parametrize(
    'size', mostly_slow(['S/16', 'B/16', 'L/16', 'g/14', 'So400m/14'], 'B/16', 'So400m/14')
)
def test_published_models_have_few_sizes_of_blocks_and_little_padding(size, block, pool):
    shapes = shapes_of(size, pool=pool)
    plan = blocks.plan(shapes, block)
    words = sum(math.prod(shape) for name, shape in shapes.items() if name.endswith('kernel'))
    assert len(plan.stacks) <= 4
    assert words <= sum(math.prod(stack) for stack in plan.stacks.values()) <= 1.2 * words
    assert all(stack.rows <= stack.columns <= block for stack in plan.stacks.values())


@pytest.mark.slow
def test_a_published_model_has_the_same_stacks_scanned_and_not():
    scanned, unrolled = (blocks.plan(shapes_of('So400m/14', scan=s), 1024) for s in (True, False))
    assert scanned.stacks == unrolled.stacks


def test_no_part_of_a_parameter_is_larger_than_a_block():
    for block in (1, 7, 64, 100, 1000):
        for cut in blocks.plan({f'{n}/kernel': (n, 129) for n in SIDES}, block).cuts.values():
            assert math.ceil(cut.rows / cut.down) <= block
            assert math.ceil(cut.columns / cut.across) <= block


def test_a_few_blocks_join_the_stack_of_many_where_they_fit():
    shapes = {'encoderblock/a/kernel': (64, 128, 128), 'b/kernel': (128, 120), 'c/kernel': (8, 8)}
    plan = blocks.plan(shapes, 128)
    # Padding 8 x 8 costs less than a program for its roots.
    assert plan.stacks == {'128x128': blocks.BlockStack(128, 128, 66)}
    check_round_trip(shapes, 128)


def test_rare_sizes_that_join_rare_sizes_all_end_together():
    sides = {'a': (8, 8), 'b': (8, 12), 'c': (12, 12), 'd': (12, 16)}
    many = dict(zip('abcd', (1, 2, 3, 200), strict=True))
    shapes = {f'encoderblock/{n}/kernel': (many[n], *sides[n]) for n in sides}
    plan = blocks.plan(shapes, 16)
    assert plan.stacks == {'12x16': blocks.BlockStack(12, 16, 206)}
    check_round_trip(shapes, 16)
