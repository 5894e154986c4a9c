"""How the classes of a dataset meet those of a model, or of another dataset: by name.

Names that are numbers meet numbers. Where one side has other names and the other none, classes
meet by number.
"""

import collections
from dataclasses import dataclass, replace

import numpy as np

from big_vit.data.sources.base import Source
from big_vit.data.sources.classes import (
    label_name,
    names_as_numbers,
    renumbered,
    shown,
    unknown_text,
)
from big_vit.errors import UserError


@dataclass(frozen=True)
class Known:
    """Classes that those of a dataset must meet: of a model, or of another dataset.

    Attributes:
      num_classes: their number.
      names: as of `Source`.
      holder: whose they are, for messages.
      may_grow: classes that are not known follow those that are, instead of being refused.
      or_numbers: where no name is on both sides, and both have as many classes, their numbers are
        the same: those of another codebase may be called by other words.
    """

    num_classes: int
    names: tuple[str, ...] | None
    holder: str
    may_grow: bool = False
    or_numbers: bool = False

    @property
    def least_classes(self) -> int:
        """The number below which a number may be the label of one of them."""
        numbers = names_as_numbers(self.names or ())
        return max([n for n in numbers if n is not None]) + 1 if numbers else self.num_classes


def known_of(source: Source, holder: str) -> Known:
    """Return the classes of a source as those to be met."""
    return Known(source.num_classes, source.class_names, holder)


def has_other_words(source: Source, known: Known) -> bool:
    """Whether a source names as many classes as are known, and none of them alike."""
    names, theirs = source.class_names, known.names
    if not known.or_numbers or names is None or theirs is None:
        return False
    alike = {*filter(None, map(label_name, names))} & {*filter(None, map(label_name, theirs))}
    return len(names) == len(theirs) and not alike


def meet(source: Source, known: Known, key: str, *, by_number: bool = False) -> tuple[Source, str]:
    """Number the classes of a source as those that are known.

    Args:
      key: section of the config, for messages.
      by_number: the numbers of the source are meant as they are, as those of a label map.

    Returns:
      (the source, what was done in one line, or '' where that is nothing).

    Raises:
      UserError: a class is not known.
    """
    ours, theirs, nameless = _comparable(source, known, by_number)
    targets = _places(ours, theirs)
    lacking = [i for i, name in enumerate(ours) if name is not None and targets[i] is None]
    count, names = known.num_classes, known.names
    if known.may_grow:
        names = names and source.class_names and (*names, *(source.class_names[i] for i in lacking))
        for i in lacking:
            targets[i], count = count, count + 1
    elif lacking:
        _check_unknown(source, lacking, ours, known, key)
    moved = [i for i, name in enumerate(ours) if name is not None and targets[i] not in (i, None)]
    if names is None and not moved and source.class_names is not None:
        names = (source.class_names + ('',) * count)[:count]
    met = replace(source, num_classes=count, class_names=names)
    if moved:
        table = np.array([target or 0 for target in targets], np.int32)
        titles = source.class_names or ours
        pairs = shown([f'{titles[i]} {i} -> {targets[i]}' for i in moved])
        line = f'{key}: {source.name} numbers classes in another way than {known.holder}: by name, '
        return renumbered(met, table, count, names, key), line + pairs
    if nameless:
        one, other = (source.name, known.holder)[:: 1 if source.class_names else -1]
        return met, f'{key}: classes have names in {one} and none in {other}: they meet by number'
    return met, ''


def _places(ours: list, theirs: list) -> list[int | None]:
    """Return where each of ours is in theirs; of two with one name, at its own place alone."""
    places = {name: number for number, name in enumerate(theirs)}
    twice = {name for name, count in collections.Counter(theirs).items() if count > 1}
    return [
        i if theirs[i : i + 1] == [name] else None if name in twice else places.get(name)
        for i, name in enumerate(ours)
    ]


def _comparable(source: Source, known: Known, by_number: bool) -> tuple[list, list, bool]:
    """Return what the classes of both sides are compared by, None for a class without a name.

    Returns:
      (of the source, of those known, whether it is the number because one side has no names).
    """
    names, theirs = source.class_names, known.names
    places, their_places = list(range(source.num_classes)), list(range(known.num_classes))
    if by_number:
        return places, their_places, False
    numbers = places if names is None else names_as_numbers(names)
    their_numbers = their_places if theirs is None else names_as_numbers(theirs)
    if numbers is not None and their_numbers is not None:
        return numbers, their_numbers, False
    if names is None or theirs is None:
        return places, their_places, True
    ours, known_names = ([label_name(name) or None for name in side] for side in (names, theirs))
    return ours, known_names, False


def _check_unknown(source: Source, lacking: list[int], ours: list, known: Known, key: str) -> None:
    """Raise `UserError` for classes that are not known; numbers must occur as labels for that."""
    if source.class_names is None and source.labels is not None:
        present = set(np.unique(source.labels()).tolist())
        lacking = [number for number in lacking if number in present]
    if not lacking:
        return
    what = f'config: {key}: {source.name} {source.split} has'
    if source.class_names is None:
        raise UserError(
            f'{what} label {ours[lacking[-1]]}, and {known.holder} no class for it among its '
            f'{known.num_classes}{f" ({shown(known.names)})" if known.names else ""}: choose other '
            f'labels by {key}.classes, or number them by {key}.label_map'
        )
    unknown = [source.class_names[number] for number in lacking]
    theirs = known.names or tuple(map(str, range(known.num_classes)))
    raise UserError(
        f'{what} classes that {known.holder} has not ({unknown_text(unknown, theirs)}): rename '
        f'them, choose others by {key}.classes, or number them by {key}.label_map'
    )
