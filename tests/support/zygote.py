"""A process that has imported torch and Megatron once, and forks the ranks of every test's runs.

Importing takes ten seconds, a fork none: that is what makes dozens of multi-process Megatron runs affordable. Requests
are JSON lines on stdin, answers JSON lines on stdout. Each run's ranks are one process group, so that a test can kill
the whole run as a node failure would.

It can also serve ``warm_python.py``, which stands where a test would start an interpreter: its program is a fork, too.

With GPUs (``zygote.py gpu``) a fork is only possible while this process has not touched CUDA. Whether that held is
tried once, by a child that does; where it failed, ranks are started as programs of their own, ten seconds slower.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import importlib.metadata
import inspect
import json
import os
import random
import resource
import select
import signal
import socket
import sys
import threading
import time
import traceback

# Asking NVML instead of CUDA keeps this process free of a CUDA context, which would not survive the fork.
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"


def free_port() -> int:
    """A port that was free a moment ago.

    Drawn below the range from which the kernel serves connections, gloo's among them: one of those would take it before
    the first rank listens.
    """
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port


def run_rank(request: dict, rank: int, port: int) -> None:
    """Become one rank of a run: never returns."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(request["world_size"]),
        LOCAL_WORLD_SIZE=str(request["world_size"]),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        **request.get("environment", {}),
    )
    log = os.open(f"{request['log']}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    # The one of the zygote has wandb's hook for every write, of which Megatron makes a thousand for its arguments.
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    if request.get("file_size_limit_bytes"):  # as a disk that is full: writing beyond it fails
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_size_limit_bytes"],) * 2)
    call_main(request["entry"], request["arguments"])


def call_main(module: str, words: list[str]) -> None:
    """End this process with the status of a program's main."""
    status = 1
    try:
        sys.argv = [module, *words]
        status = __import__(module, fromlist=["main"]).main()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        for thread in threading.enumerate():  # as Python does at its end
            if thread is not threading.current_thread() and not thread.daemon:
                thread.join()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status or 0)


def serve(place: str) -> None:
    """Fork a program for every connection to a socket, for as long as the zygote lives: never returns."""
    zygote = os.getppid()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(place)
    listener.listen(64)
    listener.settimeout(1)
    while os.getppid() == zygote:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        with contextlib.suppress(TimeoutError):
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                serve_one(connection)
            connection.close()
    os._exit(0)


def serve_one(connection: socket.socket) -> None:
    """Fork one program; pass signals on to it and its end back. It does not outlive who asked for it. Never returns."""
    message, files, _, _ = socket.recv_fds(connection, 2**20, 3)
    request = json.loads(message)
    program = os.fork()
    if program == 0:
        connection.close()
        os.setsid()
        os.environ.clear()
        os.environ.update(request["environment"])
        os.chdir(request["folder"])
        for number, file in enumerate(files):
            os.dup2(file, number)
        sys.stdin = open(0, closefd=False)  # noqa: SIM115
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
        call_main(request["module"], request["words"])
    for file in files:
        os.close(file)
    ended = os.pidfd_open(program)
    while ended not in (readable := select.select([connection, ended], [], [])[0]):
        said = connection.recv(16) if connection in readable else b""
        os.kill(program, int(said or signal.SIGKILL))
    _, status = os.waitpid(program, 0)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(program, signal.SIGKILL)  # as in wait()
    with contextlib.suppress(OSError):
        connection.send(str(os.waitstatus_to_exitcode(status)).encode())
    os._exit(0)


def forked_child_can_use_gpu() -> bool:
    """Whether importing left this process in a state in which a fork of it can open a GPU."""
    import torch

    pid = os.fork()
    if pid == 0:
        try:
            torch.zeros(1, device="cuda")
        except RuntimeError:
            os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1] == 0


def start(request: dict, fork: bool) -> list[int]:
    """Start all ranks of a run in one process group, led by the first."""
    port, ranks = free_port(), []
    for rank in range(request["world_size"]):
        if not fork:
            command = [sys.executable, "-W", "ignore", __file__, "rank", json.dumps(request), str(rank), str(port)]
            ranks.append(os.posix_spawn(sys.executable, command, os.environ, setpgroup=ranks[0] if ranks else 0))
            continue
        pid = os.fork()
        if pid == 0:
            os.setpgid(0, ranks[0] if ranks else 0)
            run_rank(request, rank, port)
        os.setpgid(pid, ranks[0] if ranks else pid)
        ranks.append(pid)
    return ranks


def wait(ranks: list[int], grace_seconds: float) -> list[int]:
    """Exit codes of all ranks; after a failure the others may speak too, then are ended: they might wait forever."""
    codes: dict[int, int] = {}
    deadline = None
    while len(codes) < len(ranks):
        pid, status = os.waitpid(-ranks[0], os.WNOHANG if deadline else 0)
        if pid:
            codes[pid] = os.waitstatus_to_exitcode(status)
            if codes[pid] != 0 and deadline is None:
                deadline = time.monotonic() + grace_seconds
        elif time.monotonic() < deadline:
            time.sleep(0.02)
        else:
            for other in ranks:
                if other not in codes:
                    os.kill(other, signal.SIGKILL)
    # The checkpoint writer's queue is a process of its own, and os._exit left it nobody to end it.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(ranks[0], signal.SIGKILL)
    return [codes[pid] for pid in ranks]


def warm_up() -> None:
    """Import, and compute once, what every rank would: what is computed depends on the installed packages alone."""
    importlib.metadata.version = functools.cache(importlib.metadata.version)  # before anybody has the plain one
    importlib.metadata.version("megatron-core")
    # What the programs import late counts too: transformers alone, by Megatron's tokenizers, takes each rank seconds.
    import megatron.core.dist_checkpointing.strategies.cached_metadata_filesystem_reader
    import megatron.core.models.mimo
    import megatron.core.tokenizers.text.models
    import megatron.training.argument_utils
    import megatron.training.arguments
    import megatron.training.training
    import torch._dynamo  # by every optimizer's first step
    import torch.utils.serialization  # noqa: F401

    from megatron_btx.data import texts, training  # noqa: F401
    from megatron_btx.engine import fallback, optimizer, saving  # noqa: F401
    from megatron_btx.model import groups, layers, torch_parts, watch  # noqa: F401
    from megatron_btx.training import bad_steps, metrics, telemetry, validation  # noqa: F401

    # Megatron's parser finds its help texts in source files: inspect reads a whole file for every class.
    inspect.getsource = functools.cache(inspect.getsource)
    factory = megatron.training.argument_utils.ArgumentGroupFactory
    factory._get_field_docstrings = staticmethod(functools.cache(factory._get_field_docstrings.__get__(factory)))
    megatron.training.arguments.add_megatron_arguments(argparse.ArgumentParser())
    # torch asks every installed package whether it is a backend, two dozen times for each group of processes.
    importlib.metadata.entry_points = functools.cache(importlib.metadata.entry_points)
    importlib.metadata.entry_points(group="torch.distributed.backends")
    # What is there now is not looked at by the ranks' garbage collectors: they would copy every page that they touch.
    gc.collect()
    gc.freeze()
    gc.enable()


def main() -> None:
    """Import once, then serve requests until stdin closes."""
    gc.disable()  # until all is imported: a quarter of that time
    from megatron_btx.engine import cpu

    if sys.argv[1:] != ["gpu"]:  # what a program on the CPU does before it imports Megatron
        cpu.hide_kernels_for_gpus()
        cpu._leave_uncompiled()
    warm_up()
    fork = sys.argv[1:] != ["gpu"] or forked_child_can_use_gpu()
    print(json.dumps({"ready": "fork" if fork else "spawn"}), flush=True)
    runs: dict[int, list[int]] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "start":
            ranks = start(request, fork)
            runs[ranks[0]] = ranks
            print(json.dumps({"group": ranks[0]}), flush=True)
        elif request["do"] == "serve":
            if os.fork() == 0:
                serve(request["socket"])
            print(json.dumps({"serves": True}), flush=True)
        else:
            print(json.dumps({"codes": wait(runs.pop(request["group"]), request["grace_seconds"])}), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["rank"]:
        run_rank(json.loads(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
    main()
