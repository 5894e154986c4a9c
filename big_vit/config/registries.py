"""Registries: tables of functions whose arguments are config keys (sources, optimizers, ...).

The keyword arguments of an entry (those with a default or behind `*`) are the config keys that it
reads, with its own defaults. So a new entry is one function and one line in its table: the config
then accepts its name and checks its keys, and the docs list its defaults.
"""

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from big_vit.errors import nearest

REQUIRED = inspect.Parameter.empty


class Registry(NamedTuple):
    """A table, located by its module and variable.

    `function` names the attribute of an entry that has the signature; None is the entry itself. The
    module is imported only when the table is first needed: `--help` must not wait for JAX.
    """

    module: str
    table: str
    function: str | None = None

    def entries(self) -> Mapping[str, Any]:
        """The table itself: entries by name."""
        return getattr(importlib.import_module(self.module), self.table)

    def keys(self, name: str) -> dict[str, Any]:
        """Config keys that an entry reads, with its defaults; `REQUIRED` marks those without."""
        entry = self.entries()[name]
        return _keys(getattr(entry, self.function) if self.function else entry)

    def readers(self, key: str) -> dict[str, Any]:
        """Entries that read a key, each with its default."""
        return {name: self.keys(name)[key] for name in self.entries() if key in self.keys(name)}

    def name(self, value: Any) -> str:
        """Checks that a config value is the name of an entry, and returns it."""
        names = list(self.entries())
        if value not in names:
            near = nearest(str(value), names, cutoff=0.4)
            hint = f' (did you mean {near!r}?)' if near else ''
            raise ValueError('one of ' + ', '.join(map(repr, names)) + hint)
        return value


@functools.cache
def _keys(function: Callable[..., Any]) -> dict[str, Any]:
    return {
        parameter.name: parameter.default
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY or parameter.default is not REQUIRED
    }


OPTIMIZERS = Registry('big_vit.optim.factory', 'LAWS')
EVALUATORS = Registry('big_vit.evaluators.registry', 'EVALUATORS')
SOURCES = Registry('big_vit.data.sources.registry', 'SOURCES')
TOKENIZERS = Registry('big_vit.models.tokenizers', 'TOKENIZERS', 'tokens')
TASKS = Registry('big_vit.tasks.registry', 'TASKS')

# By the prefix of the config keys that their entries read.
BY_SECTION = {
    'task': TASKS,
    'model': TOKENIZERS,
    'streams.*': TOKENIZERS,
    'data': SOURCES,
    'mixture.*': SOURCES,
    'evals.*': EVALUATORS,
    'optim': OPTIMIZERS,
}
