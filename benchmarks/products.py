"""Estimate a block's matrix products alone with the TPU compiler: `python -m benchmarks products`.

Each product is compiled by itself, in bfloat16 and with its size in a row of `benchmarks chips`,
and its estimated cycles are compared with the chip's peak. This bounds what a complete step can
reach: attention's own products, norms, the optimizer and collectives come on top.
"""

import argparse
import json
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks import chips
from big_vit import compiler
from big_vit.models import variants
from big_vit.planning import hlo, topology

FILE = chips.FILE.parent / 'products.json'
# Multiplications per block: forward, and for the gradients of inputs and kernels.
COUNTS = {'projection': 8, 'up': 2, 'down': 2, 'projection kernel': 4, 'mlp kernel': 2}


def shapes(tokens: int, width: int, hidden: int) -> dict[str, tuple[int, int, int]]:
    """Return (rows, summed, columns) of each product."""
    return {
        'projection': (tokens, width, width),
        'up': (tokens, width, hidden),
        'down': (tokens, hidden, width),
        'projection kernel': (width, tokens, width),
        'mlp kernel': (width, tokens, hidden),
    }


def cycles(shape: tuple[int, int, int], transposed: bool, device: Any) -> int:
    """Return the cycles of [rows, summed] @ [summed, columns] on one chip.

    Args:
      transposed: the first operand is stored transposed, as for gradients of kernels.
    """
    rows, summed, columns = shape
    chip = Mesh(np.array([device]), ('chip',))
    place = NamedSharding(chip, PartitionSpec())
    first = (summed, rows) if transposed else (rows, summed)
    operands = [
        jax.ShapeDtypeStruct(size, jnp.bfloat16, sharding=place)
        for size in (first, (summed, columns))
    ]

    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        return (a.T if transposed else a) @ b

    lowered = jax.jit(product, out_shardings=place).lower(*operands)
    compiled = lowered.compile(compiler_options=compiler.options(chip))
    return hlo.read(compiled.as_text(), 1).cycles


def share_of_peak(shape: tuple[int, int, int], cycles: int, chip: topology.Chip) -> float:
    return 2 * np.prod(shape, dtype=float) / (cycles / chip.clock * chip.peak_flops)


def of_block(shares: dict[str, float], shape: dict[str, tuple[int, int, int]]) -> float:
    """Return the share of the peak of all products of a block together, forward and backward."""
    work = {name: COUNTS[name] * float(np.prod(shape[name], dtype=float)) for name in COUNTS}
    return sum(work.values()) / sum(work[name] / shares[name] for name in COUNTS)


def measure(row: chips.Row) -> dict[str, Any]:
    place = topology.load(row.topology)
    assert place.chip is not None
    fields = variants.parse(row.variant)
    patches = (224 // fields['patch_size'][0]) ** 2
    tokens = row.batch // row.accumulation * patches
    sizes = shapes(tokens, fields['width'], fields['mlp_dim'])
    shares = {}
    for name, shape in sizes.items():
        product_cycles = cycles(shape, name.endswith('kernel'), place.devices[0])
        shares[name] = share_of_peak(shape, product_cycles, place.chip)
    return {'tokens': tokens, 'shares': shares, 'block': of_block(shares, sizes)}


def table(rows: dict[str, Any], steps: dict[str, Any]) -> str:
    header = ['model', 'slice', 'tokens', *COUNTS, 'all of a block', 'the step, big_vit']
    lines = [f'| {" | ".join(header)} |', f'|{"---|" * len(header)}']
    for row in chips.ROWS:
        figures = rows[row.name]
        step = steps.get(row.name, {}).get('big_vit')
        shares = [*figures['shares'].values(), figures['block']]
        cells = [row.variant, row.topology, f'{figures["tokens"]:,}', *(f'{x:.0%}' for x in shares)]
        cells.append(f'{step["mfu"]:.0%}' if step else '-')
        lines.append(f'| {" | ".join(cells)} |')
    return '\n'.join(lines)


def main(argv: list[str]) -> None:
    argparse.ArgumentParser(prog='python -m benchmarks products', allow_abbrev=False).parse_args(
        argv
    )
    topology.check_libtpu()
    # The cache could store a program for an absent chip, but not load it again.
    jax.config.update('jax_enable_compilation_cache', False)
    rows = {}
    for row in chips.ROWS:
        rows[row.name] = measure(row)
        print(f'{row.name}: all of a block {rows[row.name]["block"]:.0%}', flush=True)
    versions = {name: metadata.version(name) for name in ('jax', 'libtpu')}
    FILE.write_text(json.dumps({'versions': versions, 'rows': rows}, indent=1) + '\n')
    print(table(rows, chips.stored()['rows']))
