"""Commands of this package as forks of the test's process, which spare each of them the seconds that imports take."""

import gc
import importlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra

import nai_xl

PROGRAMS = ("nai_xl.train", "torch.distributed.run")  # each has a main()


class Fork(subprocess.Popen[Any]):
    """subprocess.Popen, but `python -m` one of PROGRAMS is run by a fork of this process: with the same working
    directory, environment, streams, signals and exit status. Whatever that starts is started in the same way.
    """

    def __init__(self, args: Any, *more: Any, **named: Any):
        if program := program_of(args):
            importlib.import_module(program[0])
            named["preexec_fn"] = partial(work, *program, named.get("env"), open_files())
        super().__init__(args, *more, **named)


def program_of(command: Any) -> tuple[str, Sequence[str]] | None:
    """Module and arguments of a command that can be forked."""
    if isinstance(command, str | bytes) or command[0] != sys.executable:
        return None
    words = [str(word) for word in command[1:]]
    start = words.index("-m") if "-m" in words[:2] else -2
    return (words[start + 1], words[start + 2 :]) if words[start + 1] in PROGRAMS else None


def open_files() -> set[int]:
    return {int(path.name) for path in Path("/proc/self/fd").iterdir()}


def work(module: str, arguments: Sequence[str], env: Mapping[str, str] | None, inherited: set[int]) -> None:
    """What the fork does, where Popen would begin another program. It never returns."""
    for file in open_files() - inherited - {0, 1, 2}:  # Popen waits until its own pipe is closed
        try:
            os.close(file)
        except OSError:  # the listing's own
            continue
    status = 1
    try:
        begin(module, arguments, env)
        importlib.import_module(module).main()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        if sys.exc_info()[0]:  # as at the end of a program
            sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        for thread in threading.enumerate():
            if thread is not threading.current_thread() and not thread.daemon:
                thread.join()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def begin(module: str, arguments: Sequence[str], env: Mapping[str, str] | None) -> None:
    """Make of the fork what a new process finds."""
    gc.freeze()  # the parent's objects: looking at them would copy the memory that they lie in
    gc.enable()  # Popen disables it before it forks
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    stream = partial(open, closefd=False)  # the objects before them may be of the same numbers
    sys.stdin, sys.stdout, sys.stderr = stream(0), stream(1, "w"), stream(2, "w", buffering=1)
    sys.excepthook = sys.__excepthook__
    nai_xl.PARENT = os.getppid()
    if env is not None:
        os.environ.clear()
        os.environ.update(env)
    folders = [str(Path.cwd()), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    for folder in [folder for folder in folders if folder not in sys.path][::-1]:
        sys.path.insert(0, folder)
    importlib.invalidate_caches()
    sys.argv = [module, *arguments]
    GlobalHydra.instance().clear()
