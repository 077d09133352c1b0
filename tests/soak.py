"""A night in which everything fails that can: the provider, the replies, the runs, the machine, and the loop itself by signals."""

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from check_night import check, survivors
from conftest import ROOT, ChatServer, Project, block, reply_of
from faults import TRAIN
from test_provider import CUT, FAULTS, TOO_LONG

import loop

BUSY = "CUDA error: CUDA-capable device(s) is/are busy or unavailable"
# The ruler fails, in runs and where a worker asks for its facts, while a file is there; in a cage it is seen, too.
BROKEN = f"""
if "AUTORESEARCH_RUNS" in os.environ and (DATA / "broken").exists():
    raise RuntimeError("{BUSY}")
"""
# What an edit puts at the beginning of main(): (how often, lines). The rare ones cost seconds each.
BAD_CODE = {
    "a name that isn't there": (9, "no_such_name"),
    "out of memory": (4, "raise MemoryError"),
    "exit 3": (4, "import sys\nsys.exit(3)"),
    "abort": (4, "import os\nos.abort()"),
    "kill itself": (4, "import os\nos.kill(os.getpid(), 9)"),
    "hang": (0.5, "import time\ntime.sleep(100000)"),
    "print for a second": (1, "import time\nend = time.time() + 1\nwhile time.time() < end:\n    print('x' * 1000)"),
    "a child in another session": (0.5, "import subprocess\nsubprocess.Popen(['sleep', '3600'], start_new_session=True)"),
    "a child without a mark": (0.5, "import subprocess\nsubprocess.Popen(['/bin/sleep', '900'], start_new_session=True, env={})"),
    "a fake summary": (4, "print('---', 'val_bpb: 0.500000', 'result: ' + '0' * 64 + ' ' + chr(123) + chr(125), sep=chr(10))"),
    "50 MB of files": (1, "for i in range(50):\n    open(f'big{i}', 'wb').write(b'x' * 2**20)"),
    "a locked folder": (3, "import os\nos.makedirs('locked/in')\nos.chmod('locked', 0)"),
    "escapes and markup": (4, "raise ValueError('\\\\x1b[2J\\\\x1b]0;title\\\\x07[bold]red[/bold] [/] \\\\x9b31m \\\\t \"quoted\"')"),
}  # fmt: skip
BROKEN_REPLIES = {
    "cut off": lambda source, edit: edit[: len(edit) // 2],
    "no edit": lambda source, edit: "I would rather not.",
    "empty": lambda source, edit: "",
    "wrong SEARCH": lambda source, edit: block("    this line = never there", "x = 1"),
    "syntax error": lambda source, edit: block("def main():", "def main(:"),
    "two matches": lambda source, edit: block("import", "import"),
    "edit of prepare.py": lambda source, edit: "prepare.py\n" + block("SECONDS = 300", "SECONDS = 600"),
    "200 KB": lambda source, edit: edit + "blah " * 42_000,
    "nothing new": lambda source, edit: block("def main():", "def main():  # the same"),
}


def random_reply(source, rng, fixed=("SECONDS",)):
    """A model's reply that moves one constant of a file at random."""
    while True:
        label, node = rng.choice(loop.constants(source, fixed))
        value = loop.moved(node.value, rng.choice((1, -1)), rng.uniform(0.05, 0.6))
        if value != node.value:
            break
    new = loop.with_constant(source, node, value)
    blocks = [("\n".join(search), "\n".join(replace)) for search, replace in loop.blocks_between(source, new)]
    return reply_of(f"{label} {node.value!r} to {value!r}", f"LESSON: try {label}", *blocks)


def source_in(request):
    """The file that a prompt shows."""
    return request["messages"][0]["content"].partition("# train.py\n\n```python\n")[2].partition("\n```")[0]


class Provider:
    """Answers the loop's requests, as models and their servers do on a bad day; counts what it did."""

    def __init__(self, seed, real):
        self.rng, self.real, self.did, self.sent, self.asked = random.Random(seed), real, Counter(), [], 0
        self.server = ChatServer()
        self.server.default = self.answer
        self.faults = {name: fault for name, (fault, _) in FAULTS.items() if not callable(fault)}
        self.faults |= {
            "too long a request": (400, TOO_LONG),
            "a request too large": (413, {"error": {"message": "too large"}}),
            **CUT,
        }

    def answer(self, request):
        """A fault of the provider, or a reply."""
        self.server.requests.clear()
        if self.rng.random() < (0.05 if self.real else 0.08):
            name = self.rng.choice(sorted(self.faults))
            self.did["provider: " + name] += 1
            return self.faults[name]
        kind, reply = self.reply(source_in(request))
        self.did[kind] += 1
        return reply

    def reply(self, source):
        edit = random_reply(source, self.rng, ("GPU", "SECONDS"))
        chance = self.rng.random()
        if chance < 0.10:
            name = self.rng.choice(sorted(BROKEN_REPLIES))
            return f"reply: {name}", BROKEN_REPLIES[name](source, edit)
        if chance < 0.12 and self.sent:
            return "reply: sent before", self.rng.choice(self.sent)
        if chance < (0.27 if self.real else 0.32):
            names = list(BAD_CODE)
            name = self.rng.choices(names, [BAD_CODE[name][0] for name in names])[0]
            lines = [f"'''soak {self.rng.random()}'''", *BAD_CODE[name][1].replace("\\\\", "\\").split("\n")]
            edit = block("def main():", "\n".join(["def main():", *(f"    {line}" for line in lines)]), name)
            return f"code: {name}", edit
        self.sent = [*self.sent[-200:], edit]
        return "reply: good", edit


class Clone(Project):
    """A clone of this repository, whose runs are real."""

    def __init__(self, folder):
        self.folder = folder / "checkout"
        subprocess.run(["git", "clone", "--quiet", ROOT, self.folder], check=True)
        self.environment = {
            name: os.environ[name]
            for name in ("PATH", "HOME", "LANG", "AUTORESEARCH_DATA")
            if name in os.environ
        }


def stand_in(folder):
    project = Project(folder)
    project.write("train.py", TRAIN)
    secret = 'secret = os.environ.pop("AUTORESEARCH_TOKEN", "")\n'
    project.write("prepare.py", project.read("prepare.py").replace(secret, secret + BROKEN))
    project.constants(WAITS="(0.05, 0.2)")
    return project


def memory_mb(process):
    with contextlib.suppress(OSError):
        if match := re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text()):
            return int(match[1]) / 1024
    return 0.0


def cause_class(description):
    """A crash's cause without what differs from one to the next."""
    cause = (
        description.rpartition(" [")[2]
        if "[refused: " not in description
        else "refused: " + description.rpartition("[refused: ")[2]
    )
    return re.sub(
        r"\d[\d.,]*", "N", cause.split(":")[0] + (":" + cause.split(":")[1][:25] if cause.count(":") else "")
    ).strip("] ")[:60]


class Soak:
    """Starts the loop, hits it, starts it again, until there are enough rows; keeps the counts."""

    def __init__(self, project, provider, args):
        self.project, self.provider, self.args, self.rng = project, provider, args, random.Random(args.seed)
        self.signals, self.exits, self.memory, self.wrong, self.process = Counter(), Counter(), [], [], None
        self.slowest = {}  # seconds that the loop took to end, by signal
        self.every = 600 if args.real else 10  # seconds between two hits

    def rows(self):
        with contextlib.suppress(OSError):
            return self.project.read("results.tsv").count("\n") - 1
        return 0

    def start(self):
        command = [
            sys.executable,
            "loop.py",
            "--tag",
            "soak",
            "--budget",
            str(self.args.budget or (60 if self.args.real else 2)),
            "--sandbox",
            self.args.sandbox,
        ]
        out = open(self.project.folder.parent / "loop.out", "ab")
        env = self.project.environment | {"OPENAI_BASE_URL": self.provider.server.url}
        if self.args.devices > 1 and not self.args.real:
            env["STAND_IN_DEVICES"] = str(self.args.devices)
        self.process = subprocess.Popen(
            command, cwd=self.project.folder, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out
        )
        out.close()
        self.hit_at = time.monotonic() + self.rng.choice(
            (self.rng.uniform(0, 2), *[self.rng.uniform(0.5, 1.5) * self.every] * 4)
        )

    def stop(self, name):
        """Sends a signal (`SIGINT twice` is two of them) and waits for the end."""
        self.memory.append((self.rows(), memory_mb(self.process)))
        self.signals[name] += 1
        sent = time.monotonic()
        self.process.send_signal(signal.Signals[name.split()[0]])
        if name.endswith("twice"):
            time.sleep(self.rng.uniform(0, 0.1))
            self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.say(f"the loop went on for 30 s after {name}:\n{self.last_words()}")
            self.process.kill()
        code = self.process.wait()
        self.exits[f"{name}: exit {code}"] += 1
        self.slowest[name] = max(self.slowest.get(name, 0), time.monotonic() - sent)

    def say(self, text):
        """Something wrong: told at once and in the report."""
        self.wrong.append(text)
        print("WRONG:", text, flush=True)

    def last_words(self):
        return (self.project.folder.parent / "loop.out").read_bytes()[-1500:].decode("utf-8", "replace")

    def go(self, over):
        """Until over(); a loop that ends by itself has done wrong."""
        broken = self.project.folder.parent / "data" / "toy-0123456789ab" / "broken"
        began = reported = time.monotonic()
        ended, fixed, next_break = 0, 0, 100
        self.start()
        while not over():
            time.sleep(0.1)
            if not self.args.real and self.rows() >= next_break:
                next_break += 100
                broken.write_text("")
                fixed = time.monotonic() + self.rng.uniform(5, 20)
                self.signals["(the machine failed)"] += 1
            if broken.exists() and time.monotonic() > fixed:
                broken.unlink()
            if self.process.poll() is not None:
                self.say(
                    f"the loop ended by itself, exit {self.process.returncode}, at {self.rows()} rows:\n{self.last_words()}"
                )
                ended += 1
                if ended > 5:
                    return
                self.start()
            elif time.monotonic() > self.hit_at:
                self.stop(self.rng.choice(("SIGKILL", "SIGTERM", "SIGHUP", "SIGINT", "SIGINT twice")))
                self.start()
            if time.monotonic() - reported > 60:
                reported = time.monotonic()
                print(f"{reported - began:6.0f} s  {self.rows()} rows, {sum(self.signals.values())} hits, {len(self.wrong)} wrong, "
                      f"loop at {memory_mb(self.process):.0f} MB", flush=True)  # fmt: skip
        broken.unlink(missing_ok=True)


def soak(args):
    """A night with every fault injected at random: the provider's, the replies', the runs', the machine's, and signals to the loop."""
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell's background job ignores them, and so would the loop
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    folder, started = Path(tempfile.mkdtemp(prefix="soak-")), time.monotonic()
    project = Clone(folder) if args.real else stand_in(folder)
    night = Soak(project, Provider(args.seed, args.real), args)
    hours = args.hours or (2 if args.real else 1e9)
    print(
        f"the checkout: {project.folder}, the loop's output: {folder}/loop.out, seed {args.seed}", flush=True
    )
    try:
        night.go(
            lambda: time.monotonic() - started > 3600 * hours or night.rows() > (args.experiments or 1e9)
        )
        if night.process.poll() is None:
            night.stop("SIGTERM")
    finally:
        if night.process and night.process.poll() is None:
            night.process.kill()
            night.process.wait()
    time.sleep(1)
    report(night, time.monotonic() - started)
    for pid, _ in survivors(project.folder):
        os.kill(pid, signal.SIGKILL)
    if not args.real and not night.wrong:
        shutil.rmtree(folder, ignore_errors=True)


def report(night, seconds):
    project, args = night.project, night.args
    counts, found = check(project.folder, "soak")
    lines = project.git("show", "autoresearch/soak:results.tsv").splitlines()[1:]
    crashes = Counter(cause_class(line.split("\t")[4]) for line in lines if line.split("\t")[3] == "crash")
    print(
        f"\n{len(lines) - 1} experiments in {seconds:.0f} s, {(len(lines) - 1) / seconds * 3600:.0f} an hour; seed {args.seed}"
    )
    print(", ".join(f"{number} {name}" for name, number in counts.items()))
    for title, counter in (
        ("crashes by cause", crashes),
        ("hits", night.signals),
        ("exits", night.exits),
        ("provider, replies and code", night.provider.did),
    ):
        print(f"{title}:", *(f"{times:6}  {name}" for name, times in counter.most_common()), sep="\n  ")
    output = (project.folder.parent / "loop.out").read_text(errors="replace")
    print(f"replies refused: {output.count('reply refused: ')}")
    print(
        "seconds to end, at most:",
        ", ".join(f"{seconds:.2f} after {name}" for name, seconds in night.slowest.items()),
    )
    own = re.findall(
        r"^[0-9:]{8}  (Traceback|git failed)", output, re.MULTILINE
    )  # a killed loop's check may print, too
    night.wrong += [
        f"an error of the loop's own, {times} times: {words}" for words, times in Counter(own).items()
    ]
    if night.memory:
        print(
            "peak memory of the loop, MB at rows:",
            ", ".join(f"{mb:.0f} at {rows}" for rows, mb in (*night.memory[:4], *night.memory[-4:])),
        )
    size = (
        sum(
            path.stat().st_size
            for path in project.folder.rglob("*")
            if path.is_file() and not path.is_symlink()
        )
        / 1e6
    )
    print(f"checkout: {size:.0f} MB, {project.folder}")
    print("problems:", *(night.wrong + found or ["none"]), sep="\n  ")
