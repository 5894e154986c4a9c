"""Hugging Face's detectors: the same logits and boxes from their files, and from ours in theirs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peers import CLOSE, distance, peer, randomise

from big_vit import interop, trees
from big_vit.errors import UserError
from big_vit.interop import detectors
from big_vit.models.vit import make_vit
from big_vit.pretrained.load import config_of_weights, with_learnt
from big_vit.tasks.detection import detection
from big_vit.tasks.task import ExampleShape

CANVAS = (64, 96)
DETR = dict(
    d_model=32, encoder_layers=2, decoder_layers=3, encoder_ffn_dim=48, decoder_ffn_dim=48,
    encoder_attention_heads=4, decoder_attention_heads=4, num_queries=7,
)  # fmt: skip
YOLOS = dict(
    hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
    image_size=list(CANVAS), patch_size=16, num_detection_tokens=7,
)  # fmt: skip
# COCO's numbers of categories have gaps: a class without a name.
NAMES = {0: 'N/A', 1: 'person', 2: 'bicycle', 3: 'N/A', 4: 'car'}


def randomised(model):
    """With statistics of batch norms too."""
    import torch

    randomise(model, stem=2**0.5)
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if 'query_position' in name:  # As large as theirs, so that queries differ.
            parameter.data.normal_(generator=generator)
    for name, buffer in model.named_buffers():
        if name.endswith(('running_mean', '.weight', '.bias')):
            buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.1)
        if name.endswith(('.weight', 'running_var')):
            buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return model


def theirs(kind, folder, **more):
    transformers = peer('transformers')
    names = {'id2label': NAMES, 'label2id': {'person': 1}}
    if kind == 'detr':
        peer('timm')
        config = transformers.DetrConfig(**DETR, **names, **more)
        model = transformers.DetrForObjectDetection(config)
    else:
        more = {'use_mid_position_embeddings': False, **more}
        config = transformers.YolosConfig(**YOLOS, **names, **more)
        model = transformers.YolosForObjectDetection(config)
    model = randomised(model)
    model.save_pretrained(folder)
    return model


def batch(masked):
    rng = np.random.default_rng(1)
    image = rng.normal(size=(2, *CANVAS, 3)).astype(np.float32)
    size = np.array([[64, 96], [30, 60]] if masked else [CANVAS] * 2, np.int32)
    for picture, (height, width) in zip(image, size, strict=True):
        picture[height:] = picture[:, width:] = 0
    return image, size


def their_answer(model, image, size=None):
    import torch

    given = {'pixel_values': torch.from_numpy(image.transpose(0, 3, 1, 2).copy())}
    if size is not None:
        mask = np.zeros(image.shape[:3], np.int64)
        for row, (height, width) in zip(mask, size, strict=True):
            row[:height, :width] = 1
        given['pixel_mask'] = torch.from_numpy(mask)
    with torch.no_grad():
        found = model(**given)
    return found.logits.numpy(), found.pred_boxes.numpy()


def our_answer(weights, inputs):
    trunk = make_vit(**weights.settings, scan=False, dtype=jnp.float32)
    keys = {name: value for name, value in weights.learnt.task.items() if name != 'name'}
    classes = detectors.classes_of(weights.learnt)
    model = detection(**keys).model(trunk, ExampleShape({'image': (*CANVAS, 3)}, classes))
    params = jax.tree.map(jnp.asarray, with_learnt(weights))
    with jax.default_matmul_precision('highest'):
        found = jax.jit(model.apply)({'params': params}, jax.tree.map(jnp.asarray, inputs))
    return np.asarray(found.logits[-1]), np.asarray(found.boxes[-1])


def renamed(folder, pairs):
    """The file with names of arrays as transformers 5.x has them in memory."""
    import re

    from safetensors.numpy import load_file, save_file

    arrays, new = load_file(folder / 'model.safetensors'), {}
    for name, array in arrays.items():
        for pattern, other in pairs:
            name = re.sub(pattern, other, name)
        new[name] = array
    assert set(new) != set(arrays)
    save_file(new, folder / 'model.safetensors')


def same(first, second):
    return all(distance(a, b) <= CLOSE for a, b in zip(first, second, strict=True))


def test_detr_answers_the_same_and_goes_back(tmp_path):
    model = theirs('detr', tmp_path / 'hub')
    weights = interop.read(tmp_path / 'hub')
    assert weights.learnt.task == {
        'name': 'detection', 'queries': 7, 'decoder_depth': 3, 'l1_weight': 5.0,
        'giou_weight': 2.0, 'no_object_weight': 0.1,
    }  # fmt: skip
    assert weights.meta['class_names'] == tuple(NAMES.values())
    assert config_of_weights(weights).model.variant.startswith('R50+')
    image, size = batch(masked=True)
    wanted = their_answer(model, image, size)
    assert same(our_answer(weights, {'image': image, 'picture_size': size}), wanted)
    # Padding counts: without a mask both answer otherwise, and alike.
    without = their_answer(model, image)
    assert not same(without, wanted)
    transformers = peer('transformers')
    path = interop.write(tmp_path / 'back', 'hf_detr', weights)
    again = transformers.DetrForObjectDetection.from_pretrained(path).eval()
    assert again.config.id2label == NAMES
    assert same(their_answer(again, image, size), wanted)
    back = interop.read(path)
    for name, leaf in trees.flatten(with_learnt(weights)).items():
        np.testing.assert_array_equal(trees.flatten(with_learnt(back))[name], leaf, err_msg=name)
    # Names of transformers 5.x in memory.
    newer = (('backbone.conv_encoder', 'backbone'), ('out_proj', 'o_proj'),
             (r'(layers\.\d+)\.(fc[12])', r'\1.mlp.\2'))  # fmt: skip
    renamed(tmp_path / 'hub', newer)
    found = trees.flatten(with_learnt(interop.read(tmp_path / 'hub')))
    for name, leaf in trees.flatten(with_learnt(weights)).items():
        np.testing.assert_array_equal(found[name], leaf, err_msg=name)


def test_yolos_answers_the_same_and_goes_back(tmp_path):
    model = theirs('yolos', tmp_path / 'hub')
    weights = interop.read(tmp_path / 'hub')
    assert weights.learnt.task['query_place'] == 'trunk'
    assert weights.meta['class_names'] == tuple(NAMES.values())
    image, _ = batch(masked=False)
    wanted = their_answer(model, image)
    assert same(our_answer(weights, {'image': image}), wanted)
    transformers = peer('transformers')
    path = interop.write(tmp_path / 'back', 'hf_yolos', weights)
    again = transformers.YolosForObjectDetection.from_pretrained(path).eval()
    assert same(their_answer(again, image), wanted)
    back = interop.read(path)
    for name, leaf in trees.flatten(with_learnt(weights)).items():
        np.testing.assert_array_equal(trees.flatten(with_learnt(back))[name], leaf, err_msg=name)


@pytest.mark.parametrize(
    ('kind', 'more', 'message'),
    [
        ('detr', {'position_embedding_type': 'learned'}, 'learned'),
        ('detr', {'dilation': True}, 'dilated'),
        ('detr', {'activation_function': 'mish'}, "'mish'"),
    ],
)
def test_what_big_vit_has_not_is_refused(kind, more, message, tmp_path):
    theirs(kind, tmp_path, **more)
    with pytest.raises(UserError, match=message):
        interop.read(tmp_path)
