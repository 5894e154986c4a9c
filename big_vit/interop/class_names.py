"""Names of the classes of a head, as configs of other codebases and files of labels have them."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from big_vit.data.sources.classes import shown, unknown_text
from big_vit.errors import UserError
from big_vit.interop import files

# Files beside the weights of a folder, of which configs say nothing.
_BESIDE = ('labels.txt', 'labels.json', 'classes.txt', 'class_names.txt')
_PLACEHOLDER = re.compile(r'LABEL_\d+')
Names = tuple[str, ...]


def of_config(config: Mapping[str, Any], folder: Path | None, count: int) -> dict[str, Any]:
    """Return the names and descriptions of classes that a folder of weights gives.

    They are in timm's `label_names` and `label_descriptions`, in `id2label` of transformers, or in
    a file of labels beside the weights. A map need not name every class; the others are ''.

    Args:
      folder: of the weights; None where a file beside them may belong to something else.
      count: the number of classes of the head.

    Returns:
      Metadata: `class_names`, `class_descriptions`; empty where there are no names.

    Raises:
      UserError: the names are not those of so many classes.
    """
    cfg = config.get('pretrained_cfg')
    both = {**(cfg if isinstance(cfg, Mapping) else {}), **config}
    key = next((k for k in ('label_names', 'labels', 'id2label') if both.get(k)), None)
    if not count:
        return {}
    if key is None:
        beside = [folder / name for name in _BESIDE] if folder else []
        file = next((file for file in beside if file.is_file()), None)
        return {} if file is None else {'class_names': of_file(file, count)}
    where = f'{folder / "config.json" if folder else "config"}: {key}'
    names = _in_order(both[key], count, where)
    if all(_PLACEHOLDER.fullmatch(name) for name in names):
        return {}
    found: dict[str, Any] = {'class_names': names}
    texts = both.get('label_descriptions')
    if isinstance(texts, Mapping):
        found['class_descriptions'] = tuple(str(texts.get(name) or name) for name in names)
    return found


def _in_order(value: Any, count: int, where: str) -> Names:
    """Order names, a list or a mapping from numbers (or to them), by the number of their class."""
    if isinstance(value, Mapping):
        pairs = [(k, v) if str(k).isdecimal() else (v, k) for k, v in value.items()]
        if not all(str(number).isdecimal() for number, _ in pairs):
            raise UserError(f'{where}: is no map of numbers and names')
        numbered = {int(number): str(name) for number, name in pairs}
        largest = max(numbered, default=-1)
        if largest >= count:
            raise UserError(
                f'{where}: names a class {largest} ({numbered[largest]!r}), and the head has '
                f'{count}, numbered from 0'
            )
        return tuple(numbered.get(number, '') for number in range(count))
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
        raise UserError(f'{where}: is neither a list of names nor a map of numbers and names')
    if len(value) != count:
        raise UserError(
            f'{where}: names {len(value)} classes ({shown(value, 3)}), and the head has {count}'
        )
    return tuple(value)


def of_file(path: Path, count: int, known: Sequence[str] | None = None) -> Names:
    """Read names of classes from a text of one name a line, or from JSON.

    JSON is a list, a map from numbers to names or from names to numbers, or a map from the names
    that a model has to others.

    Args:
      count: the number of classes of the head.
      known: the names that the model has.

    Raises:
      UserError: it cannot be read, or is not of these classes.
    """
    value = files.read_value(path) if path.suffix == '.json' else _lines(path)
    if isinstance(value, Mapping):
        both = [*value, *value.values()]
        if all(isinstance(x, str) for x in both) and not all(key.isdecimal() for key in value):
            return _renamed(value, known, path)
    return _in_order(value, count, str(path))


def _lines(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding='utf-8-sig').rstrip('\n').split('\n')
    except (OSError, ValueError) as error:
        raise UserError(
            f'{path}: cannot be read: {getattr(error, "strerror", None) or error}'
        ) from None
    return [line.strip() for line in lines]


def _renamed(names: Mapping[str, str], known: Sequence[str] | None, path: Path) -> Names:
    if known is None:
        raise UserError(
            f'{path}: maps names to names, and the model has none: map the numbers of classes'
        )
    strange = [name for name in names if name not in known]
    if strange:
        raise UserError(
            f'{path}: names classes that the model has not ({unknown_text(strange, known)})'
        )
    return tuple(names.get(name, name) for name in known)


def complete(meta: Mapping[str, Any], count: int) -> list[str] | None:
    """Return a name for each of `count` classes, the number for one without; None for no names."""
    names = meta.get('class_names')
    if not names or not count:
        return None
    if len(names) != count:
        raise UserError(f'the head has {count} classes, and there are {len(names)} names')
    return [name or str(number) for number, name in enumerate(names)]
