"""A loaded model answers as its evaluation scored, whatever it reads."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import overrides

import big_vit
from big_vit import config, evaluate, predict, train
from big_vit.build.data import asked_data
from big_vit.build.experiment import build_experiment
from big_vit.errors import UserError

SMALL = {
    'model.width': '24',
    'model.depth': '1',
    'model.mlp_dim': '24',
    'model.num_heads': '2',
    'total_steps': '2',
    'batch_size': '16',
}
slow = pytest.mark.slow


def trained(name, workdir, *changes, evals=('test',)):
    train.run(config.load(f'configs/{name}', overrides(SMALL, *changes, evals=evals)), workdir)
    return workdir


@pytest.mark.parametrize(
    ('task', 'kinds'),
    [
        pytest.param('orbit', ('video',), marks=slow),
        pytest.param('tones', ('audio',), marks=slow),
        pytest.param('phrases', ('text',), marks=slow),
        pytest.param('quiz', ('image', 'text'), marks=slow),
    ],
)
def test_a_model_of_any_input_is_as_sure_as_its_evaluation_found(task, kinds, tmp_path):
    """The mean of -log of the probability of each true class is the loss that was scored."""
    trained(f'sequences.py:task={task}', tmp_path)
    model = big_vit.load(tmp_path)
    assert model.kinds == kinds
    assert model.config is not None
    source = asked_data(config.override(model.config, [('data.split', 'test[:20]')]))
    likely = np.concatenate([some.probabilities for some in model.answers(source, {})])
    right = likely[np.arange(20), source.labels()]
    wanted = evaluate.run(tmp_path, 2)['test']['loss']
    assert -np.log(right).mean() == pytest.approx(wanted, rel=1e-4)


@pytest.mark.slow
def test_texts_are_given_as_they_are_or_as_files(tmp_path, capsys):
    model = big_vit.load(trained('sequences.py:task=phrases', tmp_path / 'run'))
    texts = ['the red dog bites the blue cat', 'ünïcödé 🦉', '']
    for i, words in enumerate(texts):
        (tmp_path / f'{i}.txt').write_text(words, encoding='utf-8')
    wanted = model(texts)
    paths = [tmp_path / f'{i}.txt' for i in range(3)]
    np.testing.assert_allclose(model(paths), wanted, atol=1e-6)
    assert np.ptp(wanted, axis=0).max() > 1e-6  # Different texts get different answers.
    capsys.readouterr()
    predict.main([str(tmp_path / 'run'), *map(str, paths), '--top', '1'])
    best = [model.class_names[row.argmax()] for row in wanted]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split('  ')[1].rsplit(' ', 1)[0] for line in lines] == best
    with pytest.raises(UserError, match='the model takes text: give paths or texts, not ndarray'):
        model([np.zeros((8, 8, 3), np.uint8)])
    with pytest.raises(UserError, match=r'x\.jpg: is image, and the model takes text'):
        model([Path('x.jpg')])


@slow
def test_sounds_are_given_as_files(tmp_path, capsys):
    import soundfile

    trained('sequences.py:task=tones', tmp_path / 'run')
    plain = big_vit.load(tmp_path / 'run')
    assert plain.config is not None
    source = asked_data(config.override(plain.config, [('data.split', 'test[:3]')]))
    sounds = source.load(np.arange(3))['audio']
    for i, sound in enumerate(sounds):
        soundfile.write(tmp_path / f'{i}.wav', sound, 8000, subtype='FLOAT')
    transform = f'decode_audio(8000, {sounds.shape[1] / 8000}) | {plain.transform}'
    model = big_vit.load(tmp_path / 'run', transform=transform)
    paths = [tmp_path / f'{i}.wav' for i in range(3)]
    wanted = np.concatenate([some.features for some in plain.answers(source)])
    np.testing.assert_allclose(model.embed(paths), wanted, atol=1e-4)
    np.testing.assert_allclose(model.embed([p.read_bytes() for p in paths]), wanted, atol=1e-4)
    (tmp_path / 'sounds').mkdir()
    (tmp_path / 'sounds' / 'notes.txt').write_text('a')
    with pytest.raises(UserError, match=r'has no sounds; 1 file left out \(1 \.txt\)'):
        predict.main([str(tmp_path / 'run'), str(tmp_path / 'sounds'), '--transform', transform])


@slow
def test_a_model_of_two_inputs_takes_both_or_says_so(tmp_path):
    model = big_vit.load(trained('sequences.py:task=quiz', tmp_path / 'run'))
    picture = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    answer = model([{'image': picture, 'text': 'is it red?'}])
    assert answer.shape == (1, len(model.class_names))
    with pytest.raises(UserError, match=r"takes image and text together: give \{'image': ...,"):
        model([picture])
    with pytest.raises(UserError, match='the model takes text, but there is only image'):
        model([{'image': picture}])
    with pytest.raises(UserError, match=r'takes image and text together: name data that has both'):
        predict.main([str(tmp_path / 'run'), str(tmp_path), '--top', '1'])


@slow
def test_a_model_of_pictures_and_words_chooses_among_names(tmp_path):
    workdir = trained('contrastive.py', tmp_path / 'run', evals=('all', 'unseen', 'pairs'))
    model = big_vit.load(workdir)
    with pytest.raises(UserError, match=r'compares pictures with words: name classes .*--classes'):
        model.predict([np.zeros((32, 32, 3), np.uint8)])
    assert model.config is not None
    source = asked_data(config.override(model.config, [('data.split', 'test[:20]')]))
    prompts = ('a {}', 'a picture of a {}')
    named = model.with_classes([name for name in source.class_names if name], prompts)
    answers = list(named.answers(source, {}))
    likely = np.concatenate([some.probabilities for some in answers])
    features = np.concatenate([some.features for some in answers])
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, atol=1e-5)
    # By hand: cosines with the vectors of the words, at the scale that was learned.
    texts = [p.format(n.replace('_', ' ')) for n in named.class_names for p in prompts]
    words = model.embed_text(texts).reshape(len(named.class_names), 2, -1).mean(1)
    words /= np.linalg.norm(words, axis=1, keepdims=True)
    logits = np.exp(float(model.params['logit_scale'])) * features @ words.T
    wanted = np.exp(logits - logits.max(1, keepdims=True))
    np.testing.assert_allclose(likely, wanted / wanted.sum(1, keepdims=True), atol=1e-4)
    places = np.cumsum([bool(name) for name in source.class_names]) - 1
    right = likely.argmax(1) == places[source.labels()]
    assert right.mean() == pytest.approx(evaluate.run(workdir, 2)['all']['top1'])
    for given, message in (
        ((['cat'],), 'name two different ones or more'),
        ((['cat', 'cat'],), 'name two different ones or more'),
        ((['cat', 'dog'], ['a photo']), "prompts: 'a photo' has no {} for the name of a class"),
    ):
        with pytest.raises(UserError, match=message):
            model.with_classes(*given)


@slow
def test_zero_shot_of_the_command_line(tmp_path, capsys):
    import cv2

    workdir = trained('contrastive.py', tmp_path / 'run', evals=('all', 'unseen', 'pairs'))
    picture = np.random.default_rng(0).integers(0, 256, (40, 32, 3), dtype=np.uint8)
    path = str(tmp_path / 'a.png')
    cv2.imwrite(path, picture)
    (tmp_path / 'names.txt').write_text('red square\nblue circle\n\ngreen cross\n')
    model = big_vit.load(workdir)
    names, prompts = ['red square', 'blue circle', 'green cross'], ['a {}', 'the {} there']
    ((first, likely), *_) = model.with_classes(names, prompts).predict([path], top=3)[0]
    for classes in (','.join(names), str(tmp_path / 'names.txt')):
        flags = ['--classes', classes, '--prompts', prompts[0], '--prompts', prompts[1]]
        capsys.readouterr()
        predict.main([str(workdir), path, *flags])
        assert capsys.readouterr().out.startswith(f'{path}  {first} {likely:.1%}')
    with pytest.raises(UserError, match='--prompts: are of names of classes'):
        predict.main([str(workdir), path, '--prompts', 'a {}'])


@slow
def test_masked_autoencoders_embed_by_their_trunk(tmp_path):
    from test_predict import SETTINGS
    from tiny import write_folder

    data = write_folder(tmp_path / 'data', examples=12)
    settings = {
        **SETTINGS,
        'data.path': str(data),
        'task.name': 'masked',
        'task.decoder_width': 16,
        'task.decoder_depth': 1,
        'task.decoder_heads': 2,
        'model.pool': 'gap',
        'evals.test.type': 'knn',
        'evals.test.k': (1,),
    }
    settings = config.resolve(settings)
    train.run(settings, tmp_path / 'run')
    model = big_vit.load(tmp_path / 'run')
    pixels = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)
    parts = build_experiment(settings)
    trunk = parts.task.trunk(parts.model)
    with jax.set_mesh(parts.mesh):
        image = pixels.astype(np.float32) * (2 / 255) - 1
        _, extra = trunk.apply({'params': model.params}, jnp.asarray(image))
    mine = big_vit.load(tmp_path / 'run', transform='resize(size)').embed(list(pixels))
    np.testing.assert_allclose(mine, extra['pre_logits'], atol=1e-5)
    with pytest.raises(UserError, match=r'no head that tells classes; ask for its features'):
        model(list(pixels))


@slow
def test_packed_images_are_refused_in_one_line(tmp_path):
    changes = {
        'data.name': 'digits',
        'data.path': 'default',
        'model.variant': 'mu/4',
        'model.tokenizer': 'ragged',
        'model.posemb': 'rope',
        'data.transform': 'ragged_patches(4, 9)',
        'evals.test.transform': 'ragged_patches(4, 9)',
    }
    model = big_vit.load(trained('fashion_mnist.py', tmp_path / 'run', changes))
    with pytest.raises(UserError, match='reads several images packed together'):
        model([np.zeros((8, 8, 1), np.uint8)])
