"""An independent reader of a night: git and the standard library only, so that it shares no mistake with loop.py.

    python tests/check_night.py [FOLDER [TAG]]     counts, and every broken promise; exit 1 if there is one

Reads a checkout whose loop is stopped (default: here, and the branch checked out); writes nothing. It knows
nights of train.py, by val_bpb, and no other ruler's.
"""

import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from statistics import fmean

COLUMNS = "commit val_bpb memory_gb status description change runs llm_tokens finished".split()
HEADER = "\t".join(COLUMNS).encode() + b"\n"


class Repository:
    """Reads objects of a checkout's repository, all by one git process."""

    def __init__(self, folder):
        self.folder = Path(folder).resolve()
        self.prefix = self("rev-parse", "--show-prefix").strip()
        self.batch = subprocess.Popen(
            ["git", "cat-file", "--batch"], cwd=self.folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def __call__(self, *args):
        done = subprocess.run(["git", "--no-optional-locks", *args], cwd=self.folder, capture_output=True)
        return (done.stdout + (done.stderr if done.returncode else b"")).decode("utf-8", "replace")

    def object(self, name):
        """The bytes of an object, or None."""
        self.batch.stdin.write(name.encode() + b"\n")
        self.batch.stdin.flush()
        head = self.batch.stdout.readline().split()
        return (
            None if len(head) < 3 or not head[2].isdigit() else self.batch.stdout.read(int(head[2]) + 1)[:-1]
        )

    def file(self, commit, name):
        return self.object(f"{commit}:{self.prefix}{name}")

    def close(self):
        self.batch.stdin.close()
        self.batch.wait()


def trailers(message):
    return dict(
        line.split(": ", 1) for line in message.strip().rpartition("\n\n")[2].splitlines() if ": " in line
    )


def first_parents(git, ref):
    """[(hash, parents, subject)] of a branch, the oldest first, from the last commit that holds no row yet."""
    log = git("log", "--first-parent", "--format=%H%x09%P%x09%s", ref).splitlines()
    found = []
    for line in log:
        commit, parents, subject = line.split("\t", 2)
        found.append((commit, parents.split(), subject))
        if git.file(commit, "results.tsv") in (HEADER, None):
            break
    return found[::-1]


def extended(before, now, *edited):
    """Problems of the lines that were there: they stay, but the rows of the files that were edited may gain runs."""
    for old, new in zip(before.splitlines(), now.splitlines(), strict=False):
        if old == new:
            continue
        old, new = old.decode().split("\t"), new.decode().split("\t")
        runs = COLUMNS.index("runs")
        if old[:runs] + old[runs + 1 :] != new[:runs] + new[runs + 1 :]:
            yield f"it changed more than runs of the row {old[0]}"
        elif not any(commit.startswith(old[0]) for commit in edited):
            yield f"it added runs to the row {old[0]}, and not to those of {edited}"
        elif not re.fullmatch(re.escape(old[runs]) + r"(,[\d.]+)+", new[runs]):
            yield f"runs of the row {old[0]} went from {old[runs]} to {new[runs]}"


def of_an_outcome(git, before, now, commit, parents, subject, best, chain):
    """Problems of a commit that adds a row; `best` is (hash, train.py) of what was to be beaten, hash empty at first."""
    if len(parents) != 2:
        yield f"{len(parents)} parents"
        return
    lines = now.splitlines(keepends=True)
    if len(lines) != before.count(b"\n") + 1 or not now.endswith(b"\n"):
        yield "results.tsv didn't gain exactly one line at its end"
        return
    cells = lines[-1].decode("utf-8", "replace").rstrip("\n").split("\t")
    if len(cells) != len(COLUMNS):
        yield f"its row has {len(cells)} columns"
        return
    row = dict(zip(COLUMNS, cells, strict=True))
    experiment = parents[1]
    if len(row["commit"]) < 7 or not experiment.startswith(row["commit"]):
        yield f"its row names {row['commit']} and its second parent is {experiment}"
    if row["status"] != subject.partition(":")[0]:
        yield f"its row says {row['status']}"
    expected = git.file(experiment, "train.py") if row["status"] == "keep" else best[1]
    if git.file(commit, "train.py") != expected:
        yield "its train.py is not " + ("the experiment's" if row["status"] == "keep" else "the best one's")
    head, _, message = git.object(experiment).decode("utf-8", "replace").partition("\n\n")
    if not set(re.findall(r"^parent (\w+)", head, re.MULTILINE)) <= chain:
        yield "its experiment doesn't stand on the branch"
    named = trailers(message)
    if "[refused: " not in row["description"] and not named.get("Code"):
        yield "its experiment ran and has no Code"
    edited = named.get("Parent", "")
    if bool(edited) != bool(best[0]):
        yield f"its experiment edited {edited or 'nothing'}, and the best one was {best[0] or 'none'}"
    if row["status"] == "keep" and edited != best[0]:
        yield f"it is kept as an edit of {edited[:7]}, and the best one was {best[0][:7]}"
    yield from extended(before, now, edited)


def runs_of(row):
    return [float(run) for run in row["runs"].split(",") if run]


def of_a_row(number, cells, parent):
    """Problems of a row; `parent` is the row of the file that it edited."""
    if len(cells) != len(COLUMNS):
        yield f"row {number} has {len(cells)} columns"
        return
    row = dict(zip(COLUMNS, cells, strict=True))
    try:
        bpb, runs = float(row["val_bpb"]), runs_of(row)
        float(row["memory_gb"]), int(row["llm_tokens"])
    except ValueError as error:
        yield f"row {number}: {error}"
        return
    if row["status"] not in ("keep", "discard", "crash"):
        yield f"row {number} has the status {row['status']!r}"
    elif row["status"] == "crash":
        if runs or row["change"] or not math.isnan(bpb):
            yield f"row {number} crashed, and has val_bpb {bpb}, change {row['change']!r} and runs {row['runs']!r}"
    elif not runs:
        yield f"row {number} has no runs"
    elif parent is None:
        if row["change"] or bpb != runs[0]:
            yield f"row {number}, the baseline, has val_bpb {bpb}, change {row['change']!r} and runs {row['runs']!r}"
    else:
        yield from of_a_change(number, row, parent)
    if not re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", row["finished"]):
        yield f"row {number} finished at {row['finished']!r}"


def of_a_change(number, row, parent):
    """Problems of what a row says of its effect: the mean difference to its parent's runs on the same seeds, of which none counts as
    a gain of more than three noises above the lowest; or to all runs that the parent had then, or between the two."""
    before, runs, after = runs_of(parent), runs_of(row), float(row["val_bpb"])
    if len(before) < len(runs):
        yield f"row {number} has {len(runs)} runs, and row {parent['commit']}, which it edited, {len(before)}"
        return
    change = after - float(parent["val_bpb"])
    match = re.fullmatch(r"([+-]\d+\.(\d{4}|\d{6}))\+-(\d+\.\d{4,6})", row["change"])
    last = 10 ** -len(match[2]) if match else 0  # what the last digit is worth
    if not match or not abs(float(match[1]) - change) <= 0.5 * last + 2e-6:
        yield f"row {number} has the change {row['change']!r}, and its val_bpb is its parent's plus {change:.6f}"
        return
    gains = [its - run for its, run in zip(before, runs, strict=False)]
    errors = (float(match[3]) + rounded * last for rounded in (-0.5, 0.5))
    most = [min(gains) + 3 * error * len(runs) ** 0.5 for error in errors]
    low, high = (-fmean(min(gain, limit) for gain in gains) for limit in reversed(most))
    shared = fmean(before[: len(runs)])
    luck = [shared - fmean(before[:had]) for had in range(len(runs), len(before) + 1)]  # the first is 0
    if not low + min(luck) - 2.001e-6 <= change <= high + max(luck) + 2.001e-6:
        yield f"row {number} has the change {change:.6f}, and its runs differ from its parent's by {[-gain for gain in gains]}"


def of_the_checkout(git, ref, tip, others):
    if git("symbolic-ref", "--quiet", "HEAD").strip() != ref:
        return
    if dirty := [line for line in git("status", "--porcelain").splitlines() if line[3:] not in others]:
        yield f"git status is not clean: {dirty[:5]}"
    for name in ("results.tsv", "train.py"):
        path = git.folder / name
        if name not in others and (path.read_bytes() if path.exists() else None) != git.file(tip, name):
            yield f"{name} of the checkout is not the branch's"
    for path in (*git.folder.glob(".*.new"), *git.folder.glob("runs/check-*")):
        yield f"left over: {path.relative_to(git.folder)}"


def survivors(folder):
    """[(pid, command)] of live processes that runs of this checkout started: by their environment or their working folder."""
    runs, found = Path(folder).resolve() / "runs", []
    mark = f"AUTORESEARCH_RUNS={runs}".encode()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            here = os.readlink(process / "cwd").removesuffix(" (deleted)")
            marked = mark in (process / "environ").read_bytes().split(b"\0")
            if marked or here.startswith(f"{runs}/"):
                command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
                found.append((int(process.name), command.strip()))
        except OSError:  # it ended meanwhile, or is somebody else's
            continue
    return found


def of_the_run_folders(git):
    """Each folder of runs/ is of an experiment of its number, and holds runs and perhaps a compile cache."""
    for path in sorted(git.folder.glob("runs/[0-9]*")):
        if not (match := re.fullmatch(r"(\d{4,})-([0-9a-f]{7,})", path.name)):
            yield f"runs/{path.name} is no experiment's folder"
            continue
        message = (git.object(match[2]) or b"").decode("utf-8", "replace")
        if trailers(message).get("Number") != f"{int(match[1])}":
            yield f"runs/{path.name} is of no experiment with this number"
        for run in path.iterdir():
            if not re.fullmatch(r"\d+|warm-0|test-\d+|cache", run.name):
                yield f"runs/{path.name}/{run.name} is no run's folder"


def runs_on_file(git, tag):
    """(problems, {(commit, seed, split): result}) of the file of runs."""
    found, results = [], {}
    path = Path(
        git("rev-parse", "--absolute-git-dir").strip(), "autoresearch", tag.replace("/", "--") + ".jsonl"
    )
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            event = json.loads(line)
        except ValueError:
            continue  # half a line, of a loop that was killed as it wrote
        key = event["commit"], event["seed"], event["split"]
        if "cause" in event and key in results:
            found.append(f"{key[0][:7]} ran twice on seed {key[1]} ({key[2]})")
        if "cause" in event:
            results[key] = event
    return found, results


def of_the_open(git, tag, ended, numbers):
    """Problems of the refs to what is open: each of an experiment of its number, which has no row."""
    for line in git(
        "for-each-ref", "--format=%(refname) %(objectname)", f"refs/autoresearch/{tag}/"
    ).splitlines():
        ref, commit = line.split()
        number = trailers(git.object(commit).decode("utf-8", "replace")).get("Number")
        if commit in ended or number in numbers:
            yield f"{commit[:7]} is still noted as open, and has its row"
        if ref != f"refs/autoresearch/{tag}/open/{number}":
            yield f"{ref} is of the experiment {number}"


def check(folder, tag, others=()):
    """(counts, problems) of a night; `others` are a person's files, whose changes are not the loop's matter."""
    git, ref, found, counts = Repository(folder), f"refs/heads/autoresearch/{tag}", [], Counter()
    try:
        chain = first_parents(git, ref)
        if not chain or (git.object(chain[-1][0]) is None):
            return counts, [f"there is no branch autoresearch/{tag}"]
        start, named, births, seen = chain[0][0], [], [], {chain[0][0]}
        before, best = git.file(start, "results.tsv") or HEADER, ("", git.file(start, "train.py"))
        if before != HEADER:
            found.append("the branch has no commit that holds just the header")
        for commit, parents, subject in chain[1:]:
            now, word = git.file(commit, "results.tsv") or b"", subject.partition(":")[0]
            outcome = word in ("keep", "discard", "crash")
            if outcome:
                told = of_an_outcome(git, before, now, commit, parents, subject, best, seen)
                found += [f"{commit[:7]} ({subject[:60]}): {text}" for text in told]
                named.append(parents[-1])
                births.append(now.decode("utf-8", "replace"))
            if word == "runs":  # of the baseline and the best file, as a night ends
                told = extended(before, now, named[0], best[0])
                found += [f"{commit[:7]} ({subject[:60]}): {text}" for text in told]
            if word == "keep":
                best = parents[-1], git.file(commit, "train.py")
            counts["outcomes" if outcome else "ends" if word == "runs" else "by a person"] += 1
            before = now
            seen.add(commit)
        rows = [line.split("\t") for line in before.decode("utf-8", "replace").splitlines()[1:]]
        counts += Counter(
            rows=len(rows),
            commits=len(chain),
            **Counter(f"{cells[3]}s".replace("hs", "hes") for cells in rows),
        )
        if len(rows) != len(named):
            found.append(f"{len(rows)} rows, and {len(named)} commits that each added one")
        says = {commit: trailers(git.object(commit).decode("utf-8", "replace")) for commit in named}
        told, results = runs_on_file(git, tag)
        found += told
        for number, (commit, born) in enumerate(zip(named, births, strict=True)):
            edited = says[commit].get("Parent", "")
            lines = [dict(zip(COLUMNS, line.split("\t"), strict=False)) for line in born.splitlines()[1:]]
            parent = next((row for row in lines if edited.startswith(row["commit"])), None)
            found += of_a_row(number, born.splitlines()[-1].split("\t"), parent)  # as it was judged
        for number, (commit, cells) in enumerate(zip(named, rows, strict=False)):
            row = dict(zip(COLUMNS, cells, strict=False))
            for seed, run in enumerate(row.get("runs", "").split(",")):
                value = results.get((commit, seed, "val"), {}).get("value")
                if run and value is not None and f"{value:.6f}" != run:
                    found.append(f"row {number} has {run} on seed {seed}, and the run had {value}")
        numbers = [said.get("Number") for said in says.values()]
        if double := [number for number, times in Counter(numbers).items() if times > 1]:
            found.append(f"experiments with two rows: {double}")
        if len({*named}) < len(named):
            found.append("rows that name the same commit")
        found += of_the_open(git, tag, named, numbers)
        found += of_the_checkout(git, ref, chain[-1][0], others)
        found += [f"still alive: process {pid}, {command[:80]}" for pid, command in survivors(git.folder)]
        found += of_the_run_folders(git)
        wrong = subprocess.run(
            ["git", "fsck", "--no-dangling", "--no-progress"], cwd=git.folder, capture_output=True, text=True
        )
        found += [f"git fsck: {line}" for line in (wrong.stdout + wrong.stderr).splitlines()]
        return counts, found
    finally:
        git.close()


def problems(folder, tag, others=()):
    """Every broken promise of a night, a sentence each; an empty list is a night to believe."""
    return check(folder, tag, others)[1]


def main():
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
    if not (folder / "train.py").is_file():
        sys.exit(__doc__)
    tag = (
        sys.argv[2]
        if len(sys.argv) > 2
        else Repository(folder)("symbolic-ref", "--short", "HEAD").strip().removeprefix("autoresearch/")
    )
    counts, found = check(folder, tag)
    print(f"autoresearch/{tag}: " + ", ".join(f"{number} {name}" for name, number in counts.items()))
    print(*found or ["no problems"], sep="\n")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
