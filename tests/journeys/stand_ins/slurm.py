#!/usr/bin/env python3
"""Stand-in for sbatch, srun, scontrol and scancel, whichever name it is called by.

As Slurm 22.05 does: a signal to srun kills its tasks, `scancel --signal` reaches only tasks, the
end of a job reaches both. For the tests: `--time-is-over JOB` is what --signal=B:USR1 does.
"""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from machine import STATE, detach, environment, make_machine, note_call

JOBS = STATE / 'jobs'


def sbatch() -> None:
    job = JOBS / str(4000 + len(list(JOBS.glob('*'))))
    job.mkdir(parents=True)
    (job / 'script').write_text(sys.stdin.read())
    (job / 'cwd').write_text(str(Path.cwd()))
    (job / 'path').write_text(os.environ['PATH'])
    detach(__file__, '--node', str(job))
    print(f'Submitted batch job {job.name}')


def node(job: Path) -> None:
    """Run the job's script until nobody queues it again."""
    text = (job / 'script').read_text()
    asked = dict(re.findall(r'^#SBATCH --([-a-z]+)=(.*)$', text, re.MULTILINE))
    make_machine(job / 'machine', 'localhost')
    # As many tasks as this machine bears.
    tasks = min(2, int(asked['nodes']) * int(asked['ntasks-per-node']))
    env = environment(job / 'machine') | {
        'PATH': (job / 'path').read_text(),
        'SLURM_JOB_ID': job.name,
        'SLURM_NTASKS': str(tasks),
        'STAND_INS': str(STATE),
    }
    while True:
        (job / 'requeued').unlink(missing_ok=True)
        with (job / 'log').open('a') as log:
            batch = subprocess.Popen(
                ['bash', str(job / 'script')],
                cwd=(job / 'cwd').read_text(),
                env=env,
                stdout=log,
                stderr=log,
            )
        (job / 'pid').write_text(str(batch.pid))
        status = batch.wait()
        if not (job / 'requeued').exists():
            break
    (job / 'status').write_text(str(status))


def srun(argv: list[str]) -> int:
    job = JOBS / os.environ['SLURM_JOB_ID']
    while argv[0].startswith('--'):
        argv = argv[1:]
    tasks = int(os.environ['SLURM_NTASKS'])
    started = []

    def label(task: int, pipe) -> None:
        for line in pipe:
            print(f'{task}: {line}', end='', flush=True)

    for task in range(tasks):
        names = {'SLURM_STEP_NODELIST': 'localhost', 'SLURM_PROCID': str(task),
                 'SLURM_LOCALID': str(task), 'SLURM_STEP_NUM_TASKS': str(tasks),
                 'SLURM_STEP_NUM_NODES': '1', 'SLURM_JOB_NUM_NODES': '1'}  # fmt: skip
        process = subprocess.Popen(
            argv,
            env=os.environ | names,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        threading.Thread(target=label, args=(task, process.stdout), daemon=True).start()
        started.append(process)
    (job / 'tasks').write_text(' '.join(str(process.pid) for process in started))

    def kill(*_: object) -> None:
        for process in started:
            process.kill()

    signal.signal(signal.SIGTERM, kill)
    while None in (ended := [process.poll() for process in started]):
        if any(ended):  # --kill-on-bad-exit
            kill()
        time.sleep(0.05)
    time.sleep(0.2)
    return max(abs(status or 0) for status in ended)


def main(name: str, argv: list[str]) -> int:
    if argv[:1] == ['--node']:
        node(Path(argv[1]))
        return 0
    if argv[:1] == ['--time-is-over']:
        os.kill(int((JOBS / argv[1] / 'pid').read_text()), signal.SIGUSR1)
        return 0
    note_call()
    if name == 'sbatch':
        sbatch()
    elif name == 'srun':
        return srun(argv)
    elif name == 'scontrol':
        assert argv[0] == 'requeue', argv
        (JOBS / argv[1] / 'requeued').touch()
    else:
        job = JOBS / argv[-1]
        tasks = [int(pid) for pid in (job / 'tasks').read_text().split()]
        batch = [int((job / 'pid').read_text())]
        for pid in tasks if argv[0].startswith('--signal') else tasks + batch:
            os.kill(pid, signal.SIGTERM)
    return 0


if __name__ == '__main__':
    sys.exit(main(Path(sys.argv[0]).name, sys.argv[1:]))
