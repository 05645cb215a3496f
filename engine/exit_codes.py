"""Exit codes of child processes in words."""

from __future__ import annotations

import signal


def describe_exit(code: int) -> str:
    """Return how a process ended, as the end of a sentence.

    ``code`` is that of ``subprocess.Popen``: negative if a signal ended the process. Real-time
    signals, which have no name in Python, are given by number.

    >>> describe_exit(3), describe_exit(-11), describe_exit(-40)
    ('ended with exit code 3', 'was ended by SIGSEGV', 'was ended by signal 40')
    >>> describe_exit(-9)
    'was ended by SIGKILL, as the system does when memory runs out'
    """
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    why = ", as the system does when memory runs out" if name == "SIGKILL" else ""
    return f"was ended by {name}{why}"
