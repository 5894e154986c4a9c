"""What all stand-ins need: a record of calls, and machines without anything but their Python.

STAND_INS names the folder of their state.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
STATE = Path(os.environ['STAND_INS'])
# The machine's credentials, so to speak, and what makes a fast JAX without accelerators.
PASSED = (
    'STORAGE_EMULATOR_HOST',
    'TENSORSTORE_GCS_HTTP_URL',
    'GOOGLE_AUTH_TOKEN_FOR_TESTING',
    'GOOGLE_CLOUD_PROJECT',
    'GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT',
    'GLIBC_TUNABLES',
    'XLA_FLAGS',
)

# A Python whose environments begin empty, with our pip.
PYTHON = """#!/bin/sh
if [ "$1 $2" = '-m venv' ]; then
  '{python}' -m venv --without-pip "$3"
  set -- "$3"/lib/python3.*/site-packages
  cat > "$1/pip.py" << 'END'
import os, sys, sysconfig
site = sysconfig.get_path('purelib')
os.execv('{python}', ['{python}', '{here}/pip.py', site, *sys.argv[1:]])
END
else
  exec '{python}' "$@"
fi
"""


def note_call() -> None:
    """Add the command line to the record, and every line that could be seen by `ps`."""
    with (STATE / 'calls').open('a') as file:
        file.write(json.dumps([Path(sys.argv[0]).name, *sys.argv[1:]]) + '\n')


def make_machine(folder: Path, name: str) -> None:
    """Make a home, and commands that this machine has of its own."""
    (folder / 'home').mkdir(parents=True)
    (folder / 'bin').mkdir()
    script = PYTHON.format(python=sys.executable, here=HERE)
    commands = {'python3.13': script, 'python3': script, 'python': script,
                'hostname': f'#!/bin/sh\necho {name}\n'}  # fmt: skip
    for command, text in commands.items():
        (folder / 'bin' / command).write_text(text)
        (folder / 'bin' / command).chmod(0o755)


def environment(folder: Path) -> dict[str, str]:
    """The environment of a login on a machine: nothing of ours."""
    return {
        'HOME': str(folder / 'home'),
        'PATH': f'{folder / "bin"}:/usr/bin:/bin',
        'LANG': 'C.UTF-8',
        'JAX_PLATFORMS': 'cpu',
        'JAX_NUM_CPU_DEVICES': '1',
        # Also what compiles in a moment is in the cache when a host starts again.
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
        **{name: os.environ[name] for name in PASSED if name in os.environ},
    }


def members(process: int, count: int, port: int) -> dict[str, str]:
    """What the metadata server tells real hosts: who is who."""
    return {
        'JAX_COORDINATOR_ADDRESS': f'localhost:{port}',
        'JAX_NUM_PROCESSES': str(count),
        'JAX_PROCESS_ID': str(process),
    }


def power_off(folder: Path) -> None:
    """End at once every process that calls this machine's home its own."""
    home = f'HOME={folder / "home"}'.encode()
    for path in Path('/proc').glob('[0-9]*'):
        try:
            if home in (path / 'environ').read_bytes().split(b'\0'):
                os.kill(int(path.name), signal.SIGKILL)
        except OSError:
            continue


def detach(*arguments: str) -> None:
    """Start this script again, apart from whoever called it."""
    with (STATE / 'detached.log').open('a') as log:
        subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
