"""Run commands in forks of a process that has imported big_vit: `commands.run` asks for them.

Reads a JSON line per command and answers with the number of its process, then with its status.
Nothing that a fork would inherit has been started: no backend of JAX, no thread of ours.
"""

import gc
import json
import os
import runpy
import sys
from pathlib import Path

import jax

import big_vit.ledger
import big_vit.plan
import big_vit.report
import big_vit.transfer  # noqa: F401

gc.freeze()
told = None
while told is None:
    line = sys.stdin.readline()
    if not line:
        sys.exit()
    asked = json.loads(line)
    child = os.fork()
    if child == 0:
        told = asked
    else:
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)

# In the fork, which ends as any other Python program does.
for descriptor, path in enumerate((os.devnull, told['stdout'], told['stderr'])):
    os.dup2(os.open(path, os.O_RDWR), descriptor)
sys.stdin = open(0, closefd=False)  # noqa: SIM115
os.environ.clear()
os.environ.update(told['environment'])
jax.config.update('jax_num_cpu_devices', int(os.environ['JAX_NUM_CPU_DEVICES']))
sys.path[0] = str(Path.cwd())
sys.argv = [told['module'], *told['arguments']]
sys.modules.pop(told['module'], None)  # As `python -m` finds it.
runpy.run_module(told['module'], run_name='__main__', alter_sys=True)
