"""The journal of trials that train in one program: a workdir each, and one console for all."""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from big_vit import checkpoint, journal, metrics
from big_vit.build.experiment import Experiment
from big_vit.config import Config
from big_vit.journal import Course, Damage
from big_vit.steps import Metrics

Place = str | os.PathLike[str]


class Trial(NamedTuple):
    """One of several trainings that differ in learning rate and seed alone."""

    lr: float
    seed: int


class TrialJournal:
    """The journal of all trials; see `training_loop.Journal`.

    A trial that diverges is reported and goes on without updates. Use as a context manager.

    Args:
      config: the config of all trials but for `lr` and `seed`.
      experiments: the experiment of each seed.
      grid: trials [seeds, rates].
      folder: gives the workdir of a trial, which is there.
      start: the step that the trials start or resume at.
      trackers: arguments of `metrics.Writer` for the trackers.
      state_of: gives the state of one trial as `train.run` has it, from the states of all, and
        the trial's places in `grid`.
    """

    def __init__(
        self,
        config: Config,
        experiments: Sequence[Experiment],
        grid: Sequence[Sequence[Trial]],
        folder: Callable[[Trial], Place],
        start: int,
        *,
        damage: Sequence[Damage],
        headline: str,
        label: str,
        trackers: dict[str, Any],
        state_of: Callable[[Any, int, int], Any],
    ):
        self.clock = metrics.Clock()
        self._experiments, self._grid, self._folder = experiments, grid, folder
        self._damage, self._state_of, self._skip_sigmas = damage, state_of, config.skip_sigmas
        self._headline = headline
        self._total, self._intervals = experiments[0].total_steps, experiments[0].intervals
        self._config_dumps = {
            trial: config.replacing({'seed': trial.seed, 'lr': trial.lr}).to_dict()
            for _, _, trial in self._trials()
        }
        self._courses = {trial: Course(self._total) for _, _, trial in self._trials()}
        self._lost: set[Trial] = set()
        active = jax.process_index() == 0
        self.writers: dict[Trial, metrics.Writer] = {}
        with contextlib.ExitStack() as stack:
            self.console = stack.enter_context(
                metrics.Console(self._total, start, label=label, headline=headline, active=active)
            )
            for trial, dump in self._config_dumps.items():
                self.writers[trial] = stack.enter_context(
                    metrics.Writer(folder(trial), start, active=active, config=dump, **trackers)
                )
            self._open = stack.pop_all()

    def _trials(self) -> Iterator[tuple[int, int, Trial]]:
        """Give (place of the seed, place of the rate, trial) for every trial."""
        for i, row in enumerate(self._grid):
            for j, trial in enumerate(row):
                yield i, j, trial

    def check(self, step: int, values: Metrics) -> None:
        """Warn of skipped updates, and say once where a trial has diverged.

        Raises:
          UserError: too many examples are damaged.
        """
        if 'replaced' in values:
            # Rates of a seed share its batches, so each seed's examples are counted once.
            replaced = jax.device_get(values['replaced'])[:, 0]
            for damage, count, parts in zip(self._damage, replaced, self._experiments, strict=True):
                damage.add(int(count), parts.batch_size)
        seen = ('loss', self._headline)
        observed = jax.device_get({name: values[name] for name in seen if name in values})
        skipped, losses = jax.device_get(values['skipped_in_a_row']), observed['loss']
        medians = {name: float(np.median(x)) for name, x in observed.items()}
        self.console.observe(skipped=int((skipped > 0).sum()), **medians)
        fetched = jax.device_get(values) if skipped.any() else {}
        for i, j, trial in self._trials():
            if 0 < skipped[i, j] <= journal.MAX_SKIPPED_IN_A_ROW:
                scalars = {name: value[i, j] for name, value in fetched.items()}
                examples = journal.examples_of_update(self._experiments[i], step)
                self._warn(step, trial, scalars, examples)
            lost = self._courses[trial].add(step, float(losses[i, j]), bool(skipped[i, j]))
            if lost and trial not in self._lost:
                self.console.say(f'WARNING lr {trial.lr:g} seed {trial.seed}: {lost}; it goes on')
                self._lost.add(trial)

    def _warn(self, step: int, trial: Trial, values: dict[str, Any], examples: str) -> None:
        name = f'lr {trial.lr:g} seed {trial.seed}'
        if values['skipped_in_a_row'] < journal.MAX_SKIPPED_IN_A_ROW:
            text = journal.skipped_text(values, examples, self._skip_sigmas)
            self.console.say(f'WARNING step {step}, {name}: {text}')
        else:
            self._lost.add(trial)
            text = journal.diverged_text(step, examples)
            self.console.say(f'WARNING {name}: {text}; it goes on without updates')

    def write(self, step: int, values: Metrics) -> None:
        """Write the metrics of a step to each trial's rows, and show their medians."""
        row = journal.train_row(values)
        for i, j, trial in self._trials():
            self.writers[trial].write(step, {name: float(x[i, j]) for name, x in row.items()})
        medians = {name: float(np.median(x)) for name, x in row.items()}
        self.console.training(step, medians | self._rates(step))

    def _rates(self, step: int) -> dict[str, float]:
        parts = self._experiments[0]
        return self.clock.window(
            batch_size=parts.batch_size * len(self.writers),
            flops_per_example=parts.flops_per_example,
            # A frozen trunk computes once for all trials: the FLOPs of the program are not known.
            peak_flops=None,
            steps_left=self._total - step,
        )

    def write_scores(self, step: int, evaluation: str, scores: dict[str, np.ndarray]) -> None:
        """Write scores [seeds, rates] to each trial's rows, and show those of the best trial."""
        for i, j, trial in self._trials():
            row = {f'{evaluation}/{name}': float(x[i, j]) for name, x in scores.items()}
            self.writers[trial].write(step, row)
        headline = scores.get('top1', next(iter(scores.values())))
        ranked = np.where(np.isfinite(headline), headline, -np.inf)
        i, j = (int(n) for n in np.unravel_index(ranked.argmax(), ranked.shape))
        best = {name: float(x[i, j]) for name, x in scores.items()}
        title = f'{evaluation}, best of all (lr {self._grid[i][j].lr:g})'
        self.console.evaluation(step, title, best)

    def verdict(self, step: int) -> tuple[bool, bool]:
        """Never a choice: trials that make one are trained one by one."""
        return False, False

    def save(self, states: Any) -> None:
        """Save the state of each trial in its own workdir, one after the other.

        All keep the step before too, for a kill between the saves of two trials.
        """
        keep_last = max(2, self._intervals.keep_last)
        for i, j, trial in self._trials():
            self.writers[trial].flush()
            names = self._experiments[i].class_names
            with checkpoint.Manager(
                self._folder(trial), keep_last, self._intervals.keep, class_names=names
            ) as manager:
                manager.save(
                    self._state_of(states, i, j),
                    self._config_dumps[trial],
                    self.writers[trial].latest,
                )

    def __enter__(self) -> 'TrialJournal':
        return self

    def __exit__(self, *_: Any) -> None:
        self._open.close()
