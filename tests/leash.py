"""Become a command that runs as an ordinary user and ends with its parent.

    python -I -S leash.py PARENT USER COMMAND…

A program of its own and not a `preexec_fn`: that would run Python in a fork of a process with threads, which
can hang and which Python 3.12 warns about.
"""

import ctypes
import os
import pwd
import signal
import sys

# From <linux/prctl.h>.
PR_SET_PDEATHSIG = 1


def main(parent: int, user: str, command: list[str]) -> None:
    """Replace this process by `command`, run as `user` ("" keeps the user), on a leash held by `parent`."""
    # Everything is looked up before the user changes: who we become may be unable to read this Python.
    entry = pwd.getpwnam(user) if user else None
    libc = ctypes.CDLL(None)
    if entry:
        os.setgroups([])
        os.setgid(entry.pw_gid)
        os.setuid(entry.pw_uid)
    # After setuid, which resets it. PostgreSQL takes SIGQUIT for an immediate shutdown, also of its children.
    if sys.platform == "linux":
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGQUIT)
    # A parent that died before the call above sends no signal any more.
    if os.getppid() == parent:
        os.execv(command[0], command)  # noqa: S606 - no shell is wanted


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
