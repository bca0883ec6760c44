"""A SLURM cluster on this machine: two nodes of two stand-in GPUs each, from Debian's packages, without systemd.

Commands look for their configuration at /etc/slurm, because Snakemake's plugin removes SLURM_CONF from the environment; a
cluster that is configured there already is left alone. By hand: ``python tests/slurm/lab.py`` starts one until Ctrl-C.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

ETC = Path("/etc/slurm")
LOCK = Path("/run/lock/stillhouse-slurm-lab")
MARK = "# Made by tests/slurm/lab.py; removed when the tests end.\n"
PACKAGES = {"slurmctld": "slurm-wlm", "munged": "munge"}
DATABASE_PACKAGES = {"slurmdbd": "slurmdbd", "mariadbd": "mariadb-server"}
NODES = ("wn1", "wn2")
GPUS_PER_NODE = 2
# More of everything than this machine has, so that requests sized for real GPU nodes fit.
SLURM_CONF = """\
ClusterName=stillhouse
SlurmctldHost=localhost
SlurmctldPort=16817
AuthType=auth/munge
AuthInfo=cred_expire=15
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
NodeName=wn[1-2] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[17001-17002] Gres=gpu:h100:2
PartitionName=gpu Nodes=wn[1-2] Default=YES MaxTime=2-00:00:00 PriorityTier=1 PreemptMode=REQUEUE
PartitionName=cpu Nodes=wn[1-2] MaxTime=2-00:00:00 PriorityTier=1 PreemptMode=REQUEUE
PartitionName=urgent Nodes=wn[1-2] MaxTime=2-00:00:00 PriorityTier=10 PreemptMode=OFF
"""
NO_ACCOUNTING = "AccountingStorageType=accounting_storage/none"
DATABASE = (
    "AccountingStorageType=accounting_storage/slurmdbd\nAccountingStorageHost=localhost\nAccountingStoragePort=16819"
)
SLURMDBD_CONF = """\
AuthType=auth/munge
DbdHost=localhost
DbdPort=16819
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
    for command in (["apt-get", "update"], ["apt-get", "install", "-y", "--no-install-recommends", *missing]):
        ended = subprocess.run(command, env=environment, capture_output=True, text=True)
        if ended.returncode:
            raise LabUnavailable(f"{' '.join(command)}: {ended.stderr.strip()[-300:]}")


_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


class Lab:
    """A running cluster."""

    def __init__(self, *, accounting: bool = False):
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-lab-", dir="/tmp"))
        self.accounting = accounting
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    # ---------------------------------------------------------------- start and stop

    def start(self) -> None:
        """Install what is missing and start every daemon; return when all nodes are idle.

        Raises:
            LabUnavailable: if this machine cannot run it.
        """
        install(PACKAGES | (DATABASE_PACKAGES if self.accounting else {}))
        self._lock = LOCK.open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)  # one lab at a time: they share a configuration and ports
        existing = ETC / "slurm.conf"
        if existing.exists() and not existing.read_text().startswith(MARK):
            self._lock.close()
            raise LabUnavailable(f"{existing} configures another cluster")
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
        for name in ("slurm.conf", "gres.conf", "slurmdbd.conf"):
            if (path := ETC / name).exists() and path.read_text().startswith(MARK):
                path.unlink()
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()

    def _configure(self) -> None:
        devices = self.folder / "dev"
        devices.mkdir()
        for number in range(len(NODES) * GPUS_PER_NODE):
            os.mknod(devices / f"nvidia{number}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))  # as /dev/null
        gres = []
        for index, node in enumerate(NODES):
            first, last = index * GPUS_PER_NODE, (index + 1) * GPUS_PER_NODE - 1
            gres.append(f"NodeName={node} Name=gpu Type=h100 File={devices}/nvidia[{first}-{last}]")
        ETC.mkdir(exist_ok=True)
        accounting = DATABASE if self.accounting else NO_ACCOUNTING
        (ETC / "slurm.conf").write_text(MARK + SLURM_CONF.format(folder=self.folder, accounting=accounting))
        (ETC / "gres.conf").write_text(MARK + "\n".join(gres) + "\n")

    def _start_munge(self) -> None:
        if subprocess.run(["munge", "-n"], capture_output=True).returncode == 0:
            return
        key = Path("/etc/munge/munge.key")
        if not key.exists():
            key.write_bytes(os.urandom(128))
            key.chmod(0o400)
            shutil.chown(key, "munge", "munge")
        for folder in ("/run/munge", "/var/log/munge", "/var/lib/munge"):
            Path(folder).mkdir(exist_ok=True, parents=True)
            Path(folder).chmod(0o755)
            shutil.chown(folder, "munge", "munge")
        self._spawn("munged", ["runuser", "-u", "munge", "--", "/usr/sbin/munged", "--foreground", "--force"])
        self.wait(lambda: subprocess.run(["munge", "-n"], capture_output=True).returncode == 0, "munged answers", 10)

    def _start_database(self) -> None:
        data, socket = self.folder / "mysql", Path("/run/mysqld/mysqld.sock")
        socket.parent.mkdir(exist_ok=True)
        common = [f"--datadir={data}", "--user=root", "--auth-root-authentication-method=normal"]
        subprocess.run(["mariadb-install-db", *common, "--skip-test-db"], check=True, capture_output=True)
        command = ["mariadbd", "--no-defaults", f"--datadir={data}", "--user=root", f"--socket={socket}"]
        self._spawn("mariadbd", [*command, "--skip-networking", "--innodb-buffer-pool-size=64M"])
        self.wait(lambda: self._query("SELECT 1"), "MariaDB answers", 30)
        if not self._query("CREATE DATABASE slurm_acct_db"):
            raise LabUnavailable("MariaDB refuses to make a database")
        path = ETC / "slurmdbd.conf"
        path.write_text(MARK + SLURMDBD_CONF.format(folder=self.folder))
        path.chmod(0o600)
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
        return _quiet("mariadb", "--no-defaults", "--socket=/run/mysqld/mysqld.sock", "-e", statement).returncode == 0

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
    """Return the processes whose environment at their start was such."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        pairs = (entry.partition("=") for entry in _environment_bytes(path).decode(errors="replace").split("\0"))
        if int(path.name) != os.getpid() and wanted({key: value for key, _, value in pairs}):
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
    """Start a lab and keep it until Ctrl-C."""
    lab = Lab(accounting="--accounting" in arguments)
    lab.start()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        print(
            f"SLURM runs, its logs are in {lab.folder}; Ctrl-C ends it.\n{_quiet('sinfo', '-N', '-l').stdout}",
            flush=True,
        )
        signal.pause()
    except KeyboardInterrupt:
        pass
    finally:
        lab.stop()


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
