"""Where the time goes, in a run and between runs; used by bench.py."""

import json
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
from soak import Clone, random_reply, source_in

import loop

TIMED = """\
import os, time
import prepare
WIDTH = 64
RATE = 0.5
SECONDS = 0.0
if __name__ == "__main__":
    print("began", os.environ["AUTORESEARCH_STARTED"])
    prepare.finish(1 + 1 / WIDTH + RATE, SECONDS)
    print("ended", time.monotonic())
"""


def line(what, figure):
    print(f"{what:44}  {figure}", flush=True)


# ---- a real run


def run_of_train(budget):
    """train.py once, by hand, timed from outside: what timed_run.py found, with the wall clock of a run."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        environment = os.environ | {
            "AUTORESEARCH_BUDGET": f"{budget:g}",
            "AUTORESEARCH_STARTED": str(started),
        }
        command = [sys.executable, Path(__file__).parent / "timed_run.py", Path(folder) / "found"]
        output = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True
        ).stdout
        print(output.splitlines()[0])
        found = json.loads((Path(folder) / "found").read_text())
    return found | {
        "seconds": found["ended"] - started,
        "bpb": re.search(r"^val_bpb: +(\S+)$", output, re.MULTILINE)[1],
    }


def training(budget):
    """Lines: start-up by its parts, the share of the steps, evaluation, and what batches and log cost of a step."""
    found = run_of_train(budget)
    parts, seconds = found["parts"], found["seconds"]
    names = list(parts)
    start_up = names[: names.index("the first step") + 1]
    line("spawn to the end of the first step", f"{sum(parts[name] for name in start_up):7.2f} s")
    for name in start_up:
        line(f"  {name}", f"{parts[name]:7.2f} s")
    steps = parts["the first step"] + parts["the other steps"]
    line(
        f"training steps, of a run at {budget:g} s",
        f"{steps:7.2f} s of {seconds:.2f}: {steps / seconds:.1%} ({found['steps']} steps)",
    )
    line("val_bpb, and tokens drawn", f"{float(found['bpb']):7.4f}, {found['tokens'] / 1e6:.2f} M")
    line("evaluation, with its probes", f"{parts['evaluation, with its probes']:7.2f} s")
    for name, what in (
        ("batches", "loading batches"),
        ("log", "run.log"),
    ):  # on CUDA with what they wait for the device
        line(f"  {what}, of a step", f"{found['within'][name] / steps:7.2%}")
    speed = found["tokens"] / steps
    line(
        "the loader alone",
        f"{found['loader']:,.0f} tokens/s, {found['loader'] / speed:.0f} times training's {speed:,.0f}",
    )


def answering_at_once():
    """A server of a model that answers at once, with a random edit of a constant."""
    server = ChatServer()
    server.default = lambda request: random_reply(
        source_in(request), random.Random(len(server.requests)), ("GPU",)
    )
    return server


def cycles_of_loop(budget, cycles):
    """Line: the share of the steps in the real loop on one device, from one run's start to the next one's."""
    server = answering_at_once()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # a picture may still be drawn
        project = Clone(Path(folder))
        command = [
            sys.executable,
            "loop.py",
            "--tag",
            "speed",
            "--budget",
            f"{budget:g}",
            "--devices",
            first_device(),
        ]
        environment = project.environment | {"PATH": os.environ["PATH"], "OPENAI_BASE_URL": server.url}
        quiet = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        process = subprocess.Popen(command, cwd=project.folder, env=environment, **quiet)
        while len(starts := run_starts(project)) <= cycles and process.poll() is None:
            time.sleep(0.2)
        process.terminate()
        process.wait()
        shares = []
        for (began, run), (after, _) in zip(starts, starts[1:], strict=False):
            if match := re.search(
                r"^training_seconds: +([\d.]+)", (run / "run.log").read_text(), re.MULTILINE
            ):
                shares.append(float(match[1]) / (after - began))
    if shares:
        each = ", ".join(f"{share:.1%}" for share in shares)
        line(
            "training seconds, cycle over cycle in the loop",
            f"{statistics.median(shares):7.1%} (median of {each})",
        )


def first_device():
    done = subprocess.run(
        [sys.executable, "prepare.py", "--facts"], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])["devices"][0]


def run_starts(project):
    """[(time, folder)] of the runs so far, by when their train.py was written."""
    files = project.folder.glob("runs/[0-9]*/*/train.py")
    return sorted((file.stat().st_mtime, file.parent) for file in files)


# ---- between runs


def timed_project(folder, seconds=0.0):
    project = Project(Path(folder))
    project.write("train.py", TIMED.replace("SECONDS = 0.0", f"SECONDS = {seconds}"))
    project.commit("timed")
    return project


def run_times(project):
    """(beginnings, ends) of the runs that ended, in their order, by the clock that all processes share."""
    times = [
        re.findall(r"^(?:began|ended) ([\d.]+)$", log.read_text(), re.MULTILINE)
        for log in project.folder.glob("runs/*/*/run.log")
    ]
    return tuple(
        zip(*sorted([float(value) for value in pair] for pair in times if len(pair) == 2), strict=True)
    )


def gaps(project, since=0.0):
    """Seconds from the end of each run to the beginning of the next one."""
    began, ended = run_times(project)
    return [after - before for after, before in zip(began[1:], ended, strict=False) if before > since]


def grow(project, rows):
    """Gives the branch `rows` more rows, with the commits that the loop would have made, by git fast-import."""
    tip, kept = (project.git("rev-parse", name).strip() for name in ("autoresearch/t", "autoresearch/t~1^2"))
    lines, marks = [], 0
    who = "committer a <a@b> 1700000000 +0000\n"
    for number in range(rows):
        marks += 2
        message = f"idea {number}\n\nNumber: {number + 2}\nParent: {kept}\nCode: {number:016x}\n"
        source = TIMED.replace("WIDTH = 64", f"WIDTH = {number + 100_000}")
        parent = f":{marks - 2}" if number else tip
        lines.append(f"commit refs/heads/edit\nmark :{marks - 1}\n{who}data {len(message)}\n{message}from {parent}\n"
                     f"M 100644 inline train.py\ndata {len(source)}\n{source}\n")  # fmt: skip
        outcome = "discard: an idea\n\nWork: 100000\n"
        lines.append(
            f"commit refs/heads/autoresearch/t\nmark :{marks}\n{who}data {len(outcome)}\n{outcome}from {parent}\nmerge :{marks - 1}\n"
        )
    subprocess.run(["git", "fast-import", "--quiet", f"--export-marks={project.data}/marks"], cwd=project.folder,
                   input="".join(lines).encode(), check=True)  # fmt: skip
    commits = dict(line.split() for line in (project.data / "marks").read_text().splitlines())
    text = project.git("show", f"{tip}:results.tsv")
    for number in range(rows):
        commit = commits[f":{2 * number + 1}"][:7]
        row = (
            commit,
            1.7,
            0.5,
            "discard",
            f"idea {number} with a few words to it",
            0.2,
            0.0007,
            [1.7],
            0,
            "2026-11-23T00:00:00Z",
        )
        text += loop.Row(*row).line()
    project.git("symbolic-ref", "HEAD", "refs/heads/autoresearch/t")
    project.git("reset", "--hard", "--quiet")
    project.write("results.tsv", text)
    project.commit("rows")


def overhead(args):
    """Seconds from a run's last line to the next one's spawn, with a model that answers at once; start-up; peak resident memory."""
    server = answering_at_once()
    for rows in (10, 10_000):
        with tempfile.TemporaryDirectory() as folder:
            project = timed_project(folder)
            project.offline("--experiments", 1)
            grow(project, rows - 2)
            started, peak = time.monotonic(), 0
            process = project.start(
                "--experiments", args.cycles + 1, OPENAI_BASE_URL=server.url
            )  # so many gaps between
            while process.poll() is None:
                status = Path(f"/proc/{process.pid}/status")
                if match := re.search(r"VmHWM:\s+(\d+)", status.read_text() if status.exists() else ""):
                    peak = max(peak, int(match[1]) / 1024)
                time.sleep(0.05)
            first = min(began for began in run_times(project)[0] if began > started) - started
            between = gaps(project, started)
            figure = f"{statistics.median(between):7.2f} s, at most {max(between):.2f}; start to first run {first:.2f} s, peak {peak:.0f} MB"
            line(f"the loop between two runs, at {rows:,} rows", figure)


def busy(think, args):
    """Line: the share of their time in which stand-in devices run, with a model that thinks for so many seconds."""
    server = ChatServer()

    def worse(request):  # than all before: a verdict after one run
        time.sleep(think)
        return random_reply(source_in(request), random.Random(len(server.requests)))

    server.default = worse
    with tempfile.TemporaryDirectory() as folder:
        project = timed_project(folder, args.run_seconds)
        words = "--budget", f"{2 * args.run_seconds + 20:g}", "--tag", "t", "--experiments", args.experiments
        devices = str(args.devices) if args.devices > 1 else ""
        process = project.start(*words, OPENAI_BASE_URL=server.url, STAND_IN_DEVICES=devices or "0")
        out, err = process.communicate()
        assert process.returncode == 0, out + err
    searched = sum("search: " in row["description"] for row in project_rows(out))
    share = re.findall(r"devices busy (\d+) %", out)[-1]
    what = f"{args.devices} devices, runs of {args.run_seconds:g} s, thoughts of {think:g} s"
    line(what, f"{share:>5} % of the time busy, {searched} steps of the search")


def project_rows(out):
    """The outcomes that a loop printed."""
    return [
        {"description": text}
        for text in re.findall(r"^\S+  \w+ +(?:keep|discard|crash) +(.*)$", out, re.MULTILINE)
    ]


def speed(args):
    """One table of where the time goes on this machine: start-up, training's share, loader, the loop between runs, devices that wait."""
    training(args.budget)
    cycles_of_loop(args.budget, args.runs)
    overhead(args)
    for share in (0.2, 3):
        busy(share * args.run_seconds, args)
