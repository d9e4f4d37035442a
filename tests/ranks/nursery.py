"""Started on every rank by the launcher: imports everything once, then forks a rank's process for each order.

    nursery.py FOLDER

Listens on FOLDER/RANK. An order is a line of JSON: {"arguments" (a script and its arguments), "environment"
(what differs from what the launcher set), "output" (the file for stdout and stderr)}. The answers are the
pid of the process, at once, and its exit code. Ends when stdin does.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import runpy
import select
import socket
import sys
import threading
import traceback
from pathlib import Path

import ds_serve.rank  # noqa: F401  (with torch, DeepSpeed and transformers)


def work(order: dict) -> int:
    """Becomes the script, as if python had been started with it."""
    output = os.open(order["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ |= order["environment"]
    sys.argv = order["arguments"]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
        return 0
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1


def leave(code: int) -> None:
    """The interpreter's own end, but for taking down what the nursery imported, which takes long."""
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main(folder: str) -> None:
    assert len(os.listdir("/proc/self/task")) == 1, "a fork would lose the other threads"
    gc.freeze()
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(f"{folder}/{os.environ['RANK']}")
        door.listen()
        while door in select.select([door, sys.stdin], [], [])[0]:
            caller = door.accept()[0].makefile("rw")
            line = caller.readline()
            pid = os.fork()
            if pid == 0:
                door.close()
                caller.close()
                leave(work(json.loads(line)))
            print(pid, file=caller, flush=True)
            print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), file=caller, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
