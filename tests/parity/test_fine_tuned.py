"""A peer's weights go through the transfer stage, and what comes of them is the peer's again."""

import numpy as np
from commands import run
from peers import peer, randomise, theirs
from tiny import flags

from big_vit import checkpoint, metrics
from big_vit.data.sources import digits
from big_vit.data.sources.base import Request

RUN = {
    'total_steps': '60',
    'checkpoint.every_steps': '60',
    'lr': '0.03',
    'image_size': '32',
    # Digits have one channel, timm's model three.
    'init_channels': 'sum',
    'evals.test.transform': 'resize(size)',
    'transfer.control': 'false',
    'transfer.random_features': 'false',
    'model.dtype': 'float32',
}


def test_timm_to_us_fine_tuned_and_back_scores_the_same(tmp_path):
    timm = peer('timm')
    from timm.models._hub import save_for_hf

    args = dict(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=5)
    model = randomise(timm.create_model('vit_small_patch16_224', **args))
    save_for_hf(model, str(tmp_path / 'timm'), model_args=args, safe_serialization=True)
    result = run(
        'transfer',
        *('--config', 'configs/transfer_digits.py', '--workdir', tmp_path / 'w'),
        *flags({'init': tmp_path / 'timm', **RUN}),
    )
    assert result.returncode == 0, result.stdout + result.stderr
    done = tmp_path / 'w' / 'pretrained'
    scored = metrics.latest(metrics.read(done))
    assert checkpoint.steps(done)[-1] == 60 and scored['test/top1'] > 0.3  # Chance is 0.1.
    result = run('export', '--checkpoint', done, '--to', 'timm', '--out', tmp_path / 'back')
    assert result.returncode == 0, result.stdout + result.stderr
    back = timm.create_model(f'local-dir:{tmp_path / "back"}', pretrained=True).eval()
    columns = _test_images()
    logits = theirs(back, columns['image'])
    assert logits.shape == (359, 10)
    hits = logits.argmax(-1) == columns['label']
    assert abs(hits.mean() - scored['test/top1']) < 1.5 / 359
    shifted = logits - logits.max(-1, keepdims=True)
    chosen = shifted[np.arange(359), columns['label']]
    loss = (np.log(np.exp(shifted).sum(-1)) - chosen).mean()
    assert abs(loss - scored['test/loss']) < 1e-4


def _test_images():
    """The test digits as the evaluation sees them: resized bytes, from -1 to 1."""
    from big_vit.data import transforms

    source = digits.digits(Request('test'))
    columns = source.load(np.arange(source.length))
    transform = transforms.parse('resize(size)', size=(32, 32), key='data')
    seen = transform(columns, np.zeros(source.length, np.uint64))
    return {
        'image': seen['image'].astype(np.float32) * (2 / 255) - 1,
        'label': np.asarray(seen['label']),
    }
