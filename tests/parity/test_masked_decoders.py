"""Hugging Face's MAE with its decoder: the same loss and predictions, and pretraining goes on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peers import distance, images, peer, randomise

from big_vit import config, interop, trees
from big_vit.build.experiment import build_experiment
from big_vit.errors import UserError
from big_vit.models.vit import make_vit
from big_vit.pretrained.load import initial_params, with_learnt
from big_vit.tasks import masked
from big_vit.tasks.task import ExampleShape

SIZES = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32,
    patch_size=8, decoder_hidden_size=16, decoder_num_hidden_layers=3,
    decoder_num_attention_heads=4, decoder_intermediate_size=64,
)  # fmt: skip


def theirs(folder, **more):
    transformers = peer('transformers')
    import torch
    from transformers.models.vit_mae import modeling_vit_mae as theirs

    model = randomise(transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**SIZES, **more)))
    for table in (model.vit.embeddings.position_embeddings, model.decoder.decoder_pos_embed):
        # What its own constructor means to do; 5.24 leaves zeros.
        made = theirs.build_2d_sinusoidal_position_embedding(4, 4, table.shape[-1], cls_token=True)
        half = table.shape[-1] // 2
        table.data.copy_(torch.cat([made[:, half:], made[:, :half]], dim=-1)[None])
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize('names', ['as written', 'of 4.x'])
@pytest.mark.parametrize('normalised', [True, False])
def test_loss_and_predictions_are_the_same(names, normalised, tmp_path):
    model = theirs(tmp_path, norm_pix_loss=normalised)
    import torch
    from safetensors.numpy import load_file, save_file

    if names == 'of 4.x':
        file, old = tmp_path / 'model.safetensors', 'decoder.decoder_layers.'
        renamed = {
            n.replace('decoder.decoder_encoder.layer.', old): x for n, x in load_file(file).items()
        }
        assert any(n.startswith(old) for n in renamed)
        save_file(renamed, file)
    weights = interop.read(tmp_path)
    assert weights.learnt.task == {
        'name': 'masked', 'decoder_width': 16, 'decoder_depth': 3, 'decoder_heads': 4,
        'normalise_pixels': normalised,
    }  # fmt: skip
    batch = images(32, count=3)
    noise = np.random.default_rng(2).random((3, 16)).astype(np.float32)
    with torch.no_grad():
        wanted = model(
            torch.from_numpy(batch.transpose(0, 3, 1, 2).copy()), noise=torch.from_numpy(noise)
        )
    options = {k: v for k, v in weights.learnt.task.items() if k.startswith('decoder_')}
    trunk = make_vit(**weights.settings, scan=False, dtype=jnp.float32)
    ours = masked.masked(**options).model(trunk, ExampleShape({'image': (32, 32, 3)}, 0))
    params = jax.tree.map(jnp.asarray, with_learnt(weights))
    with jax.default_matmul_precision('highest'):
        given = {'image': jnp.asarray(batch), 'drawn': {'noise': jnp.asarray(noise)}}
        predicted, hidden = ours.apply({'params': params}, given['image'], noise=jnp.asarray(noise))
        loss = masked.masked_loss(ours, normalised)
        value, _ = loss(params, (), given, jax.random.key(0), 0)
    np.testing.assert_array_equal(hidden, wanted.mask.numpy())
    assert distance(np.asarray(predicted), wanted.logits.numpy()) < 5e-5
    assert float(value) == pytest.approx(float(wanted.loss), rel=1e-5)


def test_pretraining_goes_on_with_the_decoder(tmp_path, capsys):
    theirs(tmp_path)
    weights = interop.read(tmp_path)
    settings = {
        'task.name': 'masked', 'task.decoder_width': 16, 'task.decoder_depth': 3,
        'task.decoder_heads': 4, 'model.variant': 'mu/8', 'model.width': 32, 'model.depth': 2,
        'model.mlp_dim': 64, 'model.num_heads': 2, 'model.posemb': 'sincos2d_mae',
        'model.class_token': True, 'model.pool': 'cls', 'model.activation': 'gelu',
        'model.norm_eps': 1e-12, 'model.dtype': 'float32', 'image_size': 32, 'batch_size': 8,
        'total_steps': 1, 'lr': 0.1, 'data.name': 'digits', 'data.transform': 'rgb | resize(size)',
        'init': str(tmp_path),
    }  # fmt: skip
    resolved = config.resolve(settings)
    found = trees.flatten(initial_params(resolved, keep_head=True)(build_experiment(resolved)))
    beside = weights.learnt.params
    stacked = 'decoder/Transformer/encoderblock/MlpBlock_0/Dense_0/kernel'
    for i in range(3):
        name = f'decoder/Transformer/encoderblock_{i}/MlpBlock_0/Dense_0/kernel'
        np.testing.assert_array_equal(found[stacked][i], beside[name])
    for name in ('decoder/mask_token', 'decoder/prediction/kernel'):
        np.testing.assert_array_equal(found[name], beside[name])
    assert 'pos_embedding' not in found  # Fixed there too.
    assert 'starts anew' not in capsys.readouterr().out


def test_positions_that_were_trained_are_not_taken_for_fixed_ones(tmp_path):
    model = theirs(tmp_path)
    import torch

    with torch.no_grad():
        model.decoder.decoder_pos_embed += 0.1
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"positions of its own.*--drop 'decoder") as error:
        interop.read(tmp_path)
    assert '\n' not in str(error.value)
    assert interop.read(tmp_path, drop=[r'decoder\..*']).learnt is None
