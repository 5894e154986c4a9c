"""Ctrl-C and SIGTERM: one line and the status of a shell, also while compiled code runs."""

import signal
import subprocess
import sys
import time

import pytest
from commands import ROOT, environment

# Minutes in C, during which Python runs no handler: like a compilation.
LONG = "import hashlib; hashlib.pbkdf2_hmac('sha256', b'x', b'y', 10**9)"

COMMAND = f"""
import sys, time
from big_vit import signals

def work():
    print('works', flush=True)
    if sys.argv[1] == 'in C':
        {LONG}
    elif sys.argv[1] == 'in a destructor':
        class Slow:
            def __del__(self):
                time.sleep(100)
        Slow()
    elif sys.argv[1] == 'at the end':
        try:
            time.sleep(100)
        finally:
            print('put in order', flush=True)
    time.sleep(100)

try:
    with signals.raised():
        work()
except signals.Interrupted as error:
    sys.exit(signals.say(error.number))
"""

TRAINING = f"""
from big_vit import runtime

def main(argv):
    with runtime.stop_signals(lambda: print('asked', flush=True)) as stop:
        print('works', flush=True)
        {LONG}

runtime.command(main)
"""


def ended(text, *args, numbers, pause=0.3):
    process = subprocess.Popen(
        [sys.executable, '-c', text, *args],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == 'works\n'
    for number in numbers:
        time.sleep(pause)
        process.send_signal(number)
    began = time.monotonic()
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err, time.monotonic() - began


@pytest.mark.parametrize(
    'number, status, line',
    [
        (signal.SIGINT, 130, 'error: interrupted\n'),
        (signal.SIGTERM, 143, 'error: terminated\n'),
    ],
)
def test_a_command_ends_with_one_line_and_puts_things_in_order(number, status, line):
    found = ended(COMMAND, 'at the end', numbers=[number])
    assert found[:3] == (status, 'put in order\n', line)


@pytest.mark.slow
def test_what_runs_in_c_is_given_a_moment_or_none():
    for where in ('in C', 'in a destructor'):
        status, _, err, seconds = ended(COMMAND, where, numbers=[signal.SIGINT])
        assert (status, err) == (130, 'error: interrupted\n') and 1 < seconds < 15
    status, _, err, seconds = ended(COMMAND, 'in C', numbers=[signal.SIGINT] * 2)
    assert (status, err) == (130, 'error: interrupted\n') and seconds < 2.5


def test_a_second_ctrl_c_ends_a_run_at_once_while_it_compiles():
    status, out, err, seconds = ended(TRAINING, numbers=[signal.SIGINT] * 2)
    assert (status, err) == (130, 'error: interrupted\n') and seconds < 2.5
    assert out.startswith('asked\n')


def test_a_loader_process_leaves_ctrl_c_to_its_run(tmp_path):
    (tmp_path / 'command.py').write_text("""
import multiprocessing, signal, sys
import big_vit.command_line

if __name__ == '__main__':
    with multiprocessing.get_context('spawn').Pool(1) as pool:
        ignored = pool.apply(signal.getsignal, (signal.SIGINT,)) == signal.SIG_IGN
    print(ignored, signal.getsignal(signal.SIGINT) == signal.SIG_IGN)
""")
    result = subprocess.run(
        [sys.executable, str(tmp_path / 'command.py')], cwd=ROOT, env=environment(),
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert result.stdout == 'True False\n', result.stderr
