"""Tables of functions whose arguments are config keys: sources, evaluators, optimizers, tasks, ...

An entry's keyword arguments (those with a default, and those behind `*`) are the keys that it
reads, and their defaults are its own. So a new entry is one file and one line in its table: the
config takes its name, checks what it reads, and the docs list its defaults.
"""

import difflib
import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

REQUIRED = inspect.Parameter.empty


class Registry(NamedTuple):
    """A table by the name of its module and its variable.

    `function` names the attribute of an entry that has the signature; None is the entry itself. The
    module is imported when the table is first asked for: `--help` must not wait for JAX.
    """

    module: str
    table: str
    function: str | None = None

    def entries(self) -> Mapping[str, Any]:
        return getattr(importlib.import_module(self.module), self.table)

    def keys(self, name: str) -> dict[str, Any]:
        """The config keys that an entry reads, with its own defaults; `REQUIRED` has none."""
        entry = self.entries()[name]
        return _keys(getattr(entry, self.function) if self.function else entry)

    def readers(self, key: str) -> dict[str, Any]:
        """The entries that read a key, with the default of each."""
        return {name: self.keys(name)[key] for name in self.entries() if key in self.keys(name)}

    def name(self, value: Any) -> str:
        """Checks that a config value is the name of an entry."""
        names = list(self.entries())
        if value not in names:
            near = difflib.get_close_matches(str(value), names, n=1, cutoff=0.4)
            hint = f' (did you mean {near[0]!r}?)' if near else ''
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

# By the prefix of the keys that their entries read.
BY_SECTION = {
    'task': TASKS,
    'model': TOKENIZERS,
    'streams.*': TOKENIZERS,
    'data': SOURCES,
    'mixture.*': SOURCES,
    'evals.*': EVALUATORS,
    'optim': OPTIMIZERS,
}
