"""Configs: a Python file of choices, checked against one schema before anything runs.

A config file defines `get_config(**arguments)`, which returns an `ml_collections.ConfigDict` of
the keys that differ from the schema's defaults. `CHOICES = {argument: names}` in the file restricts
an argument to some names. `load` merges schema, file and `--config.x=y` overrides into a frozen
`Config`. It records which keys are read, so that `audit` can report keys that the user set but the
run never reads.
"""

import ast
import contextlib
import difflib
import hashlib
import importlib.util
import inspect
import json
import re
import reprlib
import sys
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from big_vit.config import recipes
from big_vit.config.fields import check_text
from big_vit.config.old_names import RENAMED, comparable_dump, former_dump, renamed, renamed_dump
from big_vit.config.schema import REQUIRED, SCHEMA, UNITS, Field
from big_vit.errors import UserError, nearest

# Sections with any number of entries, under names that the user chooses.
STARRED = ('evals', 'mixture', 'streams')
# Names of evaluations that something else beside their scores has.
RESERVED_EVALUATIONS = {
    'train': 'metrics of the training itself',
    'time': 'timings',
    'step': 'the column of steps',
    'checkpoint': 'the place of the checkpoint, in what evaluate prints as JSON',
}


class Config:
    """A frozen tree of settings, as in `config.model.variant`, that records which keys are read."""

    def __init__(
        self,
        tree: dict[str, Any],
        explicit: frozenset[str] = frozenset(),
        *,
        prefix: str = '',
        reads: set[str] | None = None,
    ):
        set_ = object.__setattr__
        set_(self, '_tree', tree)
        set_(self, '_explicit', explicit)
        set_(self, '_prefix', prefix)
        set_(self, '_reads', set() if reads is None else reads)

    def __getattr__(self, name: str) -> Any:
        if name.startswith('_') or name not in self._tree:
            raise AttributeError(f'the config has no key {self._prefix}{name}')
        return self[name]

    def __getitem__(self, name: str) -> Any:
        value, key = self._tree[name], self._prefix + name
        if isinstance(value, dict):
            return Config(value, self._explicit, prefix=key + '.', reads=self._reads)
        self._reads.add(key)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._tree)

    def __setattr__(self, name: str, value: Any) -> None:
        raise TypeError(f'a config is frozen: set {self._prefix}{name} by replacing({{...}})')

    def __contains__(self, name: object) -> bool:
        return name in self._tree

    def sets(self, key: str) -> bool:
        """Whether the file or an override sets this dotted key; if not, it has its default."""
        return key in self._explicit

    def peek(self, name: str) -> Any:
        """Returns a value without recording a read."""
        return self._tree[name]

    def completed(self, defaults: dict[str, Any], **fixed: Any) -> 'Config':
        """Returns this section with None replaced by `defaults`, sharing its record of reads.

        Args:
          defaults: values for keys that are None or absent.
          **fixed: values that override the section.
        """
        given = {name: value for name, value in self._tree.items() if value is not None}
        tree = {**self._tree, **defaults, **given, **fixed}
        return Config(tree, self._explicit, prefix=self._prefix, reads=self._reads)

    def to_dict(self) -> dict[str, Any]:
        """Returns a nested copy for dumping, without recording reads."""
        return json.loads(json.dumps(self._tree))

    def replacing(self, flat: dict[str, Any]) -> 'Config':
        """Returns a checked copy of a complete config with the dotted keys of `flat` set."""
        return resolve({**self._given(), **flat})

    def without(self, *prefixes: str) -> 'Config':
        """Returns a checked copy of a complete config without keys that start with a prefix."""
        return resolve({k: v for k, v in self._given().items() if not k.startswith(prefixes)})

    def _given(self) -> dict[str, Any]:
        """Dotted keys that the user set, and all keys of starred sections."""
        # Starred sections exist only through their keys, so even those at their default count.
        return {
            key: value
            for key, value in flatten(self._tree).items()
            if key in self._explicit or key.partition('.')[0] in STARRED
        }

    def audit(self) -> None:
        """Checks that every key that the user set has been read; call it once all is built.

        Raises:
          UserError: the user set a key that this run has not read.
        """
        unread = sorted(self._explicit - self._reads)
        if unread:
            keys = ', '.join(unread)
            raise UserError(
                f'config: {keys} {"is" if len(unread) == 1 else "are"} set, but this run never '
                f'reads {"it" if len(unread) == 1 else "them"} with the other choices made; '
                'remove or change what goes with it (--explain shows what is in use)'
            )


def flatten(tree: dict[str, Any], prefix: str = '') -> dict[str, Any]:
    """Flattens nested dictionaries into one with dotted keys."""
    flat = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f'{prefix}{name}.'))
            if prefix[:-1] in STARRED and not value:  # Takes everything from `data`.
                flat[f'{prefix}{name}.split'] = None
            elif not value and f'{prefix}{name}' in SCHEMA:
                flat[f'{prefix}{name}'] = value  # Not to be lost: it is no value of that key.
        else:
            flat[f'{prefix}{name}'] = value
    return flat


def _unflatten(flat: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, last = key.split('.')
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree


def _in_schema(key: str) -> str:
    """The key as in the schema, with a star for the name that the user chose."""
    return re.sub(rf'^({"|".join(STARRED)})\.[^.]*\.', r'\1.*.', key)


def _field(key: str) -> Field:
    field = SCHEMA.get(_in_schema(key))
    if field is None:
        near = nearest_key(key)
        raise UserError(f'config: unknown key {key}' + (f'; did you mean {near}?' if near else ''))
    return field


# What other codebases call a key, and sections in place of the key that is meant most often.
_SYNONYMS = {
    'lr': 'learning_rate base_lr base_learning_rate',
    'batch_size': 'batch bs train_batch_size global_batch_size',
    'total_epochs': 'epochs epoch num_epochs max_epochs',
    'total_steps': 'steps num_steps max_steps iterations num_train_steps',
    'image_size': 'size img_size resolution input_size',
    'init': 'pretrained checkpoint weights finetune',
    'optim.name': 'optim optimizer optimiser opt',
    'optim.weight_decay': 'wd',
    'optim.clip': 'grad_clip clip_grad gradient_clip grad_clip_norm max_grad_norm',
    'schedule.name': 'schedule scheduler sched lr_schedule',
    'schedule.warmup_steps': 'warmup num_warmup_steps warmup_steps',
    'model.variant': 'model arch architecture variant model_name',
    'model.dtype': 'precision amp dtype',
    'data.name': 'data dataset dataset_name',
    'data.path': 'data_dir data_path',
    'data.transform': 'transforms augment augmentation pp preprocess',
    'data.workers': 'num_workers workers',
    'task.name': 'task objective',
    'ema': 'model_ema ema_decay',
    'accumulation': 'grad_accum gradient_accumulation_steps accum_steps',
    'evals.test.split': 'evals eval',
    'checkpoint.every_steps': 'checkpoint_every save_every save_steps',
    'log.wandb': 'wandb',
    'log.tensorboard': 'tensorboard',
}
_SYNONYM = {word: key for key, words in _SYNONYMS.items() for word in words.split()}


def nearest_key(key: str) -> str | None:
    """Guess the key that is meant: another name of it, the same in another section, or a typo."""
    key = key.replace('-', '_')
    last = key.rpartition('.')[2]
    if key in SCHEMA:
        return key
    section, meant = key.rpartition('.')[0], _SYNONYM.get(last.casefold())
    if meant and (not section or meant == 'lr' or meant.startswith(f'{section}.')):
        return meant
    by_name: dict[str, list[str]] = {}
    for name in SCHEMA:
        by_name.setdefault(name.rpartition('.')[2], []).append(name)
    parts = key.split('.')
    starred = f'{parts[0]}.*.{last}' if len(parts) == 3 else key
    near = by_name.get(last, [])
    if not near and (match := nearest(starred, SCHEMA)):
        near = [match]
    if not near and (word := nearest(last, by_name, cutoff=0.7)):
        near = by_name[word]
    closest = nearest(starred, near, cutoff=0.0)
    return closest.replace('*', parts[1] if len(parts) == 3 else '*') if closest else None


def check_keys(spec: str, keys: Iterable[str]) -> None:
    """Check that a config file is there and that the schema has the keys; runs nothing, at no cost.

    Raises:
      UserError: there is no such file, or no such key.
    """
    recipes.locate(spec)
    for key in keys:
        if key not in RENAMED:
            _field(key)


def _checked(key: str, value: Any) -> Any:
    """Validates and converts the value of a key."""
    field = _field(key)
    if value is None and field.default is None:
        return None
    if isinstance(value, list):
        value = tuple(tuple(item) if isinstance(item, list) else item for item in value)
    try:
        return field.check(value)
    except (ValueError, TypeError) as error:
        raise UserError(f'config: {key} must be {error}, got {_shown(value)}') from None


def _shown(value: Any) -> str:
    """A value in an error line: not all of a long one."""
    try:
        return reprlib.repr(value)
    except ValueError:  # Python prints no whole number of so many digits.
        return 'one of too many digits'


def resolve(explicit: dict[str, Any]) -> Config:
    """Builds the config that sets the given dotted keys and leaves the rest at its default.

    Raises:
      UserError: an unknown key, an invalid value, a missing required key, or one duration in two
        units.
    """
    current = dict(renamed(key, value) for key, value in explicit.items())
    values = {key: _checked(key, value) for key, value in current.items()}
    mixed = any(key.startswith('mixture.') for key in values)
    for first, group in REQUIRED.items():
        if first == 'data.name' and mixed:  # Each part of the mixture may name its own.
            continue
        if all(values.get(key) is None for key in group):
            options = ' or '.join(group)
            raise UserError(f'config: {options} must be set, for example --config.{first}=...')
    flat = {key: field.default for key, field in SCHEMA.items() if '*' not in key}
    for section in STARRED:
        names = dict.fromkeys(k.split('.')[1] for k in values if k.startswith(f'{section}.'))
        for name in names:
            if not re.fullmatch(r'\w+', name):
                raise UserError(f'config: {section}.{name}: use letters, digits and _ in the name')
            flat.update(
                {
                    key.replace('*', name): field.default
                    for key, field in SCHEMA.items()
                    if key.startswith(f'{section}.*')
                }
            )
    flat.update(values)
    for key in flat:
        if key.rpartition('_')[2] in UNITS and flat[key] is not None:
            others = [k for k in _siblings(key) if flat.get(k) is not None]
            if others:
                raise UserError(f'config: {key} and {others[0]} are both set; set one')
    tree = _unflatten(flat)
    for section in STARRED:
        tree.setdefault(section, {})
    set_keys = frozenset(key for key, value in values.items() if value is not None)
    return Config(tree, set_keys)


def _siblings(key: str) -> list[str]:
    """Keys of the same duration in the other units."""
    stem, _, unit = key.rpartition('_')
    others = [f'{stem}_{other}' for other in UNITS if other != unit] if unit in UNITS else []
    return [other for other in others if _in_schema(other) in SCHEMA]


def _parsed(key: str, text: str) -> Any:
    """Parses the text of an override: a Python literal if it is one, else the text itself."""
    field = _field(key)
    if field.check is check_text:
        # An empty variable of a shell: taken for unset, a run would start without its checkpoint.
        if field.default is None and not text.strip():
            raise UserError(f'config: {key} is empty: --config.{key}=VALUE, or leave it out')
        return None if text.lower() == 'none' else text
    words: dict[str, Any] = {'true': True, 'false': False, 'none': None}
    if text.lower() in words:
        with contextlib.suppress(ValueError):
            return field.check(text)  # 'none' may be one of the choices.
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def _call_get_config(
    function: Callable[..., Any], text: str, path: Path, choices: Mapping[str, Collection[str]]
) -> Any:
    """Calls `get_config` with the `arg=value,flag` text after the colon of a config spec."""
    parameters = inspect.signature(function).parameters
    arguments: dict[str, Any] = {}
    for i, token in enumerate(filter(None, text.split(','))):
        name, equals, word = token.partition('=')
        if not equals:
            if isinstance(getattr(parameters.get(name), 'default', None), bool):
                word = 'true'
            elif i == 0 and parameters:
                name, word = next(iter(parameters)), name
        if name not in parameters:
            near = nearest(name, parameters)
            known = ', '.join(parameters) or 'none'
            hint = f'did you mean {near}?' if near else f'it takes: {known}'
            raise UserError(f'{path}: get_config has no argument {name!r}; {hint}')
        default = parameters[name].default
        if isinstance(default, bool):
            if word.lower() not in ('true', 'false'):
                raise UserError(f'{path}: argument {name} must be true or false, got {word!r}')
            arguments[name] = word.lower() == 'true'
        elif isinstance(default, int | float):
            try:
                arguments[name] = type(default)(word)
            except ValueError:
                kind = type(default).__name__
                raise UserError(f'{path}: argument {name} must be {kind}, got {word!r}') from None
        else:
            arguments[name] = word
        if name in choices and word not in choices[name]:
            close = difflib.get_close_matches(word, choices[name], n=3, cutoff=0.5)
            hint = (
                f'did you mean {" or ".join(close)}?'
                if close
                else f'there are {", ".join(filter(None, choices[name]))}'
            )
            raise UserError(f'{path}: there is no {name} {word!r}; {hint}')
    for name, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and name not in arguments:
            raise UserError(f'{path}: argument {name} must be given: --config {path}:{name}=...')
    shown = ', '.join(f'{name}={value}' for name, value in arguments.items())
    with _errors_of(path, f'get_config({shown}) fails: '):
        tree = function(**arguments)
        return tree.to_dict() if hasattr(tree, 'to_dict') else tree


@contextlib.contextmanager
def _errors_of(path: Path, what: str = '') -> Iterator[None]:
    """Context that runs what a config file holds, whose errors become one line with their place."""
    try:
        yield
    except UserError:
        raise
    except SyntaxError as error:
        line = f', line {error.lineno}' if error.lineno else ''
        raise UserError(f'--config: {path}{line}: {error.msg}') from None
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [
            f', line {frame.lineno}' for frame in frames if frame.filename == str(path.absolute())
        ]
        shown = ' '.join(f'{type(error).__name__}: {error}'.split())[:200]
        raise UserError(f'--config: {path}{"".join(lines[-1:])}: {what}{shown}') from error


def load(
    spec: str, overrides: Sequence[tuple[str, str]] = (), base: dict[str, Any] | None = None
) -> Config:
    """Loads `configs/x.py:arg=v,arg2=v`, then applies `(key, text)` overrides.

    An override of a duration in another unit replaces the file's. The text 'default' undoes what
    the file set.

    Args:
      spec: path of a config file, or `big_vit:NAME` for one in the package, and its arguments
        after a colon.
      overrides: dotted keys with their values as text.
      base: values by dotted key that file and overrides may replace.

    Raises:
      UserError: a file that is missing or has no `get_config`, an invalid argument, an unknown
        key or an invalid value.
    """
    path, arguments = recipes.locate(spec)
    module_spec = importlib.util.spec_from_file_location(f'big_vit_config_{path.stem}', path)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    dont_write, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        with _errors_of(path):
            module_spec.loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = dont_write
    if not callable(getattr(module, 'get_config', None)):
        raise UserError(f'--config: {path} defines no get_config()')
    choices = getattr(module, 'CHOICES', {})
    tree = _call_get_config(module.get_config, arguments, path, choices)
    explicit = dict(base or {})

    def put(key: str, value: Any) -> None:
        key, value = renamed(key, value)
        _field(key)
        for sibling in _siblings(key):
            explicit.pop(sibling, None)
        explicit[key] = value

    if not isinstance(tree, dict):
        raise UserError(
            f'--config: get_config() of {path} must give a ConfigDict, got {_shown(tree)}'
        )
    with _errors_of(path):
        from_file = flatten(tree)
    for key in from_file:
        for sibling in _siblings(key):
            if sibling in from_file:
                raise UserError(f'config: {key} and {sibling} are both set; set one')
    for key, value in from_file.items():
        put(key, value)
    for key, text in (renamed(*pair) for pair in overrides):
        put(key, _parsed(key, text))
        if text == 'default':
            del explicit[key]
    loaded = resolve(explicit)
    check_names(loaded.evals)
    return loaded


def check_names(evaluations: Iterable[str]) -> None:
    """Check that the scores of evaluations have names of their own among the metrics of a run.

    Separate from `resolve`, so that checkpoints of before go on loading.

    Raises:
      UserError: one has a name that is taken.
    """
    for name in evaluations:
        if name in RESERVED_EVALUATIONS:
            raise UserError(
                f'config: evals.{name}: {name!r} is the name of {RESERVED_EVALUATIONS[name]}, '
                f'which this would overwrite or hide; rename it, as in evals.on_{name}'
            )


def override(config: Config, overrides: Sequence[tuple[str, str]]) -> Config:
    """Applies `--config.key=text` overrides to a config."""
    values: dict[str, Any] = {}
    for key, text in (renamed(*pair) for pair in overrides):
        values.pop(key, None)  # Reinserted last: it also beats other units given in between.
        values[key] = _field(key).default if text == 'default' else _parsed(key, text)
    changed = with_values(config, values)
    check_names(set(changed.evals) - set(config.evals))
    return changed


def with_values(config: Config, values: dict[str, Any]) -> Config:
    """Returns a checked copy with dotted keys set; durations replace those in other units."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(dict.fromkeys(_siblings(key)))
        flat[key] = value
    return config.replacing(flat)


def _flat_dump(tree: Any) -> dict[str, Any]:
    if not isinstance(tree, dict):
        raise UserError(f'config: a dump must be an object of keys, got {_shown(tree)}')
    return flatten(tree)


def from_json(tree: dict[str, Any]) -> Config:
    """Restores a config from its own dump; keys that differ from the default count as set.

    Raises:
      UserError: the dump has a key that this version does not know, or is none.
    """
    flat = renamed_dump(_flat_dump(tree))
    return resolve(
        {
            key: value
            for key, value in flat.items()
            if key.partition('.')[0] in STARRED or _checked(key, value) != _field(key).default
        }
    )


# Keys that may change when a run is resumed, because no result depends on them.
RESUMABLE = (
    *('mesh.', 'accumulation', 'model.remat', 'log.', 'checkpoint.', 'data.workers'),
    *('early_stopping.', 'profile'),
)


def difference(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Lists differences between two dumps as 'key: old -> new'."""
    a, b = (comparable_dump(_flat_dump(json.loads(json.dumps(dump)))) for dump in (old, new))
    return [
        f'{key}: {a.get(key)!r} -> {b.get(key)!r}'
        for key in sorted(a.keys() | b.keys())
        if a.get(key) != b.get(key)
    ]


def differing(dumps: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """Give the keys that are not the same in all dumps, with their values in each.

    A key that a dump of an earlier version lacks has its default there.
    """
    flats = [comparable_dump(_flat_dump(json.loads(json.dumps(dump)))) for dump in dumps]
    values = {}
    for key in dict.fromkeys(key for flat in flats for key in flat):
        field = SCHEMA.get(_in_schema(key))
        default = None if field is None else json.loads(json.dumps(field.default))
        of = [flat.get(key, None if '*' in _in_schema(key) else default) for flat in flats]
        if any(value != of[0] for value in of):
            values[key] = of
    return values


def digest(config: Config) -> str:
    """Short hash of a config, to compare hosts with each other."""
    tree = config.to_dict()
    former = _unflatten(former_dump(flatten(tree)))
    # Sections without entries are no keys.
    former = {**{name: {} for name in STARRED}, **former}
    return hashlib.sha256(json.dumps(former, sort_keys=True).encode()).hexdigest()[:16]


def steps(
    section: Config | dict[str, Any],
    name: str,
    *,
    batch_size: int,
    examples: int,
    total: int | float | None = None,
    ahead: int | float = 0.0,
) -> int | None:
    """Converts a duration to steps, from whichever unit it is given in.

    Args:
      section: part of the config with the keys `{name}_steps`, `{name}_epochs`,
        `{name}_examples` and `{name}_percent`.
      name: name of the duration.
      batch_size: examples per step.
      examples: examples per epoch.
      total: steps of the entire run, which `percent` refers to.
      ahead: steps to leave out of a duration in examples or epochs, which were done in fewer.

    Returns:
      The number of steps, or None if the duration is not set.
    """
    per_unit = {
        'steps': 1.0,
        'epochs': examples / batch_size,
        'examples': 1.0 / batch_size,
        'percent': None if total is None else total / 100,
    }
    for unit, factor in per_unit.items():
        if f'{name}_{unit}' not in section or factor is None:
            continue
        value = section[f'{name}_{unit}']
        if value is not None:
            # 1e-9 keeps rounding from losing a step of an exact product, as 0.1 epochs x 10.
            left_out = ahead if unit in ('epochs', 'examples') else 0.0
            steps_ = int(value * factor - left_out + 1e-9)
            return max(1, steps_) if value else 0
    return None
