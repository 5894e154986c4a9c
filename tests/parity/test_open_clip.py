"""open_clip's image towers answer as ours do, both ways: its own ViT, and timm's SigLIP."""

import json

import numpy as np
import pytest
from peers import CLOSE, WRONG, distance, images, ours, peer, randomise, theirs

from big_vit import interop, trees
from big_vit.errors import UserError

EMBED = 24
SIZES = dict(layers=2, width=64, head_width=32, patch_size=16, image_size=32)
TOWERS = {
    'native': ({}, False),
    'quickgelu': ({}, True),
    'average': (dict(pool_type='avg', final_ln_after_pool=True, no_ln_pre=True), False),
    'scaled': (dict(ls_init_value=0.1, norm_kwargs={'eps': 1e-6}), False),
    'tanh': (dict(act_kwargs={'approximate': 'tanh'}), False),
}


def built(vision, quick):
    peer('open_clip')
    from open_clip.model import _build_vision_tower

    return _build_vision_tower(EMBED, dict(vision), quick_gelu=quick).eval()


def saved(tower, vision, quick, folder):
    """The tower as part of a model, in the files that open_clip writes."""
    from safetensors.torch import save_file

    folder.mkdir()
    arrays = {f'visual.{name}': a.contiguous() for name, a in tower.state_dict().items()}
    save_file(arrays, folder / 'open_clip_model.safetensors')
    config = {
        'model_cfg': {'embed_dim': EMBED, 'vision_cfg': vision, 'quick_gelu': quick},
        'preprocess_cfg': {'mean': [0.1, 0.2, 0.3], 'std': [0.4, 0.5, 0.6]},
    }
    (folder / 'open_clip_config.json').write_text(json.dumps(config))


def loaded(folder):
    """The tower that a folder of ours describes, with its weights."""
    from open_clip.model import _build_vision_tower
    from safetensors.torch import load_file

    config = json.loads((folder / 'open_clip_config.json').read_text())['model_cfg']
    tower = _build_vision_tower(config['embed_dim'], config['vision_cfg'], config['quick_gelu'])
    arrays = load_file(folder / 'open_clip_model.safetensors')
    tower.load_state_dict({n.removeprefix('visual.'): a for n, a in arrays.items()})
    return tower.eval()


@pytest.mark.parametrize('name', TOWERS)
def test_both_answer_the_same_in_both_directions(name, tmp_path):
    more, quick = TOWERS[name]
    vision = {**SIZES, **more}
    tower = randomise(built(vision, quick))
    saved(tower, vision, quick, tmp_path / 'theirs')
    weights = interop.read(tmp_path / 'theirs')
    assert weights.meta['mean'] == (0.1, 0.2, 0.3)
    batch = images(32)
    wanted = theirs(tower, batch)
    inward = distance(wanted, ours(weights, batch))
    path = interop.write(tmp_path / 'ours', 'open_clip', weights)
    outward = distance(wanted, theirs(loaded(path), batch))
    print(f'open_clip {name}: in {inward:.2g}, out {outward:.2g}, of {np.abs(wanted).max():.2g}')
    assert inward <= CLOSE
    assert outward <= CLOSE
    again = interop.read(path)
    assert again.settings == weights.settings
    for key, array in trees.flatten(weights.params).items():
        np.testing.assert_array_equal(array, trees.flatten(again.params)[key])
    for wrong in ({'activation': 'gelu' if quick else 'quick_gelu'}, {'norm_eps': 1e-4}):
        assert distance(wanted, ours(weights, batch, **wrong)) > WRONG


def test_siglip_whose_tower_is_timms(tmp_path):
    timm = peer('timm')
    from timm.models.vision_transformer import _create_vision_transformer

    @timm.models.register_model
    def vit_parity_patch16_siglip_32(pretrained=False, **kwargs):
        sizes = dict(
            img_size=32,
            patch_size=16,
            embed_dim=48,
            depth=2,
            num_heads=3,
            class_token=False,
            global_pool='map',
            act_layer='gelu_tanh',
        )
        name = 'vit_base_patch16_siglip_224'
        return _create_vision_transformer(name, pretrained=pretrained, **{**sizes, **kwargs})

    name = 'vit_parity_patch16_siglip_32'
    vision = {
        'image_size': 32,
        'timm_model_name': name,
        'timm_model_pretrained': False,
        'timm_pool': 'map',
        'timm_proj': 'none',
    }
    tower = randomise(built(vision, False))
    saved(tower, vision, False, tmp_path / 'theirs')
    # The names of timm's own SigLIP models tell the number of heads and the activation.
    given = {'num_heads': 3, 'activation': 'gelu_tanh'}
    weights = interop.read(tmp_path / 'theirs', settings=given)
    assert weights.settings['pool'] == 'map'
    batch = images(32)
    wanted = theirs(tower, batch)
    inward = distance(wanted, ours(weights, batch))
    path = interop.write(tmp_path / 'ours', 'open_clip', weights, architecture=name)
    outward = distance(wanted, theirs(loaded(path), batch))
    print(f'open_clip siglip trunk: in {inward:.2g}, out {outward:.2g}')
    assert inward <= CLOSE
    assert outward <= CLOSE
    assert distance(wanted, ours(weights, batch, activation='gelu')) > WRONG
    with pytest.raises(UserError, match='--architecture'):
        interop.write(tmp_path / 'none', 'open_clip', weights)


def test_a_classifier_of_ours_becomes_a_tower(tmp_path):
    """A bias of the patches becomes part of the positions, and no head an identity."""
    tower = randomise(built(SIZES, False))
    saved(tower, SIZES, False, tmp_path / 'theirs')
    weights = interop.read(tmp_path / 'theirs')
    flat = trees.flatten(weights.params)
    del flat['head/kernel']
    flat['embedding/bias'] = np.random.default_rng(0).normal(size=64).astype(np.float32)
    settings = {**weights.settings, 'num_classes': 0, 'head_bias': True, 'embedding_bias': True}
    mine = weights._replace(params=trees.unflatten(flat), settings=settings)
    path = interop.write(tmp_path / 'ours', 'open_clip', mine)
    batch = images(32)
    assert distance(theirs(loaded(path), batch), ours(mine, batch)) <= CLOSE
