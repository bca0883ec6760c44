"""A SLURM cluster on this machine: two nodes of two stand-in GPUs each, from Debian's packages, without systemd.

Commands look for their configuration at /etc/slurm, because Snakemake's plugin removes SLURM_CONF from the environment. So
this process gets a mount namespace of its own, in which the lab's files cover that place: several labs can run side by side,
and beside a real cluster. By hand: ``python tests/slurm/lab.py`` starts one, and a shell that sees it.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

ETC = Path("/etc/slurm")
SOCKET = Path("/run/mysqld/mysqld.sock")  # where slurmdbd looks for its database
INSTALLS = Path("/run/lock/stillhouse-slurm-lab")
CLONE_NEWNS = 0x20000
PACKAGES = {"slurmctld": "slurm-wlm", "munged": "munge"}
DATABASE_PACKAGES = {"slurmdbd": "slurmdbd", "mariadbd": "mariadb-server"}
NODES = ("wn1", "wn2")
GPUS_PER_NODE = 2
# More of everything than this machine has, so that requests sized for real GPU nodes fit.
SLURM_CONF = """\
ClusterName=stillhouse
SlurmctldHost=localhost
SlurmctldPort={slurmctld}
AuthType=auth/munge
AuthInfo=cred_expire=15,socket={folder}/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmdPidFile={folder}/%n.pid
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1,sched_min_interval=0
{accounting}
MinJobAge=300
KillWait=3
InactiveLimit=0
SlurmdTimeout=300
ReturnToService=2
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
GresTypes=gpu
NodeName=DEFAULT CPUs=64 RealMemory=600000 State=UNKNOWN
NodeName=wn1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={wn1} Gres=gpu:h100:2
NodeName=wn2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={wn2} Gres=gpu:h100:2
PartitionName=gpu Nodes=wn[1-2] Default=YES MaxTime=2-00:00:00 PriorityTier=1 PreemptMode=REQUEUE
PartitionName=cpu Nodes=wn[1-2] MaxTime=2-00:00:00 PriorityTier=1 PreemptMode=REQUEUE
PartitionName=urgent Nodes=wn[1-2] MaxTime=2-00:00:00 PriorityTier=10 PreemptMode=OFF
"""
NO_ACCOUNTING = "AccountingStorageType=accounting_storage/none"
DATABASE = """\
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=localhost
AccountingStoragePort={slurmdbd}
AccountingStoragePass={folder}/munge"""
SLURMDBD_CONF = """\
AuthType=auth/munge
AuthInfo=socket={folder}/munge
DbdHost=localhost
DbdPort={slurmdbd}
SlurmUser=root
LogFile={folder}/slurmdbd.log
PidFile={folder}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm_acct_db
"""


class LabUnavailable(Exception):
    """This machine cannot run the lab; the message says why."""


def install(packages: dict[str, str]) -> None:
    """Install Debian's packages for the programs that are missing.

    Raises:
        LabUnavailable: without root, apt or the packages.
    """
    missing = [package for program, package in packages.items() if shutil.which(program, path=_PATH) is None]
    if os.geteuid() != 0:
        raise LabUnavailable("the lab starts SLURM daemons and device nodes, which takes root")
    if not missing:
        return
    if shutil.which("apt-get") is None:
        raise LabUnavailable(f"{', '.join(missing)} not installed, and there is no apt-get")
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    with INSTALLS.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (["apt-get", "update"], ["apt-get", "install", "-y", "--no-install-recommends", *missing]):
            ended = subprocess.run(command, env=environment, capture_output=True, text=True)
            if ended.returncode:
                raise LabUnavailable(f"{' '.join(command)}: {ended.stderr.strip()[-300:]}")


@cache
def leave_namespace() -> None:
    """Let this process, and those that it starts from now on, see mounts that nobody else sees.

    Raises:
        LabUnavailable: if this machine does not let it.
    """
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNS):
        raise LabUnavailable(f"no mount namespace of its own: {os.strerror(ctypes.get_errno())}")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)


def free_ports(*names: str) -> dict[str, int]:
    """Return a free port for each name."""
    with contextlib.ExitStack() as stack:
        sockets = {name: stack.enter_context(socket.socket()) for name in names}
        for one in sockets.values():
            one.bind(("127.0.0.1", 0))
        return {name: one.getsockname()[1] for name, one in sockets.items()}


_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


class Lab:
    """A running cluster."""

    def __init__(self, *, accounting: bool = False):
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-lab-", dir="/tmp"))
        self.folder.chmod(0o755)
        self.accounting = accounting
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._covered: list[Path] = []

    # ---------------------------------------------------------------- start and stop

    def start(self) -> None:
        """Install what is missing and start every daemon; return when all nodes are idle.

        Raises:
            LabUnavailable: if this machine cannot run it.
        """
        install(PACKAGES | (DATABASE_PACKAGES if self.accounting else {}))
        try:
            self._configure()
            self._start_munge()
            if self.accounting:
                self._start_database()
            (self.folder / "state").mkdir()
            self.start_slurmctld()
            for node in NODES:
                self.start_node(node)
            self.wait(lambda: self.states() == dict.fromkeys(NODES, "idle"), "all nodes are idle", 60)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End every daemon and whatever runs on the nodes, and remove the configuration."""
        for node in NODES:
            self.kill_node(node)
        for process in reversed(self._daemons.values()):
            process.terminate()
        for process in self._daemons.values():
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for place in self._covered:
            subprocess.run(["umount", "--lazy", str(place)], check=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _configure(self) -> None:
        devices = self.folder / "dev"
        devices.mkdir()
        for number in range(len(NODES) * GPUS_PER_NODE):
            os.mknod(devices / f"nvidia{number}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))  # as /dev/null
        gres = []
        for index, node in enumerate(NODES):
            first, last = index * GPUS_PER_NODE, (index + 1) * GPUS_PER_NODE - 1
            gres.append(f"NodeName={node} Name=gpu Type=h100 File={devices}/nvidia[{first}-{last}]")
        leave_namespace()
        for place in (ETC, SOCKET.parent) if self.accounting else (ETC,):
            place.mkdir(parents=True, exist_ok=True)
            subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(place)], check=True)
            self._covered.append(place)
        own = {"folder": self.folder, **free_ports("slurmctld", "slurmdbd", *NODES)}
        accounting = DATABASE.format(**own) if self.accounting else NO_ACCOUNTING
        (ETC / "slurm.conf").write_text(SLURM_CONF.format(accounting=accounting, **own))
        (ETC / "gres.conf").write_text("\n".join(gres) + "\n")
        if self.accounting:
            (ETC / "slurmdbd.conf").write_text(SLURMDBD_CONF.format(**own))
            (ETC / "slurmdbd.conf").chmod(0o600)

    def _start_munge(self) -> None:
        key, place = self.folder / "munge.key", f"--socket={self.folder}/munge"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        files = [f"--{name}-file={self.folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
        self._spawn("munged", ["/usr/sbin/munged", "--foreground", "--force", place, *files])
        self.wait(lambda: _quiet("munge", "-n", place).returncode == 0, "munged answers", 10)

    def _start_database(self) -> None:
        data = self.folder / "mysql"
        common = [f"--datadir={data}", "--user=root", "--auth-root-authentication-method=normal"]
        subprocess.run(["mariadb-install-db", *common, "--skip-test-db"], check=True, capture_output=True)
        command = ["mariadbd", "--no-defaults", f"--datadir={data}", "--user=root", f"--socket={SOCKET}"]
        self._spawn("mariadbd", [*command, "--skip-networking", "--innodb-buffer-pool-size=64M"])
        self.wait(lambda: self._query("SELECT 1"), "MariaDB answers", 30)
        if not self._query("CREATE DATABASE slurm_acct_db"):
            raise LabUnavailable("MariaDB refuses to make a database")
        self._spawn("slurmdbd", ["/usr/sbin/slurmdbd", "-D"])
        self.wait(lambda: _quiet("sacctmgr", "-n", "show", "cluster").returncode == 0, "slurmdbd answers", 30)
        for command in (
            ["add", "cluster", "stillhouse"],
            ["add", "account", "lab", "cluster=stillhouse"],
            ["add", "user", "root", "account=lab"],
        ):
            ended = _quiet("sacctmgr", "-i", *command)
            if ended.returncode and "Nothing new added" not in ended.stdout + ended.stderr:
                raise LabUnavailable(f"sacctmgr {' '.join(command)}: {ended.stderr or ended.stdout}")

    def _query(self, statement: str) -> bool:
        return _quiet("mariadb", "--no-defaults", f"--socket={SOCKET}", "-e", statement).returncode == 0

    def _spawn(self, name: str, command: list[str]) -> None:
        log = (self.folder / f"{name}.out").open("ab")
        environment = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
        environment["PATH"] = _PATH
        self._daemons[name] = subprocess.Popen(
            command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment, start_new_session=True
        )

    # ---------------------------------------------------------------- daemons, one by one

    def start_slurmctld(self) -> None:
        """Start SLURM's controller, which takes up the state that an earlier one saved."""
        self._spawn("slurmctld", ["/usr/sbin/slurmctld", "-D"])
        self.wait(lambda: _quiet("scontrol", "ping").returncode == 0, "slurmctld answers", 30)

    def start_node(self, node: str) -> None:
        """Start a node's daemon."""
        self._spawn(node, ["/usr/sbin/slurmd", "-D", "-N", node])

    def kill_node(self, node: str) -> None:
        """Cut a node's power: its daemon and everything that runs there are gone."""
        if (process := self._daemons.pop(node, None)) is not None:
            process.kill()
            process.wait()
        tasks = processes(lambda environment: environment.get("SLURMD_NODENAME") == node)
        for pid in {*map(_step_daemon, tasks), *tasks} - {None}:
            _kill(pid)

    # ---------------------------------------------------------------- what the cluster says

    def wait(self, condition: Callable[[], bool], what: str, seconds: float = 60) -> None:
        """Wait until something is so.

        Raises:
            TimeoutError: with the end of the daemons' logs.
        """
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"after {seconds} s not yet so: {what}\n{self.logs()}")
            time.sleep(0.1)

    def logs(self) -> str:
        """Return the end of every daemon's log, and what squeue and sinfo say."""
        parts = [_quiet(*command).stdout for command in (("squeue", "-a"), ("sinfo", "-N", "-l"))]
        for path in sorted([*self.folder.glob("*.log"), *self.folder.glob("*.out")]):
            parts.append(f"---- {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-15:]))
        return "\n".join(parts)

    def states(self) -> dict[str, str]:
        """Return each node's state, such as ``idle`` or ``mixed``."""
        lines = _quiet("sinfo", "-h", "-N", "-p", "gpu", "-o", "%N %t").stdout.split()
        names = {"mix": "mixed", "alloc": "allocated"}
        return {node: names.get(state, state) for node, state in zip(lines[::2], lines[1::2], strict=True)}

    def jobs(self, *states: str) -> list[dict[str, str]]:
        """Return the jobs that squeue knows in these states (default: pending and running ones)."""
        keys = {
            "id": "%i",
            "state": "%T",
            "node": "%N",
            "partition": "%P",
            "comment": "%k",
            "gres": "%b",
            "limit": "%l",
        }
        wanted = ",".join(states or ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING"))
        lines = _quiet("squeue", "-h", "-t", wanted, "-o", "|".join(keys.values())).stdout.splitlines()
        return [dict(zip(keys, line.split("|"), strict=True)) for line in lines]

    def scontrol(self, *arguments: str) -> str:
        """Run scontrol, and expect it to succeed."""
        return subprocess.run(["scontrol", *arguments], check=True, capture_output=True, text=True).stdout

    def sbatch(self, *arguments: str, wrap: str) -> str:
        """Submit a shell command; return the job's number."""
        command = ["sbatch", "--parsable", "--output=/dev/null", *arguments, f"--wrap={wrap}"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def hurry(self) -> None:
        """Let requeued jobs start now instead of after their credentials have expired."""
        for job in self.jobs("PENDING"):
            _quiet("scontrol", "update", f"jobid={job['id']}", "StartTime=now")

    def cancel_all(self) -> None:
        """End every job, and wait until the nodes are free."""
        if ids := [job["id"] for job in self.jobs()]:
            _quiet("scancel", *ids)
            self.wait(lambda: not self.jobs(), "no job is left", 30)


def processes(wanted: Callable[[dict[str, str]], bool]) -> list[int]:
    """Return the processes of this mount namespace whose environment at their start was such."""
    found, here = [], os.readlink("/proc/self/ns/mnt")
    for path in Path("/proc").glob("[0-9]*"):
        pairs = (entry.partition("=") for entry in _environment_bytes(path).decode(errors="replace").split("\0"))
        if int(path.name) != os.getpid() and wanted({key: value for key, _, value in pairs}):
            with contextlib.suppress(OSError):  # it has ended
                if os.readlink(path / "ns" / "mnt") == here:
                    found.append(int(path.name))
    return found


def _environment_bytes(process: Path) -> bytes:
    try:
        return (process / "environ").read_bytes()
    except OSError:
        return b""


def _step_daemon(pid: int) -> int | None:
    """Return the slurmstepd that a process descends from at once."""
    try:
        parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        return parent if Path(f"/proc/{parent}/comm").read_text().startswith("slurmstepd") else None
    except (OSError, ValueError):
        return None


def _kill(pid: int | None) -> None:
    assert pid is not None
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _quiet(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True)


def main(arguments: Iterable[str] = ()) -> None:
    """Start a lab, and keep it until a shell in it ends."""
    lab = Lab(accounting="--accounting" in arguments)
    lab.start()
    try:
        print(f"SLURM runs as long as this shell; its logs are in {lab.folder}.\n{lab.logs()}", flush=True)
        subprocess.run([os.environ.get("SHELL", "/bin/bash")])
    finally:
        lab.stop()


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
