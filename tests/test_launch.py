"""launch/: what the scripts would run is run, with stand-ins for gcloud and srun on PATH."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from commands import ROOT, arguments, environment
from gate import mostly_slow
from packaging.requirements import Requirement

from big_vit import checkpoint, metrics

LAUNCH = ROOT / 'launch'
SCRIPTS = sorted(LAUNCH.glob('*.sh'))
BABYSIT = LAUNCH / 'babysit'
TPU = ('--name', 'big', '--zone', 'us-west4-a', '--accelerator', 'v5litepod-256')
# What quoting has to survive.
AWKWARD = ['--config.a=it\'s "b" $c `d` \\e', '', 'two\nlines', '*', 'é']

# Records each call as a line of JSON; answers as the files beside it say.
GCLOUD = """#!{python}
import json, pathlib, sys
here = pathlib.Path(__file__).parent
if sys.argv[0].endswith(('kubectl', 'sbatch')):
    sys.stdin.read()
with open(here / 'calls', 'a') as file:
    print(json.dumps([pathlib.Path(sys.argv[0]).name, *sys.argv[1:]]), file=file)
words = ' '.join(sys.argv[1:])
for answer in sorted(here.glob('answer-*')):
    match, _, rest = answer.read_text().partition('\\n')
    lines = rest.splitlines()
    if match in words and lines:
        if len(lines) > 1:
            answer.write_text('\\n'.join([match, *lines[1:]]))
        if lines[0].startswith('status '):
            sys.exit(int(lines[0].split()[1]))
        print(lines[0])
        break
"""


SECRET = 'secret of the tests 0123456789'


class Stage:
    """A PATH with stand-ins that note how they are called."""

    def __init__(self, folder, *names):
        self.folder = folder
        for name in names:
            path = folder / name
            path.write_text(GCLOUD.format(python=sys.executable))
            path.chmod(0o755)
        self.environment = {
            **{k: v for k, v in os.environ.items() if k not in ('NAME', 'ZONE', 'VERSION')},
            'PATH': f'{folder}:{os.environ["PATH"]}',
            'HOME': str(folder),
            'TMPDIR': str(folder),
            'SSH_AUTH_SOCK': '/nowhere',
            'BIG_VIT_SECRET': SECRET,
        }

    def answer(self, match, *lines):
        """What calls with this text in them print, one line after the other."""
        path = self.folder / f'answer-{len(list(self.folder.glob("answer-*")))}'
        path.write_text('\n'.join([match, *lines]))

    def calls(self):
        path = self.folder / 'calls'
        found = [json.loads(line) for line in path.read_text().splitlines()]
        path.unlink()
        return found

    def run(self, *command, **env):
        return subprocess.run(
            [str(word) for word in command],
            cwd=ROOT,
            env=self.environment | env,
            capture_output=True,
            text=True,
            timeout=60,
        )


@pytest.fixture
def stage(tmp_path):
    return Stage(tmp_path, 'gcloud', 'ssh-add', 'kubectl', 'sbatch')


def tpu(stage, *words, **env):
    return stage.run(LAUNCH / 'tpu.sh', *words, **env)


def error_line(result):
    assert result.returncode == 2, result.stdout + result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith('error: '), line
    return line


# All scripts.


@pytest.mark.parametrize('script', SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_executable_and_parse(script):
    assert os.access(script, os.X_OK) and os.access(BABYSIT, os.X_OK)
    subprocess.run(['bash', '-n', script], check=True)


SHELLCHECK = shutil.which('shellcheck', path=f'{Path(sys.executable).parent}:{os.environ["PATH"]}')


@pytest.mark.skipif(SHELLCHECK is None, reason='shellcheck is not installed')
def test_shellcheck_finds_nothing():
    result = subprocess.run([SHELLCHECK, *SCRIPTS], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


# tpu.sh


@pytest.mark.parametrize('command', ['create', 'install', 'status', 'logs', 'kill', 'delete'])
@pytest.mark.parametrize('kind', [(), ('--queued', '--node-count', '2')], ids=['vm', 'queued'])
def test_a_dry_run_prints_what_a_real_run_runs(stage, command, kind):
    words = (command, *TPU, '--project', 'p', *kind)
    stage.answer(' list ', 'READY')
    shown = tpu(stage, *words, '--dry-run')
    assert shown.returncode == 0, shown.stderr
    assert not (stage.folder / 'calls').exists(), 'a dry run ran something'
    subprocess.run(['bash', '-ec', shown.stdout], env=stage.environment, check=True)
    printed = stage.calls()
    result = tpu(stage, *words)
    assert result.returncode == 0, result.stderr
    assert stage.calls() == printed
    for name, *rest in printed:
        if name == 'gcloud':
            assert rest[:2] == ['compute', 'tpus']
            assert rest[2] == ('queued-resources' if kind else 'tpu-vm')
            assert '--zone=us-west4-a' in rest and '--project=p' in rest


@pytest.mark.parametrize('state', ['', 'WAITING_FOR_RESOURCES', 'PREEMPTED', 'READY'])
def test_the_hosts_of_a_tpu_are_asked_once_they_are_there(stage, state):
    stage.answer(' list ', state)
    result = tpu(stage, 'status', *TPU)
    assert result.returncode == 0, result.stderr
    assert (state or 'there is no TPU big') in result.stdout
    assert [call[4] for call in stage.calls()] == ['list', *(['ssh'] if state == 'READY' else [])]


def test_without_an_agent_one_is_started_first(stage):
    shown = tpu(stage, 'install', *TPU, '--dry-run', SSH_AUTH_SOCK='').stdout.splitlines()
    assert shown[0] == 'eval "$(ssh-agent -s)"'
    assert shown[2].startswith('ssh-add ')


@pytest.mark.parametrize(
    ('words', 'wanted'),
    [
        (TPU, 'tpu-vm create big --accelerator-type=v5litepod-256 --version=v2-alpha-tpuv5-lite'),
        ((*TPU, '--spot'), '--spot'),
        ((*TPU, '--reserved'), '--reserved'),
        ((*TPU, '--version', 'other'), '--version=other'),
        ((*TPU, '--accelerator=v6e-64'), '--version=v2-alpha-tpuv6e'),
        ((*TPU, '--internal-ips'), '--internal-ips'),
        ((*TPU, '--service-account', 'a@b'), '--service-account=a@b'),
        ((*TPU, '--queued'), '--runtime-version=v2-alpha-tpuv5-lite --node-id=big'),
        ((*TPU, '--queued', '--node-count', '4'), '--node-count=4 --node-prefix=big'),
    ],
)
def test_flags_reach_the_creation(stage, words, wanted):
    assert wanted in tpu(stage, 'create', *words, '--dry-run').stdout


def test_variables_of_the_environment_are_the_defaults(stage):
    env = {'NAME': 'n', 'ZONE': 'a-b1-c', 'ACCELERATOR': 'v4-8', 'SPOT': '1', 'QUEUED': '1'}
    shown = tpu(stage, 'create', '--dry-run', '--zone', 'a-b2-c', **env).stdout
    for part in ('queued-resources create n ', '=v4-8', '--spot', '--zone=a-b2-c', '=tpu-ubuntu'):
        assert part in shown


@pytest.mark.parametrize(
    ('words', 'wanted'),
    [
        (('run', '--name', 'a'), '--zone is missing; give --zone or set ZONE'),
        (('create', '--name', 'a', '--zone', 'a-b1-c'), '--accelerator is missing'),
        (('create', *TPU, '--name', 'my pod'), "--name: 'my pod' must be of a-z"),
        (('create', *TPU, '--zone', 'x; ls'), "--zone: 'x; ls' is not like us-west4-a"),
        (('create', *TPU, '--accelerator', 'tpu7x-128'), 'has no tpu7x-128, only GKE has'),
        (('babysit', *TPU, '--accelerator', 'tpu7x-8', '--', 'x'), 'only GKE has: launch/gke.sh'),
        (('fly', *TPU), 'no command fly'),
        (('create', *TPU, '--sport'), 'no flag --sport'),
        (('create', *TPU, '--commit'), '--commit needs a value'),
        (('create', *TPU, '--spot', '--reserved'), 'exclude each other'),
        (('create', *TPU, '--node-count', '2'), '--node-count needs --queued'),
        (('create', *TPU, '--node-count', 'x'), 'NODE_COUNT must be a whole number'),
        (('create', *TPU[:4], '--accelerator', 'v99-8'), '--version is missing'),
        (('install', *TPU, '--commit', 'nope'), 'nope is no commit'),
        (('run', *TPU), 'say what to run'),
        (('run', *TPU, 'python'), 'no flag python'),
        (('kill', *TPU, '--', 'x'), 'takes no command'),
    ],
)
def test_a_mistake_is_one_line_and_runs_nothing(stage, words, wanted):
    assert wanted in error_line(tpu(stage, *words))
    assert not (stage.folder / 'calls').exists()


def test_a_missing_tool_is_said_with_where_to_get_it(stage):
    for script, words in (('tpu.sh', ('delete', *TPU)), ('slurm.sh', ('--', 'x'))):
        tools = stage.folder / 'tools'
        if not tools.exists():
            tools.mkdir()
            for name in ('dirname', 'tr', 'cat'):
                (tools / name).symlink_to(shutil.which(name))
        result = stage.run(shutil.which('bash'), LAUNCH / script, *words, PATH=str(tools))
        assert 'is not on PATH; ' in error_line(result)


def test_the_image_is_small_and_runs_as_nobody_special():
    lines = [line for line in (LAUNCH / 'Dockerfile').read_text().splitlines() if line]
    last = max(i for i, line in enumerate(lines) if line.startswith('FROM '))
    final = '\n'.join(lines[last:])
    assert 'pip' not in final and final.splitlines()[-1] == 'USER 1000'
    assert 'dev' not in final and 'requirements.txt' not in '\n'.join(lines)
    ignored = (ROOT / '.dockerignore').read_text().split('\n')
    assert '*' in ignored, 'only what is named reaches the image'
    named = {line[1:] for line in ignored if line.startswith('!')}
    assert {'big_vit', 'configs', 'launch', 'setup.py', 'README.md'} <= named
    assert not {'tests', '.git', 'docs', 'benchmarks'} & named


@pytest.mark.parametrize('extra', ['tpu', 'gcs'])
def test_what_hosts_install_reads_and_writes_the_bucket_and_has_no_test_tools(tmp_path, extra):
    setup = [sys.executable, 'setup.py', '--quiet', 'egg_info', '--egg-base', str(tmp_path)]
    subprocess.run(setup, cwd=ROOT, check=True, capture_output=True)
    about = metadata.PathDistribution(tmp_path / 'big_vit.egg-info')
    asked = {
        requirement.name
        for requirement in map(Requirement, about.requires)
        if requirement.marker is None or requirement.marker.evaluate({'extra': extra})
    }
    assert 'gcsfs' in asked
    assert not {'pytest', 'ruff', 'mypy', 'ipykernel', 'hypothesis'} & asked


# On a host: host.sh is run as the command that gcloud would carry.


class Host:
    """A home folder with the code and an environment, as `install` leaves it."""

    def __init__(self, folder):
        self.home = folder / 'home'
        self.root = self.home / 'big_vit'
        (self.root / 'venv' / 'bin').mkdir(parents=True)
        (self.root / 'venv' / 'bin' / 'python').symlink_to(sys.executable)
        (self.root / 'code').mkdir()
        (self.root / 'code' / 'launch').symlink_to(LAUNCH)
        (self.root / 'commit').write_text('abc\n')

    def ssh(self, call):
        (text,) = (word for word in call if word.startswith('--command='))
        return subprocess.run(
            ['bash', '-c', text.partition('=')[2]],
            cwd=self.home,
            env=os.environ | {'HOME': str(self.home)},
            capture_output=True,
            text=True,
            timeout=30,
        )

    def outcome(self):
        path = self.root / 'run' / 'outcome'
        deadline = time.time() + 20
        while time.time() < deadline and not path.exists():
            time.sleep(0.05)
        return path.read_text().strip()


@pytest.fixture
def host(tmp_path):
    return Host(tmp_path)


def on_host(stage, host, command, *words):
    """(result on the host) of `tpu.sh COMMAND`, which gcloud carries there."""
    sent = tpu(stage, command, *TPU, *words)
    assert sent.returncode == 0, sent.stderr
    return host.ssh(stage.calls()[-1])


def test_words_arrive_on_the_host_as_they_were_written(stage, host):
    program = 'import json, sys; print(json.dumps(sys.argv[1:]))'
    command = ('--', 'python', '-c', program, *AWKWARD)
    for _ in range(2):  # Twice: gcloud repeats a command whose connection broke.
        result = on_host(stage, host, 'run', *command)
        assert result.returncode == 0, result.stderr
    assert host.outcome() == 'done 0'
    log = (host.root / 'log').read_text()
    assert json.loads(log.splitlines()[-1]) == AWKWARD


SLEEPS = 'import time; print("up", flush=True); time.sleep(60)'
SAVES = """
import signal, sys, time
def save(*_):
    print('stopped by a signal: saved step 3 of 9; the same command resumes there', flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
print('up', flush=True)
time.sleep(60)
"""
DEAF = 'import signal, time; signal.signal(15, signal.SIG_IGN); print("up", flush=True); '


def wait_for(path, text):
    deadline = time.time() + 20
    while time.time() < deadline and not (path.exists() and text in path.read_text()):
        time.sleep(0.02)
    assert text in path.read_text()


def test_kill_lets_it_save_and_status_says_so(stage, host):
    stage.answer(' list ', 'READY')
    on_host(stage, host, 'run', '--', 'python', '-c', SAVES)
    wait_for(host.root / 'log', '\nup')
    assert 'running, commit abc: up' in on_host(stage, host, 'status').stdout
    refused = on_host(stage, host, 'run', '--', 'python', '-c', SLEEPS)
    assert refused.returncode == 3 and 'another run is active' in refused.stderr
    assert 'stopped' in on_host(stage, host, 'kill').stdout
    assert host.outcome() == 'killed 0'
    assert 'saved step 3' in (host.root / 'log').read_text()
    assert 'nothing runs' in on_host(stage, host, 'kill').stdout


def test_a_run_that_is_over_but_not_gone_is_waited_for(stage, host):
    """Babysit writes the outcome and then ends, which on a busy host takes a while."""
    folder = host.root / 'run'
    folder.mkdir()
    with subprocess.Popen(['sleep', '1.5'], start_new_session=True) as ending:
        (folder / 'pid').write_text(f'{ending.pid}\n')
        (folder / 'boot').write_text(Path('/proc/sys/kernel/random/boot_id').read_text())
        (folder / 'command').write_text('another\n')
        (folder / 'outcome').write_text('done 0\n')
        result = on_host(stage, host, 'run', '--', 'python', '-c', 'print("next")')
        assert ending.poll() == 0
    assert result.returncode == 0, result.stderr
    assert host.outcome() == 'done 0'
    assert (host.root / 'log').read_text().endswith('next\n')


@pytest.mark.slow
def test_kill_9_ends_what_does_not_listen(stage, host):
    on_host(stage, host, 'run', '--', 'python', '-c', DEAF + 'time.sleep(60)')
    wait_for(host.root / 'log', '\nup')
    left = on_host(stage, host, 'kill', '--grace', '1')
    assert left.returncode == 4 and 'kill -9' in left.stderr
    assert 'killed' in on_host(stage, host, 'kill', '--grace', '1', '-9').stdout
    assert 'nothing runs' in on_host(stage, host, 'kill').stdout


def test_the_first_install_unpacks_the_commit_and_the_second_keeps_the_environment(stage, host):
    shutil.rmtree(host.root)
    head = subprocess.run(
        ['git', 'rev-parse', '--short=12', 'HEAD'], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    if not head:
        pytest.skip('not a git checkout')
    # A pip that only notes it was called stands in for minutes of downloads.
    for _ in range(2):
        assert tpu(stage, 'install', *TPU).returncode == 0
        *_, copy, command = stage.calls()
        staged = stage.folder / '.cache' / 'big_vit' / 'launch' / 'big'
        files = [str(staged / name) for name in ('big_vit.tgz', 'big_vit.secret')]
        assert copy[5:9] == [*files, 'big:', '--worker=all']
        assert not Path(files[1]).exists(), 'the secret stays on the laptop'
        shutil.copy(files[0], host.home)
        (host.home / 'big_vit.secret').write_text(f'{SECRET}\n')
        bin_ = host.root / 'venv' / 'bin'
        if not bin_.exists():
            bin_.mkdir(parents=True)
            (bin_ / 'python').write_text(
                '#!/bin/sh\necho "$@" >> "$HOME/python"\necho Python 3.x\n'
            )
            (bin_ / 'python').chmod(0o755)
        for _ in range(2):  # gcloud repeats a command whose connection broke.
            result = host.ssh(command)
            assert result.returncode == 0, result.stderr
            assert f'commit {head}' in result.stdout
    pips = [x for x in (host.home / 'python').read_text().splitlines() if ' pip ' in f' {x} ']
    assert len(pips) == 1 and pips[0].endswith('--editable .[tpu]')
    assert (host.root / 'code' / 'big_vit' / 'train.py').exists()
    secret = host.root / 'secret'
    assert secret.read_text() == f'{SECRET}\n' and secret.stat().st_mode & 0o777 == 0o600


def test_runs_on_hosts_of_every_launcher_know_the_same_secret(stage, host):
    show = ('--', sys.executable, '-c', 'import os; print(os.environ["BIG_VIT_SECRET_FILE"])')
    assert on_host(stage, host, 'run', *show).returncode == 0
    assert host.outcome() == 'done 0'
    assert f'{host.root}/secret' in (host.root / 'log').read_text().splitlines()
    secret, pod = manifest(stage, '--topology', '2x4')[0], jobset(stage, '--topology', '2x4')[-1]
    assert secret['stringData'] == {'secret': SECRET} and SECRET not in json.dumps(pod)
    (reference,) = (
        item['valueFrom']['secretKeyRef']
        for item in pod['containers'][0]['env']
        if item['name'] == 'BIG_VIT_SECRET'
    )
    assert reference == {'name': secret['metadata']['name'], 'key': 'secret'}
    show = ('--', sys.executable, '-c', 'import os; print(os.environ["BIG_VIT_SECRET"])')
    text = stage.run(LAUNCH / 'slurm.sh', '--dry-run', *show).stdout
    assert run_job(stage, text)[1].strip() == SECRET


def test_a_launcher_makes_a_secret_of_its_own(stage):
    made = set()
    stage.environment.pop('BIG_VIT_SECRET')
    for _ in range(2):
        made.add(manifest(stage, '--topology', '2x4')[0]['stringData']['secret'])
        command = ('--', sys.executable, '-c', 'import os; print(os.environ["BIG_VIT_SECRET"])')
        text = stage.run(LAUNCH / 'slurm.sh', '--dry-run', *command).stdout
        made.add(run_job(stage, text)[1].strip())
    assert len(made) == 4 and all(re.fullmatch('[0-9a-f]{64}', secret) for secret in made)


# tpu.sh babysit, against answers of gcloud.

QUICK = {'POLL': '0', 'BACKOFF': '0', 'MAX_BACKOFF': '0'}


def babysit_tpu(stage, *flags, **env):
    result = tpu(stage, 'babysit', *TPU, *flags, '--', 'python', 'x', **QUICK | env)
    verbs = []
    for name, *words in stage.calls():
        if name == 'gcloud':
            text = ' '.join(words)
            inner = re.search(r'host\.sh (start|stop|outcome|install)', text)
            verbs.append(inner[1] if words[3] == 'ssh' and inner else words[3])
    return result, [verb for verb in verbs if verb not in ('list', 'outcome', 'ssh', 'scp')]


def test_babysit_creates_what_is_gone_and_starts_what_is_not_running(stage):
    states = ['', 'CREATING', 'READY', 'READY', 'READY', 'PREEMPTED', '']
    stage.answer(' list ', *states, 'READY')
    stage.answer('host.sh outcome', 'none', 'running', 'running', 'none', 'running', 'done 0')
    result, verbs = babysit_tpu(stage)
    assert result.returncode == 0, result.stderr
    start = ['stop', 'install', 'start']
    assert verbs == ['create', *start, 'delete', 'create', *start]
    assert 'PREEMPTED' in result.stderr and 'the run is done' in result.stderr


def test_babysit_does_not_create_while_gcloud_does_not_answer(stage):
    stage.answer(' list ', 'status 1', 'status 1', 'READY')
    stage.answer('host.sh outcome', 'done 0')
    result, verbs = babysit_tpu(stage)
    assert result.returncode == 0 and verbs == []


def test_babysit_gives_up(stage):
    stage.answer(' list ', '')
    stage.answer(' create ', 'status 1')
    result, verbs = babysit_tpu(stage, '--tries', '3')
    assert result.returncode == 1 and verbs == ['create'] * 3
    assert 'giving up: 3 attempts' in result.stderr


@pytest.mark.slow
def test_a_long_run_makes_babysit_patient_again(stage):
    stage.answer(' list ', 'READY')
    stage.answer('host.sh outcome', *['lost', 'running'] * 5, 'done 0')
    result, verbs = babysit_tpu(stage, '--tries', '2', LONG_RUN='0')
    assert result.returncode == 0 and verbs.count('start') == 5


@pytest.mark.parametrize('said', mostly_slow(['lost', 'none', 'failed 75', 'stopped 0'], 'lost'))
def test_a_host_that_lost_the_run_counts_more_than_those_that_wait_for_it(stage, said):
    gcloud = (stage.folder / 'gcloud').read_text()
    several = gcloud.replace('print(lines[0])', "print(lines[0].replace(', ', chr(10)))")
    (stage.folder / 'gcloud').write_text(several)
    stage.answer(' list ', 'READY')
    both = f'Welcome to Ubuntu, running, {said}, running'
    stage.answer('host.sh outcome', 'running, running', both, 'running, done 0', 'done 0, done 0')
    result, verbs = babysit_tpu(stage)
    assert result.returncode == 0, result.stderr
    assert verbs == ['stop', 'install', 'start'] and f'the run is {said}: starting' in result.stderr


@pytest.mark.parametrize(('said', 'status'), [('failed 2', 2), ('killed 0', 1)])
def test_babysit_leaves_mistakes_and_kills_alone_once_the_run_was_its_own(stage, said, status):
    stage.answer(' list ', 'READY')
    stage.answer('host.sh outcome', said, 'running', said)
    result, verbs = babysit_tpu(stage)
    assert result.returncode == status, result.stderr
    assert verbs == ['stop', 'install', 'start']


def test_babysit_does_not_take_over_another_run(stage):
    stage.answer(' list ', 'READY')
    stage.answer('host.sh outcome', 'other')
    result, verbs = babysit_tpu(stage)
    assert result.returncode == 2 and verbs == []


# babysit, with children that do as they are told: one word of `plan` a run.

CHILD = """
import os, pathlib, signal, sys, time
plan = pathlib.Path('plan')
word, *rest = plan.read_text().split()
plan.write_text(' '.join(rest or [word]))
print('out', word, flush=True)
print('err', word, file=sys.stderr, flush=True)
kind, _, step = word.partition('@')
if step and '--workdir=w' in sys.argv:
    os.makedirs(f'w/checkpoints/{step}/sidecar', exist_ok=True)
if kind == 'resumed':
    print(f'resume  from step {step} of gs://b/w', flush=True)
    sys.exit(1)
if kind == 'done':
    print('done    step 9, checkpoint w/checkpoints/9', flush=True)
elif kind == 'stopped':
    print('stopped by a signal: saved step 3 of 9; the same command resumes there', flush=True)
elif kind == 'waits':
    stop = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
    print('up', flush=True)
    while not stop:
        time.sleep(0.01)
    time.sleep(0.2)
    print('stopped by a signal: saved step 3 of 9; the same command resumes there', flush=True)
elif kind == 'killed':
    os.kill(os.getpid(), signal.SIGKILL)
elif kind != 'silent':
    sys.exit(int(kind))
"""
QUICKLY = ('--backoff', '0.01')


def babysit_command(folder, plan, *flags, words=('--workdir=w',)):
    (folder / 'plan').write_text(plan)
    return [str(BABYSIT), *QUICKLY, *flags, '--', sys.executable, '-c', CHILD, *words]


def babysit(folder, plan, *flags, words=('--workdir=w',)):
    result = subprocess.run(
        babysit_command(folder, plan, *flags, words=words),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=30,
    )
    return result, len(re.findall(r'^out ', result.stdout, flags=re.MULTILINE))


@pytest.mark.parametrize(
    ('plan', 'status', 'runs'),
    [
        ('done', 0, 1),
        ('silent', 0, 1),  # A command without last words, or a process that is not the first.
        ('1 75 killed stopped done', 0, 5),
        ('2 done', 2, 1),
        ('1 2 done', 2, 2),
        ('1', 1, 3),
        ('75', 75, 3),
        ('killed', 137, 3),
        ('130 143 done', 0, 3),
        ('stopped', 1, 4),  # The first saved.
        pytest.param('1@3 1@3 1@6 1@6 1@9 1@9 done', 0, 7, marks=pytest.mark.slow),
        ('1@3 1@3 1@3 1@3 done', 1, 4),
    ],
)
def test_when_babysit_runs_the_command_again(tmp_path, plan, status, runs):
    flags = ('--max-restarts', '4' if plan.count(' ') == 4 and 'killed' in plan else '2')
    result, ran = babysit(tmp_path, plan, *flags, '--outcome', 'outcome')
    assert (result.returncode, ran) == (status, runs), result.stderr
    word = 'done' if status == 0 else 'failed'
    assert (tmp_path / 'outcome').read_text() == f'{word} {status}\n'
    assert ('giving up' in result.stderr) == (status not in (0, 2))


def test_what_the_command_says_shows_progress_where_the_workdir_cannot_be_seen(tmp_path):
    plan = 'resumed@3 resumed@3 resumed@6 resumed@6 done'
    result, ran = babysit(tmp_path, plan, '--max-restarts', '1', words=())
    assert (result.returncode, ran) == (0, 5), result.stderr


def test_babysit_passes_on_lines_as_they_come_and_keeps_the_two_streams_apart(tmp_path):
    process = subprocess.Popen(
        babysit_command(tmp_path, 'waits'),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert [process.stdout.readline(), process.stdout.readline()] == ['out waits\n', 'up\n']
    assert process.stderr.readline() == 'err waits\n'
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_babysit_saves_and_ends_it(tmp_path, number):
    process = subprocess.Popen(
        babysit_command(tmp_path, 'waits', '--outcome', 'outcome'),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
    )
    while process.stdout.readline() != 'up\n':
        pass
    process.send_signal(number)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 0
    assert 'saved step 3' in output and 'out' not in output, 'it was started again'
    assert (tmp_path / 'outcome').read_text() == 'stopped 0\n'


def test_where_0_means_that_the_work_is_done_babysit_ends_with_another_status(tmp_path):
    command = babysit_command(tmp_path, 'waits', '--if-stopped=75')
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    while process.stdout.readline() != 'up\n':
        pass
    process.send_signal(signal.SIGTERM)
    assert 'saved step 3' in process.communicate(timeout=20)[0]
    assert process.returncode == 75
    assert babysit(tmp_path, 'done', '--if-stopped=75')[0].returncode == 0


def test_a_signal_during_the_wait_ends_babysit(tmp_path):
    process = subprocess.Popen(
        [*babysit_command(tmp_path, '1')[:1], *babysit_command(tmp_path, '1')[3:]],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    while 'restart 1 in 10 s' not in process.stderr.readline():
        pass
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=5)
    assert process.returncode == 0


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='needs prctl')
def test_a_killed_babysit_leaves_no_orphan(tmp_path):
    program = 'import os; print(os.getpid(), flush=True); ' + SLEEPS
    with (tmp_path / 'log').open('w') as log:
        process = subprocess.Popen([BABYSIT, '--', sys.executable, '-c', program], stdout=log)
    wait_for(tmp_path / 'log', 'up')
    child = int((tmp_path / 'log').read_text().split()[0])
    process.kill()
    process.wait()
    deadline = time.time() + 10
    while time.time() < deadline and alive(child):
        time.sleep(0.02)
    assert not alive(child)


def alive(pid):
    try:
        return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] != 'Z'
    except OSError:
        return False


def test_babysit_says_what_it_would_do_and_what_is_wrong(tmp_path):
    shown = subprocess.run(
        [BABYSIT, '--dry-run', '--', 'python', '-m', 'big_vit.train', '--workdir', 'a b'],
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    assert shlex.split(shown[0])[-1] == 'a b'
    for words, status in (([], 2), (['--'], 2), (['--', 'no-such-command'], 127)):
        result = subprocess.run([BABYSIT, *words], capture_output=True, text=True)
        assert result.returncode == status and result.stderr


# A long enough run of the real thing, to be killed on its way.
CONFIG = """
from ml_collections import ConfigDict

def get_config():
    return ConfigDict({
        'total_steps': 60, 'batch_size': 16, 'image_size': 8, 'lr': 1e-2,
        'model': {'variant': 'mu/4', 'dtype': 'float32'},
        'data': {'name': 'digits'}, 'evals': {'test': {'split': 'test[:50]', 'every_steps': 50}},
        'checkpoint': {'every_steps': 20}, 'log': {'every_steps': 10},
    })
"""


@pytest.mark.slow
def test_babysit_brings_a_killed_run_to_the_end_of_an_uninterrupted_one(tmp_path):
    (tmp_path / 'tiny.py').write_text(CONFIG)
    ends = {}
    for name in ('whole', 'killed'):
        workdir = tmp_path / name
        train = arguments('train', '--config', tmp_path / 'tiny.py', '--workdir', workdir)
        process = subprocess.Popen(
            [BABYSIT, '--backoff', '0.1', '--', *train],
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        lines = []
        for line in process.stdout:
            lines.append(line)
            if name == 'killed' and line.startswith('train 50/') and 'killed' not in ends:
                children = Path(f'/proc/{process.pid}/task/{process.pid}/children')
                os.kill(int(children.read_text().split()[0]), signal.SIGKILL)
                ends['killed'] = None
        process.stdout.close()
        assert process.wait() == 0, ''.join(lines)
        rows = [
            {key: value for key, value in row.items() if not key.startswith(metrics.TIMING)}
            for row in metrics.read(workdir)
        ]
        ends[name] = rows, checkpoint.read_sidecar(workdir, 60)['content_hash']
    assert 'babysit: status 137' in ''.join(lines) and 'resume  from step' in ''.join(lines)
    assert ends['killed'] == ends['whole']


# gke.sh


GKE = ('--name', 'r', '--image', 'img', '--accelerator', 'v5e')


def manifest(stage, *words):
    result = stage.run(LAUNCH / 'gke.sh', *GKE, *words, '--dry-run', '--', 'python', *AWKWARD)
    assert result.returncode == 0, result.stderr
    return list(yaml.safe_load_all(result.stdout))


def jobset(stage, *words):
    _, found = manifest(stage, *words)
    (job,) = found['spec']['replicatedJobs']
    return found, job, job['template']['spec'], job['template']['spec']['template']['spec']


def test_the_jobset_has_a_pod_for_each_host(stage):
    found, job, template, pod = jobset(stage, '--topology', '16x16', '--slices', '3')
    assert (found['apiVersion'], found['kind']) == ('jobset.x-k8s.io/v1alpha2', 'JobSet')
    assert job['replicas'] == 3
    assert template['parallelism'] == template['completions'] == 64
    assert template['backoffLimit'] == 0 and pod['restartPolicy'] == 'Never'
    assert pod['terminationGracePeriodSeconds'] >= 120
    assert pod['nodeSelector'] == {
        'cloud.google.com/gke-tpu-accelerator': 'tpu-v5-lite-podslice',
        'cloud.google.com/gke-tpu-topology': '16x16',
    }
    (container,) = pod['containers']
    assert container['resources']['limits'] == {'google.com/tpu': 4}
    escaped = [word.replace('$(', '$$(') for word in AWKWARD]
    command = ['launch/babysit', '--if-stopped=75', '--', 'python', *escaped]
    assert container['command'] == command
    (rule,) = template['podFailurePolicy']['rules']
    assert rule['onExitCodes']['values'] == [2]
    assert rule['onExitCodes']['containerName'] == container['name']


EVERYTHING = (
    *('--topology', '4x4', '--slices', '2', '--spot', '--namespace', 'n', '--queue', 'q'),
    *('--priority', 'high', '--service-account', 'ksa', '--cpu', '100', '--memory', '300Gi'),
    *('--shm', '64Gi', '--env', 'A=b "c" $(D)\ttab', '--env', 'B=', '--secret', 'wandb'),
)


def test_what_a_jobset_can_be_told(stage):
    secret, found = manifest(stage, *EVERYTHING)
    *_, pod = jobset(stage, *EVERYTHING)
    assert secret['metadata']['namespace'] == found['metadata']['namespace'] == 'n'
    assert found['metadata']['labels'] == {'kueue.x-k8s.io/queue-name': 'q'}
    assert (pod['priorityClassName'], pod['serviceAccountName']) == ('high', 'ksa')
    (container,), (volume,) = pod['containers'], pod['volumes']
    asked = {'google.com/tpu': 4, 'cpu': '100', 'memory': '300Gi'}
    assert container['resources'] == {'requests': asked, 'limits': asked}
    variables = {item['name']: item.get('value') for item in container['env']}
    assert variables['A'] == 'b "c" $$(D)\ttab' and variables['B'] == ''
    assert container['envFrom'] == [{'secretRef': {'name': 'wandb'}}]
    assert volume['emptyDir'] == {'medium': 'Memory', 'sizeLimit': '64Gi'}
    assert container['volumeMounts'] == [{'name': volume['name'], 'mountPath': '/dev/shm'}]
    assert container['securityContext'] == {'allowPrivilegeEscalation': False}
    *_, pod = jobset(stage, '--topology', '4x4', '--privileged')
    assert pod['containers'][0]['securityContext'] == {'privileged': True, 'runAsUser': 0}


@pytest.mark.skipif(
    importlib.util.find_spec('kubernetes_validate') is None, reason='needs kubernetes-validate'
)
@pytest.mark.parametrize('words', [EVERYTHING, ('--topology', '4x4', '--privileged')])
def test_kubernetes_would_take_the_manifest(stage, words):
    import kubernetes_validate

    secret, found = manifest(stage, *words)
    (replicated,) = found['spec']['replicatedJobs']
    job = {'apiVersion': 'batch/v1', 'kind': 'Job', 'metadata': {'name': 'x'}}
    for document in (secret, {**job, **replicated['template']}):
        kubernetes_validate.validate(document, '1.34', strict=True)
    # What the schema of JobSet v1alpha2 asks of its own part.
    assert set(found['spec']) == {'failurePolicy', 'replicatedJobs'}
    assert set(replicated) == {'name', 'replicas', 'template'}
    assert set(found['spec']['failurePolicy']) == {'maxRestarts', 'rules'}
    assert all({'name', 'action'} <= set(r) for r in found['spec']['failurePolicy']['rules'])


@pytest.mark.parametrize(
    ('topology', 'more', 'hosts', 'chips'),
    [
        ('2x2', (), 1, 4),
        ('1x1', (), 1, 1),
        ('2x4', (), 2, 4),
        ('2x4', ('--chips-per-host', '8'), 1, 8),
        ('4x4x8', ('--accelerator', 'v5p'), 32, 4),
        ('2x2x2', ('--accelerator', 'tpu7x'), 2, 4),
    ],
)
def test_hosts_of_a_topology(stage, topology, more, hosts, chips):
    _, _, template, pod = jobset(stage, '--topology', topology, *more)
    assert template['completions'] == hosts
    assert pod['containers'][0]['resources']['requests'] == {'google.com/tpu': chips}


def test_spot_nodes_are_asked_for_and_tolerated(stage):
    pod = jobset(stage, '--topology', '4x4', '--spot')[-1]
    assert pod['nodeSelector']['cloud.google.com/gke-spot'] == 'true'
    assert pod['tolerations'][0]['key'] == 'cloud.google.com/gke-spot'
    assert 'tolerations' not in jobset(stage, '--topology', '4x4')[-1]


@pytest.mark.parametrize(
    ('words', 'wanted'),
    [
        (('--name', 'r', '--', 'x'), '--image is missing'),
        ((*GKE, '--', 'x'), '--topology is missing'),
        ((*GKE, '--topology', '4x4'), 'what to run'),
        ((*GKE, '--topology', '3x3', '--', 'x'), '9 chips'),
        ((*GKE, '--topology', 'ax4', '--', 'x'), 'ax4'),
        ((*GKE, '--topology', '4x4x4', '--', 'x'), '4x4x4 has 3 sides, one of v5e 2'),
        ((*GKE, '--topology', '4x4', '--slices', '0', '--', 'x'), '--slices'),
        ((*GKE, '--topology', '4x4', '--name', 'My run', '--', 'x'), "--name: 'My run' must be"),
        ((*GKE, '--topology', '4x4', '--name', 'r' * 41, '--', 'x'), 'must be up to 40'),
        ((*GKE, '--topology', '4x4', '--queue', 'a: b', '--', 'x'), "--queue: 'a: b' is no name"),
        (
            (*GKE, '--topology', '4x4', '--env', 'A-B=1', '--', 'x'),
            "'A-B=1' is not like",
        ),
        ((*GKE, '--topology', '4x4', '--memory', '3 GB', '--', 'x'), "--memory: '3 GB' is no"),
        ((*GKE, '--topology', '4x4', '--accelerator', 'v9', '--', 'x'), 'v9'),
        ((*GKE, '--toplogy', '4x4', '--', 'x'), 'no flag --toplogy'),
    ],
)
def test_mistakes_about_a_jobset(stage, words, wanted):
    assert wanted in error_line(stage.run(LAUNCH / 'gke.sh', *words))


# slurm.sh


def slurm(stage, *words):
    result = stage.run(LAUNCH / 'slurm.sh', *words, '--dry-run', '--', 'python', *AWKWARD)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_job_script_asks_for_a_process_for_each_gpu(stage):
    text = slurm(
        stage, '--nodes', '4', '--gpus-per-node', '2', '--partition', 'gpu', '--time', '1:00'
    )
    asked = [line.partition(' ')[2] for line in text.splitlines() if line.startswith('#SBATCH')]
    for flag in ('--nodes=4', '--ntasks-per-node=2', '--gpus-per-node=2', '--partition=gpu',
                 '--time=1:00', '--signal=B:USR1@120', '--requeue'):  # fmt: skip
        assert asked.count(flag) == 1
    assert text.startswith('#!/bin/bash\n') and '--gpus-per-task' not in str(asked)


SRUN = """#!/bin/bash
while [ "${1#--}" != "$1" ]; do shift; done
"$@" &
echo $! > "$HOME/task"
trap 'kill -KILL $!' TERM
wait $!
"""


def run_job(stage, text, number=None):
    """The job script in bash, with an srun of one task; a signal ends it.

    As in Slurm 22.05: a signal to srun itself kills the task, `scancel --signal` reaches
    only the task, and the end of a job reaches both.
    """
    srun = stage.folder / 'srun'
    srun.write_text(SRUN)
    srun.chmod(0o755)
    shutil.copy(stage.folder / 'gcloud', stage.folder / 'scontrol')
    scancel = stage.folder / 'scancel'
    scancel.write_text(
        '#!/bin/bash\n[ "$*" = "--signal=TERM 7" ] && kill -TERM "$(cat "$HOME/task")"\n'
    )
    scancel.chmod(0o755)
    process = subprocess.Popen(
        ['bash', '-c', text],
        cwd=ROOT,
        env=stage.environment | {'SLURM_JOB_ID': '7'},
        stdout=subprocess.PIPE,
        text=True,
    )
    first = process.stdout.readline()
    if number:
        process.send_signal(number)
    if number == signal.SIGTERM:
        os.kill(int((stage.folder / 'task').read_text()), number)
    rest, _ = process.communicate(timeout=20)
    calls = stage.calls() if (stage.folder / 'calls').exists() else []
    return process.returncode, first + rest, calls


def test_words_arrive_in_the_job_as_they_were_written(stage):
    program = 'import json, sys; print(json.dumps(sys.argv[1:]))'
    command = ('--', sys.executable, '-c', program, *AWKWARD)
    text = stage.run(LAUNCH / 'slurm.sh', '--dry-run', *command).stdout
    status, output, calls = run_job(stage, text)
    assert (status, json.loads(output), calls) == (0, AWKWARD, [])


@pytest.mark.parametrize(
    ('number', 'requeued'),
    [(signal.SIGUSR1, [['scontrol', 'requeue', '7']]), (signal.SIGTERM, [])],
    ids=['the time is over', 'cancelled'],
)
def test_a_job_saves_at_its_end_and_queues_again_unless_cancelled(stage, number, requeued):
    text = stage.run(LAUNCH / 'slurm.sh', '--dry-run', '--', sys.executable, '-c', SAVES).stdout
    status, output, calls = run_job(stage, text, number)
    assert status == 0 and 'saved step 3' in output
    assert calls == requeued


def test_mistakes_about_a_job(stage):
    assert 'whole number' in error_line(stage.run(LAUNCH / 'slurm.sh', '--nodes', 'x', '--', 'y'))
    assert 'characters' in error_line(stage.run(LAUNCH / 'slurm.sh', '--account', 'a b', '--', 'y'))
    assert 'no flag --node' in error_line(stage.run(LAUNCH / 'slurm.sh', '--node', '2', '--', 'y'))
    assert 'what to run' in error_line(stage.run(LAUNCH / 'slurm.sh', '--nodes', '2'))


def test_without_dry_run_the_files_go_to_their_tools(stage):
    assert stage.run(LAUNCH / 'slurm.sh', '--', 'x').returncode == 0
    assert stage.run(LAUNCH / 'gke.sh', *GKE, '--topology', '4x4', '--', 'x').returncode == 0
    assert stage.calls() == [['sbatch'], ['kubectl', 'apply', '-f', '-']]
