"""In place of an interpreter: a program of ours, or torchrun, as a fork of the zygote; anything else by Python itself.

    python -IS warm_python.py SOCKET [-u] [-P] [-W ignore] -m MODULE [WORDS...]

Importing torch and Megatron takes a start five seconds of one core. This one has them at once; files, folder,
environment, signals and exit status are the caller's.
"""

import json
import os
import signal
import socket
import sys

PROGRAMS = ("torch.distributed.run", "megatron_btx.pretrain", "megatron_btx.evaluate", "megatron_btx.mixing.cli")
PROGRAMS += ("megatron_btx.mixing.convert_hf", "megatron_btx.data.datasets", "megatron_btx.report.build")
PROGRAMS += ("megatron_btx.mixing.dry_runs", "megatron_btx.mixing.model_flags", "megatron_btx.training.check_stages")


def main() -> None:
    """Become the program."""
    place, *words = sys.argv[1:]
    asked = list(words)
    while asked[:1] in (["-u"], ["-P"], ["-W"]):
        del asked[: 2 if asked[0] == "-W" else 1]
    if asked[:1] != ["-m"] or asked[1] not in PROGRAMS:
        os.execv(sys.executable, [sys.executable, *words])
    # torchrun starts its ranks with what this variable names.
    environment = {**os.environ, "PYTHON_EXEC": os.environ["WARM_PYTHON"]}
    request = {"module": asked[1], "words": asked[2:], "folder": os.getcwd(), "environment": environment}
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.connect(place)
    socket.send_fds(connection, [json.dumps(request).encode()], [0, 1, 2])
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda number, _: connection.send(str(number).encode()))
    status = int(connection.recv(16) or 1)
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


main()
