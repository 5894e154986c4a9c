#!/usr/bin/env python3
"""Stand-in for gcloud: a TPU is a folder with a home for each host, and commands run there.

For the tests: `--preempt NAME` takes a TPU away, `--power-off NAME HOST` ends all on one host.
"""

import json
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import fsspec

sys.path.insert(0, str(Path(__file__).resolve().parent))
from machine import STATE, environment, make_machine, members, note_call, power_off

TPUS = STATE / 'tpus'
PLACE = {'--zone', '--project'}
CREATE = {'--accelerator-type', '--spot', '--reserved', '--internal-ips', '--service-account',
          '--scopes'}  # fmt: skip
FLAGS = {
    ('tpu-vm', 'create'): CREATE | {'--version'},
    ('queued-resources', 'create'): (CREATE - {'--internal-ips'})
    | {'--internal-ips', '--runtime-version', '--node-id', '--node-count', '--node-prefix'},
    ('tpu-vm', 'delete'): {'--quiet'},
    ('queued-resources', 'delete'): {'--quiet', '--force'},
    ('tpu-vm', 'list'): {'--filter', '--format'},
    ('queued-resources', 'list'): {'--filter', '--format'},
    ('tpu-vm', 'ssh'): {'--worker', '--command', '--internal-ip'},
    ('queued-resources', 'ssh'): {'--worker', '--node', '--command', '--internal-ip'},
    ('tpu-vm', 'scp'): {'--worker', '--internal-ip'},
    ('queued-resources', 'scp'): {'--worker', '--node', '--internal-ip'},
}


def fail(text: str):
    sys.exit(f'ERROR: (gcloud) {text}')


class Tpu:
    def __init__(self, name: str):
        self.folder, self.name = TPUS / name, name
        self._file = self.folder / 'tpu.json'

    def exists(self) -> bool:
        return self._file.exists()

    @property
    def facts(self) -> dict:
        return json.loads(self._file.read_text())

    def change(self, **facts) -> None:
        self._file.write_text(json.dumps({**(self.facts if self.exists() else {}), **facts}))

    def hosts(self) -> list[Path]:
        return sorted(self.folder.glob('host-*'))

    def create(self, kind: str, accelerator: str) -> None:
        if self.exists():
            fail(f'ALREADY_EXISTS: {self.name}')
        with socket.create_server(('', 0)) as server:
            port = server.getsockname()[1]
        # Of a pod as many as this machine bears.
        count = 1 if int(accelerator.rpartition('-')[2]) <= 8 else 2
        for host in range(count):
            make_machine(self.folder / f'host-{host}', f'{self.name}-w-{host}')
        # A queued resource is there when one has asked for it twice.
        first = 'READY' if kind == 'tpu-vm' else 'WAITING_FOR_RESOURCES'
        self.change(kind=kind, port=port, state=first, asked=0)

    def state(self) -> str:
        facts = self.facts
        if facts['state'] == 'WAITING_FOR_RESOURCES':
            asked = facts['asked'] + 1
            self.change(asked=asked, state='ACTIVE' if asked > 1 else facts['state'])
        return self.facts['state']

    def power_off(self) -> None:
        for host in self.hosts():
            power_off(host)


def list_tpus(kind: str, flags: dict[str, str]) -> int:
    there = [Tpu(path.name) for path in sorted(TPUS.glob('*')) if Tpu(path.name).exists()]
    there = [tpu for tpu in there if tpu.facts['kind'] == kind]
    if pattern := flags.get('--filter'):
        tail = pattern.removeprefix('name~')
        there = [t for t in there if re.search(tail, f'projects/p/locations/z/x/{t.name}')]
    for tpu in there:
        print(tpu.state() if '--format' in flags else f'{tpu.name}  {tpu.state()}')
    return 0


def reachable(kind: str, name: str, flags: dict[str, str]) -> list[tuple[int, Path, dict]]:
    """(number, folder, environment) of the hosts that flags name."""
    tpu = Tpu(name)
    if not tpu.exists() or tpu.facts['kind'] != kind:
        fail(f'NOT_FOUND: {name}')
    if (state := tpu.facts['state']) not in ('READY', 'ACTIVE'):
        fail(f'{name} is {state}')
    if kind == 'queued-resources' and flags.get('--node', '0') not in ('0', 'all'):
        fail(f'--node={flags["--node"]}: there is one')
    hosts = list(enumerate(tpu.hosts()))
    if (worker := flags.get('--worker', '0')) != 'all':
        hosts = [hosts[int(worker)]]
    count = len(tpu.hosts())
    who = {} if count == 1 else tpu.facts
    return [
        (i, host, environment(host) | (members(i, count, who['port']) if who else {}))
        for i, host in hosts
    ]


def ssh(kind: str, name: str, flags: dict[str, str]) -> int:
    started = [
        subprocess.Popen(['bash', '-c', flags['--command']], cwd=host / 'home', env=env)
        for _, host, env in reachable(kind, name, flags)
    ]
    return max(process.wait() for process in started)


def scp(kind: str, words: list[str], flags: dict[str, str]) -> int:
    *sources, target = words
    name, _, below = target.partition(':')
    for _, host, _ in reachable(kind, name, flags):
        for source in sources:
            shutil.copy(source, host / 'home' / below)
    return 0


def tpus(kind: str, verb: str, rest: list[str]) -> int:
    flags = dict(word.partition('=')[::2] for word in rest if word.startswith('--'))
    words = [word for word in rest if not word.startswith('--')]
    if unknown := flags.keys() - FLAGS[kind, verb] - PLACE:
        fail(f'unrecognized arguments: {unknown}')
    if verb == 'list':
        return list_tpus(kind, flags)
    if verb == 'ssh':
        return ssh(kind, words[0], flags)
    if verb == 'scp':
        return scp(kind, words, flags)
    tpu = Tpu(words[0])
    if verb == 'create':
        tpu.create(kind, flags['--accelerator-type'])
    elif not tpu.exists():
        fail(f'NOT_FOUND: {words[0]}')
    else:
        tpu.power_off()
        shutil.rmtree(tpu.folder)
    return 0


def storage(words: list[str]) -> int:
    bucket = fsspec.filesystem('gs', use_listings_cache=False)
    match words:
        case ['buckets', 'create', url, '--location=us-west4', '--uniform-bucket-level-access']:
            bucket.mkdir(url.removeprefix('gs://'))
        case ['rsync', folder, url, '--recursive']:
            for path in sorted(p for p in Path(folder).rglob('*') if p.is_file()):
                bucket.put_file(str(path), f'{url}/{path.relative_to(folder)}')
        case ['cp', url, folder, '--recursive']:
            inside = url.removeprefix('gs://')
            for path in bucket.find(inside):
                target = Path(folder, inside.rpartition('/')[2], path[len(inside) + 1 :])
                target.parent.mkdir(parents=True, exist_ok=True)
                bucket.get_file(path, str(target))
        case _:
            fail(f'storage: {words}')
    return 0


def main(argv: list[str]) -> int:
    match argv:
        case ['--preempt', name]:
            Tpu(name).power_off()
            queued = Tpu(name).facts['kind'] == 'queued-resources'
            Tpu(name).change(state='SUSPENDED' if queued else 'PREEMPTED')
        case ['--power-off', name, host]:
            power_off(Tpu(name).hosts()[int(host)])
        case ['services', 'enable', *_]:
            note_call()
        case ['storage', *words]:
            note_call()
            return storage(words)
        case ['compute', 'tpus', kind, verb, *rest]:
            note_call()
            return tpus(kind, verb, rest)
        case _:
            fail(f'unknown: {argv}')
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
