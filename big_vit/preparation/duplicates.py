"""Which examples equal others, or look like them, and which of those stay.

All examples are in one order: more pixels first, then more bytes, then their place in the input
(`keep='first'` has the place alone). An example is left out if one before it equals it or is near.
So of any that are alike the first stays, and what stays does not depend on how the work is divided.

Rows, not pictures, are sent between workers, in blocks: one for each part of the keys.
"""

from collections.abc import Iterator

import numpy as np

from big_vit.preparation.signatures import Signatures, distance

_PLACE = [('id', '<u8'), ('pixels', '<u4'), ('bytes', '<u4')]
EQUAL = np.dtype([('key', '<u8', 2), *_PLACE])
_SIGNATURE = [('colours', 'i1', 8), ('bits', '<u8', 4)]
ALIKE = np.dtype([('key', '<u4'), *_PLACE, *_SIGNATURE])
SOUGHT = np.dtype([('key', '<u8'), *_PLACE])
# An example that is left out, and the one that it is left out for.
EDGE = np.dtype([('id', '<u8'), ('of', '<u8'), ('reason', 'u1')])
# Reasons of edges in the order in which they count.
OF_EVALUATION, OF_EQUAL, OF_ALIKE, WITHOUT = 0, 1, 2, 3

_UNIT_BITS = np.uint64(32)
# Mean difference of chroma, in levels, above which pictures of one shape are of other things.
_MOST_COLOUR = 10
# Comparisons at a time, and the most rows with one key that are compared beside other groups.
_BLOCK, _SMALL = 1 << 20, 64


def ids(unit: int, rows: np.ndarray) -> np.ndarray:
    """Number examples across units, in the order of the input."""
    return (np.uint64(unit) << _UNIT_BITS) + rows.astype(np.uint64)


def unit_of(numbers: np.ndarray) -> np.ndarray:
    return (numbers >> _UNIT_BITS).astype(np.int64)


def row_of(numbers: np.ndarray) -> np.ndarray:
    return (numbers & np.uint64(0xFFFFFFFF)).astype(np.int64)


def _placed(
    dtype: np.dtype, examples: np.ndarray, pixels: np.ndarray, sizes: np.ndarray
) -> np.ndarray:
    rows = np.zeros(len(examples), dtype)
    rows['id'], rows['pixels'], rows['bytes'] = examples, pixels, sizes
    return rows


def equal_rows(
    examples: np.ndarray, pixels: np.ndarray, sizes: np.ndarray, hashes: np.ndarray
) -> np.ndarray:
    """Make rows of which those with one key are equal; `hashes` are uint8 [n, 16]."""
    rows = _placed(EQUAL, examples, pixels, sizes)
    rows['key'] = np.ascontiguousarray(hashes).view('<u8').reshape(-1, 2)
    return rows


def sought_rows(
    examples: np.ndarray, pixels: np.ndarray, sizes: np.ndarray, places: np.ndarray
) -> np.ndarray:
    """Make rows whose key is the hash of where the example lies."""
    rows = _placed(SOUGHT, examples, pixels, sizes)
    rows['key'] = places
    return rows


def unfound(examples: np.ndarray) -> np.ndarray:
    """Make edges of examples that have no vector."""
    edges = np.zeros(len(examples), EDGE)
    edges['id'], edges['reason'] = examples, WITHOUT
    return edges


def alike_rows(
    examples: np.ndarray, pixels: np.ndarray, sizes: np.ndarray, signatures: Signatures
) -> np.ndarray:
    """Make rows for each band of each window of pictures; those with one key may be alike."""
    present = np.flatnonzero(signatures.is_there)
    bands = signatures.bands[present]
    count, windows, parts = bands.shape
    base = np.repeat(present, windows * parts)
    rows = _placed(ALIKE, examples[base], pixels[base], sizes[base])
    numbers = np.arange(parts, dtype=np.uint32) << np.uint32(16)
    rows['key'] = (bands.astype(np.uint32) | numbers).reshape(-1)
    rows['colours'] = signatures.colours[base]
    bits = np.broadcast_to(signatures.bits[present][:, :, None], (count, windows, parts, 4))
    rows['bits'] = bits.reshape(-1, 4)
    return np.unique(rows)  # Windows often agree.


def blocks(rows: np.ndarray, parts: int) -> Iterator[tuple[int, bytes]]:
    """Divide rows by their keys; yield (part, its rows)."""
    key = rows['key'] if rows['key'].ndim == 1 else rows['key'][:, 0]
    part = (key.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) >> _UNIT_BITS) % np.uint64(parts)
    order = np.argsort(part, kind='stable')
    numbers, starts = np.unique(part[order], return_index=True)
    for number, some in zip(numbers.tolist(), np.split(order, starts[1:]), strict=False):
        yield number, rows[some].tobytes()


def _sorted(rows: np.ndarray, first_evaluation: int, keep: str) -> tuple[np.ndarray, np.ndarray]:
    """Sort rows by key, those of evaluations first and then by rank; return where keys begin."""
    keys = [rows['key']] if rows['key'].ndim == 1 else [rows['key'][:, 1], rows['key'][:, 0]]
    rank = [] if keep == 'first' else [~rows['bytes'], ~rows['pixels']]
    is_own = unit_of(rows['id']) < first_evaluation
    rows = rows[np.lexsort((rows['id'], *rank, is_own, *keys))]
    key = rows['key'] if rows['key'].ndim == 2 else rows['key'][:, None]
    changes = np.any(key[1:] != key[:-1], axis=1)
    return rows, np.concatenate([[0], np.flatnonzero(changes) + 1, [len(rows)]])


def _edges(left_out: np.ndarray, of: np.ndarray, first_evaluation: int, reason: int) -> np.ndarray:
    edges = np.zeros(len(left_out), EDGE)
    edges['id'], edges['of'] = left_out, of
    edges['reason'] = np.where(unit_of(of) >= first_evaluation, OF_EVALUATION, reason)
    return np.unique(edges)


def equal(rows: np.ndarray, first_evaluation: int, keep: str) -> np.ndarray:
    """Find equal examples among rows of `EQUAL`; return edges.

    Args:
      first_evaluation: units from this on are of evaluations.
      keep: 'largest' or 'first'.
    """
    if not len(rows):
        return np.zeros(0, EDGE)
    rows, bounds = _sorted(rows, first_evaluation, keep)
    leaders = np.repeat(rows['id'][bounds[:-1]], np.diff(bounds))
    taken = (leaders != rows['id']) & (unit_of(rows['id']) < first_evaluation)
    return _edges(rows['id'][taken], leaders[taken], first_evaluation, OF_EQUAL)


def alike(rows: np.ndarray, most: tuple[int, int], first_evaluation: int, keep: str) -> np.ndarray:
    """Find examples that are alike among rows of `ALIKE` that share a key; return edges.

    Args:
      most: bits in which signatures may differ, and those in which one of an evaluation may.
      first_evaluation, keep: as of `equal`.
    """
    if not len(rows):
        return np.zeros(0, EDGE)
    rows, bounds = _sorted(rows, first_evaluation, keep)
    is_own, sizes = unit_of(rows['id']) < first_evaluation, np.diff(bounds)
    found = [np.zeros((0, 2), np.uint64), *_side_by_side(rows, is_own, sizes, most)]
    for group in np.flatnonzero(sizes > _SMALL):
        some = slice(bounds[group], bounds[group + 1])
        found.extend(_of_large(rows[some], is_own[some], most))
    pairs = np.unique(np.concatenate(found), axis=0)
    return _edges(pairs[:, 0], pairs[:, 1], first_evaluation, OF_ALIKE)


def _near(
    leaders: np.ndarray, is_own: np.ndarray, others: np.ndarray, most: tuple[int, int]
) -> np.ndarray:
    """Whether examples are near others; `is_own` says it of the leaders. Arrays broadcast."""
    near = distance(leaders['bits'], others['bits']) <= np.where(is_own, *most)
    near &= leaders['id'] != others['id']
    colours = leaders['colours'].astype(np.int16) - others['colours']
    # What is near an evaluation in grey alone is too near.
    return near & ((np.abs(colours).sum(-1) <= 8 * _MOST_COLOUR) | ~is_own)


def _side_by_side(
    rows: np.ndarray, is_own: np.ndarray, sizes: np.ndarray, most: tuple[int, int]
) -> Iterator[np.ndarray]:
    """Yield (left out, for which) of all small groups: each row with the next, the next but one."""
    after = np.repeat(np.cumsum(sizes), sizes) - np.arange(len(rows)) - 1
    leaders = np.flatnonzero(np.repeat(sizes, sizes) <= _SMALL)
    for step in range(1, _SMALL):
        leaders = leaders[after[leaders] >= step]
        compared = leaders[is_own[leaders + step]]
        for some in np.array_split(compared, len(compared) // _BLOCK + 1):
            one, other = rows[some], rows[some + step]
            near = _near(one, is_own[some], other, most)
            yield np.stack([other['id'][near], one['id'][near]], axis=1)


def _of_large(group: np.ndarray, is_own: np.ndarray, most: tuple[int, int]) -> Iterator[np.ndarray]:
    """Yield (left out, for which) of a large group, in which each is compared with all before it.

    Of those of one signature only the first is compared, which is near whatever they are, so that a
    picture that is there a hundred thousand times costs no more than its number.
    """
    signatures = np.zeros(len(group), [*_SIGNATURE, ('is_own', '?')])
    for name, _, _ in _SIGNATURE:
        signatures[name] = group[name]
    signatures['is_own'] = is_own
    _, first, which = np.unique(signatures, return_index=True, return_inverse=True)
    same = np.flatnonzero((first[which] != np.arange(len(group))) & is_own)
    first_of = first[which[same]]
    yield np.stack([group['id'][same], group['id'][first_of]], axis=1)
    kept, evaluation = np.sort(first), np.full(len(group), -1)
    step = max(1, min(1024, _BLOCK // len(kept)))
    for start in range(0, len(kept), step):
        some, others = kept[start : start + step], kept[start + 1 :]
        near = _near(group[some][:, None], is_own[some][:, None], group[others], most)
        near &= (some[:, None] < others) & is_own[others]
        left_out, of = others[near.any(0)], some[near.argmax(0)[near.any(0)]]
        yield np.stack([group['id'][left_out], group['id'][of]], axis=1)
        evaluation[left_out[~is_own[of]]] = of[~is_own[of]]
    near_one = evaluation[first_of] >= 0
    of = evaluation[first_of[near_one]]
    yield np.stack([group['id'][same[near_one]], group['id'][of]], axis=1)
