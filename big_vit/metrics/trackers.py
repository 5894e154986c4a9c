"""Trackers, which show the metrics of runs: TensorBoard and Weights & Biases.

Both write in threads or processes of their own, so a call only queues a few numbers. Their
libraries are imported only where they are used.
"""

import json
import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from etils import epath

from big_vit import storage
from big_vit.errors import UserError

# Kept beside the metrics, so that a resumed run goes on as the same run there.
WANDB_ID = 'wandb_id'


class Tracker(Protocol):
    """A service that shows the metrics of a run."""

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Add one row of metrics."""

    def picture(self, step: int, name: str, picture: np.ndarray) -> None:
        """Add a picture, uint8 [height, width, 3]."""

    def checkpoint(self, path: os.PathLike[str], step: int, latest: dict[str, float]) -> None:
        """Note where the newest checkpoint is."""

    def close(self, latest: dict[str, float]) -> None:
        """Return when everything is stored."""


def flat(config: dict[str, Any], prefix: str = '') -> dict[str, bool | int | float | str]:
    """Flatten the keys of a nested config that are set, by dotted name; lists become JSON text."""
    values: dict[str, bool | int | float | str] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            values |= flat(value, f'{prefix}{name}.')
        elif value is not None:
            plain = isinstance(value, bool | int | float | str)
            values[prefix + name] = value if plain else json.dumps(value)
    return values


def _scores(latest: dict[str, float]) -> dict[str, float]:
    """Select the metrics of evaluations."""
    return {k: v for k, v in latest.items() if '/' in k and not k.startswith('train/')}


class TensorBoard:
    """Event files in WORKDIR/tensorboard: scalars, pictures, and hyperparameters with scores."""

    def __init__(self, workdir: epath.Path, start_step: int, config: dict[str, Any]) -> None:
        from tensorboardX import SummaryWriter

        # Files are named by the second: without the step, a quick restart would replace the first.
        self._events = SummaryWriter(
            str(workdir / 'tensorboard'),
            purge_step=start_step,
            filename_suffix=f'.{start_step}',
        )
        self._config = config
        text = json.dumps(config, indent=4)
        self._events.add_text('config', '\n'.join('    ' + line for line in text.splitlines()))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def picture(self, step: int, name: str, picture: np.ndarray) -> None:
        self._events.add_image(name, picture, step, dataformats='HWC')

    def checkpoint(self, path: os.PathLike[str], step: int, latest: dict[str, float]) -> None:
        self._events.add_text('checkpoint', os.fspath(path), step)

    def close(self, latest: dict[str, float]) -> None:
        from tensorboardX.summary import hparams

        # Not `add_hparams`, which makes another run of it, in a folder named by the time.
        for summary in hparams(flat(self._config), dict.fromkeys(_scores(latest), 0.0)):
            self._events.file_writer.add_summary(summary)
        self._events.close()


class WeightsAndBiases:
    """A run of a project; its id is kept in the workdir, so a resumed run is the same one there.

    Args:
      rows: rows of metrics from before a resume, for the table of evaluations.
    """

    def __init__(
        self, workdir: epath.Path, project: str, config: dict[str, Any], rows: list[dict[str, Any]]
    ) -> None:
        try:
            import wandb
        except ImportError:
            raise UserError(
                "config: log.wandb needs `pip install wandb`, or big_vit's extra of that name"
            ) from None
        self._client = wandb
        id_file = workdir / WANDB_ID
        run_id = id_file.read_text().strip() if id_file.exists() else os.urandom(4).hex()
        storage.write_text(id_file, run_id + '\n')
        where = {'dir': os.fspath(workdir)} if storage.is_local(workdir) else {}
        self._run = wandb.init(
            project=project, name=workdir.name, config=config, id=run_id, resume='allow', **where
        )
        self._evaluated: list[list[Any]] = []
        for row in rows:
            self._note(row['step'], row)

    def _note(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            split, _, key = name.rpartition('/')
            if split and split not in ('train', 'time'):
                self._evaluated.append([step, split, key, value])

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)
        self._note(step, values)

    def picture(self, step: int, name: str, picture: np.ndarray) -> None:
        self._run.log({name: self._client.Image(picture)}, step=step)

    def checkpoint(self, path: os.PathLike[str], step: int, latest: dict[str, float]) -> None:
        name = f'checkpoint-{self._run.id}'
        artifact = self._client.Artifact(name, 'model', metadata={'step': step, **latest})
        where = path if not storage.is_local(path) else Path(path).resolve().as_uri()
        artifact.add_reference(os.fspath(where), checksum=False)
        self._run.log_artifact(artifact, aliases=['latest', f'step-{step}'])

    def close(self, latest: dict[str, float]) -> None:
        if self._evaluated:
            columns = ['step', 'evaluation', 'score', 'value']
            self._run.log({'evaluations': self._client.Table(columns, self._evaluated)})
        self._run.finish()
