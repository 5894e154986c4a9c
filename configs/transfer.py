"""Fine-tune with established recipes: SGD with momentum, cosine, no decay, a head that starts at 0.

    python -m big_vit.transfer --config configs/transfer.py:cifar10,path=DIR \
        --config.init=CHECKPOINT --workdir runs/cifar10 --sweep lr=0.001,0.003,0.01,0.03

The first argument is the dataset: cifar10, cifar100, imagenet2012, oxford_iiit_pet or
oxford_flowers102 (as in big_vision's configs/transfer.py), vtab_NAME for the 19 tasks of VTAB-1k
(arXiv 1910.04867; as in scenic's plain ViT), or own, a folder with one sub-folder per class. DIR is
the data_dir of TensorFlow Datasets; docs/transfer.md explains how to prepare each dataset, which
rates to sweep, and how these recipes differ from theirs. Other arguments:

* size=224: pixels; crop=inception, resmall or resize: how training images are cropped.
* final=true: also trains on the validation part, as VTAB does once the settings are chosen.
* folders=true: own has folders train, val and test, instead of a split into 80, 10 and 10 %.

Rates to sweep: 0.001,0.003,0.01,0.03; imagenet2012 0.003,0.01,0.03,0.06; VTAB-1k none, 0.01.
"""

from ml_collections import ConfigDict

# Steps, warmup, rate, crop, share of `train` to train on, test split, and the published accuracy.
NAMED: dict[str, tuple] = {
    'cifar10': (10_000, 500, 0.003, 'resmall', 98, 'test', '98.55 % (98.46 to 98.60)'),
    'cifar100': (10_000, 500, 0.01, 'resmall', 98, 'test', '91.35 % (91.09 to 91.62)'),
    'imagenet2012': (20_000, 500, 0.03, 'inception', 99, 'validation', '83.27 % (83.22 to 83.33)'),
    'oxford_iiit_pet': (500, 100, 0.003, 'inception', 90, 'test', '93.78 % (93.62 to 94.00)'),
    'oxford_flowers102': (500, 100, 0.003, 'inception', 90, 'test', '99.43 % (99.42 to 99.45)'),
}
B32 = 'ViT-B/32 of AugReg on ImageNet-21k, five runs (configs/transfer.py of big_vision)'
G14 = '78.29 % ± 0.53 as mean of the 19 tasks: ViT-G/14 on JFT-3B (arXiv 2106.04560)'
# VTAB-1k: name in TFDS, the 200 validation examples, test split, augmentation; then the label and
# the transform of all images, where they are needed.
VAL = 'validation[:200]'
EYES = 'diabetic_retinopathy_detection/btgraham-300'
CLEVR = ('clevr', 'train[63000:63200]', 'validation', 'flip')
SPRITES = ('dsprites', 'train[589824:590024]', 'train[663552:]')
NORB = ('smallnorb', 'test[:200]', 'test[50%:]')
BYTES = 'rgb | autocontrast | '  # dSprites has values 0 and 1, which become black and white.
VTAB: dict[str, tuple] = {
    'caltech101': ('caltech101', 'train[2753:2953]', 'test', 'crop flip'),
    'cifar100': ('cifar100', 'train[45000:45200]', 'test', 'crop flip'),
    'dtd': ('dtd', VAL, 'test', 'crop flip'),
    'oxford_flowers102': ('oxford_flowers102', VAL, 'test', 'crop flip'),
    'oxford_iiit_pet': ('oxford_iiit_pet', 'train[2944:3144]', 'test', 'crop flip'),
    'svhn': ('svhn_cropped', 'train[65931:66131]', 'test', 'crop flip'),
    'sun397': ('sun397/tfds', VAL, 'test', 'crop flip'),
    'patch_camelyon': ('patch_camelyon', VAL, 'test', 'crop flip'),
    'eurosat': ('eurosat/rgb', 'train[16200:16400]', 'train[21600:]', 'crop flip'),
    'resisc45': ('resisc45', 'train[18900:19100]', 'train[25200:]', 'crop flip'),
    'diabetic_retinopathy': (EYES, VAL, 'test', 'crop flip'),
    'clevr_count': (*CLEVR, 'clevr_count'),
    'clevr_distance': (*CLEVR, 'clevr_distance'),
    'dmlab': ('dmlab', VAL, 'test', 'flip'),
    'kitti_distance': ('kitti', VAL, 'test', 'flip', 'kitti_distance'),
    'dsprites_location': (*SPRITES, '', 'dsprites_location', BYTES),
    'dsprites_orientation': (*SPRITES, 'crop', 'dsprites_orientation', BYTES),
    'smallnorb_azimuth': (*NORB, 'crop', 'label_azimuth', 'rgb | '),
    'smallnorb_elevation': (*NORB, 'crop flip', 'label_elevation', 'rgb | '),
}
CHOICES = {
    'dataset': (*NAMED, 'own', *(f'vtab_{name}' for name in VTAB)),
    'crop': ('', 'inception', 'resmall', 'resize'),
}


def get_config(
    dataset: str = 'cifar10',
    path: str = '',
    size: int = 384,
    crop: str = '',
    final: bool = False,
    folders: bool = False,
):
    larger = round(size * 7 / 6)  # 448 for 384.
    crops = {
        'inception': 'inception_crop(size)',
        'resmall': f'resmall_crop(size, {larger})',
        'resize': f"resize({larger}, method='bilinear') | random_crop(size)",
        'none': "resize(size, method='bilinear')",
    }
    middle = f'resize_small({larger}) | central_crop(size)'
    before, augment, batch, published = '', 'flip', 512, None
    data = {'name': 'tfds', 'path': path or None, 'tfds_name': dataset}
    if dataset == 'own':
        data = {'name': 'folder', 'path': path or None}
        steps, warmup, lr, usual = 500, 100, 0.01, 'inception'
        batch = 64  # For few images and one device; published recipes use 512.
        train, val, test = 'train[:80%]', 'train[80%:90%]', 'train[90%:]'
        if folders:
            train, val, test = 'train', 'val', 'test'
    elif dataset in NAMED:
        steps, warmup, lr, usual, share, test, accuracy = NAMED[dataset]
        train, val = f'train[:{share}%]', f'train[{share}%:]'
        published = f'{accuracy} with lr {lr}: {B32}'
    else:
        name, val, test, augment, *more = VTAB[dataset.removeprefix('vtab_')]
        label = more[0] if more else None
        before = more[1] if len(more) > 1 else ''
        steps, warmup, lr, train, published = 2500, 200, 0.01, 'train[:800]', G14
        usual = 'resize' if 'crop' in augment else 'none'
        middle = crops['none']
        data |= {'tfds_name': name, 'label_column': label}
    flip = ' | flip_lr' if 'flip' in augment else ''
    # The test split is only scored once, at the end.
    evals = {'test': {'split': test, 'transform': before + middle, 'every_percent': 100}}
    if not final:
        evals['val'] = {'split': val, 'transform': before + middle}
    return ConfigDict(
        {
            'total_steps': steps,
            'batch_size': batch,
            'image_size': size,
            'lr': lr,
            'data': {
                **data,
                'split': f'{train}+{val}' if final else train,
                'transform': before + crops[crop or usual] + flip,
            },
            'evals': evals,
            # Unset keys leave weight decay at 0 and clip gradients to a norm of 1.
            'optim': {'name': 'sgd', 'momentum': 0.9, 'mu_dtype': 'bfloat16'},
            'schedule': {'name': 'cosine', 'warmup_steps': warmup},
            'checkpoint': {'every_steps': 1000},
            'log': {'every_steps': 50},
            'transfer': {'published': published},
        }
    )
