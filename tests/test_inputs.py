"""Models of video, sound, words and several inputs, from the config to a step; what is refused."""

import math

import numpy as np
import pytest
from tiny import audited, overrides

from big_vit import config, metrics, train
from big_vit.build.data import eval_data, train_data
from big_vit.errors import UserError

SMALL = {'model.width': '24', 'model.depth': '1', 'model.mlp_dim': '24', 'model.num_heads': '2'}
RUN = {'total_steps': '2', 'batch_size': '16', 'log.every_steps': '1'}
TASKS = {
    'orbit': ('video',),
    'orbit,blind=True': ('image',),
    'tones': ('image',),
    'tones,blind=True': ('image',),
    'phrases': ('tokens',),
    'phrases,blind=True': ('tokens',),
    'quiz,fusion=concat': ('image', 'tokens'),
    'quiz,fusion=cross': ('tokens', 'image'),
    'quiz,fusion=latents': ('image', 'tokens'),
    'quiz,blind=True': ('image',),
}


def load(task, *parts):
    return config.load(
        f'configs/sequences.py:task={task}', overrides(SMALL, RUN, *parts, evals=('test',))
    )


@pytest.mark.parametrize('task', TASKS)
def test_each_task_reads_its_parts_and_leaves_no_key_unread(task):
    parts = audited(load(task))
    assert parts.data.reads == TASKS[task]


@pytest.mark.parametrize(
    'task', ['orbit', pytest.param('quiz,fusion=cross', marks=pytest.mark.slow)]
)
@pytest.mark.slow
def test_they_train_and_are_scored(task, tmp_path):
    train.run(load(task), tmp_path / 'w')
    rows = metrics.read(tmp_path / 'w')
    losses = [row['train/loss'] for row in rows if 'train/loss' in row]
    assert len(losses) == 2
    assert losses[0] == pytest.approx(math.log(8 if task == 'orbit' else 4), rel=1e-4)
    scored = next(row for row in rows if 'test/top1' in row)
    assert scored['test/count'] == 20 and np.isfinite(scored['test/loss'])


@pytest.mark.slow
def test_ragged_images_train(tmp_path):
    settings = config.load(
        'configs/fashion_mnist.py',
        overrides(
            SMALL,
            RUN,
            {
                'data.name': 'digits',
                'data.path': 'default',
                'model.variant': 'mu/4',
                'model.tokenizer': 'ragged',
                'model.posemb': 'rope',
                'data.transform': 'ragged_patches(4, 9)',
                'evals.test.transform': 'ragged_patches(4, 9)',
            },
            evals=('test',),
        ),
    )
    train.run(settings, tmp_path / 'w')
    assert any('test/top1' in row for row in metrics.read(tmp_path / 'w'))


WRONG = [
    (
        'orbit',
        {'data.transform': 'middle_frame()'},
        ('gives image, label but no video', 'decode_v'),
    ),
    ('orbit', {'model.tubelet': '3'}, ('8 frames do not divide', 'take 6 or 9')),
    ('orbit', {'image_size': '36'}, ('36x36 pixels do not divide into 8x8', '32 or 40 would')),
    ('phrases', {'data.transform': "keep('text', 'label')"}, ('text has to become numbers',)),
    ('quiz,fusion=cross', {'model.queries': 'sound'}, ('picture, question',)),
    ('quiz,fusion=concat', {'model.latents': '4'}, ('model.latents is set', 'never reads')),
    ('quiz,fusion=concat', {'mixup': '0.2'}, ('mix images', 'takes image, tokens')),
    ('quiz,blind=True', {'model.tokenizer': 'cct', 'model.variant': 'mu/7'}, ('2, 4, 8', '7x7')),
    ('quiz,blind=True', {'model.tokenizer': 'resnet'}, ("such as 'R50+B/16'",)),
    ('quiz,blind=True', {'model.posemb': 'rope', 'model.head_dim': '6'}, ('divisible by 4',)),
    (
        'quiz,blind=True',
        {'model.posemb': 'learned', 'model.posemb_prefix': '1'},
        ('posemb_prefix=1', 'has 0 prefix'),
    ),
    ('quiz,blind=True', {'model.pool': 'cls_dist'}, ('model.registers=1',)),
    ('quiz,blind=True', {'model.attention': 'cudnn'}, ('NVIDIA GPU',)),
    (
        'quiz,blind=True',
        {'model.posemb': 'relative', 'model.patch_dropout': '0.5'},
        ('no model.patch_dropout',),
    ),
    (
        'quiz,blind=True',
        {
            'model.tokenizer': 'ragged',
            'data.transform': 'ragged_patches(16, 4) | byte_tokens(48)',
            'evals.test.transform': 'ragged_patches(16, 4) | byte_tokens(48)',
        },
        ('patches of 768 numbers', '8x8 pixels'),
    ),
    (
        'quiz,blind=True',
        {
            'model.tokenizer': 'ragged',
            'data.transform': 'ragged_patches(8, 9) | byte_tokens(48)',
            'evals.test.transform': 'ragged_patches(8, 9) | byte_tokens(48)',
            'model.pool': 'cls',
        },
        ('neither class token nor registers',),
    ),
]


@pytest.mark.parametrize('task, change, parts', WRONG)
def test_what_does_not_fit_is_refused_in_a_line(task, change, parts):
    with pytest.raises(UserError) as caught:
        audited(load(task, change))
    for part in parts:
        assert part in str(caught.value)


def test_floats_and_bytes_are_of_one_range_or_it_is_said(tmp_path):
    pictures = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3)).astype(np.uint8)
    kinds = {'bytes': pictures, 'deep': pictures.astype(np.uint16) * 257, 'floats': pictures / 255}
    for kind, images in kinds.items():
        np.savez(tmp_path / f'{kind}.npz', train_images=images, train_labels=np.arange(8) % 2)

    def opened(kind, scored, **more):
        places = {'data': kind, 'evals.test': scored}
        paths = {f'{key}.path': str(tmp_path / f'{file}.npz') for key, file in places.items()}
        names = {f'{key}.name': 'arrays' for key in places}
        settings = {
            'image_size': 8,
            'batch_size': 4,
            'total_steps': 1,
            'lr': 1.0,
            'model.variant': 'mu/4',
        }
        settings |= {'data.split': 'train', 'evals.test.split': 'train', 'data.transform': ''}
        settings |= {'evals.test.transform': '', **names, **paths, **more}
        resolved = config.resolve(settings)
        return eval_data(resolved, 'test', train_data(resolved))

    opened('bytes', 'deep')
    opened('floats', 'floats')
    for one, other in (('bytes', 'floats'), ('floats', 'bytes')):
        with pytest.raises(
            UserError, match=r'evals\.test\.transform gives images of .*value_range'
        ):
            opened(one, other)
    said = {'evals.test.transform': 'value_range(-1, 1, in_low=0, in_high=1)'}
    opened('bytes', 'floats', **said)
