"""What may import what, and what an import costs."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from big_vit import interop

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / 'big_vit'
FILES = sorted(PACKAGE.rglob('*.py'))

# Units are modules or subpackages; a unit may import those of the layers before its own.
LAYERS = [
    {'errors'},
    {'storage', 'trees', 'signals'},
    {'runtime', 'config', 'command_line', 'distributed', 'ownership'},
    {'models', 'optim', 'data', 'sharding', 'planning', 'compiler', 'completion'},
    {'tasks', 'augment', 'augment_colour', 'state', 'checkpoint_hashes', 'metrics', 'interop'},
    {'checkpoint', 'workdir'},
    {'steps', 'evaluators'},
    {'build'},
    {'pretrained', 'ledger', 'explain', 'journal', 'resumption', 'training_loop'},
    {'inspection'},
    {'sweeps', 'predictor', 'deployment', 'preparation'},
    {
        'train',
        'transfer',
        'average',
        'evaluate',
        'explore',
        'predict',
        'report',
        'plan',
        'export',
        'prepare',
        'bench_data',
        'show_data',
        '__main__',
    },
]
WITHIN_A_LAYER = {
    ('command_line', 'config'),  # Which key was meant by a flag that there is not.
    ('augment', 'tasks'),  # What bytes become where nothing is said, and labels as targets.
    ('augment_colour', 'augment'),
    ('augment_colour', 'tasks'),
    ('explain', 'ledger'),
    ('journal', 'resumption'),
    ('transfer', 'train'),  # All runs of a transfer are runs of train.
    ('sweeps', 'train'),
    ('report', 'evaluate'),  # What is mistaken is what was scored.
    ('sweeps', 'evaluate'),  # What validation chose is scored as any checkpoint is.
    ('workdir', 'checkpoint'),
}
NOT_IN = {
    'models': {'data', 'sharding', 'config'},
    'data': {'models', 'sharding', 'config'},
}
ONLY_IN = {
    'orbax': {'checkpoint.py'},
    'grain': {'data/pipeline.py'},
    'tensorflow_datasets': {'data/sources/prepared.py', 'prepare.py'},
    'array_record': {'data/sources/array_record.py', 'data/sources/records.py'},
    'pyarrow': {
        *('data/sources/arrow.py', 'predict.py'),
        *('preparation/columns.py', 'preparation/embeddings.py'),
    },
    'apache_beam': {'preparation/pipeline.py'},
    'simplejpeg': {'data/decode.py', 'data/transforms/pixels.py'},
    'av': {'data/transforms/video.py'},
    'onnx': {'deployment/graph.py', 'deployment/operators.py', 'deployment/writer.py'},
    'onnxruntime': {'deployment/writer.py'},
    'torch': set(),
    'safetensors': {'interop/files.py'},
    'huggingface_hub': {'interop/hub.py'},
    'soundfile': {'data/transforms/audio.py'},
    'tokenizers': {'data/transforms/text.py'},
    'fsspec': {'data/files.py', 'storage.py'},
    'tensorflow': set(),
    'pickle': set(),
    'cloudpickle': set(),
    'dill': set(),
    'marshal': set(),
    'shelve': set(),
}
DEPENDENCIES = {
    'jax', 'jaxlib', 'jaxtyping', 'flax', 'optax', 'orbax', 'grain', 'numpy', 'scipy', 'sklearn',
    'matplotlib', 'PIL', 'cv2', 'etils', 'rich', 'wandb', 'tensorboardX', 'tensorflow',
    'tensorflow_datasets', 'ml_collections', 'beartype', 'pytest', 'torch', 'timm', 'transformers',
    'chex', 'safetensors', 'nbclient', 'nbformat', 'pdoc', 'tensorboard',
}  # fmt: skip


def relative(path):
    return path.relative_to(PACKAGE).as_posix()


def unit_of(path):
    return path.relative_to(PACKAGE).with_suffix('').parts[0]


def nodes(path):
    return list(ast.walk(ast.parse(path.read_text(), str(path))))


def imports(path):
    """Dotted names, also of imports inside functions; `from a import b` is `a` and `a.b`."""
    for node in nodes(path):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f'{path}: imports are absolute'
            yield node.module
            yield from (f'{node.module}.{alias.name}' for alias in node.names)


def imported_units(path):
    parts = (name.split('.') for name in imports(path))
    known = {unit_of(file) for file in FILES}
    return {p[1] for p in parts if p[0] == 'big_vit' and len(p) > 1 and p[1] in known}


def layer_of(unit):
    found = [i for i, layer in enumerate(LAYERS) if unit in layer]
    assert found, f'big_vit/{unit} is new: say in tests/test_layering.py which layer it is of'
    return found[0]


def module_files():
    return [path for path in FILES if path != PACKAGE / '__init__.py']


def test_there_is_a_package_to_check():
    assert len(module_files()) > 20
    assert imported_units(PACKAGE / 'transfer.py') >= {'train', 'pretrained', 'metrics'}


@pytest.mark.parametrize('path', module_files(), ids=relative)
def test_imports_point_to_earlier_layers_only(path):
    unit = unit_of(path)
    for other in imported_units(path) - {unit}:
        if (unit, other) in WITHIN_A_LAYER:
            continue
        assert layer_of(other) < layer_of(unit), f'{relative(path)} imports {other}'


@pytest.mark.parametrize('path', module_files(), ids=relative)
def test_models_and_data_know_neither_each_other_nor_meshes_nor_configs(path):
    assert not imported_units(path) & NOT_IN.get(unit_of(path), set())


@pytest.mark.parametrize('path', FILES, ids=relative)
def test_heavy_or_dangerous_libraries_are_imported_in_their_one_place(path):
    for name in imports(path):
        places = ONLY_IN.get(name.partition('.')[0])
        assert places is None or relative(path) in places, f'{relative(path)} imports {name}'


def test_each_library_is_still_imported_in_its_place():
    for library, places in ONLY_IN.items():
        for place in places:
            found = {name.partition('.')[0] for name in imports(PACKAGE / place)}
            assert library in found, f'{place} does not import {library}: correct ONLY_IN'


@pytest.mark.parametrize('path', FILES, ids=relative)
def test_no_text_is_executed_and_no_pickle_is_read(path):
    for node in nodes(path):
        if isinstance(node, ast.Call):
            name = node.func.id if isinstance(node.func, ast.Name) else None
            assert name not in {'eval', 'exec', 'compile', '__import__'}, f'line {node.lineno}'
            for keyword in node.keywords:
                if keyword.arg == 'allow_pickle':
                    assert getattr(keyword.value, 'value', True) is False, f'line {node.lineno}'


@pytest.mark.parametrize('path', FILES, ids=relative)
def test_no_module_is_named_like_one_of_python_or_a_dependency(path):
    if path.parent != PACKAGE or path.name == '__init__.py':
        return
    taken = set(sys.stdlib_module_names) | DEPENDENCIES
    assert path.stem not in taken


def test_recipes_import_ml_collections_and_other_recipes_only():
    files = sorted((ROOT / 'configs').glob('*.py'))
    assert files
    for path in files:
        imported = {'.'.join(name.split('.')[:2]) for name in imports(path)}
        imported = {name for name in imported if not name.startswith('ml_collections')}
        assert imported <= {'big_vit.recipes'}, f'{path.name} imports {imported}'


# In a process of their own.


def in_a_process(code):
    environment = os.environ | {'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'}
    result = subprocess.run(
        [sys.executable, '-c', code],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        cwd=ROOT,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_importing_the_package_imports_nothing_else():
    code = 'import sys; old = set(sys.modules); import big_vit, json; '
    loaded = in_a_process(code + 'print(json.dumps(sorted(set(sys.modules) - old)))')
    assert not {name.partition('.')[0] for name in loaded} & DEPENDENCIES
    assert [name for name in loaded if name.startswith('big_vit.')] == []


HELP = """
import contextlib, inspect, io, json, runpy, sys
from big_vit import command_line
names = [
    name for name, made in inspect.getmembers(command_line, inspect.isfunction)
    if not name.startswith('_') and not inspect.signature(made).parameters
]
helps = {}
for name in names:
    command = name.replace('prepare_', 'prepare ')  # Its own commands.
    sys.argv, out = [*command.split(), '--help'], io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        runpy.run_module(f'big_vit.{command.split()[0]}', run_name='__main__')
    helps[command] = out.getvalue()
print(json.dumps([helps, sorted(sys.modules)]))
"""


def test_help_of_a_command_is_there_before_jax_would_be():
    helps, loaded = in_a_process(HELP)
    commands = {path.stem for path in FILES if 'runtime.command(main)' in path.read_text()}
    assert {name.split()[0] for name in helps} == commands
    for name, text in helps.items():
        assert text.startswith(f'usage: python -m big_vit.{name} [-h]')
    assert not {'jax', 'numpy', 'flax'} & set(loaded)
    written = ' '.join(helps['export'].split())
    assert f'one of {", ".join(interop.WRITE)}' in written.replace('- ', '-')


# CPU seconds rather than those of a clock, for other work may share the machine; and VmHWM,
# for the ru_maxrss of a child starts at that of the process that it was forked from.
COST = """
import json, resource, sys
before = resource.getrusage(resource.RUSAGE_SELF)
import big_vit.train
after = resource.getrusage(resource.RUSAGE_SELF)
megabytes = after.ru_maxrss / 1024
try:
    status = open('/proc/self/status').read()
    megabytes = int(status.partition('VmHWM:')[2].split()[0]) / 1024
except (OSError, IndexError):
    pass
print(json.dumps({
    'seconds': after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
    'megabytes': megabytes,
    'modules': sorted({name.partition('.')[0] for name in sys.modules}),
}))
"""


def test_importing_train_is_quick_and_loads_nothing_that_not_every_run_needs():
    in_a_process(COST)  # The first import after an update writes bytecode.
    found = in_a_process(COST)
    unwanted = {
        'orbax', 'grain', 'tensorflow', 'tensorflow_datasets', 'sklearn', 'matplotlib', 'cv2',
        'wandb', 'tensorboardX',
    }  # fmt: skip
    assert not unwanted & set(found['modules'])
    assert found['seconds'] < 3
    assert found['megabytes'] < 400


def test_the_core_imports_with_jax_flax_and_optax_alone():
    blocked = ['grain', 'tensorflow_datasets', 'orbax', 'ml_collections', 'cv2', 'sklearn']
    code = (
        f'import sys, json; sys.modules.update(dict.fromkeys({blocked})); '
        'import big_vit.models.vit, big_vit.optim.factory, big_vit.steps, big_vit.sharding, '
        'big_vit.state; print(json.dumps(sorted(sys.modules)))'
    )
    assert {'big_vit.models.vit', 'big_vit.state'} <= set(in_a_process(code))
