"""A real Slurm on this machine, for tests: one controller and two node daemons on loopback, in a folder of their own.

    python tests/slurm/cluster.py DIR        start it, print what to export, and wait for Ctrl-C

The nodes are called by addresses of loopback, so that every name resolves and nothing outside DIR is touched.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

NODES = ("127.0.0.1", "127.0.0.2")
NEEDED = ("slurmctld", "slurmd", "munged", "sbatch", "squeue", "scancel", "scontrol", "srun")
_SBIN = ("/usr/sbin", "/usr/local/sbin")
_START_SECONDS = 60.0


def missing() -> list[str]:
    """The programs of Slurm and munge that are not installed."""
    return [name for name in NEEDED if find_program(name) is None]


def find_program(name: str) -> str | None:
    """A program on the path or among those of the system."""
    return shutil.which(name, path=os.pathsep.join((os.environ.get("PATH", ""), *_SBIN)))


class Cluster:
    """The daemons of a cluster; see :func:`cluster`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.configuration = folder / "slurm.conf"
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}

    def environment(self) -> dict[str, str]:
        """What tells Slurm's commands, and jobs, which cluster is meant."""
        return {"SLURM_CONF": str(self.configuration)}

    def start(self) -> None:
        """Start every daemon, and wait until both nodes are idle."""
        for name in ("state", "munge", "spool"):
            (self.folder / name).mkdir(parents=True)
        (self.folder / "munge").chmod(0o700)
        self._write_key()
        self._write_configuration()
        self._start_munge()
        self.start_controller()
        for number, node in enumerate(NODES):
            self._spawn(f"slurmd-{number + 1}", "slurmd", "-D", "-N", node)
        self.wait_for_nodes()

    def start_controller(self) -> None:
        """Start the controller; its state is that of an earlier one."""
        self._spawn("slurmctld", "slurmctld", "-D")

    def stop_controller(self) -> None:
        """End the controller as a restart of its host would."""
        self._end(self.daemons.pop("slurmctld"))

    def run(self, *words: str, **variables: str) -> str:
        """What a command of Slurm's answers, to a caller who has exported ``variables``."""
        environment = {**os.environ, **self.environment(), **variables}
        answer = subprocess.run(words, capture_output=True, text=True, env=environment)
        if answer.returncode:
            raise RuntimeError(f"{' '.join(words)}: status {answer.returncode}: {answer.stderr.strip()}")
        return answer.stdout

    def wait_for_nodes(self) -> None:
        """Wait until the controller answers and both nodes can work."""
        deadline = time.monotonic() + _START_SECONDS
        said = ""
        while time.monotonic() < deadline:
            with contextlib.suppress(RuntimeError):
                said = self.run("sinfo", "--noheader", "--Node", "--partition=all", "--format=%T")
                if said.split().count("idle") == len(NODES):
                    return
            time.sleep(0.2)
        raise RuntimeError(f"the nodes did not come up ({said.strip()}); logs lie in {self.folder}")

    def stop(self) -> None:
        """Cancel what is left and end every daemon that was started here."""
        with contextlib.suppress(RuntimeError):
            self.run("scancel", f"--user={pwd.getpwuid(os.getuid()).pw_name}")
            deadline = time.monotonic() + _START_SECONDS
            while time.monotonic() < deadline and self.run("squeue", "--noheader").strip():
                time.sleep(0.2)
        for name in reversed(list(self.daemons)):
            self._end(self.daemons.pop(name))

    def _end(self, daemon: subprocess.Popen[bytes]) -> None:
        daemon.send_signal(signal.SIGTERM)
        try:
            daemon.wait(timeout=10)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()

    def _spawn(self, name: str, program: str, *words: str) -> None:
        found = find_program(program)
        assert found is not None
        with (self.folder / f"{name}.out").open("ab") as log:
            self.daemons[name] = subprocess.Popen(
                [found, *words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.environment()},
                start_new_session=True,
            )

    def _write_key(self) -> None:
        key = self.folder / "munge" / "key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)

    def _start_munge(self) -> None:
        munge = self.folder / "munge"
        self._spawn(
            "munged",
            "munged",
            "--foreground",
            "--force",
            f"--key-file={munge / 'key'}",
            f"--socket={self._socket()}",
            f"--pid-file={munge / 'pid'}",
            f"--log-file={munge / 'log'}",
            f"--seed-file={munge / 'seed'}",
        )
        deadline = time.monotonic() + _START_SECONDS
        while not self._socket().exists():
            if time.monotonic() > deadline:
                raise RuntimeError(f"munged did not start; see {self.folder / 'munged.out'}")
            time.sleep(0.05)

    def _socket(self) -> Path:
        return self.folder / "munge" / "socket"

    def _write_epilog(self) -> Path:
        """What a node does after a job: while the file ``slow`` lies in the folder, for seconds, as real sites do."""
        epilog = self.folder / "epilog"
        epilog.write_text(f"#!/bin/sh\n[ ! -e {self.folder}/slow ] || sleep 6\n")
        epilog.chmod(0o755)
        return epilog

    def _write_configuration(self) -> None:
        controller, first, second = _free_ports(3)
        user = pwd.getpwuid(os.getuid()).pw_name
        lines = [
            "ClusterName=test",
            f"SlurmctldHost={socket.gethostname()}(127.0.0.1)",
            f"SlurmUser={user}",
            f"SlurmdUser={user}",
            f"SlurmctldPort={controller}",
            "AuthType=auth/munge",
            # A requeued job begins after this many seconds; Slurm's own 120 would be half of all tests. 5 is the least.
            f"AuthInfo=socket={self._socket()},cred_expire=5",
            f"StateSaveLocation={self.folder / 'state'}",
            f"SlurmdSpoolDir={self.folder / 'spool'}/%n",
            f"SlurmctldPidFile={self.folder / 'slurmctld.pid'}",
            f"SlurmdPidFile={self.folder / 'slurmd-%n.pid'}",
            f"SlurmctldLogFile={self.folder / 'slurmctld.log'}",
            f"SlurmdLogFile={self.folder / 'slurmd-%n.log'}",
            "ProctrackType=proctrack/linuxproc",
            "TaskPlugin=task/none",
            "SelectType=select/cons_tres",
            "SelectTypeParameters=CR_Core",
            "SlurmdParameters=config_overrides",
            "SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0,bf_interval=2",
            "ReturnToService=2",
            f"Epilog={self._write_epilog()}",
            "KillWait=10",
            # A job of the partition "urgent" takes the nodes of others, which have 30 seconds to save and leave.
            "PreemptType=preempt/partition_prio",
            "PreemptMode=REQUEUE",
            "InactiveLimit=0",
            "MinJobAge=300",
            # Of two clusters on one machine no job has the number of another: the processes of jobs are known by it.
            f"FirstJobId={1 + secrets.randbelow(60_000) * 1000}",
            "MpiDefault=none",
        ]
        for node, port in zip(NODES, (first, second), strict=True):
            lines.append(f"NodeName={node} NodeHostname=localhost NodeAddr={node} Port={port} CPUs=4 State=UNKNOWN")
        nodes = ",".join(NODES)
        lines.append(f"PartitionName=all Nodes={nodes} Default=YES MaxTime=60 State=UP PriorityTier=1 GraceTime=30")
        lines.append(f"PartitionName=other Nodes={nodes} MaxTime=60 State=UP PriorityTier=1 GraceTime=30")
        lines.append(f"PartitionName=urgent Nodes={nodes} MaxTime=60 State=UP PriorityTier=9 PreemptMode=OFF")
        lines.append(f"PartitionName=closed Nodes={nodes} State=DOWN")  # jobs wait here, and never start
        self.configuration.write_text("\n".join(lines) + "\n")


def _free_ports(count: int) -> list[int]:
    listeners = [socket.socket() for _ in range(count)]
    for listener in listeners:
        listener.bind(("127.0.0.1", 0))
    ports = [int(listener.getsockname()[1]) for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """A cluster that works while the block lasts."""
    started = Cluster(folder)
    try:
        started.start()
        yield started
    finally:
        started.stop()


def main() -> int:
    """Keep a cluster until Ctrl-C."""
    if lacking := missing():
        print(f"not installed: {' '.join(lacking)}; apt-get install slurm-wlm munge", file=sys.stderr)
        return 2
    with cluster(Path(sys.argv[1]).resolve()) as started, contextlib.suppress(KeyboardInterrupt):
        for name, value in started.environment().items():
            print(f"export {name}={value}", flush=True)
        # Unblocked, a SIGTERM would end this process before the daemons are ended. They must not inherit the block.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        signal.sigwait({signal.SIGINT, signal.SIGTERM})
    return 0


if __name__ == "__main__":
    sys.exit(main())
