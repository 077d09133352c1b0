"""Kills the loop before any step it takes, and everything else that a night may meet; used by test_faults.py and bench.py."""

import contextlib
import json
import random
import re
import signal
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path

from check_night import COLUMNS, problems, trailers
from conftest import Project

# Installed as sitecustomize: an audit hook sees what loop.py is about to do to files and processes, without a change to loop.py.
KILLER = """\
import os, re, sys, sysconfig

sysconfig.get_paths = lambda *args, **kwargs: {"purelib": os.devnull, "platlib": os.devnull}  # a look over the real ones takes long
HOW = {"os.mkdir", "os.rmdir", "os.remove", "os.rename", "os.chmod", "os.kill", "os.killpg", "shutil.rmtree", "fcntl.flock"}


def kind_of(event, args):
    if event == "subprocess.Popen":
        words = [os.fsdecode(word) for word in args[1]]
        if words[0] != "git":
            ruler = {"--facts": "facts", "--check": "check"}
            asked = next((name for option, name in ruler.items() if option in words), os.path.basename(words[0]))
            return f"start {asked}"
        return "git " + next(word for word, before in zip(words[1:], words) if before != "-c" and not word.startswith("-"))
    if event == "open":
        path, mode, flags = args
        if isinstance(path, int) or os.fsdecode(path).startswith("/dev/"):
            return None
        if not (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return None
        return f"write {os.path.basename(os.fsdecode(path))}"
    if event in HOW:
        last = "" if isinstance(args[0], int) or event in ("os.kill", "fcntl.flock") else os.path.basename(os.fsdecode(args[0]))
        return f"{event.partition('.')[2]} {re.sub('[0-9]+(-[0-9a-f-]+)?', '*', last)}".strip()


def install(log, spec):
    wanted, number = spec.rsplit(" ", 1)
    number, seen, over = int(number), 0, False

    def hook(event, args):
        nonlocal seen, over
        if over or not (event in HOW or event in ("open", "subprocess.Popen")):
            return
        kind = kind_of(event, args)
        if kind is None:
            return
        os.write(log, f"{kind}\\n".encode())
        seen += wanted in ("any", kind)
        if seen == number:
            over = True
            os.kill(os.getpid(), 9)

    sys.addaudithook(hook)


if "KILL_BEFORE" in os.environ and any(os.path.basename(word) == "loop.py" for word in sys.orig_argv[1:2]):
    install(os.open(os.environ["KILL_LOG"], os.O_WRONLY | os.O_CREAT | os.O_APPEND), os.environ["KILL_BEFORE"])
"""
# A stand-in for train.py with noise, with a constant that crashes, and with enough others for any number of experiments.
TRAIN = '''\
"""A stand-in for train.py: its val_bpb is a function of its constants and, a little, of the seed."""

import os
import random

import prepare

DEPTH = 4
WIDTH = 64
LEARNING_RATE = 0.02
DECAY = 0.1
WARMUP = 0.5
HEADS = 2
SECONDS = 0.0


def main():
    seed = os.environ["AUTORESEARCH_SEED"]
    own = f"{seed} {DEPTH} {WIDTH} {LEARNING_RATE} {DECAY} {WARMUP}"
    noise = random.Random(seed).gauss(0, 0.0007) + random.Random(own).gauss(0, 0.002)
    if HEADS == 3:
        raise ValueError(f"{WIDTH} can't be divided by {HEADS}")
    shape = 1 / WIDTH + abs(DEPTH - 6) / 100 + WIDTH / 20000
    prepare.finish(1 + shape + abs(LEARNING_RATE - 0.05) + abs(DECAY - 0.3) / 9 + abs(WARMUP - 0.2) / 9 + noise, min(SECONDS, 0.2))


if __name__ == "__main__":
    main()
'''
RUNS = COLUMNS.index("runs")
PERSONS = {"notes.txt", "draft.txt"}  # a staged change and an untracked file


def night(folder):
    """A Project for kills: its trainer keeps, discards and crashes, and a person has work of their own in the checkout."""
    folder.mkdir(parents=True, exist_ok=True)
    project = Project(folder)
    project.write("train.py", TRAIN)
    project.commit("a trainer with noise")
    project.write("notes.txt", "a staged change\n")
    project.git("add", "notes.txt")
    project.write("draft.txt", "an untracked file\n")
    (folder / "hook").mkdir()
    (folder / "hook" / "sitecustomize.py").write_text(KILLER)
    return project


def rows_of(project):
    text = project.git("show", "autoresearch/t:results.tsv", check=False)
    return [line.split("\t") for line in text.splitlines()[1:]]


def message_of(project, commit):
    return trailers(project.git("show", "-s", "--format=%B", commit))


def open_of(project):
    """{number: (hash of its code, commit)} of the experiments that were begun and have no row."""
    refs = project.git("for-each-ref", "--format=%(objectname)", "refs/autoresearch/t/open/").split()
    rows = [cells[0] for cells in rows_of(project)]
    said = {commit: message_of(project, commit) for commit in refs if not any(map(commit.startswith, rows))}
    return {found["Number"]: (found["Code"], commit) for commit, found in said.items()}


def results_of(project):
    """{(commit, seed, split): cause or value} of the runs that ended."""
    lines, found = project.folder / ".git" / "autoresearch" / "t.jsonl", {}
    for line in lines.read_text().splitlines() if lines.exists() else ():
        with contextlib.suppress(ValueError):
            event = json.loads(line)
            if "cause" in event:
                found[event["commit"], event["seed"], event["split"]] = event["cause"] or event["value"]
    return found


def session(project, before=None, seconds=None, experiments=1, devices=1):
    """Runs the loop, killed before an event (`git update-ref 2`, `any 40`) or after `seconds`: (its events' kinds, whether it was)."""
    log = project.folder.parent / "events"
    log.write_text("")
    extra = {"PYTHONPATH": str(project.folder.parent / "hook"), "PYTHONDONTWRITEBYTECODE": "1"}
    extra |= {"KILL_LOG": str(log), "KILL_BEFORE": before or "any 0"} | devices_of(devices)
    process = project.start(
        "--offline", "--budget", "20", "--tag", "t", "--experiments", experiments, **extra
    )
    try:
        out, err = process.communicate(timeout=seconds or 60)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
    assert process.returncode in (0, -signal.SIGKILL), f"exit {process.returncode}\n{out}\n{err}"
    return log.read_text().splitlines(), process.returncode != 0


def devices_of(number):
    """The environment in which the stand-in names so many devices."""
    return {"STAND_IN_DEVICES": str(number)} if number > 1 else {}


def killed_and_started_again(project, devices=1, **when):
    """(kind of the event before which it struck or None, problems): a session that is killed, then one that isn't."""
    before = rows_of(project)
    events, struck = session(project, devices=devices, **when)
    left, begun, results = rows_of(project), open_of(project), results_of(project)
    untouched = (
        project.read("notes.txt"),
        project.read("draft.txt"),
        project.git("diff", "--cached", "--name-only", "--", "notes.txt"),
    )
    try:
        again = project.offline("--experiments", 1, **devices_of(devices))
    except AssertionError as error:
        return events[-1] if struck else None, [f"the next start failed: {error}"]
    rows, found = rows_of(project), problems(project.folder, "t", PERSONS)
    if untouched != ("a staged change\n", "an untracked file\n", "notes.txt\n"):
        found.append(f"a person's files were touched by the killed loop: {untouched}")
    if (project.read("notes.txt"), project.read("draft.txt")) != untouched[:2]:
        found.append("a person's files were touched by the next start")
    for earlier, later in ((before, left), (left, rows)):
        if [cells[0] for cells in later[: len(earlier)]] != [cells[0] for cells in earlier]:
            found.append("a row was lost")
        if any(not new[RUNS].startswith(old[RUNS]) for old, new in zip(earlier, later, strict=False)):
            found.append("a row's run was lost")
    if len(rows) <= len(left):
        found.append(f"the next start added no row:\n{again}")
    said = [message_of(project, cells[0]) for cells in rows]
    codes = {message.get("Number"): message.get("Code") for message in said}
    for number, (code, commit) in begun.items():
        first = message_of(project, commit).get("Rebased", commit)  # it may be tried anew more than once
        if number not in codes:
            found.append(f"the experiment {number}, which was open, has no row")
        elif codes[number] != code and not any(first == message.get("Rebased") for message in said):
            found.append(f"the experiment {number}, which was open, has the row of another")
    later = results_of(project)
    if lost := [key for key, value in results.items() if later.get(key) != value]:
        found.append(f"runs that were made were lost: {lost}")
    return (
        re.sub(r"\d{4,}", "*", events[-1])
        if struck and not when.get("seconds")
        else "at random"
        if struck
        else None
    ), found


def edited_by_a_person(project, rng):
    project.write(
        "train.py",
        project.read("train.py").replace(
            "SECONDS = ", f"# {rng.random()}\nDROPOUT = {rng.random()}\nSECONDS = ", 1
        ),
    )


def kills(args):
    """Kills an offline night before evenly spread steps, then at random times; after each, a clean start must go on as if nothing was."""
    rng, table, bad, devices = random.Random(args.seed), Counter(), Counter(), dict(devices=args.devices)
    number, rows, started = 0, 0, time.monotonic()
    told = 0
    with tempfile.TemporaryDirectory() as folder:
        project = night(Path(folder) / "count")
        first, later = (len(session(project, experiments=n, **devices)[0]) for n in (2, 2))
        print(
            f"{first} steps in a night's first session of 2 experiments, {later} in the next one", flush=True
        )
        plan = []
        for part, most in ((args.kills // 4, first), (args.kills - args.kills // 4 - args.kills // 2, later)):
            plan.append([dict(before=f"any {1 + round(most * n / part)}") for n in range(part)])
        plan.append([dict(seconds=rng.uniform(0.05, 1.5)) for _ in range(args.kills // 2)])
        for kind, points in zip(("first", "later", "random"), plan, strict=True):
            rng.shuffle(points)
            for place, when in enumerate(points):
                if kind == "first" or place % 50 == 0:
                    rows += len(rows_of(project))
                    number += 1
                    project = night(Path(folder) / f"{number}")
                if kind != "first" and place % 4 == 3:
                    edited_by_a_person(project, rng)
                struck, found = killed_and_started_again(
                    project, experiments=8, **devices, **when
                )  # more than it lives for
                table[struck or "(it ended before)"] += 1
                bad[struck] += bool(found)
                if found:
                    told += 1
                    kept = tempfile.mkdtemp(prefix="killed-")
                    subprocess.run(["cp", "-a", project.folder.parent, kept])
                    print(
                        f"PROBLEMS: {struck}, {when} ({kind} {place}), kept in {kept}:",
                        *found,
                        sep="\n  ",
                        flush=True,
                    )
                    number += 1  # what is wrong once must not be counted again at each later kill
                    project = night(Path(folder) / f"{number}")
        rows += len(rows_of(project))
    print("killed before                     times  with problems")
    for kind, times in table.most_common():
        print(f"{kind:32}  {times:5}  {bad[kind]:13}")
    print(
        f"{sum(table.values())} kills, {rows} rows, {told} with problems, {time.monotonic() - started:.0f} s"
    )
