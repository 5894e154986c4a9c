"""What parameters and attention are like, in numbers: differences, spectra, distances, rollout.

Pure functions of NumPy arrays. Blocks may be scanned or unrolled: it makes no difference here.
"""

import re
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from big_vit import trees
from big_vit.errors import UserError
from big_vit.models import encoder

# The kernels of a block, by the end of their path.
PARTS = {
    'MultiHeadDotProductAttention_0/query': 'query',
    'MultiHeadDotProductAttention_0/key': 'key',
    'MultiHeadDotProductAttention_0/value': 'value',
    'MultiHeadDotProductAttention_0/out': 'out',
    'CrossAttention_0/query': 'cross query',
    'CrossAttention_0/key': 'cross key',
    'CrossAttention_0/value': 'cross value',
    'CrossAttention_0/out': 'cross out',
    'MlpBlock_0/Dense_0': 'mlp in',
    'MlpBlock_0/Dense_gate': 'mlp gate',
    'MlpBlock_0/Dense_1': 'mlp out',
}
_BLOCK = re.compile(r'(.*?)Transformer/encoderblock_(\d+)/(.*)')


class Difference(NamedTuple):
    """How an array of one checkpoint differs from that of another."""

    relative: float  # Norm of the difference over that of the first; inf where that is 0.
    cosine: float  # Of the angle between the two; NaN where one is 0 and the other is not.
    largest: float  # Of all absolute differences.


class Comparison(NamedTuple):
    """Arrays of two checkpoints by path, and what there is no counterpart for."""

    both: dict[str, Difference]
    only_first: list[str]
    only_second: list[str]
    other_shape: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    overall: Difference  # Of all arrays of `both` as one vector.


def unrolled(params: dict[str, Any]) -> dict[str, np.ndarray]:
    """Arrays by path, each block of its own, in the order in which people count blocks."""
    flat = trees.flatten(encoder.unstack_blocks(params))

    def order(name: str) -> list[tuple[bool, int, str]]:
        return [(t.isdigit(), int(t) if t.isdigit() else 0, t) for t in re.split(r'(\d+)', name)]

    return {name: np.asarray(flat[name]) for name in sorted(flat, key=order)}


def split_block(name: str) -> tuple[str, int, str] | None:
    """(What is before it, number, rest of the path) of an array of a block; else None."""
    match = _BLOCK.fullmatch(name)
    return (match[1], int(match[2]), match[3]) if match else None


def _difference(sums: np.ndarray, largest: float) -> Difference:
    """From the sums of squares of a, of b, of a - b, and of the products of a and b."""
    a, b, apart, product = sums
    relative = np.sqrt(apart / a) if a else (np.inf if b else 0.0)
    cosine = product / np.sqrt(a * b) if a and b else (np.nan if a or b else 1.0)
    return Difference(float(relative), float(cosine), float(largest))


def compare(first: dict[str, Any], second: dict[str, Any], names: tuple[str, str]) -> Comparison:
    """How the parameters of two checkpoints of one architecture differ.

    Heads, positions and embeddings may be of other shapes or missing; blocks may not.

    Args:
      names: of the two, for messages.

    Raises:
      UserError: arrays of the encoder have other shapes; names them.
    """
    a, b = unrolled(first), unrolled(second)
    shared = [name for name in a if name in b]
    shapes = {n: (a[n].shape, b[n].shape) for n in shared if a[n].shape != b[n].shape}
    wrong = [n for n in [*shapes, *(a.keys() ^ b.keys())] if 'Transformer/' in n]
    if any(n in shapes for n in wrong) or len(shared) == len(shapes):
        shown = [f'{n} is {_shape(a.get(n))} and {_shape(b.get(n))}' for n in wrong or [*a, *b]]
        more = f'; and {len(shown) - 4} more' if len(shown) > 4 else ''
        raise UserError(
            f'{names[0]} and {names[1]} are of different architectures: {"; ".join(shown[:4])}'
            f'{more}. Compare two checkpoints of the same model'
        )
    both, sums, most = {}, np.zeros(4), 0.0
    for name in shared:
        if name in shapes:
            continue
        x, y = a[name].astype(np.float64).ravel(), b[name].astype(np.float64).ravel()
        apart = x - y
        own = np.array([x @ x, y @ y, apart @ apart, x @ y])
        largest = float(np.abs(apart).max(initial=0.0))
        both[name] = _difference(own, largest)
        sums, most = sums + own, max(most, largest)
    return Comparison(
        both,
        [name for name in a if name not in b],
        [name for name in b if name not in a],
        shapes,
        _difference(sums, most),
    )


def _shape(array: np.ndarray | None) -> str:
    return 'missing' if array is None else 'x'.join(map(str, array.shape)) or 'a scalar'


def by_block(values: dict[str, float]) -> dict[str, np.ndarray]:
    """Numbers by path as a vector over the blocks for each array that all blocks have."""
    found: dict[str, dict[int, float]] = {}
    for name, value in values.items():
        at = split_block(name)
        if at is not None:
            found.setdefault(at[0] + at[2], {})[at[1]] = value
    depth = max(map(len, found.values()), default=0)
    return {
        name: np.array([each[i] for i in range(depth)])
        for name, each in found.items()
        if sorted(each) == list(range(depth))
    }


def matrices(params: dict[str, Any]) -> dict[str, list[np.ndarray]]:
    """For each kind of kernel the matrix of every block, [in, out].

    Heads lie side by side. Encoders of several streams have the stream in front of the kind.
    """
    found: dict[str, list[np.ndarray]] = {}
    for name, leaf in unrolled(params).items():
        at = split_block(name)
        if at is None or at[2].removesuffix('/kernel') not in PARTS:
            continue
        part = PARTS[at[2].removesuffix('/kernel')]
        out = part.endswith('out')
        matrix = leaf.reshape(-1, leaf.shape[-1]) if out else leaf.reshape(leaf.shape[0], -1)
        found.setdefault(at[0] + part, []).append(matrix)
    order = [*PARTS.values()]
    return dict(sorted(found.items(), key=lambda kv: order.index(kv[0].rpartition('/')[2])))


def sizes(params: dict[str, Any]) -> dict[str, Float[np.ndarray, ' depth']]:
    """The root mean square of each kind of kernel, block by block."""
    return {
        part: np.array([np.sqrt(np.square(m, dtype=np.float64).mean()) for m in each])
        for part, each in matrices(params).items()
    }


def spectra(params: dict[str, Any]) -> dict[str, Float[np.ndarray, 'depth rank']]:
    """The singular values of each kind of kernel, block by block, largest first.

    As roots of the eigenvalues of the smaller Gram matrix: ten times as fast as an SVD, and exact
    to about 1e-8 of the largest.
    """
    found = {}
    for part, each in matrices(params).items():
        rows = []
        for matrix in each:
            wide = matrix.astype(np.float64)
            gram = wide @ wide.T if wide.shape[0] <= wide.shape[1] else wide.T @ wide
            rows.append(np.sqrt(np.clip(np.linalg.eigvalsh(gram)[::-1], 0, None)))
        found[part] = np.stack(rows)
    return found


def stable_rank(values: Float[np.ndarray, '*lead rank']) -> Float[np.ndarray, '*lead']:
    """Of singular values: how many as large as the largest make up the same norm."""
    top = np.maximum(values.max(-1), 1e-30)
    return np.square(values).sum(-1) / np.square(top)


def position_similarity(
    table: Float[np.ndarray, 'tokens width'], grid: tuple[int, int]
) -> Float[np.ndarray, 'rows columns rows columns']:
    """The cosine of each position with each, both on the grid."""
    unit = table / np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-12)
    return (unit @ unit.T).reshape(*grid, *grid)


def components(
    kernel: Float[np.ndarray, '*lead rows columns channels width'], count: int = 28
) -> Float[np.ndarray, 'count rows columns shown']:
    """The principal components of a patch embedding's kernels, largest first.

    As figure 7 of the ViT paper (arXiv 2010.11929). Each is [rows, columns, 3], or of other than
    three channels [rows, columns, 1], their mean; of several frames the middle one.
    """
    frames = kernel.reshape(-1, *kernel.shape[-4:])
    kernel = np.asarray(frames[len(frames) // 2], np.float64)
    if kernel.shape[2] != 3:
        kernel = kernel.mean(2, keepdims=True)
    flat = kernel.reshape(-1, kernel.shape[3])
    left, _, _ = np.linalg.svd(flat - flat.mean(1, keepdims=True), full_matrices=False)
    return left.T[:count].reshape(-1, *kernel.shape[:3])


# Attention.


def rollout(
    weights: Float[np.ndarray, 'depth heads tokens tokens'],
) -> Float[np.ndarray, 'tokens tokens']:
    """How much each token of the last block has of each input token (arXiv 2005.00928).

    The mean over heads, half of it the residual, multiplied through the blocks.
    """
    mixed = np.eye(weights.shape[-1])
    for block in weights:
        mixed = (block.mean(0, dtype=np.float64) + np.eye(len(block[0]))) / 2 @ mixed
    return mixed


def looked_at(
    matrix: Float[np.ndarray, 'tokens tokens'], prefix: int, grid: tuple[int, int]
) -> Float[np.ndarray, 'rows columns']:
    """What share of the look at patches each patch has; it sums to 1.

    Looked at by the class token, or, without one, by all patches on average.
    """
    own = matrix[0] if prefix else matrix.mean(0)
    shares = own[prefix:].reshape(grid)
    return shares / max(float(shares.sum()), 1e-30)


def distances(
    weights: Float[np.ndarray, 'depth heads tokens tokens'],
    prefix: int,
    grid: tuple[int, int],
    pixels: tuple[float, float],
) -> Float[np.ndarray, 'depth heads']:
    """How far patches look, in pixels: figure 11 of the ViT paper (arXiv 2010.11929).

    The distance between the middles of two patches, weighted by attention, averaged over patches.

    Args:
      pixels: from one patch to the next, (down, right).
    """
    along = [np.arange(count) * step for count, step in zip(grid, pixels, strict=True)]
    axes = np.meshgrid(*along, indexing='ij')
    places = np.stack([axis.ravel() for axis in axes], -1)
    apart = np.linalg.norm(places[:, None] - places[None], axis=-1)
    found = np.zeros(weights.shape[:2])
    for i, block in enumerate(weights):
        own = block[:, prefix:, prefix:].astype(np.float64)
        total = np.maximum(own.sum(-1), 1e-30)
        found[i] = ((own * apart).sum(-1) / total).mean(-1)
    return found
