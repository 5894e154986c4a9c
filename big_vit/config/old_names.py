"""Former names of keys: configs, flags and checkpoints that have them go on working."""

import sys
from typing import Any

RENAMED = {
    'loss': 'task.loss',
    'label_smoothing': 'task.label_smoothing',
    'model.shared': 'task.embedding_dim',
}
# (key, value) that has become another one.
MOVED = {('model.fusion', 'apart'): ('task.name', 'contrastive')}
# Defaults of then, which a dump states whether or not they were set.
_DEFAULTS = {'loss': 'softmax', 'label_smoothing': 0.0, 'model.shared': 512}
# Values that a dump with former keys implies, where nothing in it says otherwise.
_IMPLIED = {'task.name': 'classification', 'model.fusion': 'concat'}

# (default of then, default of today), which leaves to the program what was always so.
_OTHER_DEFAULTS = {'data.shuffle': (True, 'auto')}

_noted: set[str] = set()


def renamed(key: str, value: Any) -> tuple[str, Any]:
    """A key and its value under today's names, with a note on the console where they differ."""
    if key in RENAMED:
        _note(key, RENAMED[key])
        return RENAMED[key], value
    if isinstance(value, str) and (key, value) in MOVED:
        new_key, new_value = MOVED[key, value]
        _note(f'{key}={value!r}', f'{new_key}={new_value!r}')
        return new_key, new_value
    return key, value


def renamed_dump(flat: dict[str, Any]) -> dict[str, Any]:
    """All values of a dumped config under today's names; defaults of then become unset."""
    current: dict[str, Any] = {}
    for key, value in flat.items():
        if key in RENAMED:
            current[RENAMED[key]] = None if value == _DEFAULTS[key] else value
        elif isinstance(value, str) and (key, value) in MOVED:
            new_key, new_value = MOVED[key, value]
            current[new_key] = new_value
        else:
            current[key] = value
    if RENAMED.keys() & flat.keys():
        current = {**_IMPLIED, **current}
    return current


def comparable_dump(flat: dict[str, Any]) -> dict[str, Any]:
    """`renamed_dump` for comparing runs: a default of then is unset, whoever stated it."""
    current = renamed_dump(flat)
    defaults = {RENAMED[key]: value for key, value in _DEFAULTS.items()}
    return {
        key: None if key in defaults and value == defaults[key] else value
        for key, value in current.items()
    } | {key: now for key, (then, now) in _OTHER_DEFAULTS.items() if current.get(key) == then}


_LATER = (
    'task.',
    'init_architecture',
    'checkpoint.best',
    'early_stopping.',
    'init_standardise',
    'model.weight_init',
    'model.pack',
    'model.rope_shift',
    'model.rope_jitter',
    'model.rope_rescale',
    'optim.rate_in_momentum',
    'optim.weight_decay_end',
    'optim.clip_by',
    'optim.freeze_',
    'schedule.start',
    'schedule.drop_',
    'data.index',
    'data.window',
    'data.annotations',
    'data.corners',
    'data.zero_label',
    'data.boxes_column',
    'data.box_format',
)
_LATER_OF_EVALS = (
    *('index', 'examples', 'window', 'views', 'lidar'),
    *('annotations', 'corners', 'zero_label', 'boxes_column', 'box_format'),
    *('stride', 'scales', 'flips'),
)
# Of these False is unset.
_LATER_SWITCHES = ('model.post_norm', 'model.posemb_per_block')


def former_dump(flat: dict[str, Any]) -> dict[str, Any]:
    """A flat dump under the names of then, as far as they can say it; the rest stays as it is.

    Digests of configs are made of it, so that work that earlier versions have done is recognised.
    """
    former = dict(flat)
    for old, new in RENAMED.items():
        value = former.pop(new, None)
        former[old] = _DEFAULTS[old] if value is None else value
    for (old, old_value), (new, new_value) in MOVED.items():
        if former.get(new) == new_value:
            former[old] = old_value
        if former.get(new) in (new_value, _IMPLIED[new]):
            former.pop(new)
    for key, (then, now) in _OTHER_DEFAULTS.items():
        if former.get(key) == now:
            former[key] = then
    # Keys that came later, where nothing is set.
    return {
        key: value
        for key, value in former.items()
        if not (_came_later(key) and value is None)
        and not (key in _LATER_SWITCHES and value is False)
    }


def _came_later(key: str) -> bool:
    section, _, rest = key.partition('.')
    of_evals = section in ('evals', 'mixture') and rest.rpartition('.')[2] in _LATER_OF_EVALS
    return key.startswith(_LATER) or of_evals


def _note(old: str, new: str) -> None:
    if old not in _noted:
        _noted.add(old)
        print(f'note    {old} is {new} now', file=sys.stderr)
