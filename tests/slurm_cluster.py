"""A Slurm cluster of two nodes on this machine: munged, slurmctld and two slurmd, with all they write below one folder."""

import os
import pwd
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cadetlib import processes

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "sinfo")
NODES = ("n1", "n2")
PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])  # where daemons are, which a user's PATH leaves out
READY = 60  # seconds

# Nodes of 96 cores and 8 GPUs, as the README's script asks for: Slurm counts them, and does not look for them.
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=96 Gres=gpu:8
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=96 Gres=gpu:8
PartitionName=main Nodes=n1,n2 Default=YES
PartitionName=other Nodes=n1,n2
"""
DAEMONS = """
cd {folder}
munged --foreground --force --socket={folder}/munge.socket --key-file={folder}/munge.key --pid-file={folder}/munge.pid \
  --log-file={folder}/munge.log --seed-file={folder}/munge.seed &
until test -S munge.socket; do sleep 0.05; done
slurmctld -D -c & slurmd -D -N n1 & slurmd -D -N n2 &
wait
"""


def missing() -> list[str]:
    """The programs of a cluster that this machine has not."""
    return [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]


def free_ports(n: int) -> list[int]:
    """Ports of this machine that nobody listens on."""
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


@contextmanager
def running(folder: Path) -> Iterator[dict[str, str]]:
    """The environment in which sbatch and the like find the cluster. All it started ends with it, or with this process."""
    for name in ("state", *(f"spool-{node}" for node in NODES)):
        (folder / name).mkdir()
    named = dict(folder=folder, host=socket.gethostname().partition(".")[0], user=pwd.getpwuid(os.getuid()).pw_name)
    (folder / "slurm.conf").write_text(CONFIGURATION.format(**named, ports=free_ports(3)))
    for i in range(8):
        (folder / f"gpu{i}").touch()  # without files Slurm counts no GPU
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-7]\n")
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(128))
    environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": PATH}
    # The supervisor takes over the orphans of all it starts, jobs among them, and ends them when it or this process is ended.
    command = processes.supervised(["bash", "-c", DAEMONS.format(**named)])
    with open(folder / "daemons.log", "w") as log:
        daemons = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
    try:
        _wait_until_ready(environment, folder / "daemons.log")
        yield environment
    finally:
        daemons.terminate()
        daemons.wait()


def _wait_until_ready(environment: dict[str, str], log: Path) -> None:
    deadline = time.monotonic() + READY
    while time.monotonic() < deadline:
        found = subprocess.run(["sinfo", "--noheader", "--format=%N %T", "-N"], env=environment, capture_output=True, text=True)
        if sorted(set(found.stdout.splitlines())) == [f"{node} idle" for node in NODES]:
            return
        time.sleep(0.1)
    raise RuntimeError(
        f"found no cluster after {READY} s but {found.stdout + found.stderr!r}; its daemons said\n{log.read_text()}"
    )
