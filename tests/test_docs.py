"""docs/config.md is the schema in words; `make golden` rewrites it."""

import os
import re

from commands import ROOT

from big_vit import augment, schema, scoring
from big_vit.data import transforms
from big_vit.optim import factory

HEAD = """# Config keys

Made from `big_vit/schema.py` by `make golden`. Any key can be set in a config file or on
the command line as `--config.KEY=VALUE`; the value `default` takes back what the file set. A
duration is set in one unit; in `evals` and `mixture`, `*` is
any name, and what is not set comes from `data`.

| key | value | default | meaning |
|---|---|---|---|
"""


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
            default = '' if field.default is None else f'`{field.default!r}`'
            rows.append([key, field.check.__doc__, default, field.doc])
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


def test_every_evaluator_is_documented_with_the_keys_that_it_reads():
    rows = {}
    for line in (ROOT / 'docs' / 'evaluators.md').read_text().splitlines():
        cells = [cell.strip() for cell in line.strip('|').split('|')]
        if line.startswith('| `') and len(cells) == 3:
            rows[cells[0].strip('`')] = set(re.findall(r'`(\w+)`', cells[2]))
    assert rows == {kind: set(scoring.keys(kind)) for kind in schema.EVALUATORS}
    for name in schema.CORRUPTIONS:
        assert f'`{name}`' in (ROOT / 'docs' / 'evaluators.md').read_text()
