"""Checks of config values: functions that validate and convert a value of one kind."""

from collections.abc import Callable
from typing import Any, NamedTuple

from big_vit.errors import nearest

UNITS = ('steps', 'epochs', 'examples', 'percent')
# The largest numbers of the types in which steps compute.
INT_MAX, FLOAT_MAX = 2**31 - 1, 3.4e38
# More features or layers than any model has: a slip of the keyboard.
WIDEST, DEEPEST = 2**16, 1024


class Field(NamedTuple):
    """One key of the schema: the check of its value, its default and its meaning.

    The docstring of `check` names the valid values in docs/config.md.
    """

    check: Callable[[Any], Any]
    default: Any
    doc: str


def number(
    lowest: float = -FLOAT_MAX, highest: float = FLOAT_MAX, excluded: float | None = None
) -> Callable[[Any], float]:
    """Makes a check for numbers in a range, bounds included except the one named `excluded`."""
    if highest == FLOAT_MAX:
        span = f'above {lowest:g}' if excluded == lowest else f'of at least {lowest:g}'
    else:
        start = 'above' if excluded == lowest else 'from'
        span = f'{start} {lowest:g} to {"below " * (excluded == highest)}{highest:g}'

    def check(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f'a number {span}')
        if not abs(value) <= FLOAT_MAX:  # Also refuses inf, as which 1e999 is parsed, and nan.
            raise ValueError(f'a finite number {span}')
        if not lowest <= value <= highest or value == excluded:
            raise ValueError(f'a number {span}')
        return float(value)

    check.__doc__ = f'number {span}'
    return check


below_one = number(0, 1, excluded=1)


def integer(lowest: int, highest: int = INT_MAX) -> Callable[[Any], int]:
    """Makes a check for whole numbers in a range; whole floats such as 1e6 are accepted."""
    power = highest.bit_length()
    last = f'2**{power} - 1' if highest == 2**power - 1 and power > 24 else str(highest)
    span = f'whole number from {lowest} to {last}'

    def check(value: Any) -> int:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value <= highest:
            raise ValueError(f'a {span}')
        return value

    check.__doc__ = span
    return check


def boolean(value: Any) -> bool:
    """true, false"""
    if not isinstance(value, bool):
        raise ValueError('true or false')
    return value


def power_of_two(highest: int) -> Callable[[Any], int]:
    """Makes a check for the powers of two up to one."""
    within = integer(1, highest)

    def check(value: Any) -> int:
        value = within(value)
        if value & (value - 1):
            raise ValueError(f'a power of two up to {highest}')
        return value

    check.__doc__ = f'power of two up to {highest}'
    return check


def shuffle(value: Any) -> bool | str:
    """true, false, auto, windows"""
    return value if isinstance(value, bool) else choice('auto', 'windows')(value)


def check_text(value: Any) -> str:
    """text"""
    if not isinstance(value, str) or '\0' in value:  # No file's name holds a NUL.
        raise ValueError('a text')
    return value


def choice(*choices: str) -> Callable[[Any], str]:
    """Makes a check for one of several words."""

    def check(value: Any) -> str:
        if value not in choices:
            near = nearest(str(value), choices, cutoff=0.4)
            hint = f' (did you mean {near!r}?)' if near else ''
            raise ValueError('one of ' + ', '.join(map(repr, choices)) + hint)
        return value

    check.__doc__ = ', '.join(choices)
    return check


def size(value: Any) -> tuple[int, int]:
    """side, or (height, width)"""
    # Bounded so that a typo cannot allocate terabytes.
    pair = value if isinstance(value, tuple) else (value, value)
    integers = all(isinstance(n, int) and not isinstance(n, bool) for n in pair)
    if len(pair) != 2 or not integers or not all(1 <= n <= 16384 for n in pair):
        raise ValueError('pixels from 1 to 16384: one whole number, or (height, width)')
    return pair[0], pair[1]


def span(lowest: float, highest: float) -> Callable[[Any], tuple[float, float]]:
    """Makes a check for a pair of numbers, the first of which is not above the second."""

    def check(value: Any) -> tuple[float, float]:
        pair = value if isinstance(value, tuple) and len(value) == 2 else (None, None)
        try:
            low, high = (number(lowest, highest)(x) for x in pair)
        except ValueError:
            low, high = 1.0, 0.0
        if low > high or high == 0:
            raise ValueError(f'a pair (least, greatest) of numbers from {lowest:g} to {highest:g}')
        return low, high

    check.__doc__ = f'pair (least, greatest) of numbers from {lowest:g} to {highest:g}'
    return check


def rules(value: Any) -> tuple[tuple[str, float], ...]:
    """pairs of (regex, factor of at least 0)"""
    try:
        return tuple((check_text(pattern), number(0)(factor)) for pattern, factor in value)
    except (TypeError, ValueError):
        raise ValueError(
            "a tuple of (regex on the parameter's path, factor of at least 0)"
        ) from None


def durations_by_rule(value: Any) -> tuple[tuple[str, float], ...]:
    """pairs of (regex, duration of at least 0)"""
    try:
        return rules(value)
    except ValueError:
        raise ValueError(
            "a tuple of (regex on the parameter's path, duration of at least 0)"
        ) from None


def durations(key: str, doc: str, units: tuple[str, ...] = UNITS) -> dict[str, Field]:
    """Makes the fields of a duration, one per unit; `doc` completes "..., in steps."."""
    return {f'{key}_{unit}': Field(number(0), None, f'{doc}, in {unit}.') for unit in units}


def classes(value: Any) -> tuple[str | int, ...]:
    """tuple of names or numbers"""
    choices = value if isinstance(value, tuple) else (value,)
    numbers = all(isinstance(c, str) or (type(c) is int and 0 <= c <= INT_MAX) for c in choices)
    if not choices or not numbers:
        raise ValueError("a tuple of names or numbers of classes, such as ('cat', 'dog')")
    return choices


def several(check_item: Callable[[Any], Any], what: str) -> Callable[[Any], tuple[Any, ...]]:
    """Makes a check for one value or a tuple of distinct ones, each checked by `one`."""

    def check(value: Any) -> tuple[Any, ...]:
        items = value if isinstance(value, tuple) else (value,)
        if not items:
            raise ValueError(f'{what}, or a tuple of them')
        checked = tuple(check_item(item) for item in items)
        if len(set(checked)) != len(checked):
            raise ValueError(f'a tuple of different values ({what})')
        return checked

    check.__doc__ = f'{what}, or a tuple of them'
    return check
