"""Prepare a dataset of TensorFlow Datasets: `python -m big_vit.prepare cifar10 --data_dir DIR`.

TensorFlow Datasets downloads it and writes files that support random access. This is the only
command that may need TensorFlow (`pip install 'big_vit[prepare]'`): the code that writes many
datasets uses it. `prepare fashion_mnist --format idx` needs neither, and takes the files of the
authors.

`prepare filter SHARDS --out OUT` cleans a large set of pictures (`big_vit.preparation`), and
`prepare index SHARDS` writes beside them what is in each (`big_vit.data.sources.indexing`).
"""

import sys

from big_vit import command_line

if __name__ == '__main__':  # Before the slow imports.
    if sys.argv[1:2] == ['filter']:
        own, _ = command_line.before_dashes(sys.argv[2:])
        command_line.answer_help(command_line.prepare_filter(), own)
    elif sys.argv[1:2] == ['index']:
        command_line.answer_help(command_line.prepare_index(), sys.argv[2:])
    else:
        command_line.answer_help(command_line.prepare())

import functools
from pathlib import Path
from typing import Any

from etils import epath

from big_vit import ownership, runtime
from big_vit.data import download
from big_vit.data.sources import indexing, prepared
from big_vit.data.sources.base import Request
from big_vit.errors import UserError
from big_vit.preparation import filtering


def _builder(name: str, data_dir: str, file_format: str | None) -> Any:
    """Return the TFDS builder of a dataset.

    Raises:
      UserError: there is no such dataset, or TFDS or TensorFlow is missing.
    """
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise UserError(
            f'needs `pip install tensorflow-datasets importlib_resources` ({error})'
        ) from error
    kwargs = {'file_format': file_format} if file_format else {}
    try:
        return tfds.builder(name, data_dir=data_dir, **kwargs)
    except tfds.core.registered.DatasetNotFoundError as error:
        reason = ' '.join(str(error).split())[:300]
        raise UserError(f'{name}: TensorFlow Datasets has no such dataset: {reason}') from error
    except ImportError as error:
        raise _needs_tensorflow(name, error) from error


def _needs_tensorflow(name: str, error: Exception) -> UserError:
    return UserError(
        f'{name} is prepared by code that needs TensorFlow: '
        f"pip install 'big_vit[prepare]', or pip install tensorflow "
        f'({" ".join(str(error).split())[-60:]})'
    )


def prepare(
    name: str, data_dir: str, file_format: str = 'array_record', downloads: str | None = None
) -> Path:
    """Download and write a dataset; return its folder.

    Args:
      name: name[/config][:version].
      data_dir: root folder of all datasets.
      file_format: array_record, or another format that TFDS can write.
      downloads: folder for downloaded files; inside data_dir if None.

    Raises:
      UserError: there is no such dataset or no network, TensorFlow is needed and missing, or the
        dataset already exists in another format.
    """
    builder = _builder(name, data_dir, file_format)
    try:
        with ownership.own(epath.Path(builder.data_path).parent, '--data_dir'):
            builder.download_and_prepare(download_dir=downloads, file_format=file_format)
    except UserError:
        raise
    except Exception as error:  # TFDS and its downloader raise classes of their own.
        reason = ' '.join(str(error).split())
        if "No module named 'tensorflow'" in reason:
            raise _needs_tensorflow(name, error) from error
        if 'ownload' not in type(error).__name__ and 'hecksum' not in type(error).__name__:
            raise UserError(f'{name} could not be prepared: {reason[:400]}') from error
        raise UserError(
            f'{name} could not be downloaded ({reason[:300]}): see whether this machine has a '
            'network, or put the files into --download_dir by hand'
        ) from error
    return Path(builder.data_path)


def prepare_idx(name: str, data_dir: Path) -> list[str]:
    """Download a dataset in IDX files; return lines that say where it is and how it is used.

    Raises:
      UserError: there is no such dataset, or it cannot be downloaded.
    """
    if name != 'fashion_mnist':
        raise UserError(f'{name}: of IDX files only fashion_mnist is known; leave --format out')
    folder = data_dir / name
    fetched = download.fashion_mnist(folder)
    return [
        f'{"wrote" if fetched else "there":<7} {folder}: {len(download.FASHION_MNIST)} IDX files',
        f'use     --config configs/fashion_mnist.py:path={folder}',
    ]


def index(argv: list[str]) -> None:
    """Index shards, as `prepare index` is told to."""
    args, _ = command_line.parse(command_line.prepare_index(), argv)
    indexing.index(
        args.path,
        to=args.to,
        label_column=args.label_column,
        share=args.share,
        workers=args.workers,
        say=functools.partial(print, flush=True),
    )


def main(argv: list[str]) -> None:
    if argv[:1] == ['filter']:
        filtering.main(argv[1:])
        return
    if argv[:1] == ['index']:
        index(argv[1:])
        return
    args, _ = command_line.parse(command_line.prepare(), argv)
    data_dir = str(Path(args.data_dir).expanduser())
    if args.format == 'idx':
        print('\n'.join(prepare_idx(args.name, Path(data_dir))))
        return
    builder = _builder(args.name, data_dir, None)
    there = (Path(builder.data_path) / 'dataset_info.json').exists()
    if not there:
        prepare(args.name, data_dir, args.format, args.download_dir)
        builder = _builder(args.name, data_dir, None)
    sizes = {split: info.num_examples for split, info in builder.info.splits.items()}
    label = prepared.default_label(builder.info)
    request = Request(next(iter(sizes)))
    first = prepared.tfds(request, tfds_name=args.name, path=data_dir, label_column=label)
    more = f' --config.data.label_column={label}' if label else ''
    kept = builder.info.file_format.value
    print(
        f'there   {builder.data_path}: {kept} files, which are read as they are'
        if there
        else f'wrote   {builder.data_path}: {kept} files'
    )
    print(f'splits  {", ".join(f"{n} {size:,}" for n, size in sizes.items())}')
    print(f'classes {first.num_classes}')
    print(
        f'use     --config.data.name=tfds --config.data.tfds_name={args.name} '
        f'--config.data.path={data_dir}{more}'
    )


if __name__ == '__main__':
    runtime.command(main)
