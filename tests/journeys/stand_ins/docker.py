#!/usr/bin/env python3
"""Stand-in for docker: builds an image as a folder, with the commands of its Dockerfile really run.

What a base image has is this machine's; pip is ours. An image is a root folder and image.json.
"""

import fnmatch
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from machine import STATE, environment, make_machine, note_call

IMAGES = STATE / 'images'


def image_folder(name: str) -> Path:
    return IMAGES / re.sub(r'\W', '_', name)


def is_ignored(path: str, rules: list[str]) -> bool:
    """Whether .dockerignore leaves a path out: the last rule that matches it or a parent says."""
    ignored = False
    parts = path.split('/')
    for rule in rules:
        pattern = rule.removeprefix('!').rstrip('/')
        for end in range(1, len(parts) + 1):
            candidates = ['/'.join(parts[:end])]
            if pattern.startswith('**/'):
                candidates = ['/' + candidates[0]]
            wanted = pattern.replace('**/', '*/', 1)
            depth_fits = '**' in rule or wanted.count('/') == candidates[0].count('/')
            if depth_fits and fnmatch.fnmatch(candidates[0], wanted):
                ignored = not rule.startswith('!')
    return ignored


def copy_context(context: Path, target: Path) -> None:
    """Copy what git knows and .dockerignore lets through, links as links."""
    lines = (context / '.dockerignore').read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith('#')]
    for path in sorted(context.rglob('*')):
        name = str(path.relative_to(context))
        if (path.is_file() or path.is_symlink()) and not is_ignored(name, rules):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target / name, follow_symlinks=False)


class Stage:
    """A stage of a build: its root folder and what its instructions set."""

    def __init__(self, folder: Path, base: str):
        self.folder, self.root, self.base = folder, folder / 'root', base
        self.workdir, self.user, self.environment = '/', 'root', {}
        make_machine(folder, 'build')
        # Not of the base image, and only root may.
        (folder / 'bin' / 'useradd').write_text(f'#!/bin/sh\necho "$@" > {folder}/useradd\n')
        (folder / 'bin' / 'useradd').chmod(0o755)
        self.root.mkdir()

    def at(self, path: str) -> Path:
        full = path if path.startswith('/') else f'{self.workdir}/{path}'
        return self.root / full.strip('/')

    def run(self, text: str, arguments: dict[str, str]) -> None:
        text = re.sub(r'(?<![\w.])/(opt|src|big_vit)/', rf'{self.root}/\1/', text)
        self.at('.').mkdir(parents=True, exist_ok=True)
        (self.root / 'opt').mkdir(exist_ok=True)
        env = environment(self.folder) | arguments
        result = subprocess.run(['sh', '-ec', text], cwd=self.at('.'), env=env)
        if result.returncode:
            sys.exit(f'ERROR: failed to solve: exit code: {result.returncode}')

    def copy(self, words: list[str], context: Path, stages: dict[str, 'Stage']) -> None:
        source_root = context
        if words[0].startswith('--from='):
            source_root = stages[words.pop(0).partition('=')[2]].root
        *sources, target = words
        for source in sources:
            found = source_root / source.strip('/')
            if not found.exists():
                sys.exit(f'ERROR: failed to compute cache key: "/{source}": not found')
            if found.is_dir():
                shutil.copytree(found, self.at(target), symlinks=True, dirs_exist_ok=True)
            else:
                self.at(target).mkdir(parents=True, exist_ok=True)
                shutil.copy(found, self.at(target))


def instructions(text: str) -> list[tuple[str, str]]:
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith('#')]
    joined = '\n'.join(lines).replace('\\\n', ' ')
    return [tuple(line.split(None, 1)) for line in joined.splitlines()]


def build(file: Path, name: str, context: Path, given: dict[str, str]) -> None:
    folder = image_folder(name)
    shutil.rmtree(folder, ignore_errors=True)
    copy_context(context, folder / 'context')
    stages: dict[str, Stage] = {}
    arguments: dict[str, str] = {}
    stage: Stage | None = None
    for word, rest in instructions(file.read_text()):
        if word == 'ARG':
            key, _, default = rest.partition('=')
            arguments[key] = given.get(key, default)
        elif word == 'FROM':
            base, _, label = rest.partition(' AS ')
            stage = Stage(folder / f'stage-{len(stages)}', base)
            stages[label or 'last'] = stage
        else:
            assert stage is not None
            if word == 'WORKDIR':
                stage.workdir = rest
                stage.at('.').mkdir(parents=True, exist_ok=True)
            elif word == 'COPY':
                stage.copy(shlex.split(rest), folder / 'context', stages)
            elif word == 'RUN':
                stage.run(rest, arguments)
            elif word == 'ENV':
                stage.environment |= dict(pair.split('=', 1) for pair in shlex.split(rest))
            elif word == 'USER':
                stage.user = rest
            else:
                sys.exit(f'ERROR: dockerfile parse error: unknown instruction: {word}')
    assert stage is not None
    about = {'root': str(stage.root), 'workdir': stage.workdir, 'user': stage.user,
             'environment': stage.environment, 'pushed': False}  # fmt: skip
    (folder / 'image.json').write_text(json.dumps(about))


def main(argv: list[str]) -> None:
    note_call()
    if argv[0] == 'push':
        path = image_folder(argv[1]) / 'image.json'
        path.write_text(json.dumps(json.loads(path.read_text()) | {'pushed': True}))
        return
    flags: dict[str, str] = {}
    given: dict[str, str] = {}
    words = argv[1:]
    while words and words[0].startswith('-'):
        flag, value = words.pop(0), words.pop(0)
        if flag == '--build-arg':
            given |= dict([value.split('=', 1)])
        else:
            flags[flag] = value
    build(Path(flags['-f']), flags['-t'], Path(words[0]).resolve(), given)


if __name__ == '__main__':
    main(sys.argv[1:])
