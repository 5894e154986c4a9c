"""docs/config.md is the schema in words and docs/reference.md the docstrings: see `make golden`."""

import importlib.util
import os
import re

from commands import ROOT

from big_vit import augment
from big_vit.config import registries, schema, schema_evals
from big_vit.data import transforms
from big_vit.data.sources.registry import SOURCES
from big_vit.optim import factory

REFERENCE = ROOT / 'docs' / 'make_reference.py'
HEAD = """# Config keys

Made from `big_vit/config/` by `make golden`. Any key can be set in a config file or on
the command line as `--config.KEY=VALUE`; the value `default` takes back what the file set. A
duration is set in one unit; in `evals` and `mixture`, `*` is
any name, and what is not set comes from `data`.

| key | value | default | meaning |
|---|---|---|---|
"""


# Sections whose keys are arguments of registered functions, which have the defaults.
SECTIONS = ('task', 'data', 'evals.*', 'optim')


def values(check) -> str:
    """Which values a key takes: the docstring of its check, or the names of a table."""
    registry = getattr(check, '__self__', None)
    return ', '.join(registry.entries()) if registry else check.__doc__


def shown(value: object) -> str:
    return 'required' if value is registries.REQUIRED else f'`{value!r}`'


def own_defaults(key: str) -> str:
    """Which entries of the section's table read a key, and their defaults."""
    section, _, name = key.rpartition('.')
    if section not in SECTIONS:
        return ''
    registry = registries.BY_SECTION[section]
    readers = registry.readers(name)
    alike: dict[str, list[str]] = {}
    for reader, default in readers.items():
        alike.setdefault(shown(default), []).append(reader)
    parts = [f'{value} ({", ".join(names)})' for value, names in alike.items()]
    return '; '.join(parts)


def page() -> str:
    durations: dict[str, list[str]] = {}
    rows = []
    for key, field in schema.SCHEMA.items():
        stem, _, unit = key.rpartition('_')
        if unit in schema.UNITS:
            durations.setdefault(stem, []).append(unit)
            if len(durations[stem]) > 1:
                continue
            doc = field.doc.rpartition(',')[0] + '.'
            rows.append([stem, field.check.__doc__, '', doc])
        else:
            default = own_defaults(key) if field.default is None else f'`{field.default!r}`'
            rows.append([key, values(field.check), default, field.doc])
    for row in rows:
        if row[0] in durations:
            row[0] += '_{' + ','.join(durations[row[0]]) + '}'
    escaped = ([cell.replace('|', r'\|') for cell in [f'`{row[0]}`', *row[1:]]] for row in rows)
    return HEAD + ''.join(f'| {" | ".join(cells)} |\n' for cells in escaped)


def test_the_list_of_config_keys_is_up_to_date():
    path = ROOT / 'docs' / 'config.md'
    if os.environ.get('UPDATE_GOLDEN'):
        path.write_text(page())
    assert path.read_text() == page(), 'docs/config.md is out of date: run `make golden`'


def reference():
    spec = importlib.util.spec_from_file_location('make_reference', REFERENCE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_is_up_to_date():
    path, text = ROOT / 'docs' / 'reference.md', reference().page()
    if os.environ.get('UPDATE_GOLDEN'):
        path.write_text(text)
    assert path.read_text() == text, 'docs/reference.md is out of date: run `make reference`'


def test_the_reference_has_signatures_and_what_docstrings_say():
    text = reference().page()
    for words in (
        '## big_vit.checkpoint\n',
        "which: str='params'",
        '- `UserError`: the checkpoint has no such part.',
        'Writer(\n    workdir: str | os.PathLike[str],\n',
    ):
        assert words in text, words
    assert '_hash_device' not in text and '### main' not in text
    # Every example of code is closed, and no text is taken for a tag.
    assert text.count('```') % 2 == 0
    outside = re.sub(r'```.*?```|`[^`\n]*`|^    .*$', '', text, flags=re.DOTALL | re.MULTILINE)
    assert not re.search(r'<\w', outside)


def test_every_transform_is_documented():
    text = (ROOT / 'docs' / 'data.md').read_text()
    for name in [*transforms.OPERATIONS, *augment.OPERATIONS]:
        assert re.search(rf'`{name}\b', text), f'docs/data.md does not mention {name}'


def test_every_optimizer_is_documented_with_the_keys_that_it_reads():
    text = (ROOT / 'docs' / 'optimizers.md').read_text()
    rows = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip('|').split('|')]
        if line.startswith('| `') and len(cells) == 5:
            rows[cells[0].strip('`')] = set(re.findall(r'`(\w+)`', cells[3]))
    assert rows == {name: set(factory.defaults(name)) for name in factory.LAWS}


def test_every_source_is_documented_with_the_keys_that_it_reads():
    rows = {}
    for line in (ROOT / 'docs' / 'data.md').read_text().splitlines():
        cells = [cell.strip() for cell in line.strip('|').split('|')]
        if line.startswith('| `') and len(cells) == 3 and cells[0].strip('`') in SOURCES:
            rows[cells[0].strip('`')] = set(re.findall(r'`(\w+)`', cells[2])) - {'num_classes'}
    assert rows == {name: set(registries.SOURCES.keys(name)) for name in SOURCES}


def test_every_evaluator_is_documented_with_the_keys_that_it_reads():
    rows = {}
    for line in (ROOT / 'docs' / 'evaluators.md').read_text().splitlines():
        cells = [cell.strip() for cell in line.strip('|').split('|')]
        if line.startswith('| `') and len(cells) == 3:
            rows[cells[0].strip('`')] = set(re.findall(r'`(\w+)`', cells[2]))
    table = registries.EVALUATORS
    assert rows == {name: set(table.keys(name)) for name in table.entries()}
    for name in schema_evals.CORRUPTIONS:
        assert f'`{name}`' in (ROOT / 'docs' / 'evaluators.md').read_text()


def test_every_task_is_documented_with_the_keys_that_it_reads():
    rows = {}
    for line in (ROOT / 'docs' / 'tasks.md').read_text().splitlines():
        cells = [cell.strip() for cell in line.strip('|').split('|')]
        if line.startswith('| `') and len(cells) == 5 and cells[0] != '`task.name`':
            rows[cells[0].strip('`')] = set(re.findall(r'`(\w+)`', cells[2]))
    table = registries.TASKS
    assert rows == {name: set(table.keys(name)) for name in table.entries()}
