"""Weights by name, against a server that answers as the hub does, and caches made by hand."""

import concurrent.futures
import hashlib
import io
import json
import shutil

import numpy as np
import pytest
from commands import error_line, run
from stand_in_hub import serve
from test_parts import behind, model
from tiny import RUN, flags, write_folder
from torch_writer import save

from big_vit import average, interop, trees
from big_vit.errors import UserError
from big_vit.interop import fit, hub, layout, locations, remote_files, timm_vit
from big_vit.pretrained.load import read_pretrained

constants = pytest.importorskip('huggingface_hub.constants')
SAFETENSORS = pytest.importorskip('safetensors.numpy')

NAME, OTHER = 'timm/vit_small_patch16_224.of_a_test', 'lab/model'
ARGUMENTS = {'embed_dim': 48, 'depth': 2, 'num_heads': 3, 'mlp_ratio': 2, 'img_size': 32}
CONFIG = {'architecture': 'vit_small_patch16_224', 'num_classes': 5, 'model_args': ARGUMENTS}


def files(seed=0, name='model.safetensors'):
    """What a repository of a small model has, and its parameters under our names."""
    ours, theirs = model(seed)
    config = json.dumps(CONFIG).encode()
    return {name: SAFETENSORS.save(theirs), 'config.json': config}, ours


def same(weights, wanted):
    found = trees.flatten(weights.params)
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array)


def point_at(monkeypatch, cache, url):
    """Settings that the hub's library reads from the environment when it is imported."""
    monkeypatch.setattr(constants, 'ENDPOINT', url)
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(cache))
    monkeypatch.setattr(constants, 'HF_HUB_DISABLE_XET', True)
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    template = url + '/{repo_id}/resolve/{revision}/{filename}'
    monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', template)
    for module in ('file_download', 'utils._http'):  # Where they were imported by name.
        for name in ('ENDPOINT', 'HUGGINGFACE_CO_URL_TEMPLATE', 'HF_HUB_CACHE'):
            target = f'huggingface_hub.{module}.{name}'
            monkeypatch.setattr(target, getattr(constants, name), raising=False)
    monkeypatch.setattr('big_vit.storage.PAUSES_S', (0.01, 0.01, 0.01))
    forget(monkeypatch)


def forget(monkeypatch):
    """What another process would not know."""
    monkeypatch.setattr(locations, '_fetched', {})
    monkeypatch.setattr(locations, '_recalled', {})


@pytest.fixture
def server(tmp_path, monkeypatch):
    with serve() as running:
        point_at(monkeypatch, tmp_path / 'cache', running.url)
        yield running


@pytest.fixture
def offline(tmp_path, monkeypatch):
    point_at(monkeypatch, tmp_path / 'cache', 'http://localhost:1')
    return tmp_path / 'cache'


def by_hand(cache, contents, repository=NAME, commit='a' * 40):
    folder = cache / f'models--{repository.replace("/", "--")}'
    (folder / 'refs').mkdir(parents=True)
    (folder / 'refs' / 'main').write_text(commit)
    (folder / 'snapshots' / commit).mkdir(parents=True)
    for name, data in contents.items():
        (folder / 'snapshots' / commit / name).write_bytes(data)


# Names.


def test_names_are_parsed():
    for spec, wanted in {
        'timm/vit_x.a_b': ('timm/vit_x.a_b', None, None, ''),
        'hf://lab/m': ('lab/m', None, None, ''),
        'hf-hub:lab/m@v1.0': ('lab/m', 'v1.0', None, ''),
        'hf://lab/m@refs/pr/4/sub/w.npz:img': ('lab/m', 'refs/pr/4', 'sub/w.npz', 'img'),
        'hf://lab/m@a%2Fb:ema': ('lab/m', 'a/b', None, 'ema'),
        'runs/fashion': None,
        'lab/m': None,
        'gs://bucket/w.npz': None,
    }.items():
        assert hub.parse(spec) == wanted
    for spec in ('hf://gpt', 'hf-hub:', 'hf://a/b@', 'hf://a b/c'):
        with pytest.raises(UserError, match='is named hf://OWNER/NAME'):
            hub.parse(spec)


# From the server.


def gets(server):
    """Paths of files that were fetched; the hub's library asks for things of its own, too."""
    return [path for method, path in server.requests if method == 'GET' and '/resolve/' in path]


def test_a_model_of_the_hub_is_the_one_in_its_repository(server, monkeypatch):
    contents, ours = files()
    commit = server.put(NAME, contents)
    weights = interop.read(NAME)
    same(weights, ours)
    assert weights.settings['num_heads'] == 3  # The config beside it was fetched, too.
    assert weights.meta['source'] == f'hf://{NAME}@{commit}/model.safetensors'
    got = gets(server)
    assert len(got) == 2 and not any(path.endswith('.bin') for path in got)
    interop.read(NAME)
    assert gets(server) == got
    # Another process, without a network.
    forget(monkeypatch)
    server.failures = [503] * 100
    same(interop.read(NAME), ours)


def test_safetensors_are_preferred_and_else_what_there_is_is_read(server, tmp_path):
    contents, ours = files()
    other, theirs = model(1)
    torch_file = save(theirs, tmp_path / 'w').read_bytes()
    server.put(NAME, contents | {'pytorch_model.bin': torch_file})
    same(interop.read(NAME), ours)
    config = {'config.json': contents['config.json']}
    server.put(OTHER, {**config, 'pytorch_model.bin': torch_file})
    same(interop.read(f'hf://{OTHER}'), other)
    in_two = dict(enumerate(np.array_split(list(theirs), 2)))
    parts = {f'part{i}.safetensors': {n: theirs[n] for n in names} for i, names in in_two.items()}
    index = {'weight_map': {n: file for file, part in parts.items() for n in part}}
    index_file = {'model.safetensors.index.json': json.dumps(index).encode()}
    shards = {file: SAFETENSORS.save(part) for file, part in parts.items()}
    server.put('lab/parts', {**config, **index_file, **shards})
    same(interop.read('hf://lab/parts'), other)


def test_a_file_and_a_part_of_it_can_be_named(server, tmp_path):
    (ours, theirs), (_, others) = model(0), model(1)
    file = save({'student': behind('backbone.', theirs), 'x': behind('y.', others)}, tmp_path / 'w')
    server.put(OTHER, {'sub/run.pth': file.read_bytes(), 'model.safetensors': b'another'})
    told = {'settings': {'num_heads': 3}, 'architecture': 'vit_small_patch16_224'}
    same(interop.read(f'hf://{OTHER}/sub/run.pth:student.backbone', **told), ours)


def test_a_revision_is_read_and_a_workdir_stays_with_its_own(server, tmp_path, monkeypatch):
    contents, ours = files(0)
    newer_contents, newer = files(1)
    old = server.put(NAME, contents)
    server.put(NAME, contents, 'v1')
    same(interop.read(NAME), ours)
    workdir = locations.epath.Path(tmp_path)
    interop.record(workdir)
    server.put(NAME, newer_contents)
    forget(monkeypatch)
    same(interop.read(f'{NAME}@v1'), ours)
    same(interop.read(f'{NAME}@{old}'), ours)
    same(interop.read(NAME), newer)
    forget(monkeypatch)
    interop.recall(tmp_path)
    weights = interop.read(NAME)
    same(weights, ours)
    assert f'@{old}/' in weights.meta['source']
    (tmp_path / locations.RECORD).write_text('[')
    with pytest.raises(UserError, match=r'init\.json: is not JSON .*; remove it'):
        interop.recall(tmp_path)


def test_a_local_path_goes_before_a_name(server, tmp_path, monkeypatch):
    contents, ours = files(0)
    server.put(NAME, files(1)[0])
    monkeypatch.chdir(tmp_path)
    (tmp_path / NAME).mkdir(parents=True)
    for name, data in contents.items():
        (tmp_path / NAME / name).write_bytes(data)
    same(interop.read(NAME), ours)
    assert interop.read(NAME).meta['source'] is None and not server.requests


def test_a_busy_server_is_asked_again(server):
    contents, ours = files()
    server.put(NAME, contents)
    server.failures = [503, 500]
    same(interop.read(NAME), ours)


@pytest.mark.slow  # The hub's library tries for a while.
def test_a_file_that_breaks_off_is_told_and_not_kept(server, monkeypatch, tmp_path):
    server.put(NAME, files()[0])
    server.cut = 100
    with pytest.raises(UserError, match=rf'{NAME}: model.safetensors cannot be fetched'):
        interop.read(NAME)
    assert not list((tmp_path / 'cache').rglob('snapshots/*/*'))
    server.cut = 0
    same(interop.read(NAME), files()[1])


def test_what_the_hub_refuses_is_one_line_that_names_the_cure(server):
    server.refused = {
        'lab/gated': (403, 'GatedRepo'),
        'lab/private': (401, 'RepoNotFound'),
        'lab/forbidden': (403, ''),
    }
    server.put(OTHER, {'README.md': b'none'})
    for spec, wanted in {
        'hf://lab/gated': r'lab/gated: is gated: accept its terms at http.*/lab/gated and log in',
        'hf://lab/private': r'there is no such model, or it is private: .*HF_TOKEN',
        'hf://lab/nowhere': r'lab/nowhere: there is no such model',
        f'hf://{OTHER}@v9': r"has no revision 'v9': see http.*/commits/main",
        f'hf://{OTHER}': r'there is no model.safetensors in it: name a file of http.*/tree/main',
        f'hf://{OTHER}/w.npz': r'there is no w.npz in it',
        'hf://lab/.m': r'no name of the hub',
        'hf://lab/forbidden': r'lab/forbidden: ',
    }.items():
        with pytest.raises(UserError, match=wanted) as caught:
            interop.load_init(spec)
        assert '\n' not in str(caught.value)


# Without a network.


def test_a_cache_made_by_hand_is_enough(offline):
    contents, ours = files()
    by_hand(offline, contents)
    same(interop.read(NAME), ours)
    same(interop.read(f'{NAME}@{"a" * 40}'), ours)


def test_offline_a_line_says_which_file_goes_where(offline, monkeypatch):
    for why, is_set in ((r'Connection refused', False), ('HF_HUB_OFFLINE is set', True)):
        monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', is_set)
        forget(monkeypatch)
        with pytest.raises(UserError) as caught:
            interop.load_init(NAME)
        text = str(caught.value)
        assert '\n' not in text and why in text
        assert 'model.safetensors is not in the cache' in text
        assert f'copy models--timm--{NAME[5:]} of another cache to {offline}' in text


def test_a_name_without_its_prefix_is_recognised(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'runs').mkdir()
    for spec, wanted in {
        'vit_tiny_patch16_224.augreg_in21k': r', or timm/vit_tiny_patch16_224.augreg_in21k of the',
        'google/vit-base-patch16-224': r', or hf://google/vit-base-patch16-224 of the hub$',
        'runs/fashion': r'checkpoints/STEP folders$',
        '../runs/fashion': r'checkpoints/STEP folders$',
    }.items():
        with pytest.raises(UserError, match=wanted):
            read_pretrained(spec)


# Behind URLs.


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """A store with checksums; `broken` makes its files come damaged."""
    import base64

    import fsspec
    from fsspec.implementations.memory import MemoryFileSystem

    class Store(MemoryFileSystem):
        protocol, store, pseudo_dirs = 'standin', {}, ['']
        cachable = False
        broken, gone, opened = False, False, 0

        @classmethod
        def _strip_protocol(cls, path):
            return '/' + path.rpartition('://')[2].strip('/')

        def info(self, path, **more):
            if Store.gone:
                raise ConnectionError('no route')
            about = super().info(path, **more)
            data = Store.store[path].getvalue()
            digest = hashlib.md5(data).digest()
            return about | {'md5Hash': base64.b64encode(digest).decode()}

        def _open(self, path, mode='rb', **more):
            Store.opened += mode == 'rb'
            data = Store.store[path].getvalue() if mode == 'rb' else b''
            if Store.broken:
                return io.BytesIO(data[:-1] + bytes([data[-1] ^ 1]))
            return super()._open(path, mode, **more)

    fsspec.register_implementation('standin', Store, clobber=True)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    monkeypatch.setattr('big_vit.storage.PAUSES_S', (0.01,))
    forget(monkeypatch)
    return Store


def test_a_file_behind_a_url_is_fetched_once_and_again_when_it_changes(bucket, tmp_path):
    url, (ours, theirs), (newer, others) = 'standin://b/w.safetensors', model(0), model(1)
    told = {'settings': {'num_heads': 3}, 'architecture': 'vit_small_patch16_224'}

    def read():
        locations._fetched.clear()
        return interop.read(url, **told)

    bucket().pipe_file('/b/w.safetensors', SAFETENSORS.save(theirs))
    weights = read()
    same(weights, ours)
    assert weights.meta['source'] == url
    same(read(), ours)
    assert bucket.opened == 1
    bucket().pipe_file('/b/w.safetensors', SAFETENSORS.save(others))
    same(read(), newer)
    assert bucket.opened == 2
    bucket.gone = True  # Without a network the one in the cache is read.
    same(read(), newer)
    with pytest.raises(
        UserError, match=r'b/x.npz: cannot be read \(no route\), and .*cache/big_vit'
    ):
        interop.load_init('standin://b/x.npz')
    bucket.gone = False
    with pytest.raises(UserError, match=r'b/x.npz: there is no such file'):
        interop.load_init('standin://b/x.npz')


def test_several_processes_of_a_host_fetch_a_file_once(bucket):
    bucket().pipe_file('/b/w.npz', bytes(range(256)) * 4096)
    with concurrent.futures.ThreadPoolExecutor(6) as threads:
        paths = list(threads.map(remote_files.fetch, ['standin://b/w.npz'] * 6))
    assert bucket.opened == 1
    assert {path.read_bytes() for path in paths} == {bytes(range(256)) * 4096}


def test_a_file_that_comes_damaged_is_not_kept(bucket, tmp_path):
    bucket().pipe_file('/b/w.safetensors', SAFETENSORS.save(model()[1]))
    bucket.broken = True
    with pytest.raises(UserError, match=r'w\.safetensors: cannot be read: its checksum'):
        interop.load_init('standin://b/w.safetensors')
    assert bucket.opened == 2  # It was tried again.
    kept = [path.name for path in (tmp_path / 'cache').rglob('*') if path.is_file()]
    assert kept == ['.w.safetensors.lock']


def test_a_file_of_a_web_server_is_read(server, tmp_path, monkeypatch):
    pytest.importorskip('aiohttp')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    contents, ours = files()
    server.put(OTHER, contents)
    url = f'{server.url}/{OTHER}/resolve/main/model.safetensors'
    told = {'settings': {'num_heads': 3}, 'architecture': 'vit_small_patch16_224'}
    same(interop.read(url, **told), ours)
    with pytest.raises(UserError, match=r'nothing\.npz: there is no such file'):
        interop.load_init(url.replace('model.safetensors', 'nothing.npz'))
    forget(monkeypatch)
    server.cut, server.failures = 0, [503] * 100
    same(interop.read(url, **told), ours)
    with pytest.raises(UserError, match=r'new\.npz: cannot be read .* is not there: where there'):
        interop.load_init(url.replace('model.safetensors', 'new.npz'))


def test_a_url_of_a_run_is_none_of_weights():
    assert interop.load_init('gs://bucket/run') is None
    assert interop.load_init('gs://bucket/run/checkpoints/100') is None


def test_a_url_leads_to_no_place_outside_of_the_cache():
    with pytest.raises(UserError, match=r'without \.\.'):
        remote_files.fetch('memory://b/../../../w.npz')


# State dicts without a config.


NAMED = 'test_vit'  # A ViT of timm's with 6 blocks of width 64.


def bare():
    """Its arrays as timm names them, for images of 32 pixels, and under our names."""
    settings = fit.complete(
        dict(
            num_classes=0, patch_size=(16, 16), width=64, depth=6, mlp_dim=192, num_heads=2,
            posemb='learned', posemb_prefix=1, pool='cls', activation='gelu',
        )
    )  # fmt: skip
    shapes = layout.shapes_of(settings, {'image_size': (32, 32), 'channels': 3})
    rng = np.random.default_rng(0)
    flat = {name: rng.normal(0, 0.02, shape).astype(np.float32) for name, shape in shapes.items()}
    rules = timm_vit.rules_of('timm', settings, shapes, {'distilled': False})
    return flat, layout.to_theirs(rules, flat)


def test_a_bare_state_dict_is_of_the_named_architecture_or_says_where_not(tmp_path):
    ours, theirs = bare()
    path = str(save(theirs, tmp_path / 'w.pth'))
    weights = interop.load_init(path, f'{NAMED}.r160_in1k')
    same(weights, ours)
    assert weights.settings['num_heads'] == 2 and weights.settings['norm_eps'] == 1e-6
    with pytest.raises(UserError, match=r'init_architecture: vit_tini_patch16_224 .* vit_\w+\?$'):
        interop.load_init(path, 'vit_tini_patch16_224')
    with pytest.raises(UserError, match='init_architecture'):
        interop.load_init(path)
    shapes = {name: array.shape for name, array in theirs.items()}
    patch = 'patch_embed.proj.weight'
    for found, name, wanted in (
        (shapes, 'resnet50', 'resnet50 is not a ViT that big_vit has'),
        (shapes, 'vit_base_patch16_224', r'proj\.weight is 64x3x16x16, and .* 768x3x16x16'),
        (shapes | {patch: (384, 3, 16, 16)}, 'vit_small_patch32_224', r'has 384x3x32x32'),
        (shapes | {'blocks.6.x': (1,)}, NAMED, r'there is a blocks\.6, and .* has 6 blocks'),
        (
            shapes | {patch: (768, 3, 16, 16)},
            'deit_base_patch16_224',
            r'there is no blocks\.6, and',
        ),
    ):
        with pytest.raises(UserError, match=wanted):
            timm_vit.check_architecture(name, found, 'w.pth')


def test_an_architecture_beside_what_says_its_own_is_an_error(tmp_path):
    for name, data in files()[0].items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=r"init_architecture='vit_base.*is vit_small.* by itself"):
        interop.load_init(str(tmp_path), 'vit_base_patch16_224')
    assert interop.load_init(str(tmp_path), 'vit_small_patch16_224') is not None


def test_a_mean_is_of_runs_and_says_how_weights_become_one(tmp_path):
    for name, data in files()[0].items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=rf'big_vit\.export --from {tmp_path} --out RUN'):
        average.run([str(tmp_path)] * 2, [0.5, 0.5], str(tmp_path / 'mean'))


# As commands.


@pytest.mark.slow
def test_commands_take_names_and_state_dicts(tmp_path, monkeypatch):
    photos = write_folder(tmp_path / 'photos', examples=12)
    picture = next(photos.rglob('*.jpg'))
    contents, _ = files()
    recipe = ['--config', 'big_vit:transfer:own,path=' + str(photos) + ',size=32']
    small = flags(RUN, {'schedule.warmup_steps': 1})
    with serve() as server:
        server.put(NAME, contents)
        for name, value in {
            'HF_HOME': str(tmp_path / 'home'), 'HF_ENDPOINT': server.url, 'HF_HUB_DISABLE_XET': '1',
        }.items():  # fmt: skip
            monkeypatch.setenv(name, value)
        monkeypatch.delenv('HF_HUB_OFFLINE', raising=False)

        def done(*words):
            result = run(*words)
            assert result.returncode == 0, result.stdout + result.stderr
            return result.stdout

        workdir = tmp_path / 'transfer'
        text = done('transfer', *recipe, *small, f'--config.init={NAME}', '--workdir', workdir)
        assert f'init    hf://{NAME}@' in text
        origin = json.loads((workdir / 'init.json').read_text())[NAME]
        assert origin in text
        assert done('predict', NAME, picture, '--top', 2).count('%') == 2
        assert 'embedding/kernel' in done('explore', f'hf://{NAME}')
        done('export', '--from', NAME, '--out', tmp_path / 'run')
        assert (tmp_path / 'run' / 'checkpoints' / '0').is_dir()
        # A run that begins again takes what it took, though there is something newer.
        server.put(NAME, files(1)[0])
        (workdir / 'transfer.json').unlink()
        shutil.rmtree(workdir / 'pretrained' / 'checkpoints')
        (workdir / 'pretrained' / 'metrics.jsonl').unlink()
        again = done('transfer', *recipe, *small, f'--config.init={NAME}', '--workdir', workdir)
        assert f'init    {origin}' in again
    state_dict = save(bare()[1], tmp_path / 'w.pth')
    named = [f'--config.init={state_dict}', f'--config.init_architecture={NAMED}']
    assert '6 blocks of width 64' in done('transfer', *recipe, *small, *named, '--explain')
    result = run(
        'transfer',
        *recipe,
        *small,
        named[0],
        '--config.init_architecture=tost_vit',
        '--workdir',
        workdir,
    )
    assert 'did you mean test_vit' in error_line(result)
