"""Two streams apart: losses and scores against loops in float64, towers alone, on any mesh."""

import json
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import error_line, run
from gate import mostly_slow
from sample_models import INPUTS, PICTURE, example, operations, random_like
from tiny import audited, flags, overrides, write_captioned

from big_vit import checkpoint, config, metrics, sharding, state, train
from big_vit.build.data import host_batches
from big_vit.build.evaluations import build_evaluators
from big_vit.build.experiment import build_experiment, example_indices
from big_vit.build.model import build_model
from big_vit.build.steps import build_train_step
from big_vit.data.sources import captions, sprites
from big_vit.data.sources.base import Request
from big_vit.errors import UserError
from big_vit.models import flops
from big_vit.models.encoder import EncoderConfig
from big_vit.models.layers import Style
from big_vit.models.tokenizers import Stream
from big_vit.models.two_towers import TwoTowers
from big_vit.pretrained.load import read_pretrained
from big_vit.tasks.batch import model_inputs
from big_vit.tasks.contrastive import contrastive_loss, row_hashes

BOTH = {**PICTURE, **INPUTS['words'][1]}
STREAMS = (
    Stream('look', patch_size=(4, 4)),
    Stream('read', tokenizer='words', vocab=11, posemb='learned', depth=1),
)
TINY = {
    'model.width': '24',
    'model.depth': '1',
    'model.mlp_dim': '24',
    'model.num_heads': '2',
    'task.embedding_dim': '8',
    'batch_size': '16',
    'total_steps': '4',
    'log.every_steps': '1',
    'evals.all.split': 'test[:100]',
    'evals.unseen.split': 'unseen[:60]',
    'evals.pairs.split': 'test[:50]',
}


def model(**changes):
    sizes = {'scan': False, 'pool': 'gap', 'logit_bias': None, **changes}
    encoder = EncoderConfig(
        **dict(width=24, depth=2, mlp_dim=20, num_heads=2, scan=sizes.pop('scan')),
        style=Style(dtype=jnp.float32),
    )
    return TwoTowers(STREAMS, encoder, embedding_dim=6, **sizes)


def batch_of(size, seed=0):
    rng = np.random.default_rng(seed)
    mask = (np.arange(9) < rng.integers(2, 10, (size, 1))).astype(np.uint8)
    return {
        'image': rng.standard_normal((size, 16, 16, 3)).astype(np.float32),
        'tokens': rng.integers(0, 11, (size, 9)).astype(np.int32) * mask,
        'text_mask': mask,
    }


def call(net, params, given):
    params, given = jax.tree.map(jnp.asarray, (params, given))
    return net.apply({'params': params}, given)


@pytest.fixture(scope='module', params=mostly_slow(['gap', 'map'], 'map'))
def tower_pair(request):
    net = model(pool=request.param, logit_bias=-3.0)
    return net, random_like(state.abstract_params(net, BOTH))


@pytest.fixture(autouse=True, scope='module')
def full_precision():
    with jax.default_matmul_precision('highest'):
        yield


# The model.


@pytest.mark.slow
def test_a_tower_alone_says_what_it_says_beside_the_other(tower_pair):
    net, params = tower_pair
    batch = batch_of(5)
    logits, both = call(net, params, batch)
    picture, _ = call(net, params, batch['image'])
    words = {name: batch[name] for name in ('tokens', 'text_mask')}
    text, _ = call(net, params, words)
    np.testing.assert_allclose(picture, both['look'], atol=1e-6)
    np.testing.assert_allclose(text, both['read'], atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(picture, axis=1), 1, atol=1e-6)
    scale, bias = float(np.exp(params['logit_scale'])), float(params['logit_bias'])
    wide = scale * np.asarray(picture, float) @ np.asarray(text, float).T + bias
    np.testing.assert_allclose(logits, wide, atol=1e-5)
    # Neither knows of the other, nor of what is no word.
    other = {**batch_of(5, seed=1), 'image': batch['image']}
    _, changed = call(net, params, other)
    np.testing.assert_array_equal(changed['look'], both['look'])
    assert np.abs(changed['read'] - both['read']).max() > 0.01
    padded = np.where(batch['text_mask'], batch['tokens'], 7)
    _, same = call(net, params, {**batch, 'tokens': padded})
    np.testing.assert_allclose(same['read'], both['read'], atol=1e-6)


@pytest.mark.parametrize('scan', mostly_slow([False, True], True))
def test_operations_and_tokens_are_those_of_the_trace(tower_pair, scan):
    net = model(pool=tower_pair[0].pool, scan=scan)
    variables = {'params': state.abstract_params(net, BOTH)}
    counts = []
    for batch in (1, 4):
        traced = jax.make_jaxpr(net.apply)(variables, example(BOTH, batch))
        counts.append(flops.count(net.apply, variables, example(BOTH, batch)))
        assert counts[-1] == operations(traced)
    # Each example of one stream is compared with all of the other.
    assert counts[1] - 4 * counts[0] == (4 * 4 - 4) * 2 * net.embedding_dim
    assert net.sequence_length({part: shape for part, (shape, _) in BOTH.items()}) == 16 + 9


def test_the_shared_encoder_is_there_once():
    net = model()
    params = state.abstract_params(net, BOTH)
    assert set(params) == {
        *('Transformer', 'look', 'read', 'shared_look', 'shared_read', 'logit_scale')
    }
    assert 'Transformer' in params['read'] and 'Transformer' not in params['look']


# The losses.


def wanted_loss(logits, together, kind):
    """Both losses as the papers write them, in loops."""
    size, total = len(logits), 0.0
    if kind == 'sigmoid':
        for i in range(size):
            for j in range(size):
                sign = 1 if together[i, j] else -1
                total += np.log1p(np.exp(-sign * logits[i, j]))
        return total / size
    for way, pairs in ((logits, together), (logits.T, together.T)):
        for i in range(size):
            log_sum = np.log(np.exp(way[i]).sum())
            own = [way[i, j] - log_sum for j in range(size) if pairs[i, j]]
            total -= sum(own) / len(own)
    return total / (2 * size)


@pytest.mark.parametrize('kind', ['softmax', 'sigmoid'])
@pytest.mark.parametrize('repeated', [False, True])
def test_losses_against_loops(kind, repeated):
    rng = np.random.default_rng(3)
    logits = rng.standard_normal((7, 7)).astype(np.float32) * 3
    tokens = np.arange(7 * 4).reshape(7, 4)
    if repeated:
        tokens[4], tokens[6] = tokens[1], tokens[1]
    together = (tokens[:, None] == tokens[None]).all(-1)

    def apply(variables, given, train, rngs):
        return logits, {}

    batch = {'tokens': jnp.asarray(tokens)}
    loss = contrastive_loss(Mock(spec=TwoTowers, apply=apply, streams=STREAMS), kind)
    found, aux = loss({}, (), batch, None, 0)
    wide = wanted_loss(logits.astype(float), together, kind)
    assert float(found) == pytest.approx(wide, rel=1e-6)
    hits = [together[i, logits[i].argmax()] for i in range(7)]
    assert float(aux.metrics['accuracy']) == pytest.approx(np.mean(hits))
    # Without words only the diagonal belongs together.
    pictures = Mock(spec=TwoTowers, apply=apply, streams=(STREAMS[0],) * 2)
    alone, _ = contrastive_loss(pictures, kind)({}, (), batch, None, 0)
    assert float(alone) == pytest.approx(wanted_loss(logits.astype(float), np.eye(7), kind))


def test_hashes_tell_any_two_rows_apart():
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 4, (4000, 6)).astype(np.int32)
    numbers = np.asarray(row_hashes(jnp.asarray(rows)))
    assert len(np.unique(numbers, axis=0)) == len(np.unique(rows, axis=0)) < 4000
    swapped = row_hashes(jnp.asarray([[1, 2, 0], [2, 1, 0], [1, 2, 0]]))
    assert (swapped[0] == swapped[2]).all() and (swapped[0] != swapped[1]).all()


def load(*parts, loss='sigmoid'):
    return config.load(f'configs/contrastive.py:loss={loss}', overrides(TINY, *parts))


@pytest.mark.parametrize('loss', [pytest.param('softmax', marks=pytest.mark.slow), 'sigmoid'])
def test_the_loss_is_of_the_whole_batch_of_all_devices(loss):
    settings = load(loss=loss)
    parts = build_experiment(settings)
    assert parts.mesh.size == 8
    with jax.set_mesh(parts.mesh):
        now = state.create(parts.model, parts.data.inputs, parts.optimizer, 0, parts.abstract_state)
        batch = next(host_batches(parts.data, 0, slice(None)))
        placed = jax.device_put(batch, sharding.batch_sharding(parts.mesh))
        params = jax.device_get(now['params'])
        _, values = build_train_step(settings, parts)(now, placed)
    given = model_inputs(jax.tree.map(jnp.asarray, batch))
    logits, _ = call(plain(loss), params, given)
    words = batch['tokens']
    together = (words[:, None] == words[None]).all(-1)
    wide = wanted_loss(np.asarray(logits, float), together, loss)
    assert float(values['loss']) == pytest.approx(wide, rel=1e-5)


def plain(loss='sigmoid'):
    """The model of the config, on one device."""
    return build_experiment(load(loss=loss), jax.devices()[:1]).model


# The data.


def test_captions_say_what_is_seen():
    source = captions.captions(Request('test', image_size=(32, 32)))
    columns = source.load(np.arange(360))
    for image, text, label in zip(*(columns[n] for n in ('image', 'text', 'label')), strict=True):
        hue, shape = source.class_names[label].split()
        assert hue in text and shape in text
        # The noise is grey; what is brighter by far than its channel's median is the shape.
        high = image.reshape(-1, 3).astype(int) - np.median(image.reshape(-1, 3), axis=0)
        on = tuple(bool(n) for n in np.percentile(high, 97, axis=0) > 60)
        assert on == tuple(bool(n) for n in sprites.RGB[sprites.COLOURS.index(hue)]), text


def test_training_never_shows_six_pairs_but_all_their_words():
    train_, test = (
        captions.captions(Request(split, image_size=(16, 16))) for split in ('train', 'test')
    )
    assert train_.class_names == test.class_names and len(set(test.class_names)) == 36
    assert train_.num_classes == test.num_classes == 36
    shown = {train_.class_names[n] for n in np.unique(train_.labels())}
    unseen = set(test.class_names) - shown
    assert len(unseen) == 6
    held_out = captions.captions(Request('unseen', image_size=(16, 16)))
    assert {held_out.class_names[n] for n in held_out.labels()} == unseen
    columns = held_out.load(np.arange(40))
    for text, label in zip(columns['text'], columns['label'], strict=True):
        assert all(word in text for word in test.class_names[label].split())
    for side in (0, 1):
        assert len({name.split()[side] for name in unseen}) == 6
        assert len({name.split()[side] for name in shown}) == 6
    texts = train_.load(np.arange(2000))['text']
    assert not any(all(word in text for word in name.split()) for name in unseen for text in texts)


# From the command to the scores.


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp('contrastive') / 'w'
    settings = load()
    train.run(settings, workdir)
    return workdir


def test_it_trains_and_is_scored(trained):
    rows = metrics.read(trained)
    assert len([row for row in rows if 'train/loss' in row]) == 4
    scored = {name: value for row in rows for name, value in row.items()}
    assert scored['all/count'] == 100 and scored['unseen/count'] == 60
    assert scored['pairs/count'] == scored['pairs/back/count'] == 50


def as_bytes(texts):
    tokens, mask = (np.zeros((len(texts), 40), kind) for kind in (np.int32, np.uint8))
    for row, text in enumerate(texts):
        numbers = [byte + 3 for byte in text.encode()] + [1]
        tokens[row, : len(numbers)], mask[row, : len(numbers)] = numbers, 1
    return {'tokens': tokens, 'text_mask': mask}


@pytest.mark.slow
def test_scores_of_the_command_on_three_devices_are_those_of_loops(trained):
    scores = json.loads(run('evaluate', '--checkpoint', trained, '--json', devices=3).stdout)
    params, _ = checkpoint.load_params(trained, checkpoint.steps(trained)[-1], 'params')
    net = plain()
    # Zero-shot: the mean of what two sentences say, against 100 pictures.
    source = captions.captions(Request('test', image_size=(32, 32)))
    columns = source.load(np.arange(100))
    sentences = [
        text for name in source.class_names for text in (f'a {name}', f'a picture of a {name}')
    ]
    said, _ = call(net, params, as_bytes(sentences))
    kinds = []
    for own in np.asarray(said, float).reshape(36, 2, -1):
        mean = sum(vector / np.linalg.norm(vector) for vector in own)
        kinds.append(mean / np.linalg.norm(mean))
    image = columns['image'].astype(np.float32) * (2 / 255) - 1
    seen, _ = call(net, params, image)
    best = (np.asarray(seen, float) @ np.array(kinds).T).argmax(1)
    # Of nearly equal ones another may win.
    right = float((best == columns['label']).mean())
    assert scores['all']['top1'] == pytest.approx(right, abs=0.011)
    # Matching: the first place of a caption with the same words.
    given = as_bytes(columns['text'][:50])
    _, both = call(net, params, {'image': image[:50], **given})
    near = np.asarray(both['image'], float) @ np.asarray(both['text'], float).T
    words = given['tokens']
    same = (words[:, None] == words[None]).all(-1)
    for way, pairs, prefix in ((near, same, ''), (near.T, same.T, 'back/')):
        place = [
            min(np.flatnonzero(row[np.argsort(-line, kind='stable')]))
            for line, row in zip(way, pairs, strict=True)
        ]
        for k in (1, 5, 10):
            got = scores['pairs'][f'{prefix}recall@{k}']
            assert got == pytest.approx(np.mean(np.array(place) < k), abs=0.021)


@pytest.mark.slow
def test_without_words_each_example_matches_only_itself():
    settings = config.resolve(
        {
            'total_steps': 1,
            'batch_size': 16,
            'image_size': 16,
            'lr': 0.0,
            'model.variant': 'mu/8',
            'model.width': 24,
            'model.depth': 1,
            'model.num_heads': 2,
            'model.mlp_dim': 24,
            'model.dtype': 'float32',
            'task.name': 'contrastive',
            'streams.fine.patch': 4,
            'streams.rough.patch': 8,
            'task.embedding_dim': 8,
            'data.name': 'digits',
            'data.transform': 'resize(size)',
            'evals.pairs.type': 'matching',
            'evals.pairs.split': 'test[:40]',
        }
    )
    parts = build_experiment(settings)
    params = random_like(state.abstract_params(parts.model, parts.data.inputs))
    placed = jax.device_put(params, state.shardings(parts.abstract_state)['params'])
    with jax.set_mesh(parts.mesh):
        found = build_evaluators(settings, parts)['pairs'](placed, {})
    image = parts.evals['pairs'].source.load(np.arange(40))['image']
    image = parts.evals['pairs'].transform({'image': image}, np.zeros(40, np.uint64))['image']
    net = build_experiment(settings, jax.devices()[:1]).model
    _, both = call(net, params, np.asarray(image, np.float32) * (2 / 255) - 1)
    near = np.asarray(both['fine'], float) @ np.asarray(both['rough'], float).T
    own = (near > np.diag(near)[:, None]).sum(1)
    for k in (1, 5, 10):
        assert found[f'recall@{k}'] == pytest.approx((own < k).mean(), abs=0.026)
    assert 0 < found['recall@10'] < 1 and found['count'] == 40
    # Nor is there anything to make sentences for.
    with pytest.raises(UserError, match='one stream of words'):
        wrong = config.override(settings, [('evals.pairs.type', 'zero_shot')])
        build_evaluators(wrong, build_experiment(wrong))


@pytest.mark.slow
def test_features_are_of_what_is_seen_whatever_streams_are_called():
    flat = config.flatten(load().to_dict())
    kept = ('model.', 'task.', 'data.', 'batch_size', 'image_size', 'lr')
    given = {k: v for k, v in flat.items() if k.startswith(kept) and v is not None}
    settings = config.resolve(
        {
            **given,
            'total_steps': 1,
            'streams.caption.tokenizer': 'words',
            'streams.picture.tokenizer': 'patches',
            # Pictures alone, without words.
            'evals.near.type': 'knn',
            'evals.near.name': 'captions',
            'evals.near.transform': "keep('image', 'label')",
        }
    )
    parts = build_experiment(settings)
    assert [stream.name for stream in parts.model.streams] == ['picture', 'caption']
    assert parts.evals['near'].reads == ('image',)
    build_evaluators(settings, parts)
    params = random_like(state.abstract_params(parts.model, parts.data.inputs))
    net = build_experiment(settings, jax.devices()[:1]).model
    image = np.zeros((2, 32, 32, 3), np.float32)
    _, alone = call(net, params, image)
    _, both = call(net, params, {'image': image, **as_bytes(['a', 'b'])})
    np.testing.assert_allclose(both['pre_logits'], alone['pre_logits'], atol=1e-6)


def test_the_scale_of_clip_ends_at_100_and_that_of_siglip_does_not():
    batch = batch_of(4)
    for bias, most in ((None, 100.0), (-1.0, np.exp(6.0))):
        net = model(logit_bias=bias)
        params = {**random_like(state.abstract_params(net, BOTH)), 'logit_scale': np.float32(6)}
        params |= {} if bias is None else {'logit_bias': np.float32(bias)}
        logits, both = call(net, params, batch)
        wide = most * np.asarray(both['look'], float) @ np.asarray(both['read'], float).T
        np.testing.assert_allclose(logits, wide + (bias or 0), rtol=1e-4, atol=1e-3)


def test_a_tower_goes_on_as_a_model_of_one_input(trained):
    found = read_pretrained(str(trained), 'image')
    assert set(found.params) == {'Transformer', 'embedding', 'pos_embedding'}
    params, _ = checkpoint.load_params(trained, checkpoint.steps(trained)[-1], 'params')
    image = batch_of(3)['image']
    image = np.concatenate([np.concatenate([image, image], 1)] * 2, 2)
    _, wanted = call(plain(), params, image)
    alone = build_model(
        found.config.replacing({'total_steps': 1}),
        0,
        {'image': (32, 32, 3)},
        sharding.make_mesh(1, 1, 1, jax.devices()[:1]),
    )
    _, got = call(alone, found.params, image)
    np.testing.assert_allclose(got['pre_logits'], wanted['pre_logits'], atol=1e-5)


# What is refused.


WRONG = [
    ({'model.pool': 'cls'}, ("'gap' or 'map'", "task.name='contrastive'")),
    ({'model.registers': '2'}, ('model.registers', "task.name='contrastive'")),
    ({'mixup': '0.2'}, ('mix labels', "task.name='contrastive'")),
    ({'task.label_smoothing': '0.1'}, ('task.label_smoothing', "read by task 'classification'")),
    ({'model.latents': '4'}, ('model.latents', 'never reads')),
    ({'evals.all.type': 'classification'}, ('evals.all.type', "'zero_shot', 'matching'")),
    ({'evals.all.prompts': "('a photo',)"}, ('evals.all.prompts', 'has no {}')),
    ({'evals.pairs.prompts': "('a {}',)"}, ("read by type 'zero_shot'",)),
    ({'model.fusion': 'cross', 'model.queries': 'image'}, ("model.fusion='cross'", 'apart')),
    ({'model.fusion': 'latents'}, ("model.fusion='latents'", 'apart')),
    (
        {'task.name': 'classification', 'task.embedding_dim': 'default'},
        ('compares two streams', "task.name='contrastive'"),
    ),
    ({'streams.more.tokenizer': 'patches'}, ('two streams, and there are 3', 'streams.NAME')),
    ({'data.transform': "keep('image', 'label')"}, ('but no tokens',)),
]


@pytest.mark.parametrize('change, parts', WRONG, ids=lambda x: next(iter(x)))
def test_bad_configs_say_what_is_wrong(change, parts):
    with pytest.raises(UserError) as caught:
        audited(load(change))
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize('name', ['Transformer', 'logit_scale'])
def test_a_stream_has_the_name_of_no_other_part(name):
    given = load({})._given().items()
    renamed = {key.replace('streams.image.', f'streams.{name}.'): value for key, value in given}
    with pytest.raises(UserError, match=f'streams.{name}: another part of the model has this name'):
        build_experiment(config.resolve(renamed))


def test_a_tower_that_is_not_there_is_named(trained, tmp_path):
    command = ['transfer', '--config', 'configs/transfer_digits.py', '--workdir', tmp_path / 'w']
    for tower, parts in (
        (None, ('init_tower must say', 'image or text')),
        ('sound', ("init_tower='sound'", 'image, text')),
        ('text', ('blocks of its own', 'streams.text.depth=1')),
    ):
        more = {'init': str(trained), **({'init_tower': tower} if tower else {})}
        line = error_line(run(*command, *flags(more)))
        for part in parts:
            assert part in line


def test_shards_of_pictures_and_captions_need_no_labels(tmp_path):
    write_captioned(tmp_path)
    columns = captions.captions(Request('train', image_size=(32, 32))).load(np.arange(32))
    own = {'data.name': 'tar', 'data.path': str(tmp_path), 'data.text_column': 'txt'}
    pairs = {'evals.pairs.split': 'train[:20]', 'evals.pairs.transform': 'decode | byte_tokens(40)'}
    # Zero-shot is of another dataset than that of training.
    others = {'evals.all.name': 'captions', 'evals.unseen.name': 'captions'}
    settings = load(own, pairs, others, {'data.transform': 'decode | byte_tokens(40)'})
    parts = build_experiment(settings)
    batch = next(host_batches(parts.data, 0, slice(None)))
    index = example_indices(parts, 0)
    np.testing.assert_array_equal(batch['image'], columns['image'][index])
    wanted = as_bytes([columns['text'][i] for i in index])
    np.testing.assert_array_equal(batch['tokens'], wanted['tokens'])
