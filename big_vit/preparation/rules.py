"""Rules that an example must meet by itself: size, shape, caption, and its other columns."""

import operator
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from big_vit.errors import UserError
from big_vit.preparation.settings import ASPECT, CAPTION, SIDE, Settings

_COMPARED = re.compile(r'\s*([\w.-]+?)\s*(>=|<=|!=|=|>|<)\s*(.*?)\s*')
_ORDERS: dict[str, Callable[[float, float], bool]] = {
    '>=': operator.ge,
    '<=': operator.le,
    '>': operator.gt,
    '<': operator.lt,
}


class Where(NamedTuple):
    """A rule such as 'score>=5' or 'language=en|de'."""

    column: str
    sign: str
    value: str

    def holds(self, found: Any) -> bool:
        """Whether the value of an example meets the rule; one that is missing never does."""
        if found is None:
            return False
        if self.sign in _ORDERS:
            number = _number(found)
            return number is not None and _ORDERS[self.sign](number, float(self.value))
        is_one = any(_same(found, wanted.strip()) for wanted in self.value.split('|'))
        return is_one == (self.sign == '=')


def parse_where(text: str) -> Where:
    """Parse COLUMN, one of >= <= > < = !=, and a value, or several separated by '|'.

    Raises:
      UserError: it is no such rule, or a number is missing.
    """
    match = _COMPARED.fullmatch(text)
    if not match or not match[3]:
        raise UserError(
            f"--where: cannot read {text!r}: write 'score>=5', 'language=en|de' or 'nsfw!=1'"
        )
    rule = Where(match[1], match[2], match[3])
    if rule.sign in _ORDERS and _number(rule.value) is None:
        raise UserError(f'--where: {rule.value!r} in {text!r} is not a number')
    return rule


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if number == number else None


def _same(found: Any, wanted: str) -> bool:
    if isinstance(found, bool):
        return wanted.lower() in (('true', '1') if found else ('false', '0'))
    if isinstance(found, int | float):
        return _number(wanted) == found
    return str(found).strip() == wanted


def broken_by_text(text: str | None, value: Callable[[str], Any], settings: Settings) -> str | None:
    """Return the reason that an example is left out by its caption or columns; None if by none.

    Args:
      text: its caption; None where it has none, which is as long as an empty one.
      value: the value of a column, None where there is none.
    """
    text = (text or '').strip()
    counts = (settings.caption_chars, len(text)), (settings.caption_words, len(text.split()))
    for bounds, count in counts:
        if bounds is not None and not bounds[0] <= count <= bounds[1]:
            return CAPTION
    for line in settings.where:
        rule = parse_where(line)
        if not rule.holds(value(rule.column)):
            return f'where {line}'
    return None


def broken_by_shape(height: int, width: int, settings: Settings) -> str | None:
    """Return the reason that a picture is left out by its size in pixels; None if by none."""
    shorter, longer = sorted((height, width))
    if shorter < settings.min_side:
        return SIDE
    if settings.max_aspect is not None and longer > settings.max_aspect * shorter:
        return ASPECT
    return None
