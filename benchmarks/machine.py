"""On what a benchmark ran: the processors, and the versions of Python and of packages."""

import os
import platform
from importlib import metadata
from pathlib import Path


def cpu() -> str:
    try:
        text = Path('/proc/cpuinfo').read_text()
        return text.partition('model name')[2].partition(':')[2].partition('\n')[0].strip()
    except OSError:
        return platform.processor()


def about(*packages: str) -> dict[str, str]:
    """Return what results name beside their figures."""
    versions = {name: metadata.version(name) for name in packages}
    return {'cpu': f'{os.cpu_count()} x {cpu()}', 'python': platform.python_version(), **versions}
