"""Nights over real engines: Slurm with two nodes on this machine, ssh to it, containers on it. Needs root on Debian; no
part of pytest.

    python tests/check_clusters.py [slurm] [ssh] [docker]     installs what it lacks of PACKAGES; five minutes for each

Each night has 40 stand-in experiments on 16 devices. A node is killed, drained and brought back meanwhile, the loop is
killed and started again, and every row is checked by git. Prints what became of it, and how long an engine takes.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil
from check_night import check
from conftest import FACTS, ROOT, STAND_IN, Project
from faults import TRAIN

sys.path.insert(0, str(ROOT))
import loop  # noqa: E402

PACKAGES = {
    "slurm": ["slurm-wlm", "munge"],
    "ssh": ["openssh-server"],
    "docker": ["podman", "podman-docker", "runc"],  # a docker of one's own may talk to podman's server, too
}
NODES = "n1", "n2"
EXPERIMENTS, AT_ONCE, SECONDS = 40, 16, 6
SLURM = """\
ClusterName=check
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=16817
SlurmUser=root
AuthInfo=socket={folder}/munge/socket
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/%n.pid
SlurmdLogFile={folder}/%n.log
SlurmdSpoolDir={folder}/%n
SlurmdTimeout=30
ReturnToService=2
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
MpiDefault=none
NodeName=n1 NodeAddr=127.0.0.1 Port=17001 CPUs=16 RealMemory=4000 Gres=gpu:8
NodeName=n2 NodeAddr=127.0.0.1 Port=17002 CPUs=16 RealMemory=4000 Gres=gpu:8
PartitionName=all Nodes=n1,n2 Default=YES State=UP
"""
SSHD = """\
Port 2222
ListenAddress 127.0.0.1
HostKey {folder}/host
AuthorizedKeysFile {folder}/key.pub
PidFile {folder}/sshd.pid
PermitRootLogin prohibit-password
MaxStartups 100
MaxSessions 100
StrictModes no
UsePAM no
"""
SSH = """\
Host box
  HostName 127.0.0.1
  Port 2222
  User root
  IdentityFile {folder}/key
  UserKnownHostsFile {folder}/known
  StrictHostKeyChecking accept-new
"""


def run(*words, **how):
    return subprocess.run(list(map(str, words)), check=True, capture_output=True, text=True, **how).stdout


def names_of(process):
    """The namespace that stands for a node: what runs on it shares its host name."""
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/{process}/ns/uts")


class Slurm:
    """A controller and two nodes on loopback, each with eight GPUs that aren't there."""

    def __init__(self, folder):
        self.folder = folder
        for name in ("munge", "state", *NODES):
            (folder / name).mkdir(parents=True)
        (folder / "munge").chmod(0o711)
        (folder / "key").write_bytes(os.urandom(1024))
        (folder / "key").chmod(0o400)
        (folder / "slurm.conf").write_text(SLURM.format(folder=folder))
        lines = []
        for node in NODES:
            (folder / f"gpu-{node}").mkdir()
            for number in range(8):
                os.mknod(folder / f"gpu-{node}" / f"nvidia{number}", 0o20666, os.makedev(1, 3))
            lines.append(f"NodeName={node} Name=gpu File={folder}/gpu-{node}/nvidia[0-7]\n")
        (folder / "gres.conf").write_text("".join(lines))
        os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
        files = {
            "key-file": "key",
            "socket": "munge/socket",
            "pid-file": "munge/pid",
            "log-file": "munge/log",
        }
        options = [f"--{name}={folder}/{path}" for name, path in files.items()]
        run("munged", "--force", *options, f"--seed-file={folder}/munge/seed")
        run("slurmctld", "-f", os.environ["SLURM_CONF"])
        for node in NODES:
            self.start(node)
        while run("sinfo", "-h", "-t", "idle", "-o", "%D").strip() != "2":
            time.sleep(0.2)

    def start(self, node, *more):
        """Starts a node, with a host name of its own."""
        slurmd = f"hostname {node}; exec slurmd -f {os.environ['SLURM_CONF']} -N {node} {' '.join(more)}"
        run("unshare", "--uts", "sh", "-c", slurmd)

    def kill(self, node):
        """Kills all that runs on a node in one moment, as a loss of power would."""
        place = names_of((self.folder / f"{node}.pid").read_text().strip())
        for process in psutil.pids():
            if names_of(process) == place:
                os.kill(process, signal.SIGKILL)

    def back(self, node):
        self.start(node, "-b")  # as after a reboot: its jobs are over, and it takes others at once

    def drain(self, node):
        run("scontrol", "update", f"nodename={node}", "state=drain", "reason=check")

    def undrain(self, node):
        run("scontrol", "update", f"nodename={node}", "state=resume")

    def stop(self):
        for node in NODES:
            self.kill(node)
        for name in ("slurmctld.pid", "munge/pid"):
            with contextlib.suppress(OSError, ValueError):
                os.kill(int((self.folder / name).read_text()), signal.SIGTERM)

    def launches(self, home):
        """As from the login node: each run is a job. All GPUs are free for that."""
        run("scancel", "--user=root")
        return [("srun -Q -N1 -n1 --gres=gpu:1 -c 1 --time=5", AT_ONCE)]

    def inside(self, home):
        """As in an sbatch script: each run is a step of one allocation."""
        run("scancel", "--user=root")
        whole = "salloc --no-shell -N2 --ntasks-per-node=8 --gres=gpu:8".split()
        said = subprocess.run(whole, check=True, capture_output=True, text=True).stderr
        job = re.search(r"Granted job allocation (\d+)", said)[1]
        return [(f"srun -Q --jobid={job} --exact -N1 -n1 --gres=gpu:1 -c 1", AT_ONCE)]


class Ssh:
    """A server on loopback; two names for it stand for two boxes."""

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir()
        Path("/run/sshd").mkdir(exist_ok=True)
        for name in ("host", "key"):
            run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name)
        (folder / "sshd.conf").write_text(SSHD.format(folder=folder))
        (folder / "ssh.conf").write_text(SSH.format(folder=folder))
        self.start("")

    def start(self, node):
        run(shutil.which("sshd"), "-f", self.folder / "sshd.conf")

    def sessions(self):
        """The server's processes, one for each connection."""
        server = psutil.Process(int((self.folder / "sshd.pid").read_text()))
        return [process for process in server.children(recursive=True) if process.name() == "sshd"]

    def kill(self, node):
        """Every second connection falls silent, as if a cable were pulled: nobody says that it is gone."""
        self.silent = self.sessions()[::2]
        for process in self.silent:
            process.suspend()

    def back(self, node):
        for process in self.silent:
            with contextlib.suppress(psutil.Error):
                process.kill()

    def drain(self, node):
        """No new connection; those that are there stay."""
        os.kill(int((self.folder / "sshd.pid").read_text()), signal.SIGTERM)
        time.sleep(0.5)

    def undrain(self, node):
        self.start(node)

    def stop(self):
        with contextlib.suppress(OSError, psutil.Error):
            for process in (*self.sessions(), psutil.Process(int((self.folder / "sshd.pid").read_text()))):
                process.kill()

    def launches(self, home):
        box = f"ssh -T -F {self.folder}/ssh.conf box env HOME={home} AUTORESEARCH_DATA={home}/data"
        return [(box, AT_ONCE // 2), (box, AT_ONCE // 2)]

    inside = launches


class Docker:
    """Two containers that hold a copy of this machine, served by podman, which speaks docker's protocol."""

    def __init__(self, folder):
        folder.mkdir()
        self.server = subprocess.Popen(
            self.podman("system", "service", "--time=0", f"unix://{folder}/socket")
        )
        os.environ["DOCKER_HOST"] = f"unix://{folder}/socket"
        for node in NODES:
            most = "--ulimit=nofile=1024:4096", "--ulimit=nproc=4096:4096"
            how = ["--detach", f"--name={node}", f"--hostname={node}", "--network=none", *most]
            waits = "while :; do sleep 1; done"  # a shell takes the end of whatever was left to it
            run(*self.podman("run", *how, "--rootfs", "/:O", "sh", "-c", waits))

    def podman(self, *words):
        return ["podman", "--runtime=runc", *words]

    def kill(self, node):
        run("docker", "kill", node)

    def back(self, node):
        run("docker", "start", node)

    def drain(self, node):
        """It stands still, with all that runs on it."""
        run("docker", "pause", node)

    def undrain(self, node):
        run("docker", "unpause", node)

    def stop(self):
        run(*self.podman("rm", "--force", "--time=0", *NODES))
        self.server.kill()

    def launches(self, home):
        told = f"-e HOME={home} -e AUTORESEARCH_DATA={home}/data"
        return [(f"docker exec -i {told} {node}", AT_ONCE // 2) for node in NODES]

    inside = launches


class Night:
    """A night that is killed and started again, with its output in a file."""

    begun = []  # processes of loops, none of which is to outlive this check

    def __init__(self, folder, engine, seconds=SECONDS):
        folder.mkdir()
        self.project, self.folder, self.engine = Project(folder), folder, engine
        train = TRAIN.replace("min(SECONDS, 0.2)", "SECONDS").replace("SECONDS = 0.0", f"SECONDS = {seconds}")
        self.project.write("train.py", train)
        self.project.constants(WAITS="(1, 20)")
        self.log, self.process = folder / "night.log", None

    def start(self, experiments=EXPERIMENTS, launches=()):
        done = max(len(self.rows()) - 1, 0)
        words = [
            "--offline",
            "--budget",
            "60",
            "--tag",
            "t",
            "--experiments",
            str(experiments - done),
            "--sandbox",
            "auto",
        ]
        for prefix, many in launches or self.engine.launches(self.folder):
            words += ["--launch", prefix, "--at-once", str(many)]
        env = self.project.environment | {
            "SLURM_CONF": os.environ.get("SLURM_CONF", ""),
            "DOCKER_HOST": os.environ.get("DOCKER_HOST", ""),
            "OPENAI_API_KEY": "sk-secret",
        }
        how = dict(cwd=self.project.folder, env=env, stdin=subprocess.DEVNULL, stderr=subprocess.STDOUT)
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen([sys.executable, "loop.py", *words], stdout=log, **how)
        self.begun.append(self.process)

    def rows(self):
        text = self.project.git("show", "autoresearch/t:results.tsv", check=False)
        return text.splitlines()[1:]

    def until(self, rows, most=600):
        """Waits for so many rows, or for so many seconds, or for the night's end."""
        end = time.monotonic() + most
        while len(self.rows()) < rows and self.process.poll() is None and time.monotonic() < end:
            time.sleep(0.2)

    def there(self):
        """The processes of runs on nodes."""
        place, found = f"{self.folder}/.cache/", []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("AUTORESEARCH_RUNS", "").startswith(place):
                    found.append(process)
        return found

    def results(self):
        path = self.project.folder / ".git" / "autoresearch" / "t.jsonl"
        return [
            event for event in map(json.loads, filter(None, path.read_text().split("\n"))) if "cause" in event
        ]


def trouble(engine, folder):
    """A night in which all of it happens; the problems that are left."""
    night = Night(folder, engine)
    began = time.monotonic()

    def say(text):
        print(f"  {time.monotonic() - began:5.1f} s, {len(night.rows()):2} rows: {text}", flush=True)

    night.start()
    night.until(12)
    engine.kill("n2")
    say("a node lost")
    while (lost := night.log.read_text().count(f"not a word in {loop.SILENCE} s")) < 2 and len(
        night.rows()
    ) < 30:
        time.sleep(0.2)
    say(f"{lost} of its runs given up by now")
    running = len(night.there())
    night.process.kill()
    night.process.wait()
    killed = time.monotonic()
    while night.there():
        time.sleep(0.1)
    say(
        f"the loop killed by SIGKILL with {running} processes of runs on nodes: all gone after {time.monotonic() - killed:.1f} s"
    )
    engine.back("n2")
    night.start()
    night.until(len(night.rows()) + 4)
    engine.drain("n1")
    say("the killed node back, the other one drained")
    night.until(len(night.rows()) + 6, 15)
    engine.undrain("n1")
    say("the drained one back")
    night.process.wait()
    counts, found = check(night.project.folder, "t")
    text = night.log.read_text()
    lost = [line for line in text.splitlines() if "going on in" in line]
    say(f"the end, status {night.process.returncode}: {dict(counts)}")
    begun = sum(bool(re.search(r"the worker of \S+ on ", line)) for line in lost)
    nodes = Counter(result.get("node", "nowhere") for result in night.results())
    print(
        f"  {len(lost)} times a device was waited for, {begun} of them lost a run; results from {dict(nodes)}"
    )
    for reason, times in Counter(re.sub(r"\w+:\d+ ?|; going on.*", "", line[10:]) for line in lost).items():
        print(f"    {times} times{reason}")
    print("  the key crossed to a node" if "sk-secret" in text else "  problems:", found or "none")
    return found + ["it ended before its time"] * (counts["rows"] != EXPERIMENTS + 1)


def cut_off(engine, folder):
    """A night whose loop and clients are killed by SIGKILL in one moment: nobody tells the nodes."""
    night = Night(folder, engine, seconds=50)
    night.start()
    while "#0 baseline" not in night.log.read_text() or not night.there():
        time.sleep(0.2)
    time.sleep(2)  # into its 50 seconds
    processes = [
        psutil.Process(night.process.pid),
        *psutil.Process(night.process.pid).children(recursive=True),
    ]
    processes[0].suspend()  # so that it can tell its clients nothing
    for process in reversed(processes):
        with contextlib.suppress(psutil.Error):
            process.kill()
    night.process.wait()
    killed = time.monotonic()
    while night.there():
        time.sleep(0.2)
    print(
        f"  loop and clients killed in one moment: no run on a node after {time.monotonic() - killed:.1f} s"
    )


def steady(engine, folder, seconds=20, experiments=64):
    """A night without trouble and without a gain: how busy 16 devices are, and what the loop itself takes."""
    night, busy, used = Night(folder, engine, seconds), [], 0.0
    night.project.verdicts("discard")
    night.start(experiments, engine.inside(folder))
    night.until(1)
    began, done = time.monotonic(), len(night.results())
    while (
        night.process.poll() is None and len(night.rows()) < experiments + 2 - AT_ONCE
    ):  # then they run out of work
        with contextlib.suppress(psutil.Error):
            used = sum(psutil.Process(night.process.pid).cpu_times()[:2])
        time.sleep(0.2)
    wall, results = time.monotonic() - began, night.results()[done:]
    busy = sum(result["seconds"] for result in results) / AT_ONCE / wall
    night.process.terminate()
    night.process.wait()
    print(
        f"  {len(results)} runs of {seconds} s in {wall:.0f} s on {AT_ONCE} devices, which were in a run for {busy:.0%} "
        f"of the time; the loop's own CPU since its start {used:.1f} s"
    )


def latency(name, words, folder, env):
    """Seconds from a start to the run's first step, and from a run's last step to the next one's first, by the log."""
    runs = folder / re.sub(r"\W+", "-", name)
    data = folder / "data" / "toy"
    data.mkdir(parents=True, exist_ok=True)
    (data / "meta.json").write_text('{"fingerprint": "0123456789ab"}')
    os.environ.update(env | {"HOME": str(folder), "AUTORESEARCH_DATA": str(folder / "data")})
    train = (
        (STAND_IN / "train.py")
        .read_text()
        .replace("def main():", "def main():\n    import time; print('AT', time.time())")
    )
    device, begins, ends = loop.Device("box:0", runs, words), [], []
    loop.Device.known.clear()
    for seed in range(7):
        told = {"SEED": f"{seed}", "SPLIT": "val", "BUDGET": "60", "WORK": "", "PACE": "0.0101"}
        job = dict(
            files={"prepare.py": (STAND_IN / "prepare.py").read_text(), "train.py": train},
            ruler="prepare.py",
            told=told,
            branch="latency",
            kept="",
        )
        job |= dict(
            folder=str(runs / "0001-abcdef0" / f"{seed}"),
            name="box:0",
            device="fake:0",
            probe=False,
            index=0,
            at_once=1,
        )
        started = time.time()
        result = device.run(job | dict(facts=FACTS | {"folder": ""}, sandbox="off"), lambda line: None)
        assert not result["cause"], result
        step = float(Path(result["log"]).read_text().partition("AT ")[2].split()[0])
        begins.append(step - started)
        ends.append(time.time() - started - begins[-1])
    middle = lambda values: sorted(values[1:])[len(values[1:]) // 2]  # noqa: E731
    print(f"  {name}: first step {begins[0]:.2f} s after the first start, which asks the ruler, then {middle(begins):.2f} s (median of 6); "
          f"from the last step to its result {middle(ends):.2f} s", flush=True)  # fmt: skip


def main():
    wanted = sys.argv[1:] or [*PACKAGES]
    missing = {"slurm": "slurmctld", "ssh": "sshd", "docker": "podman"}
    if packages := [
        package for name in wanted if not shutil.which(missing[name]) for package in PACKAGES[name]
    ]:
        run("apt-get", "update")
        run(
            "apt-get",
            "install",
            "-y",
            "--no-install-recommends",
            *packages,
            env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"},
        )
    found, home = [], os.environ.get("HOME", "/root")
    with tempfile.TemporaryDirectory(prefix="clusters-") as name:
        folder = Path(name)
        for kind in wanted:
            print(kind, flush=True)
            engine = {"slurm": Slurm, "ssh": Ssh, "docker": Docker}[kind](folder / kind)
            try:
                found += trouble(engine, folder / f"{kind}-trouble")
                cut_off(engine, folder / f"{kind}-cut-off")
                steady(engine, folder / f"{kind}-steady")
                place = folder / f"{kind}-latency"
                latency("local shell", ["env"], place, {})
                for how in dict.fromkeys((engine.launches, engine.inside)):
                    latency(f"{kind}, {how.__name__}", how(place)[0][0].split(), place, {})
            finally:
                os.environ["HOME"] = home
                for process in Night.begun:
                    process.kill()
                engine.stop()
    print("broken promises:", found or "none")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
