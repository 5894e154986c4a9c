"""Which of several that are alike are left out, beside all pairs compared one by one."""

import numpy as np
import pytest

from big_vit.preparation import duplicates
from big_vit.preparation.signatures import Signatures

EVALUATION = 3  # Units from this on are of evaluations.
MOST = (30, 50)


def examples_of(rng, count, kinds):
    """Examples in five units, whose signatures are those of some kinds with a few bits changed."""
    unit = np.sort(rng.integers(0, 5, count))
    numbers = np.concatenate([duplicates.ids(u, np.arange((unit == u).sum())) for u in range(5)])
    middle = rng.integers(0, 2, (kinds, 2, 256), dtype=np.uint8)
    kind = rng.integers(0, kinds, count)
    bits = middle[kind] ^ (rng.random((count, 2, 256)) < rng.choice([0, 0.04, 0.2], (count, 1, 1)))
    words = np.packbits(bits.astype(np.uint8), axis=-1).view('<u8')
    bands = words.view('<u2')[..., :3] & 3
    colours = rng.choice([0, 60], (count, 1)) * np.ones((1, 8), int)
    return (
        numbers,
        rng.integers(1, 4, count).astype(np.uint32),
        rng.integers(1, 3, count).astype(np.uint32),
        Signatures(words, bands, colours.astype(np.int8), rng.random(count) < 0.9),
    )


def rank(example, keep):
    number, pixels, size = example
    return (number,) if keep == 'first' else (-int(pixels), -int(size), number)


def alike_one_by_one(numbers, pixels, sizes, found, keep):
    """What is left out, and for which of the reasons, by comparing all pairs in plain Python."""
    out = {}
    rows = list(zip(numbers.tolist(), pixels.tolist(), sizes.tolist(), strict=True))
    for i, one in enumerate(rows):
        for j, other in enumerate(rows):
            if one[0] >> 32 >= EVALUATION or i == j or not (found.is_there[[i, j]]).all():
                continue
            of_evaluation = other[0] >> 32 >= EVALUATION
            if not of_evaluation and rank(other, keep) > rank(one, keep):
                continue
            far = np.abs(found.colours[i].astype(int) - found.colours[j]).mean() > 10
            if far and not of_evaluation:
                continue
            for a in range(2):
                for b in range(2):
                    shares = (found.bands[i, a] == found.bands[j, b]).any()
                    differ = bin(
                        int.from_bytes(found.bits[i, a].tobytes())
                        ^ int.from_bytes(found.bits[j, b].tobytes())
                    ).count('1')
                    if shares and differ <= MOST[of_evaluation]:
                        out.setdefault(one[0], set()).add((not of_evaluation, other[0]))
    return out


# Groups of more than so many rows of one key are compared in another way.
@pytest.mark.parametrize('small', [64, 2])
@pytest.mark.parametrize('keep', ['largest', 'first'])
@pytest.mark.parametrize('seed', range(3))
def test_what_is_left_out_is_what_comparing_all_pairs_says(seed, keep, small, monkeypatch):
    monkeypatch.setattr(duplicates, '_SMALL', small)
    rng = np.random.default_rng(seed)
    given = examples_of(rng, 120, 12)
    rows = duplicates.alike_rows(*given)
    edges = duplicates.alike(rows, MOST, EVALUATION, keep)
    wanted = alike_one_by_one(*given, keep)
    assert 10 < len(wanted) < 110
    assert set(edges['id'].tolist()) == set(wanted)
    for edge in edges:
        is_own = edge['reason'] == duplicates.OF_ALIKE
        assert (is_own, int(edge['of'])) in wanted[int(edge['id'])]
    reasons = {n: min(edges['reason'][edges['id'] == n]) for n in wanted}
    for number, pairs in wanted.items():  # The evaluation comes before other reasons.
        by_evaluation = any(not is_own for is_own, _ in pairs)
        assert (reasons[number] == duplicates.OF_EVALUATION) == by_evaluation


@pytest.mark.parametrize('parts', [1, 2, 7, 64])
def test_however_rows_are_divided_the_result_is_one(parts):
    rng = np.random.default_rng(5)
    rows = duplicates.alike_rows(*examples_of(rng, 200, 20))
    whole = duplicates.alike(rows, MOST, EVALUATION, 'largest')
    rng.shuffle(rows)
    gathered = {}
    for some in np.array_split(rows, 5):  # As from five units.
        for part, block in duplicates.blocks(some, parts):
            assert 0 <= part < parts
            gathered.setdefault(part, []).append(block)
    found = [
        duplicates.alike(
            np.frombuffer(b''.join(blocks), duplicates.ALIKE), MOST, EVALUATION, 'largest'
        )
        for blocks in gathered.values()
    ]
    np.testing.assert_array_equal(np.unique(np.concatenate(found)), np.unique(whole))


def test_of_any_that_are_equal_the_best_stays():
    rng = np.random.default_rng(1)
    numbers = duplicates.ids(0, np.arange(300))
    pixels, sizes = rng.integers(1, 5, (2, 300)).astype(np.uint32)
    hashes = rng.integers(0, 255, (40, 16), dtype=np.uint8)
    kind = rng.integers(0, 40, 300)
    rows = duplicates.equal_rows(numbers, pixels, sizes, hashes[kind])
    for keep in ('largest', 'first'):
        edges = duplicates.equal(rows, EVALUATION, keep)
        wanted = {}
        for k in np.unique(kind):
            ranked = sorted(
                np.flatnonzero(kind == k).tolist(),
                key=lambda i: rank((i, pixels[i], sizes[i]), keep),
            )
            wanted |= dict.fromkeys(ranked[1:], ranked[0])
        assert dict(zip(edges['id'].tolist(), edges['of'].tolist(), strict=True)) == wanted


def test_examples_of_evaluations_stay_and_take_all_that_equal_them():
    numbers = np.concatenate([duplicates.ids(0, np.arange(3)), duplicates.ids(3, np.arange(2))])
    ones = np.ones(5, np.uint32)
    large = np.array([9, 9, 9, 1, 1], np.uint32)
    rows = duplicates.equal_rows(numbers, large, ones, np.zeros((5, 16), np.uint8))
    edges = duplicates.equal(rows, EVALUATION, 'largest')
    assert edges['id'].tolist() == [0, 1, 2] and set(edges['reason']) == {0}
    assert set(edges['of'].tolist()) == {3 << 32}


def test_one_picture_many_times_costs_no_square():
    count = 20_000
    numbers, ones = duplicates.ids(1, np.arange(count)), np.ones(count, np.uint32)
    same = Signatures(
        np.zeros((count, 1, 4), np.uint64),
        np.zeros((count, 1, 1), np.uint16),
        np.zeros((count, 8), np.int8),
        np.ones(count, bool),
    )
    rows = duplicates.alike_rows(numbers, ones, ones, same)
    edges = duplicates.alike(rows, MOST, EVALUATION, 'first')
    assert edges['id'].tolist() == numbers[1:].tolist() and set(edges['of'].tolist()) == {1 << 32}


@pytest.mark.parametrize('count', [3, 100])
def test_each_goes_that_is_near_one_before_it_also_one_that_goes(count):
    """A chain, of which each differs from the next by as much as it may."""
    numbers, ones = duplicates.ids(1, np.arange(count)), np.ones(count, np.uint32)
    bits = np.zeros((count, 256), np.uint8)
    for i in range(count):
        bits[i, MOST[0] * i % 256 : MOST[0] * i % 256 + MOST[0]] = 1
    bits = np.bitwise_xor.accumulate(bits, axis=0)
    words = np.packbits(bits, axis=1).view(np.uint64)[:, None]
    bands = np.zeros((count, 1, 1), np.uint16)
    found = Signatures(words, bands, np.zeros((count, 8), np.int8), np.ones(count, bool))
    rows = duplicates.alike_rows(numbers, ones, ones, found)
    edges = duplicates.alike(rows, MOST, EVALUATION, 'first')
    assert np.unique(edges['id']).tolist() == numbers[1:].tolist()


def test_nothing_has_no_duplicates():
    for make, dtype, more in (
        (duplicates.alike, duplicates.ALIKE, (MOST,)),
        (duplicates.equal, duplicates.EQUAL, ()),
    ):
        assert len(make(np.zeros(0, dtype), *more, EVALUATION, 'first')) == 0
