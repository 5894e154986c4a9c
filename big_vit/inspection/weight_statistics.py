"""Statistics of parameters and attention: differences, spectra, distances, rollout.

Pure functions of NumPy arrays, which treat scanned and unrolled blocks alike.
"""

import re
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from big_vit import trees
from big_vit.errors import UserError
from big_vit.models import encoder

# Kernels of a block, by the end of their path.
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
    """Difference between an array of one checkpoint and the same array of another."""

    relative: float  # Norm of the difference over the norm of the first; inf if that is 0.
    cosine: float  # NaN if exactly one of the arrays is 0.
    largest: float  # Largest absolute difference.


class Comparison(NamedTuple):
    """Differences of the arrays of two checkpoints by path, and arrays without a counterpart."""

    both: dict[str, Difference]
    only_first: list[str]
    only_second: list[str]
    other_shape: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    overall: Difference  # All arrays of `both` as one vector.


def unrolled(params: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return arrays by path with separate blocks, in numeric rather than alphabetical order."""
    flat = trees.flatten(encoder.unstack_blocks(params))

    def order(name: str) -> list[tuple[bool, int, str]]:
        return [(t.isdigit(), int(t) if t.isdigit() else 0, t) for t in re.split(r'(\d+)', name)]

    return {name: np.asarray(flat[name]) for name in sorted(flat, key=order)}


def split_block(name: str) -> tuple[str, int, str] | None:
    """Split a path into (prefix, block number, rest); None for arrays outside blocks."""
    match = _BLOCK.fullmatch(name)
    return (match[1], int(match[2]), match[3]) if match else None


def _difference(sums: np.ndarray, largest: float) -> Difference:
    """Build a Difference from the sums of a², b², (a - b)² and a·b, and the largest difference."""
    a, b, difference, product = sums
    relative = np.sqrt(difference / a) if a else (np.inf if b else 0.0)
    cosine = product / np.sqrt(a * b) if a and b else (np.nan if a or b else 1.0)
    return Difference(float(relative), float(cosine), float(largest))


def compare(first: dict[str, Any], second: dict[str, Any], names: tuple[str, str]) -> Comparison:
    """Compare the parameters of two checkpoints of one architecture.

    Heads, positions and embeddings may be missing or have other shapes; blocks may not.

    Args:
      names: names of the two, for messages.

    Raises:
      UserError: arrays of the encoder have other shapes; the message names them.
    """
    a, b = unrolled(first), unrolled(second)
    shared = [name for name in a if name in b]
    shapes = {n: (a[n].shape, b[n].shape) for n in shared if a[n].shape != b[n].shape}
    differing = [n for n in [*shapes, *(a.keys() ^ b.keys())] if 'Transformer/' in n]
    if any(n in shapes for n in differing) or len(shared) == len(shapes):
        shown = [f'{n} is {_shape(a.get(n))} and {_shape(b.get(n))}' for n in differing or [*a, *b]]
        more = f'; and {len(shown) - 4} more' if len(shown) > 4 else ''
        raise UserError(
            f'{names[0]} and {names[1]} are of different architectures: {"; ".join(shown[:4])}'
            f'{more}. Compare two checkpoints of the same model'
        )
    both, sums, overall_largest = {}, np.zeros(4), 0.0
    for name in shared:
        if name in shapes:
            continue
        x, y = a[name].astype(np.float64).ravel(), b[name].astype(np.float64).ravel()
        difference = x - y
        array_sums = np.array([x @ x, y @ y, difference @ difference, x @ y])
        largest = float(np.abs(difference).max(initial=0.0))
        both[name] = _difference(array_sums, largest)
        sums, overall_largest = sums + array_sums, max(overall_largest, largest)
    return Comparison(
        both,
        [name for name in a if name not in b],
        [name for name in b if name not in a],
        shapes,
        _difference(sums, overall_largest),
    )


def _shape(array: np.ndarray | None) -> str:
    return 'missing' if array is None else 'x'.join(map(str, array.shape)) or 'a scalar'


def by_block(values: dict[str, float]) -> dict[str, np.ndarray]:
    """Gather numbers by path into a vector over the blocks, for each array that all blocks have."""
    by_name: dict[str, dict[int, float]] = {}
    for name, value in values.items():
        split = split_block(name)
        if split is not None:
            by_name.setdefault(split[0] + split[2], {})[split[1]] = value
    depth = max(map(len, by_name.values()), default=0)
    return {
        name: np.array([by_number[i] for i in range(depth)])
        for name, by_number in by_name.items()
        if sorted(by_number) == list(range(depth))
    }


def matrices(params: dict[str, Any]) -> dict[str, list[np.ndarray]]:
    """Return the matrices [in, out] of all blocks for each kind of kernel.

    Heads are side by side. Encoders of several streams prefix the kind with the stream.
    """
    by_kind: dict[str, list[np.ndarray]] = {}
    for name, leaf in unrolled(params).items():
        split = split_block(name)
        if split is None or split[2].removesuffix('/kernel') not in PARTS:
            continue
        part = PARTS[split[2].removesuffix('/kernel')]
        out = part.endswith('out')
        matrix = leaf.reshape(-1, leaf.shape[-1]) if out else leaf.reshape(leaf.shape[0], -1)
        by_kind.setdefault(split[0] + part, []).append(matrix)
    order = [*PARTS.values()]
    return dict(sorted(by_kind.items(), key=lambda kv: order.index(kv[0].rpartition('/')[2])))


def sizes(params: dict[str, Any]) -> dict[str, Float[np.ndarray, ' depth']]:
    """Return the root mean square of each kind of kernel, per block."""
    return {
        part: np.array([np.sqrt(np.square(m, dtype=np.float64).mean()) for m in kernels])
        for part, kernels in matrices(params).items()
    }


def spectra(params: dict[str, Any]) -> dict[str, Float[np.ndarray, 'depth rank']]:
    """Return the singular values of each kind of kernel per block, largest first.

    They are square roots of the eigenvalues of the smaller Gram matrix, which is ten times as fast
    as an SVD and exact to about 1e-8 of the largest.
    """
    by_kind = {}
    for part, kernels in matrices(params).items():
        rows = []
        for matrix in kernels:
            m = matrix.astype(np.float64)
            gram = m @ m.T if m.shape[0] <= m.shape[1] else m.T @ m
            rows.append(np.sqrt(np.clip(np.linalg.eigvalsh(gram)[::-1], 0, None)))
        by_kind[part] = np.stack(rows)
    return by_kind


def stable_rank(values: Float[np.ndarray, '*lead rank']) -> Float[np.ndarray, '*lead']:
    """Return the stable rank |s|² / max(s)² of singular values s."""
    top = np.maximum(values.max(-1), 1e-30)
    return np.square(values).sum(-1) / np.square(top)


def position_similarity(
    table: Float[np.ndarray, 'tokens width'], grid: tuple[int, int]
) -> Float[np.ndarray, 'rows columns rows columns']:
    """Return the cosine of each position with each other, both axes on the grid."""
    unit = table / np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-12)
    return (unit @ unit.T).reshape(*grid, *grid)


def components(
    kernel: Float[np.ndarray, '*lead rows columns channels width'], count: int = 28
) -> Float[np.ndarray, 'count rows columns shown']:
    """Return the principal components of a patch embedding's kernels, largest first.

    As in figure 7 of the ViT paper (arXiv 2010.11929).

    Args:
      kernel: with more than one frame, the middle one is used.

    Returns:
      RGB components if there are three channels; otherwise components of the mean over channels.
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
    """Return the share of each input token in each token of the last block (arXiv 2005.00928).

    The attention of each block, averaged over heads and mixed half and half with the identity for
    the residual connection, is multiplied through the blocks.
    """
    mixed = np.eye(weights.shape[-1])
    for block in weights:
        mixed = (block.mean(0, dtype=np.float64) + np.eye(len(block[0]))) / 2 @ mixed
    return mixed


def patch_attention(
    matrix: Float[np.ndarray, 'tokens tokens'], prefix: int, grid: tuple[int, int]
) -> Float[np.ndarray, 'rows columns']:
    """Return the share of attention that each patch receives; sums to 1.

    The attention is that of the class token or, without prefix tokens, the mean over all patches.
    """
    attention = matrix[0] if prefix else matrix.mean(0)
    shares = attention[prefix:].reshape(grid)
    return shares / max(float(shares.sum()), 1e-30)


def distances(
    weights: Float[np.ndarray, 'depth heads tokens tokens'],
    prefix: int,
    grid: tuple[int, int],
    pixels: tuple[float, float],
) -> Float[np.ndarray, 'depth heads']:
    """Return the mean attention distance of the patches (arXiv 2010.11929, figure 11).

    The distance between the centres of two patches, weighted by attention, averaged over patches.

    Args:
      pixels: distance from one patch to the next, (down, right).

    Returns:
      Distances in pixels.
    """
    along = [np.arange(count) * step for count, step in zip(grid, pixels, strict=True)]
    axes = np.meshgrid(*along, indexing='ij')
    centres = np.stack([axis.ravel() for axis in axes], -1)
    between = np.linalg.norm(centres[:, None] - centres[None], axis=-1)
    distance = np.zeros(weights.shape[:2])
    for i, block in enumerate(weights):
        attention = block[:, prefix:, prefix:].astype(np.float64)
        total = np.maximum(attention.sum(-1), 1e-30)
        distance[i] = ((attention * between).sum(-1) / total).mean(-1)
    return distance
