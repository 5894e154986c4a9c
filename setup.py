"""Packaging of big_vit. Version ranges are those that the tests run on, oldest and newest."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r"__version__ = '(.+)'", (HERE / 'big_vit' / '__init__.py').read_text())[1]

# jax[tpu]'s own pin of libtpu: Python 3.11 resolves to jax 0.10, later ones to jax 0.12.
HAS_LIBTPU = "sys_platform == 'linux' and platform_machine == 'x86_64'"
LIBTPU = [
    f"libtpu==0.0.42.*; python_version < '3.12' and {HAS_LIBTPU}",
    f"libtpu==0.0.50.*; python_version >= '3.12' and {HAS_LIBTPU}",
]
# What reads sequences: sound, video, words.
AUDIO, VIDEO, TEXT = ['soundfile>=0.13'], ['av>=17'], ['tokenizers>=0.21']
TEST = [
    'pytest>=8',
    'pytest-xdist>=3.7',
    'beartype>=0.18',
    'psutil>=5',
    'hypothesis>=6.100',
    'nbclient>=0.10',
    'nbformat>=5.10',
    'ipykernel>=6.29',
    *LIBTPU,
    *AUDIO,
    *VIDEO,
    *TEXT,
]

setup(
    name='big_vit',
    version=VERSION,
    description='Pretrain Vision Transformers at TPU or GPU scale, transfer them to small datasets',
    long_description=(HERE / 'README.md').read_text(),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    python_requires='>=3.11',
    packages=find_packages(include=['big_vit', 'big_vit.*']),
    install_requires=[
        'jax>=0.10.2,<0.13',
        'flax>=0.12.8',
        'optax>=0.2.8',
        'orbax-checkpoint>=0.12.8,<0.13',
        'etils[epath]>=1.10',
        'grain>=0.2.18',
        'absl-py',  # Whose flags Grain asks for in worker processes.
        'ml-collections>=1.1',
        'tensorflow-datasets>=4.9.10',
        'importlib_resources',  # tensorflow-datasets needs it and does not say so.
        'numpy>=2.0',
        'jaxtyping>=0.2.36',
        'opencv-python-headless>=4.11',
        'simplejpeg>=1.8',
        'pillow>=10.1',
        'pyarrow>=16',
        'fsspec>=2024.2',
        'scipy>=1.12',
        'safetensors>=0.8',
        'rich>=13',
        'tensorboardX>=2.6',
        'scikit-learn>=1.4',
        'matplotlib>=3.8',
    ],
    extras_require={
        'tpu': ['jax[tpu]>=0.10.2,<0.13'],
        'cuda': ['jax[cuda13]>=0.10.2,<0.13'],
        'plan': LIBTPU,
        'gcs': ['gcsfs'],
        'audio': AUDIO,
        'video': VIDEO,
        'text': TEXT,
        'onnx': ['onnx>=1.17', 'onnxruntime>=1.20'],
        'prepare': ['tensorflow>=2.18'],
        'wandb': ['wandb>=0.18'],
        'test': TEST,
        'dev': [*TEST, 'ruff>=0.9', 'mypy>=1.13'],
    },
)
