#!/usr/bin/env python3
"""Stand-in for kubectl with a cluster behind it: a JobSet's pods are processes of its image.

The controllers do as those of Kubernetes: a pod that ends with 0 is complete whatever ended it, one
that fails fails its Job, which ends the other pods and restarts the JobSet, and an exit status that
the pod failure policy names ends the JobSet. For the tests: `--evict NAME INDEX` drains a node.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent))
from docker import image_folder
from machine import STATE, detach, environment, make_machine, members, note_call

SETS = STATE / 'jobsets'


class Pods:
    """The pods of one attempt at a JobSet."""

    def __init__(self, folder: Path, attempt: int):
        self.folder, self.attempt = folder, attempt
        *secrets, jobset = json.loads((folder / 'manifest.json').read_text())
        self.secrets = {item['metadata']['name']: item['stringData'] for item in secrets}
        (job,) = jobset['spec']['replicatedJobs']
        self.job = job['template']['spec']
        self.spec = self.job['template']['spec']
        (self.container,) = self.spec['containers']
        # As many as this machine bears.
        self.count = min(2, self.job['completions'] * job['replicas'])

    def variables(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for source in self.container.get('envFrom', ()):
            found |= self.secrets[source['secretRef']['name']]
        for item in self.container['env']:
            if 'value' in item:
                found[item['name']] = item['value'].replace('$$(', '$(')
            else:
                ref = item['valueFrom']['secretKeyRef']
                found[item['name']] = self.secrets[ref['name']][ref['key']]
        return found

    def start(self) -> list[subprocess.Popen]:
        image = json.loads((image_folder(self.container['image']) / 'image.json').read_text())
        if not image['pushed']:
            sys.exit('ErrImagePull')
        with socket.create_server(('', 0)) as server:
            port = server.getsockname()[1]
        pods = []
        for index in range(self.count):
            machine = self.folder / f'pod-{index}'
            shutil.rmtree(machine, ignore_errors=True)
            make_machine(machine, f'{self.folder.name}-slice-0-{index}')
            path = (
                image['environment'].get('PATH', '$PATH').replace('/opt/', f'{image["root"]}/opt/')
            )
            env = environment(machine)
            env |= {**image['environment'], **self.variables(), **members(index, self.count, port)}
            env['PATH'] = path.replace('$PATH', environment(machine)['PATH'])
            command = [word.replace('$$(', '$(') for word in self.container['command']]
            with (self.folder / f'log-{index}').open('a') as log:
                pods.append(
                    subprocess.Popen(
                        command,
                        cwd=Path(image['root'], image['workdir'].strip('/')),
                        env=env,
                        stdout=log,
                        stderr=log,
                    )
                )
            (self.folder / f'pid-{index}').write_text(str(pods[-1].pid))
        return pods

    def outcome(self, pods: list[subprocess.Popen]) -> str:
        """Completed, Failed or restart; ends all pods once one has failed."""
        policy = self.job['podFailurePolicy']['rules'][0]['onExitCodes']['values']
        while True:
            ended = [pod.poll() for pod in pods]
            failed = [status for status in ended if status]
            if failed or None not in ended:
                break
            time.sleep(0.1)
        for pod in pods:
            if pod.poll() is None:
                pod.terminate()
        for pod in pods:
            pod.wait(self.spec['terminationGracePeriodSeconds'])
        if not failed:
            return 'Completed'
        return 'Failed' if any(status in policy for status in failed) else 'restart'


def control(folder: Path) -> None:
    """The controllers of one JobSet, until it is over."""
    allowed = json.loads((folder / 'manifest.json').read_text())[-1]['spec']['failurePolicy']
    for attempt in range(allowed['maxRestarts'] + 1):
        (folder / 'attempt').write_text(str(attempt))
        pods = Pods(folder, attempt)
        started = pods.start()

        def on_delete(*_: object, started: list[subprocess.Popen] = started) -> None:
            for pod in started:
                pod.terminate()
            for pod in started:
                pod.wait()
            sys.exit()

        signal.signal(signal.SIGTERM, on_delete)
        outcome = pods.outcome(started)
        if outcome != 'restart':
            (folder / 'condition').write_text(outcome)
            return
    (folder / 'condition').write_text('Failed')


def folder_of(words: list[str]) -> Path:
    text = ' '.join(words)
    name = re.search(r'jobset(?:-name=|/)([-a-z0-9]+)', text)
    assert name, text
    folder = SETS / name[1]
    if not folder.exists():
        sys.exit(f'Error from server (NotFound): jobsets "{name[1]}" not found')
    return folder


def apply() -> None:
    manifest = list(yaml.safe_load_all(sys.stdin))
    folder = SETS / manifest[-1]['metadata']['name']
    folder.mkdir(parents=True)
    (folder / 'manifest.json').write_text(json.dumps(manifest))
    detach(__file__, '--controller', str(folder))


def wait(words: list[str]) -> int:
    folder = folder_of(words)
    while not (folder / 'condition').exists():
        time.sleep(0.1)
    said = (folder / 'condition').read_text()
    wanted = next(word.rpartition('=')[2] for word in words if word.startswith('--for='))
    return 0 if said == wanted else 1


def main(argv: list[str]) -> int:
    if argv[0] == '--controller':
        (Path(argv[1]) / 'pid').write_text(str(os.getpid()))
        control(Path(argv[1]))
        return 0
    if argv[0] == '--evict':
        os.kill(int((SETS / argv[1] / f'pid-{argv[2]}').read_text()), signal.SIGTERM)
        return 0
    note_call()
    if argv == ['apply', '-f', '-']:
        apply()
    elif argv[0] == 'logs':
        folder = folder_of(argv)
        (index,) = re.findall(r'completion-index=(\d+)', ' '.join(argv))
        follow = ['tail', '-n', '+1', '-F', str(folder / f'log-{index}')]
        return subprocess.run(follow).returncode
    elif argv[0] == 'wait':
        return wait(argv)
    elif argv[0] == 'delete':
        folder = folder_of(argv)
        if not (folder / 'condition').exists():
            os.kill(int((folder / 'pid').read_text()), signal.SIGTERM)
        (folder / 'deleted').touch()
    else:
        sys.exit(f'error: unknown command {argv}')
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
