"""What configs and sharding tables come to, as text that a review can read.

A change of a default, a config or a rule shows up as a difference of tests/golden/;
`make golden` (UPDATE_GOLDEN=1) rewrites them.
"""

import difflib
import os
from pathlib import Path

import pytest
from jax.sharding import AbstractMesh

from big_vit import config, sharding, state, trees
from big_vit.config import schema
from big_vit.models import variants
from big_vit.models.vit import make_vit

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).resolve().parent / 'golden'
CONFIGS = sorted((ROOT / 'configs').glob('*.py'))
VARIANTS = ['Ti/16', 'B/16', 'L/16', 'g/14', '22B/14']
MESH = AbstractMesh((1, 64, 4), sharding.AXES)
MIN_SHARD_SIZE = 2**20


def config_name(path):
    return f'config_{path.stem}.txt'


def variant_name(variant):
    return f'params_{variant.replace("/", "_")}.txt'


EXPECTED = {config_name(p) for p in CONFIGS} | {variant_name(v) for v in VARIANTS}


def compare(name, text):
    file = GOLDEN / name
    if os.environ.get('UPDATE_GOLDEN') == '1':
        GOLDEN.mkdir(exist_ok=True)
        file.write_text(text)
        return
    if not file.is_file():
        pytest.fail(f'{file} is missing: `make golden` writes it', pytrace=False)
    old = file.read_text()
    if old != text:
        lines = difflib.unified_diff(
            old.splitlines(), text.splitlines(), f'golden/{name}', 'now', lineterm='', n=1
        )
        pytest.fail(
            '\n'.join([*lines, '', 'if this is what you want: `make golden`']), pytrace=False
        )


def test_golden_files_of_what_no_longer_exists_are_deleted():
    found = {path.name for path in GOLDEN.iterdir()} if GOLDEN.is_dir() else set()
    stale = found - EXPECTED
    if os.environ.get('UPDATE_GOLDEN') == '1':
        for name in stale:
            (GOLDEN / name).unlink()
        return
    assert not stale, f'no config or variant belongs to {sorted(stale)}: `make golden`'


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_the_resolved_config_is_the_golden_one(path):
    # A transfer's model is its checkpoint's; the base stands for that.
    loaded = config.load(str(path), base={'model.variant': 'mu/1'})
    flat = config.flatten(loaded.to_dict())
    lines = [f'{key} = {value!r}' for key, value in sorted(flat.items())]
    compare(config_name(path), '\n'.join(lines) + '\n')


def columns(rows):
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        '  '.join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


@pytest.mark.parametrize('variant', VARIANTS)
def test_sharding_and_decay_of_all_parameters_are_the_golden_ones(variant):
    net = make_vit(num_classes=1000, **variants.parse(variant))
    params = trees.flatten(state.abstract_params(net, (224, 224, 3)))
    rules = schema.SCHEMA['optim.weight_decay_rules'].default
    decay = trees.match_rules(rules, params, 'optim.weight_decay_rules')
    rows = [('path', 'shape', 'spec', 'decay')]
    for name, leaf in params.items():
        spec = sharding.spec_for(name, leaf.shape, MESH, MIN_SHARD_SIZE)
        shown = ', '.join(axis or '-' for axis in spec) or 'replicated'
        rows.append((name, 'x'.join(map(str, leaf.shape)), shown, f'{decay[name]:g}'))
    sizes = ', '.join(f'{axis} {size}' for axis, size in MESH.shape.items())
    head = f'{variant} at 224 pixels, 1000 classes; {sizes}; min_shard_size {MIN_SHARD_SIZE}'
    compare(variant_name(variant), '\n'.join([head, '', *columns(rows)]) + '\n')
