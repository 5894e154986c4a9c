"""transformers' ViT, DeiT, DINOv2, SigLIP, DINOv3 and ViTMAE answer as ours do, both ways."""

import numpy as np
import pytest
from peers import CLOSE, WRONG, distance, export_and_read, images, ours, peer, randomise, theirs

from big_vit import interop, trees
from big_vit.errors import UserError

SIZES = dict(
    hidden_size=48,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=96,
    image_size=32,
    patch_size=16,
)


def pooled(y):
    return y.pooler_output


def mean(outputs):
    return outputs.last_hidden_state.mean(1)


def first(y):
    return y.last_hidden_state[:, 0]


def logits(y):
    return y.logits


def unshuffled(model):
    """ViTMAE with all patches, in their order."""
    import torch

    def call(batch):
        noise = torch.arange(4.0).repeat(len(batch), 1)
        return model(batch, noise=noise)

    return call


# format: (model, config, what to compare, more of the config, --drop)
MODELS = {
    'hf_vit': ('ViTForImageClassification', 'ViTConfig', logits, dict(num_labels=5), ()),
    'hf_vit pooler': ('ViTModel', 'ViTConfig', pooled, {}, ()),
    'hf_vit bare': ('ViTModel', 'ViTConfig', first, {}, (r'pooler\..*',)),
    'hf_vit tanh': (
        'ViTForImageClassification',
        'ViTConfig',
        logits,
        dict(num_labels=5, hidden_act='gelu_pytorch_tanh', layer_norm_eps=1e-6, qkv_bias=False),
        (),
    ),
    'hf_deit': ('DeiTForImageClassification', 'DeiTConfig', logits, dict(num_labels=5), ()),
    'hf_deit teacher': (
        'DeiTForImageClassificationWithTeacher',
        'DeiTConfig',
        logits,
        dict(num_labels=5),
        (),
    ),
    'hf_dinov2': ('Dinov2Model', 'Dinov2Config', pooled, dict(use_mask_token=False), ()),
    'hf_dinov2 classifier': (
        'Dinov2ForImageClassification',
        'Dinov2Config',
        logits,
        dict(num_labels=5),
        (r'.*mask_token',),
    ),
    'hf_dinov2 swiglu': (
        'Dinov2Model',
        'Dinov2Config',
        pooled,
        dict(use_swiglu_ffn=True, use_mask_token=False),
        (),
    ),
    'hf_dinov2_reg': (
        'Dinov2WithRegistersModel',
        'Dinov2WithRegistersConfig',
        pooled,
        {},
        (r'.*mask_token',),
    ),
    'hf_dinov2_reg classifier': (
        'Dinov2WithRegistersForImageClassification',
        'Dinov2WithRegistersConfig',
        logits,
        dict(num_labels=5),
        (r'.*mask_token',),
    ),
    'hf_siglip': ('SiglipVisionModel', 'SiglipVisionConfig', pooled, {}, ()),
    'hf_dinov3': (
        'DINOv3ViTModel',
        'DINOv3ViTConfig',
        pooled,
        dict(num_register_tokens=4),
        (r'.*mask_token',),
    ),
    'hf_dinov3 gated': (
        'DINOv3ViTModel',
        'DINOv3ViTConfig',
        pooled,
        dict(num_register_tokens=0, use_gated_mlp=True, hidden_act='silu', key_bias=True),
        (r'.*(mask|register)_tokens?',),
    ),
    'hf_mae': ('ViTMAEModel', 'ViTMAEConfig', first, dict(mask_ratio=0.0), ()),
    'hf_ijepa': ('IJepaModel', 'IJepaConfig', mean, {}, ()),
    'hf_ijepa classifier': (
        'IJepaForImageClassification',
        'IJepaConfig',
        logits,
        dict(num_labels=5),
        (),
    ),
}


def build(name, folder):
    """(transformers' model, what of its answer counts, what we read of it, the images)"""
    transformers = peer('transformers')
    kind, config, answer, more, drop = MODELS[name]
    model = getattr(transformers, kind)(getattr(transformers, config)(**SIZES, **more))
    model = randomise(model)
    model.save_pretrained(folder)
    return model, answer, interop.read(folder, drop=drop), images(32)


def call(model):
    return unshuffled(model) if type(model).__name__ == 'ViTMAEModel' else model


@pytest.mark.parametrize('name', MODELS)
def test_both_answer_the_same_in_both_directions(name, tmp_path, record_property):
    model, answer, weights, batch = build(name, tmp_path / 'theirs')
    wanted = theirs(call(model), batch, answer)
    inward = distance(wanted, ours(weights, batch))
    path, again = export_and_read(weights, name.partition(' ')[0], tmp_path / 'ours')
    more = {'mask_ratio': 0.0} if name == 'hf_mae' else {}
    loaded, info = type(model).from_pretrained(path, output_loading_info=True, **more)
    outward = distance(wanted, theirs(call(loaded.eval()), batch, answer))
    record_property('parity', f'{name}: in {inward:.1e} out {outward:.1e}')
    print(f'{name}: in {inward:.2g}, out {outward:.2g}, of {np.abs(wanted).max():.2g}')
    assert inward <= CLOSE
    assert outward <= CLOSE
    absent = {key for key in info['missing_keys'] if 'pooler' not in key}
    assert not absent
    assert not info['unexpected_keys']
    first_time, second_time = trees.flatten(weights.params), trees.flatten(again.params)
    assert first_time.keys() == second_time.keys()
    for key, array in first_time.items():
        np.testing.assert_array_equal(array, second_time[key])
    assert again.settings == weights.settings


WRONG_KNOBS = {
    'eps': ('hf_vit', dict(norm_eps=1e-5)),
    'gelu': ('hf_vit', dict(activation='gelu_tanh')),
    'siglip gelu': ('hf_siglip', dict(activation='gelu')),
    'dinov3 eps': ('hf_dinov3', dict(norm_eps=1e-6)),
    'dinov3 theta': ('hf_dinov3', dict(rope_theta=10_000.0)),
    'prefix': ('hf_dinov2_reg', None),
}


def permuted(weights, names):
    """The weights with arrays of each block in another order."""
    flat = trees.flatten(weights.params)
    changed = dict(flat)
    for name in flat:
        parts = name.split('/')
        for old, new in names.items():
            if old in parts:
                changed[name] = flat[name.replace(f'/{old}/', f'/{new}/')]
    return weights._replace(params=trees.unflatten(changed))


@pytest.mark.parametrize('knob', WRONG_KNOBS)
def test_a_wrong_setting_shows(knob, tmp_path):
    name, wrong = WRONG_KNOBS[knob]
    model, answer, weights, batch = build(name, tmp_path)
    if wrong is None:  # The positions of class token and first patch are swapped.
        flat = trees.flatten(weights.params)
        table = flat['pos_embedding'].copy()
        table[:, [0, 1]] = table[:, [1, 0]]
        flat['pos_embedding'], wrong = table, {}
        weights = weights._replace(params=trees.unflatten(flat))
    assert distance(theirs(call(model), batch, answer), ours(weights, batch, **wrong)) > WRONG


def test_queries_and_keys_swapped_shows_with_registers_and_positions(tmp_path):
    model, answer, weights, batch = build('hf_vit', tmp_path)
    wrong = permuted(weights, {'key': 'value', 'value': 'key'})
    assert distance(theirs(model, batch, answer), ours(wrong, batch)) > WRONG


def test_the_classifier_of_siglip_takes_the_mean(tmp_path):
    transformers = peer('transformers')
    vision = transformers.SiglipVisionConfig(**SIZES).to_dict()
    config = transformers.SiglipConfig(vision_config=vision, num_labels=5)
    model = randomise(transformers.SiglipForImageClassification(config))
    model.save_pretrained(tmp_path / 'theirs')
    with pytest.raises(UserError, match=r'unexpected: vision_model\.head\..*--drop'):
        interop.read(tmp_path / 'theirs')
    weights = interop.read(tmp_path / 'theirs', drop=[r'vision_model\.head\..*'])
    batch = images(32)
    wanted = theirs(model, batch, logits)
    assert distance(wanted, ours(weights, batch)) <= CLOSE
    path, _ = export_and_read(weights, 'hf_siglip', tmp_path / 'ours')
    loaded = transformers.SiglipForImageClassification.from_pretrained(path).eval()
    assert distance(wanted, theirs(loaded, batch, logits)) <= CLOSE


def test_a_whole_siglip_needs_its_text_tower_dropped(tmp_path):
    transformers = peer('transformers')
    vision = transformers.SiglipVisionConfig(**SIZES).to_dict()
    text = dict(
        hidden_size=48,
        num_hidden_layers=1,
        num_attention_heads=3,
        intermediate_size=64,
        vocab_size=10,
        pad_token_id=1,
        bos_token_id=2,
        eos_token_id=3,
    )
    config = transformers.SiglipConfig(vision_config=vision, text_config=text)
    model = randomise(transformers.SiglipModel(config))
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r'--drop .*text_model'):
        interop.read(tmp_path)
    weights = interop.read(tmp_path, drop=[r'text_model\..*', r'logit_(scale|bias)'])
    batch = images(32)
    wanted = theirs(model.vision_model, batch, pooled)
    assert distance(wanted, ours(weights, batch)) <= CLOSE
