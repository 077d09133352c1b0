"""Measurements, each a sub-command; none is a test.

    python tests/bench.py baseline --budget 300 --seeds 3     the shipped train.py, run by run: val_bpb, mean and spread
    python tests/bench.py overhead                            the loop's own seconds between runs and its memory, at 10 and 10,000 rows

Writes only below a temporary folder. Numbers depend on what else the machine does: say which machine, and run them twice.
"""

import argparse
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from conftest import ROOT, ChatServer, Project

import loop


def baseline(args):
    """Runs train.py as it is by hand, a seed after the other, and prints what the ruler says."""
    values = []
    for seed in range(args.seeds):
        environment = os.environ | {"AUTORESEARCH_SEED": str(seed), "AUTORESEARCH_BUDGET": str(args.budget)}
        started = time.monotonic()
        environment["AUTORESEARCH_STARTED"] = str(started)
        run = subprocess.run([sys.executable, "train.py"], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        seconds = time.monotonic() - started
        summary = dict(re.findall(r"^(\w+): +(\S+)$", run.stdout.rpartition("---")[2], re.MULTILINE))
        values.append(float(summary["val_bpb"]))
        print(f"seed {seed}  {seconds:.1f} s wall clock  " + "  ".join(f"{key} {value}" for key, value in summary.items()), flush=True)
    spread = statistics.stdev(values) if len(values) > 1 else 0
    print(f"val_bpb: mean {statistics.mean(values):.4f}, standard deviation {spread:.4f}, {len(values)} seeds at {args.budget:g} s")


TIMED = """\
import os, time
import prepare
WIDTH = 64
RATE = 0.5
if __name__ == "__main__":
    print("began", os.environ["AUTORESEARCH_STARTED"])
    prepare.finish(1 + 1 / WIDTH + RATE)
    print("ended", time.monotonic())
"""


def grow(project, rows):
    """Gives the branch `rows` more rows, with the commits that the loop would have made, by git fast-import."""
    tip = project.git("rev-parse", "autoresearch/t").strip()
    lines, marks = [], 0
    who = "committer a <a@b> 1700000000 +0000\n"
    for number in range(rows):
        marks += 2
        message = f"idea {number}\n\nSeed: {number}\nTokens: 0\nTree: {number:016x}\n"
        source = TIMED.replace("WIDTH = 64", f"WIDTH = {number + 100_000}")
        parent = f":{marks - 2}" if number else tip
        lines.append(f"commit refs/heads/edit\nmark :{marks - 1}\n{who}data {len(message)}\n{message}from {parent}\n"
                     f"M 100644 inline train.py\ndata {len(source)}\n{source}\n")  # fmt: skip
        lines.append(f"commit refs/heads/autoresearch/t\nmark :{marks}\n{who}data 8\ndiscard\n\nfrom {parent}\nmerge :{marks - 1}\n")
    subprocess.run(["git", "fast-import", "--quiet", f"--export-marks={project.data}/marks"], cwd=project.folder,
                   input="".join(lines).encode(), check=True)  # fmt: skip
    commits = dict(line.split() for line in (project.data / "marks").read_text().splitlines())
    text = project.git("show", f"{tip}:results.tsv")
    for number in range(rows):
        commit = commits[f":{2 * number + 1}"][:7]
        text += loop.Row(commit, 1.7, 0.5, "discard", f"idea {number} with a few words to it", [1.7], 0, "2026-11-23T00:00:00Z").line()
    project.git("symbolic-ref", "HEAD", "refs/heads/autoresearch/t")
    project.git("reset", "--hard", "--quiet")
    project.write("results.tsv", text)
    project.commit("rows")


def overhead(args):
    """Seconds from a run's last line to the next one's spawn, with a model that answers at once; start-up; peak resident memory."""
    server = ChatServer()
    server.default = lambda request: loop.random_reply(
        request["messages"][1]["content"].partition("```python\n")[2].partition("\n```")[0], random.Random(len(server.requests)), "GPU"
    )
    print("rows     start s   between runs s: median, worst   peak MB")
    for rows in (10, 10_000):
        with tempfile.TemporaryDirectory() as folder:
            project = Project(Path(folder))
            project.write("train.py", TIMED)
            project.commit("timed")
            project.offline("--experiments", 1)
            grow(project, rows - 2)
            started, peak, first = time.monotonic(), 0, None
            process = project.start("--experiments", args.cycles, OPENAI_BASE_URL=server.url)
            while process.poll() is None:
                status = Path(f"/proc/{process.pid}/status")
                if match := re.search(r"VmHWM:\s+(\d+)", status.read_text() if status.exists() else ""):
                    peak = max(peak, int(match[1]) / 1024)
                time.sleep(0.05)
            logs = sorted(project.folder.glob("runs/*/run.log"), key=lambda path: path.stat().st_mtime)[-args.cycles :]
            times = [[float(value) for value in re.findall(r"^(?:began|ended) ([\d.]+)$", log.read_text(), re.MULTILINE)] for log in logs]
            first = times[0][0] - started
            gaps = [after[0] - before[1] for before, after in zip(times, times[1:], strict=False)]
            print(f"{rows:6,}  {first:8.2f}  {statistics.median(gaps):14.3f}, {max(gaps):.3f}  {peak:22.0f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("baseline", help=baseline.__doc__)
    command.add_argument("--budget", type=float, default=300)
    command.add_argument("--seeds", type=int, default=3)
    command.set_defaults(run=baseline)
    command = commands.add_parser("overhead", help=overhead.__doc__)
    command.add_argument("--cycles", type=int, default=20)
    command.set_defaults(run=overhead)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
