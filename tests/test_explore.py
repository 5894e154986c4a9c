"""`python -m big_vit.explore` on our checkpoints, on peers' weights, and on what is neither."""

import cv2
import jax.numpy as jnp
import numpy as np
import pytest
from commands import error_line, run
from gate import mostly_slow
from test_export import weights_of

from big_vit import explore, export, interop
from big_vit.errors import UserError
from big_vit.inspection import (
    attention_maps,
    loaded_model,
    patch_components,
    weight_statistics,
)

pytest.importorskip('safetensors')


@pytest.fixture(scope='module')
def places(tmp_path_factory):
    """The same weights as a workdir with scanned blocks, and as timm has them; a photograph."""
    folder = tmp_path_factory.mktemp('explore')
    weights = weights_of()
    export.to_checkpoint(weights, str(folder / 'run'), [('model.scan', 'true')])
    interop.write(folder / 'timm', 'timm', weights)
    photo = np.zeros((90, 120, 3), np.uint8)
    photo[20:50, 30:80] = (40, 120, 250)
    cv2.imwrite(str(folder / 'photo.jpg'), photo)
    return folder


def test_ours_and_a_peers_give_the_same_numbers(places):
    ours, theirs = (loaded_model.load(str(places / name)) for name in ('run', 'timm'))
    found = weight_statistics.compare(ours.params, theirs.params, ('run', 'timm'))
    assert found.overall.relative == 0 and not found.only_first
    assert ours.grid == theirs.grid == (2, 2) and ours.channels == theirs.channels == 3
    np.testing.assert_array_equal(ours.positions(), theirs.positions())
    assert ours.positions().shape == (4, 48)
    one, other = (attention_maps.from_file(each, places / 'photo.jpg') for each in (ours, theirs))
    assert one.image.shape == (32, 32, 3)
    np.testing.assert_array_equal(one.image, other.image)
    assert one.weights.shape == (2, 3, 5, 5)
    np.testing.assert_allclose(one.weights.sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(one.weights, other.weights, atol=1e-5)
    assert one.rollout.sum() == pytest.approx(1)
    assert one.distances.shape == (2, 3) and (one.distances < 16 * 2**0.5).all()


def test_patches_of_several_pictures_are_coloured_alike(places, tmp_path):
    ours, theirs = (loaded_model.load(str(places / name)) for name in ('run', 'timm'))
    picture = ours.normalised(ours.picture(places / 'photo.jpg'))
    tokens = ours.patch_tokens(picture)
    assert tokens.shape == (2, 2, 48)
    np.testing.assert_allclose(tokens, theirs.patch_tokens(picture), atol=1e-4)
    _, extra = ours.model.apply({'params': ours.params}, jnp.asarray(picture)[None])
    np.testing.assert_allclose(tokens.reshape(4, 48), extra['tokens'][0, 1:], atol=1e-4)
    paths = [str(places / 'photo.jpg')] * 2
    found = patch_components.from_files(theirs, paths)
    np.testing.assert_array_equal(*found.colours)
    assert found.colours.std() > 0 and found.pictures[0].shape == (32, 32, 3)


def test_a_foreground_is_of_pictures_to_draw(places):
    line = error_line(run('explore', places / 'run', '--foreground'))
    assert '--foreground is of the pictures of --png FOLDER' in line


def test_pictures_are_normalised_as_the_weights_have_seen_them(places):
    for name in ('run', 'timm'):
        found = loaded_model.load(str(places / name))
        black = found.normalised(np.zeros((1, 1, 3), np.uint8))[0, 0]
        np.testing.assert_allclose(black, [-0.1 / 0.4, -0.2 / 0.5, -0.3 / 0.6], rtol=1e-6)


def test_the_middle_of_a_picture_is_taken(places):
    wide = np.zeros((64, 256, 3), np.uint8)
    wide[:, 96:160] = 255
    cv2.imwrite(str(places / 'wide.png'), wide)
    found = loaded_model.load(str(places / 'timm'))
    assert (found.picture(places / 'wide.png') == 255).all()


@pytest.mark.parametrize('name', ['run', 'timm'])
def test_text_is_the_default(name, places, capsys):
    explore.main([str(places / name)])
    assert 'parameters, ' in capsys.readouterr().out
    explore.main([str(places / name), '--spectra', '--image', str(places / 'photo.jpg')])
    shown = capsys.readouterr().out
    assert 'stable rank' in shown and 'mean attention distance' in shown
    assert 'rollout over 2x2 patches' in shown and 'head 3' in shown
    explore.main([str(places / name), '--compare', str(places / 'timm')])
    assert 'all of these' in capsys.readouterr().out


@pytest.mark.parametrize('name', mostly_slow(['run', 'timm'], 'timm'))
@pytest.mark.slow
def test_pictures_need_no_data(name, places, tmp_path, capsys):
    path = str(places / name)
    explore.main([path, '--png', str(tmp_path / 'a')])
    found = capsys.readouterr()
    drawn = {file.stem for file in (tmp_path / 'a').iterdir()}
    assert drawn == {'embedding', 'positions'}
    if name == 'run':  # Its config names a folder of images that is not there.
        assert 'images.png is left out: config: data.path' in found.err
    more = ['--spectra', '--image', str(places / 'photo.jpg'), '--compare', str(places / 'timm')]
    explore.main([path, *more, '--png', str(tmp_path / 'b')])
    drawn = {file.stem for file in (tmp_path / 'b').iterdir()}
    assert drawn == {'spectra', 'norms', 'attention', 'distances', 'patches', 'comparison'}
    for file in (tmp_path / 'b').iterdir():
        assert cv2.imread(str(file)).std() > 5, file


def test_a_model_of_another_width_is_told_from_ours(places, tmp_path):
    interop.write(tmp_path / 'wide', 'timm', weights_of(width=96))
    result = run('explore', places / 'run', '--compare', tmp_path / 'wide')
    line = error_line(result)
    assert 'are of different architectures' in line and '96 and' not in line.split(':')[0]
    assert 'Transformer/encoderblock_0/LayerNorm_0/bias is 48 and 96' in line


def test_a_file_that_is_no_picture_is_told(places, monkeypatch):
    found = loaded_model.load(str(places / 'timm'))
    (places / 'text.jpg').write_text('no picture')
    with pytest.raises(UserError, match=r'text\.jpg: not an image .* name a JPEG'):
        found.picture(places / 'text.jpg')
    cut = (places / 'photo.jpg').read_bytes()[:400]
    (places / 'cut.jpg').write_bytes(cut)
    with pytest.raises(UserError, match=r'--image .*cut\.jpg'):
        found.picture(places / 'cut.jpg')
    with pytest.raises(UserError, match=r'nowhere\.jpg: cannot be read: No such file'):
        found.picture(places / 'nowhere.jpg')
    with pytest.raises(UserError, match='cannot be read: it is a folder'):
        found.picture(places)
    monkeypatch.setattr(loaded_model, 'MOST_PIXELS', 1000)
    with pytest.raises(UserError, match='90x120 pixels are more than 1,000; scale it down'):
        found.picture(places / 'photo.jpg')
    monkeypatch.setattr(loaded_model, 'MOST_BYTES', 100)
    with pytest.raises(UserError, match='is larger than'):
        found.picture(places / 'photo.jpg')


def test_attention_that_does_not_fit_is_refused(places, monkeypatch):
    monkeypatch.setattr(loaded_model, 'MOST_ATTENTION', 100)
    with pytest.raises(UserError, match='look at a smaller model'):
        attention_maps.from_file(loaded_model.load(str(places / 'timm')), places / 'photo.jpg')


def test_metrics_that_are_damaged_are_told(places, capsys):
    (places / 'run' / 'metrics.jsonl').write_text(
        '{"step": 1, "train/loss": 2}\n{"st\n{"step": 3}\n'
    )
    try:
        with pytest.raises(UserError, match=r'metrics\.jsonl, line 2: .* delete that line'):
            explore.main([str(places / 'run')])
    finally:
        (places / 'run' / 'metrics.jsonl').unlink()


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        (('nowhere',), 'nowhere: no such folder; give the --workdir of a training run'),
        (('nowhere', 'there', '--spectra'), '--spectra looks at one checkpoint; there are 2'),
    ],
)
def test_without_a_checkpoint_one_line_says_so(args, message):
    with pytest.raises(UserError, match=message):
        explore.main(list(args))


def test_a_config_of_another_version_hides_nothing_but_the_model(places, capsys):
    found = loaded_model.load(str(places / 'run'))
    found.sidecar['config']['a_key_of_tomorrow'] = 3
    assert found.settings()['a_key_of_tomorrow'] == 3
    explore.show(found)
    assert 'a_key_of_tomorrow = 3' in capsys.readouterr().out
    with pytest.raises(UserError, match='a_key_of_tomorrow'):
        _ = found.model


def test_which_parameters_is_a_question_to_ours_only(places):
    with pytest.raises(UserError, match='--which is for checkpoints of ours'):
        loaded_model.load(str(places / 'timm'), 'ema')
