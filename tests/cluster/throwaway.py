"""A Slurm of two nodes on this machine, with accounting and fake GPUs, in one folder; gone when the tests end.

Every daemon is started by us, keeps its state, sockets and keys in that folder, and is ended by its own process id.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

NODES = 2
GPUS = 8
PROGRAMS = ("slurmctld", "slurmd", "slurmdbd", "munged", "mariadbd", "sshd", "rsync", "gcc")
SEARCHED = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


def why_not() -> str | None:
    """The reason why no Slurm can be started here; None if one can."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=SEARCHED) is None]
    if missing:
        return f"{', '.join(missing)} missing (scripts/setup_slurm_test.sh installs them as root with apt)"
    return None if os.geteuid() == 0 else "Slurm's daemons and the pyxis stand-in need root"


def wait_for(done: Callable[[], object], seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not done():
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not within {seconds:g} s")
        time.sleep(0.2)


class Slurm:
    """Start with `start()`; `environment` is what clients need."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ports = _free_ports(NODES + 3)
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        for name in ("state", "log", "munge", "dev", *(f"spool/n{i}" for i in range(NODES))):
            (self.folder / name).mkdir(parents=True)
        self._write_configuration()
        self._build_pyxis_stand_in()
        # munged asks for one folder that others may enter and a key that they may not read
        (self.folder / "munge").chmod(0o711)
        self._daemon(
            "munged", "--foreground", f"--key-file={self.folder}/munge/key", f"--socket={self.socket}",
            f"--pid-file={self.folder}/munge/pid", f"--log-file={self.folder}/munge/log",
            f"--seed-file={self.folder}/munge/seed",
        )  # fmt: skip
        self._start_database()
        self._daemon("slurmdbd", "-D", SLURM_CONF=str(self.folder / "slurmdbd.conf"), MYSQL_UNIX_PORT=self.database)
        wait_for(lambda: self.command("sacctmgr", "-n", "list", "cluster").returncode == 0, 30, "slurmdbd")
        self.command("sacctmgr", "-i", "add", "cluster", "throwaway")
        self._daemon("slurmctld", "-D", "-c", "-f", self.environment["SLURM_CONF"])
        for i in range(NODES):
            self._daemon("slurmd", "-D", "-c", "-N", f"n{i}", "-f", self.environment["SLURM_CONF"])
        wait_for(lambda: self.output("sinfo", "-h", "-t", "idle", "-o", "%D") == str(NODES), 60, "two idle nodes")

    def stop(self) -> None:
        self.command("scancel", "--user", "root")
        with suppress(TimeoutError):
            wait_for(lambda: not self.output("squeue", "-h", "-o", "%i"), 15, "an empty queue")
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in reversed(self._daemons):
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def command(self, *words: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "PATH": SEARCHED, **self.environment}
        return subprocess.run(words, env=env, capture_output=True, text=True, timeout=60, check=False)

    def output(self, *words: str) -> str:
        return self.command(*words).stdout.strip()

    def state(self, job: str) -> str:
        """Slurm's word for a job, from accounting."""
        return self.output("sacct", "-X", "-n", "-P", "-j", job, "-o", "State").split(" ")[0]

    @property
    def socket(self) -> str:
        return f"{self.folder}/munge/socket"

    @property
    def database(self) -> str:
        return f"{self.folder}/database.socket"

    def _daemon(self, program: str, *arguments: str, **env: str) -> None:
        path = shutil.which(program, path=SEARCHED)
        assert path is not None
        with open(self.folder / "log" / f"{program}-{len(self._daemons)}", "wb") as log:
            self._daemons.append(
                subprocess.Popen(
                    [path, *arguments],
                    env={**os.environ, **self.environment, **env},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            )

    def _start_database(self) -> None:
        data = f"--datadir={self.folder}/database"
        install = ("mariadb-install-db", "--no-defaults", "--user=root", "--auth-root-authentication-method=normal")
        made = self.command(*install, "--skip-test-db", data)
        assert made.returncode == 0, made.stdout + made.stderr
        self._daemon(
            "mariadbd", "--no-defaults", "--user=root", data, f"--socket={self.database}", "--skip-networking",
            "--innodb-buffer-pool-size=64M", "--innodb-lock-wait-timeout=900", "--innodb-flush-log-at-trx-commit=0",
            f"--pid-file={self.folder}/database.pid",
        )  # fmt: skip
        client = ("mariadb", "--no-defaults", "-uroot", "-S", self.database, "-e")
        wait_for(lambda: self.command(*client, "select 1").returncode == 0, 30, "mariadb")
        self.command(*client, "create database slurm")

    def _write_configuration(self) -> None:
        folder, control, database = self.folder, self.ports[0], self.ports[1]
        key = folder / "munge" / "key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)
        for i in range(NODES):
            for gpu in range(GPUS):
                os.mknod(folder / "dev" / f"n{i}gpu{gpu}", 0o20666, os.makedev(1, 3))
        write = {
            "slurmdbd.conf": f"""AuthType=auth/munge
AuthInfo=socket={self.socket}
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={database}
SlurmUser=root
PidFile={folder}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm
""",
            "gres.conf": "".join(
                f"NodeName=n{i} Name=gpu File={folder}/dev/n{i}gpu[0-{GPUS - 1}]\n" for i in range(NODES)
            ),
            "cgroup.conf": "CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n",
            "plugstack.conf": f"required {folder}/pyxis.so\n",
            "slurm.conf": f"""ClusterName=throwaway
SlurmctldHost={socket.gethostname().split(".")[0]}(127.0.0.1)
SlurmctldPort={control}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={self.socket},cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
PlugStackConfig={folder}/plugstack.conf
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={database}
AccountingStoragePass={self.socket}
MpiDefault=none
SwitchType=switch/none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,batch_sched_delay=0,bf_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerNode=1024
GresTypes=gpu
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
KillWait=5
RebootProgram=/bin/true
"""
            + "".join(
                f"NodeName=n{i} NodeHostname={socket.gethostname().split('.')[0]} NodeAddr=127.0.0.1"
                f" Port={self.ports[3 + i]} CPUs=32 RealMemory=8192 Gres=gpu:{GPUS} State=UNKNOWN\n"
                for i in range(NODES)
            )
            + f"PartitionName=batch Nodes=n[0-{NODES - 1}] Default=YES MaxTime=INFINITE State=UP\n",
        }
        for name, text in write.items():
            (folder / name).write_text(text, encoding="utf-8")
        (folder / "slurmdbd.conf").chmod(0o600)

    def _build_pyxis_stand_in(self) -> None:
        library, source = self.folder / "pyxis.so", Path(__file__).with_name("pyxis_stand_in.c")
        subprocess.run(["gcc", "-shared", "-fPIC", "-Wall", "-o", str(library), str(source)], check=True)


class Sshd:
    """An ssh server on loopback that knows one key and runs commands with the throwaway Slurm's environment."""

    def __init__(self, folder: Path, env: dict[str, str]) -> None:
        folder.mkdir()
        self.identity, self.port = folder / "id", _free_ports(1)[0]
        for name in ("host", "id"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
        # rsync calls ssh, which asks for a known host key: it gets a list of its own, not the user's
        self.programs = folder / "bin"
        self.programs.mkdir()
        ssh = shutil.which("ssh")
        key = (folder / "host.pub").read_text()
        (folder / "known_hosts").write_text(f"[127.0.0.1]:{self.port} {key}")
        (self.programs / "ssh").write_text(f'#!/bin/sh\nexec {ssh} -o UserKnownHostsFile={folder}/known_hosts "$@"\n')
        (self.programs / "ssh").chmod(0o755)
        variables = " ".join(f'{name}="{value}"' for name, value in env.items())
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd's own empty folder
        (folder / "config").write_text(f"""Port {self.port}
ListenAddress 127.0.0.1
HostKey {folder}/host
AuthorizedKeysFile {folder}/id.pub
PidFile {folder}/pid
StrictModes no
PermitRootLogin prohibit-password
PasswordAuthentication no
UsePAM no
SetEnv {variables}
""")
        self._daemon = subprocess.Popen(
            ["/usr/sbin/sshd", "-D", "-e", "-f", str(folder / "config")], stderr=subprocess.PIPE
        )
        wait_for(self._answers, 10, "sshd")

    def _answers(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def stop(self) -> None:
        self._daemon.send_signal(signal.SIGTERM)
        self._daemon.communicate(timeout=10)


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now, all held until all are known."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()
