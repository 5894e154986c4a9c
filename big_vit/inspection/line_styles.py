"""Colours and dashes of lines: the same run looks the same in every chart, table and picture."""

import zlib
from collections.abc import Sequence

# Colours that stay apart for colour-blind readers, on light and on dark paper.
LIGHT = (
    *('#0b62c4', '#b3460b', '#1a7a4c', '#8a3ffc', '#a2191f', '#6b5f00', '#007d8a', '#c2187a'),
    *('#7d848b', '#14213d'),
)
DARK = (
    *('#6cb2ff', '#ff9e5e', '#5fd39a', '#c8a6ff', '#ff8a8f', '#dcc84a', '#4fd1dd', '#ff8ccb'),
    *('#8b939c', '#f2f4f8'),
)
# Lengths of strokes and gaps, in widths of the line: lines of one colour differ in them.
DASHES = ((), (5, 2), (1.5, 1.5), (6, 2, 1.5, 2), (3, 3), (1, 3))


def slots(keys: Sequence[str]) -> dict[str, int]:
    """Give each key a slot: its colour is slot % 10, its dash slot // 10.

    A key prefers the colour that it hashes to, so it mostly has the same one beside other keys, and
    always whatever the order of the keys. Ten keys have ten colours before a dash is used.
    """
    taken: dict[str, int] = {}
    for place, key in enumerate(sorted(set(keys))):
        layer, wanted = place // len(LIGHT), zlib.crc32(key.encode()) % len(LIGHT)
        free = (layer * len(LIGHT) + (wanted + i) % len(LIGHT) for i in range(len(LIGHT)))
        taken[key] = next(slot for slot in free if slot not in taken.values())
    return {key: taken[key] for key in keys}


def style(slot: int) -> tuple[int, int]:
    """Return the places of a slot's colour and dash; after sixty slots they come again."""
    return slot % len(LIGHT), slot // len(LIGHT) % len(DASHES)
