"""Models as ONNX and StableHLO: what other runtimes answer is what ours does."""

import json
import re
import stat
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image
from sample_models import EXTRAS, INPUTS, combined, example, random_like
from test_export import weights_of

import big_vit
from big_vit import checkpoint, config, deployment, export, trees
from big_vit.build.model import build_model
from big_vit.deployment import graph, operators
from big_vit.errors import UserError
from big_vit.inspection.loaded_model import LoadedModel
from big_vit.models.vit import make_vit
from big_vit.sharding import make_mesh

ROOT = Path(__file__).resolve().parents[2]
onnx = pytest.importorskip('onnx')
onnxruntime = pytest.importorskip('onnxruntime')


def loaded_of(**settings):
    weights = weights_of(**settings)
    # Of ordinary size, so that answers are.
    params = jax.tree.map(lambda x: x * np.float32(0.2), weights.params)
    return LoadedModel('weights', params, foreign_weights=weights._replace(params=params))


def answers_of(loaded, image):
    """By the module itself; `image` is [batch, height, width, channels]."""
    settings = {**loaded.foreign_weights.settings, 'dtype': jnp.float32, 'scan': False}
    logits, extra = jax.jit(make_vit(**settings).apply)({'params': loaded.params}, image)
    return {'logits': logits, 'features': extra['pre_logits']}


def session_of(path_or_bytes):
    return onnxruntime.InferenceSession(path_or_bytes, providers=['CPUExecutionProvider'])


def ask(session, inputs):
    names = [output.name for output in session.get_outputs()]
    taken = {one.name for one in session.get_inputs()}
    given = {name: x for name, x in inputs.items() if name in taken}
    return dict(zip(names, session.run(names, given), strict=True))


def images_of(batch, size=32, channels=3):
    return np.random.default_rng(batch).normal(size=(batch, size, size, channels)).astype('f4')


def test_onnx_answers_as_the_model_does(tmp_path, capsys):
    loaded = loaded_of(registers=2, activation='gelu')
    lines = deployment.write(tmp_path, 'onnx', loaded, class_names='abcde', licence='mit')
    assert 'image [batch, 3, 32, 32] -> logits [batch, 5], features [batch, 48]' in lines[0]
    file = onnx.load(tmp_path / 'model.onnx')
    onnx.checker.check_model(file, full_check=True)
    assert [entry.version for entry in file.opset_import] == [17] and file.ir_version == 8
    session = session_of(tmp_path / 'model.onnx')
    image = images_of(4)
    wanted = answers_of(loaded, image)
    for rows in (slice(0, 4), slice(0, 1), slice(1, 4)):
        found = ask(session, {'image': image[rows].transpose(0, 3, 1, 2)})
        for name, value in wanted.items():
            np.testing.assert_allclose(found[name], np.asarray(value)[rows], atol=1e-5)
    # Its parameters have our names.
    paths = set(trees.flatten(loaded.params))
    names = {x.name for x in file.graph.initializer if not x.name.startswith('constant')}
    assert len(names & paths) > len(paths) - 3
    kinds = {node.op_type for node in file.graph.node}
    assert {'LayerNormalization', 'Softmax', 'MatMul'} <= kinds and not kinds & {'Einsum', 'If'}

    about = json.loads((tmp_path / 'model.json').read_text())
    assert about['classes'] == list('abcde') and about['activation'] == 'softmax'
    assert about['big_vit'] == big_vit.__version__ and about['licence'] == 'mit'
    (described,) = about['files'].values()
    assert described['inputs']['image']['shape'] == ['batch', 3, 32, 32]
    assert list(described['outputs']) == ['logits', 'features']
    how = about['preprocessing']
    assert how['resize'] == {'shorter_side': 36} and how['crop'] == [32, 32]
    assert (how['mean'], how['std']) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    assert json.loads(file.metadata_props[0].value)['preprocessing'] == how


# Every way to make tokens, every pooling, and what blocks may be made of.
MODELS = {
    **{f'patches-{pool}': ('patches', pool, {}) for pool in EXTRAS},
    **{
        name: (name, pool, {})
        for name, pool in zip(INPUTS, ('gap', 'map', 'seq', 'cls') * 9, strict=False)
        if name not in ('patches', 'ragged', 'concat', 'cross', 'latents', 'words')
    },
    **{name: (name, 'map', {}) for name in ('words', 'ragged', 'concat', 'cross', 'latents')},
    'rope': ('patches', 'gap', {'posemb': 'rope', 'registers': 2, 'head_dim': 12}),
    'relative': ('patches', 'cls', {'posemb': 'relative'}),
    'hybrid': ('resnet', 'cls', {'posemb': 'learned', 'posemb_prefix': 1}),
    'quick_gelu': ('patches', 'gap', {'activation': 'quick_gelu', 'mlp': 'mlp'}),
    'erf': ('patches', 'gap', {'activation': 'gelu', 'mlp': 'mlp'}),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize('name', MODELS)
def test_every_part_of_a_model_can_be_written(name):
    tokenizer, pool, more = MODELS[name]
    module, inputs = combined(tokenizer, pool, **more)
    shapes = jax.eval_shape(module.init, jax.random.key(0), example(inputs))['params']
    params = jax.tree.map(lambda x: x * np.float32(0.5), random_like(shapes))
    flat = trees.flatten(params)

    def apply(params, inputs):
        logits, extra = module.apply({'params': trees.unflatten(dict(params))}, inputs)
        return {'logits': logits, 'pooled': extra['pre_logits']}

    file = graph.make_model(apply, flat, inputs, ('logits', 'pooled'), {})
    onnx.checker.check_model(file, full_check=True)
    session = session_of(file.SerializeToString())
    rng = np.random.default_rng(0)
    given = {
        name: rng.standard_normal((3, *shape)).astype(dtype)
        if dtype.kind == 'f'
        else rng.integers(0, 2 if 'mask' in name else 3, (3, *shape)).astype(dtype)
        for name, (shape, dtype) in inputs.items()
    }
    if 'text_mask' in given:
        given['text_mask'][:, 0] = 1
    wanted = jax.jit(apply)(flat, given)
    for rows in (slice(0, 3), slice(2, 3)):
        found = ask(session, {name: x[rows] for name, x in given.items()})
        for key, value in wanted.items():
            np.testing.assert_allclose(found[key], np.asarray(value)[rows], atol=1e-5)


ALONE = """
import sys

class Blocked:
    def find_spec(self, name, *_):
        if name.partition('.')[0] in ('big_vit', 'flax'):
            raise ImportError(name)

sys.meta_path.insert(0, Blocked())
from pathlib import Path
import jax, numpy as np
folder, inside = Path(sys.argv[1]), sys.argv[2] == 'inside'
file = jax.export.deserialize(bytearray((folder / 'model.stablehlo').read_bytes()))
assert file.platforms == ('cpu', 'cuda', 'tpu')
before = ()
if not inside:
    from safetensors.numpy import load_file
    before = (load_file(folder / 'model.safetensors'),)
images = np.load(folder / 'images.npy')
for rows in (1, len(images)):
    out = file.call(*before, images[:rows])
np.savez(folder / 'out.npz', **out)
"""


@pytest.mark.slow
@pytest.mark.parametrize('where', ['inside', 'apart'])
def test_stablehlo_answers_with_jax_alone(where, tmp_path):
    loaded = loaded_of()
    most = {'inside': None, 'apart': 100}[where]
    deployment.write(tmp_path, 'stablehlo', loaded, most_inside=most)
    about = json.loads((tmp_path / 'model.json').read_text())
    assert about['jax'] == jax.__version__ and re.fullmatch(r'\d{4}-\d\d-\d\d', about['date'])
    file = about['files']['model.stablehlo']
    assert file.get('weights') == (None if where == 'inside' else 'model.safetensors')
    assert (tmp_path / 'model.safetensors').exists() == (where == 'apart')
    image = images_of(3)
    np.save(tmp_path / 'images.npy', image)
    subprocess.run([sys.executable, '-c', ALONE, tmp_path, where], check=True)
    with np.load(tmp_path / 'out.npz') as found:
        for name, value in answers_of(loaded, image).items():
            np.testing.assert_allclose(found[name], value, atol=1e-5)


@pytest.mark.slow
def test_large_models_keep_their_parameters_beside_them(tmp_path):
    loaded, image = loaded_of(), images_of(2)
    for _ in range(2):  # The second time over the first.
        deployment.write(tmp_path, 'onnx', loaded, most_inside=100)
    data, file = tmp_path / 'model.onnx.data', tmp_path / 'model.onnx'
    assert (
        trees.nbytes(loaded.params) * 0.9 < data.stat().st_size < trees.nbytes(loaded.params) * 1.1
    )
    assert data.stat().st_mode & stat.S_IRGRP == file.stat().st_mode & stat.S_IRGRP
    found = ask(session_of(file), {'image': image.transpose(0, 3, 1, 2)})
    np.testing.assert_allclose(found['logits'], answers_of(loaded, image)['logits'], atol=1e-5)


def saved(folder, shapes, classes=0, names=None, **settings):
    """A checkpoint of random parameters, without training; and its model and parameters."""
    flat = {**tiny.MODEL, 'total_steps': 1, 'batch_size': 8, 'lr': 1e-3, 'image_size': 16}
    flat |= {'data.name': 'digits', 'model.variant': 'mu/4', **settings}
    built = config.resolve({k: int(v) if str(v).isdecimal() else v for k, v in flat.items()})
    module = build_model(built, classes, shapes, make_mesh(1, 1, 1, jax.devices()[:1]))
    inputs = {n: (s, np.dtype('f4' if n == 'image' else 'i4')) for n, s in shapes.items()}
    tree = jax.eval_shape(module.init, jax.random.key(0), example(inputs))['params']
    params = jax.tree.map(lambda x: x * np.float32(0.5), random_like(tree))
    checkpoint.save_params(folder, params, 0, built.to_dict(), names)
    return module, params


@pytest.mark.slow
def test_towers_are_files_of_their_own(tmp_path):
    """Their embeddings, by scale and bias, are the logits of the model that was trained."""
    shapes = {'image': (16, 16, 3), 'tokens': (9,), 'text_mask': (9,)}
    settings = {
        'task.name': 'contrastive', 'task.loss': 'sigmoid', 'task.embedding_dim': 16,
        'model.pool': 'map', 'model.dtype': 'float32',
        'streams.image.tokenizer': 'patches', 'streams.image.posemb': 'learned',
        'streams.text.tokenizer': 'words', 'streams.text.posemb': 'learned',
        'streams.text.depth': 1, 'data.name': 'captions', 'data.transform': 'byte_tokens(9)',
    }  # fmt: skip
    module, params = saved(tmp_path / 'run', shapes, **settings)
    rng = np.random.default_rng(0)
    image, tokens = images_of(3, 16), rng.integers(0, 200, (3, 9)).astype('i4')
    mask = (np.arange(9) < [[9], [4], [1]]).astype('u1')
    parts = {'image': image, 'tokens': tokens, 'text_mask': mask}
    logits, _ = jax.jit(module.apply)({'params': params}, parts)
    for to in deployment.FORMATS:
        out = tmp_path / to
        export.main(['--checkpoint', str(tmp_path / 'run'), '--to', to, '--out', str(out)])
        about = json.loads((out / 'model.json').read_text())
        if to == 'onnx':
            parts['image'] = image.transpose(0, 3, 1, 2)
            seen, read = (ask(session_of(out / f'{t}.onnx'), parts) for t in ('image', 'text'))
        else:
            files = [
                jax.export.deserialize(bytearray((out / f'{t}.stablehlo').read_bytes()))
                for t in ('image', 'text')
            ]
            seen, read = files[0].call(image), files[1].call(tokens, mask)
        cosines = np.asarray(seen['embedding']) @ np.asarray(read['embedding']).T
        found = about['logit_scale'] * cosines + about['logit_bias']
        np.testing.assert_allclose(found, logits, atol=2e-5)
        assert about['text'] == {
            'operations': 'byte_tokens(9)', 'tokenizer': 'bytes', 'first_byte': 3, 'end': 1,
            'padding': 0,
        }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['colour', 'grey', 'masked'])
def test_the_documented_lines_answer_as_predict_does(kind, tmp_path):
    """On pictures of several sizes, of a scanned model, by model.json alone."""
    task = 'masked' if kind == 'masked' else 'classification'
    settings = {
        'task.name': task, 'model.pool': 'cls', 'model.registers': 1, 'model.posemb': 'rope',
        'model.mlp': 'swiglu', 'model.depth': 2, 'image_size': 32,
        'data.name': 'folder', 'data.path': 'nowhere',
        'data.transform': 'rrc(size) | normalize()',
        'evals.test.split': 'test',
        'evals.test.transform': 'resize_small(36) | central_crop(size) | normalize()',
    }  # fmt: skip
    if kind == 'masked':
        settings |= {'task.decoder_width': 16, 'task.decoder_depth': 1, 'task.decoder_heads': 2}
        settings |= {'evals.test.type': 'knn', 'evals.test.train_split': 'train'}
    else:
        settings |= {'model.dtype': 'float32', 'model.lora': 2}
    if kind == 'grey':
        settings['data.transform'] = 'rrc(size)'
        settings['evals.test.transform'] = 'resize_small(36) | central_crop(size)'
    names = None if kind == 'masked' else ('bird', 'cat', 'dog')
    shape = (32, 32, 1 if kind == 'grey' else 3)
    saved(tmp_path / 'run', {'image': shape}, len(names or ()), names, **settings)
    rng = np.random.default_rng(0)
    pictures = []
    for i, size in enumerate([(50, 70), (90, 41), (36, 36)]):
        coarse = rng.integers(0, 255, (6, 5, 3), dtype=np.uint8)
        pictures.append(str(tmp_path / f'{i}.png'))
        Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(pictures[-1])
    out = tmp_path / 'out'
    export.main(['--checkpoint', str(tmp_path / 'run'), '--to', 'onnx', '--out', str(out)])
    text = (ROOT / 'docs' / 'interop.md').read_text()
    (script,) = re.findall(r'```python\n(import json\n.*?)```', text, re.DOTALL)
    loaded = big_vit.load(tmp_path / 'run')
    if kind == 'masked':  # The same lines ask for features.
        script = re.sub(
            r'    logits = .*',
            "    print(*session.run(['features'], {'image': x})[0][0])\n",
            script,
            flags=re.DOTALL,
        )
    command = [sys.executable, '-c', script, str(out), *pictures]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    if kind == 'masked':
        found = np.array([list(map(float, line.split())) for line in lines])
        np.testing.assert_allclose(found, loaded.embed(pictures), atol=0.05)  # bfloat16
        return
    for line, path, (best, *_) in zip(lines, pictures, loaded.predict(pictures), strict=True):
        assert line.split()[:2] == [path, best[0]]
        assert float(line.split()[2]) == pytest.approx(best[1], abs=1e-4)


def test_what_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    loaded = loaded_of(depth=1, activation='gelu_tanh')
    with monkeypatch.context() as patched:
        patched.delitem(operators.OPERATORS, 'tanh')
        with pytest.raises(UserError, match=r"operation 'tanh' of .*block_0/Mlp.*--to stablehlo"):
            deployment.write(tmp_path / 'a', 'onnx', loaded)
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, 'onnx', None)
        with pytest.raises(UserError, match=r"pip install 'big_vit\[onnx\]'"):
            deployment.write(tmp_path / 'b', 'onnx', loaded)
    assert not list(tmp_path.iterdir())
    kernel = loaded.params['head']['kernel']
    loaded.params['head']['kernel'] = kernel * np.float32('nan')
    with pytest.raises(UserError, match='NaN or infinite numbers in head/kernel'):
        deployment.write(tmp_path / 'c', 'stablehlo', loaded)
    loaded.params['head']['kernel'] = kernel
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match=r'--out .*file: onnx is a folder'):
        deployment.write(tmp_path / 'file', 'onnx', loaded)
    with pytest.raises(UserError, match='--set only goes with --from'):
        export.main(['--checkpoint', 'x', '--to', 'onnx', '--out', 'y', '--set', 'norm_eps=1'])


@pytest.mark.slow
def test_a_file_that_answers_otherwise_is_refused(tmp_path, monkeypatch):
    wrong = operators._plain('Sin')
    monkeypatch.setitem(operators.OPERATORS, 'tanh', wrong)
    loaded = loaded_of(depth=1, activation='gelu_tanh')
    with pytest.raises(UserError, match='differs by'):
        deployment.write(tmp_path, 'onnx', loaded)
    assert not list(tmp_path.iterdir())
