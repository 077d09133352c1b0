"""Measurements, each a sub-command; none is a test.

    python tests/bench.py baseline --budget 300 --seeds 3     the shipped train.py, run by run: val_bpb, mean and spread
    python tests/bench.py clock --budget 60 --runs 10         the same file on the same seed, again and again: how equal are they?
    python tests/bench.py pairs --budget 60 --seeds 5         four edits and the file, seed by seed: deviations with and without pairs
    python tests/bench.py judge                               the rule that keeps or discards, on thousands of simulated nights
    python tests/bench.py speed                               where the time goes, in a run and between runs: one table, 45 minutes
    python tests/bench.py overhead                            the loop's own seconds between runs and its memory, at 10 and 10,000 rows
    python tests/bench.py written --hours 0.25                a night with a model that sends the edits of tests/night/edits.py, and its audit
    python tests/bench.py kills --kills 200 --devices 3       the loop killed before its steps and at random: is anything lost?
    python tests/bench.py soak --experiments 1000             a night in which everything fails at random; --real --hours 2 with real runs

Writes only below a temporary folder. Numbers depend on what else the machine does: say which machine, and run them twice.
"""

import argparse
import contextlib
import json
import math
import os
import queue
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean

import faults
import soak
import speed
from conftest import ROOT, ChatServer, reply_of
from night.edits import EDITS as WRITTEN

import loop


def pace():
    """The machine's, as the loop would note it on a branch; empty on a GPU."""
    command = [sys.executable, "prepare.py", "--facts"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])["settings"].get("PACE", "")


def train(budget, seed, pace, work="", edit=("", ""), core=None):
    """A run of train.py, as the loop does it, with one text in it replaced by another: the ruler's summary."""
    source = (ROOT / "train.py").read_text()
    assert edit[0] in source, f"train.py holds no {edit[0]!r}"
    told = dict(BUDGET=budget, SEED=seed, PACE=pace, WORK=work, STARTED=time.monotonic())
    environment = os.environ | {f"AUTORESEARCH_{name}": str(value) for name, value in told.items()}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "train.py").write_text(source.replace(*edit, 1))
        shutil.copy(ROOT / "prepare.py", folder)
        command = [*on(core), sys.executable, "prepare.py", "--run"]
        # A session of its own, as in the loop: Linux shares a core between sessions.
        settings = dict(cwd=folder, env=environment, start_new_session=True)
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, **settings)
    return dict(re.findall(r"^(\w+): +(\S+)$", done.stdout.rpartition("---")[2], re.MULTILINE))


def on(core):
    """The start of a command that keeps to one core; of any, where there is none to keep to (a GPU, macOS)."""
    return [] if core is None else [sys.executable, "-c", PINNED, str(core)]


PINNED = "import os, sys; os.sched_setaffinity(0, {int(sys.argv[1])}); os.execv(sys.argv[2], sys.argv[2:])"


def cores_for(pace):
    """The cores that runs keep to, one each, on a CPU, which has a pace; one that is none on a GPU and on macOS."""
    return sorted(os.sched_getaffinity(0)) if pace and hasattr(os, "sched_getaffinity") else [None]


def at_once(pace, jobs):
    """Summaries of runs, given by train()'s arguments: on a CPU as many at a time as there are cores, each on its own."""
    cores = cores_for(pace)
    free = queue.SimpleQueue()
    for core in cores:
        free.put(core)

    def run(job):
        core = free.get()
        try:
            return train(**job, pace=pace, core=core)
        finally:
            free.put(core)

    with ThreadPoolExecutor(len(cores)) as pool:
        return list(pool.map(run, jobs))


def tokens_of(summary):
    return round(1e6 * float(summary["total_tokens_M"]))


def spread(values):
    """Mean and standard deviation, in words."""
    return f"mean {fmean(values):.5g}, standard deviation {statistics.stdev(values) if len(values) > 1 else 0:.2g}"


def baseline(args):
    """Runs train.py as it is, a seed after the other, and prints what the ruler says."""
    values, now = [], pace()
    for seed in range(args.seeds):
        summary = train(args.budget, seed, now)
        values.append(float(summary["val_bpb"]))
        print(f"seed {seed}  " + "  ".join(f"{key} {value}" for key, value in summary.items()), flush=True)
    print(f"val_bpb: {spread(values)}, {len(values)} seeds at {args.budget:g} s")


@contextlib.contextmanager
def busy(cores):
    """Beside processes that do nothing but wait in a loop, one on each of these cores."""
    loop_of = [sys.executable, "-c", "while True: pass"]
    others = [subprocess.Popen([*on(core), *loop_of], start_new_session=True) for core in cores]
    try:
        yield
    finally:
        for other in others:
            other.kill()


def clock(args):
    """Runs train.py on seed 0, on each core, in turns quiet and beside a busy loop on each core: how equal are they?

    As the loop compares an edit with its parent: all train on as many tokens as the clock gave the first one.
    """
    now = pace()
    cores = cores_for(now)
    job = dict(budget=args.budget, seed=0)
    if not args.alone:
        job["work"] = tokens_of(train(**job, pace=now, core=cores[-1]))
    found = {"quiet": [], "beside": []}
    while len(found["beside"]) < args.runs:
        for kind, summaries in found.items():
            with busy(cores) if kind == "beside" else contextlib.nullcontext():
                new = at_once(now, [job] * len(cores))
            summaries += new
            for summary in new:
                print(f"{kind:8}" + "  ".join(f"{key} {summary[key]}" for key in CLOCK_KEYS), flush=True)
    for kind, summaries in found.items():
        runs = [run for run in summaries if float(run["trained_percent"]) >= 98]
        print(f"{kind}: {len(runs)} of {len(summaries)} runs got all of their training")
        if runs:
            print(f"  tokens: {spread([tokens_of(run) for run in runs])}")
            print(f"  val_bpb: {spread([float(run['val_bpb']) for run in runs])}")


CLOCK_KEYS = "val_bpb", "total_tokens_M", "training_seconds", "total_seconds", "trained_percent"
EDITS = (  # of four kinds, all small: what a night mostly sees
    ("MUON_MEAN = 19.0", "MUON_MEAN = 13.0"),
    ("    embed_lr=0.3", "    embed_lr=0.22"),
    ("    head_lr=0.01", "    head_lr=0.008"),
    ("    matrix_lr=0.02,", "    matrix_lr=0.021,"),
)


def pairs(args):
    """Runs train.py and four edits of it on the same seeds: how much does the difference scatter, and how much a run?"""
    now, seeds = pace(), range(args.seeds)
    job = dict(budget=args.budget)
    job["work"] = tokens_of(
        at_once(now, [job | dict(seed=0)])[0]
    )  # as the loop does it: the baseline follows its tokens, too
    before = at_once(now, [job | dict(seed=seed) for seed in seeds])
    values = [float(summary["val_bpb"]) for summary in before]
    print(
        "train.py           " + " ".join(f"{value:.6f}" for value in values) + f"   {spread(values)}",
        flush=True,
    )
    for edit in EDITS:
        after = at_once(now, [job | dict(seed=seed, edit=edit) for seed in seeds])
        runs = [float(summary["val_bpb"]) for summary in after]
        print(
            f"{edit[1].strip(' ,'):18} " + " ".join(f"{run:.6f}" for run in runs) + f"   {spread(runs)}",
            flush=True,
        )
        differences = [run - value for run, value in zip(runs, values, strict=True)]
        print(
            f"{'difference':18} "
            + " ".join(f"{value:+.6f}" for value in differences)
            + f"   {spread(differences)}"
        )
        tokens = [tokens_of(one) / tokens_of(other) for one, other in zip(after, before, strict=True)]
        print(f"{'tokens':18} " + " ".join(f"x {share:.4f}" for share in tokens), flush=True)


# val_bpb of every experiment of a real night on an H100 (the original program, 125 rows), crashes left out, minus the best
# kept one before it: in millionths, the first four left out.
DELTAS = (
    -298, -934, -1185, -3260, 371, -795, -610, 784, -1015, 695, 1030, 720, 555, 6236, 73, -255, 536, 272, 281, 5464, 1641, 809, 857,
    227, 490, 270, -28, 3265, 979, 6886, 1045, -70, 1259, 1577, -85, 153, 7060, 2339, 2634, 775, 150, 2218, 411, 1945, 3768, 365,
    18, 1429, 1637, 288, 1961, 2591, 1496, 11025, 618, 1109, 479, 311, 3509, 394, -436, 463, -130, 897, 459, 648, 1719, 773, 1027,
    1027, 3662, 88, 1233, 749, 3836, 773, 367, 493, 1365, 7859, 1417, 1703, 2243721, 3724, 1295, 2186, 1918, 207, -31, 253, 634,
    903, 1626, 1946, 535, 647, -88, 429, -951, -403, -222, 211, 270, 179, 325, -481, 815, 807, 154, 1052, 88, 621, -266, 558, 28,
    449, 992, 526, 171, 600,
)  # fmt: skip


def written(args):
    """A night of real runs with a model that sends, over HTTP, edits written beforehand, and the search beside it; then its audit."""
    server, left, one_at_a_time = ChatServer(), list(WRITTEN), threading.Lock()

    def reply(request):
        source = soak.source_in(request)
        with one_at_a_time:
            for idea, reason, blocks in left:
                if all(source.count(before) == 1 for before, _ in blocks):
                    left.remove((idea, reason, blocks))
                    return reply_of(idea, reason, *blocks)
        return 503, {"error": {"message": "no edit is left that fits this file"}}

    server.default = reply
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        project = soak.Clone(Path(folder))
        environment = project.environment | {"OPENAI_BASE_URL": server.url}
        start = [sys.executable, "loop.py", "--tag", "written", "--sandbox", args.sandbox]
        for words in (["--budget", f"{args.budget:g}", "--hours", f"{args.hours:g}"], ["--audit"]):
            subprocess.run([*start, *words], cwd=project.folder, env=environment, check=True)
        print((project.folder / "results.tsv").read_text(), end="")
    print(
        f"{len(WRITTEN) - len(left)} of {len(WRITTEN)} edits were sent; {'; '.join(idea for idea, *_ in left)}"
    )


EFFECTS = [delta / 1e6 for delta in DELTAS]
NOISES = (0.0003, 0.0007, 0.0015)  # deviations of a run over seeds, bits per byte
RUNS = 100  # of a night, the baseline's and those that a parent needs on further seeds among them
STRICT_NIGHTS = 10  # times as many as of the other rules
GOALS = (1.25, 2.1, 5.5)  # times strict's true gain, where a fifth of a run's noise is its own


def strict(differences, noise, size, spread):
    """What most loops do: one run, and lower is better."""
    return "keep" if differences[0] > 0 else "discard"


def draw_nights(count, seed):
    """The chances of each night: its seeds', and each experiment's edit and runs."""
    rng = random.Random(seed)

    def chances():
        return [rng.gauss() for _ in range(loop.MAX_RUNS)]

    for _ in range(count):
        yield chances(), [(rng.random(), chances()) for _ in range(RUNS)]


def simulate(
    chances,
    rule,
    noise,
    share,
    stays=False,
    prior=1.0,
    effects=EFFECTS,
    size=0.0,
    bad_run=0.0,
    bad_parent=0.0,
):
    """One night; a run is its file's true value + what its seed does to all + what is particular to this run.

    noise: deviation of a run; share: the particular part's of it; stays: that part is the edit's, and every
    file built on it inherits it (else each file has its own); prior: the ruler's, in true deviations of a
    difference; size: share that each edit adds; bad_run, bad_parent: added to one's second run.
    """
    of_seeds, experiments = chances
    particular = share * noise
    common = math.sqrt(noise**2 - particular**2)
    pair = deviation_of_pair(noise, share, stays)

    def runs_of(truth, own):
        return [truth + common * a + particular * b for a, b in zip(of_seeds, own, strict=True)]

    own = [0.0] * loop.MAX_RUNS if stays else experiments[0][1]
    truth, parent, made, used = 0.0, runs_of(0.0, own), 1, 1
    pairs, runs, deviation = [], [], prior * pair
    changes, rows, false, tried = [], [loop.Row("", 0, 0, "keep", "", runs=parent[:1])], 0, 0
    while used < RUNS:
        tried += 1
        place, chance = experiments[tried]
        effect = effects[int(place * len(effects))]
        inherited = [a + b for a, b in zip(own, chance, strict=True)] if stays else chance
        candidate, differences, verdict = runs_of(truth + effect, inherited), [], "again"
        if bad_parent and tried >= 20 and made == 1:  # before its second run is made
            parent[1], bad_parent = parent[1] + bad_parent, 0
        while verdict == "again":
            seed = len(differences)
            used += 1 + (seed >= made)  # the parent's run on this seed, where it has none
            if used > RUNS:
                break
            made = max(made, seed + 1)
            rows[-1].runs = parent[:made]
            if bad_run and tried >= 20 and seed == 1:
                candidate[1], bad_run = candidate[1] + bad_run, 0
            differences.append(parent[seed] - candidate[seed])
            if seed == 1:
                pairs.append(differences)
            if seed:
                deviation = loop.noise_of(pairs, prior * pair)
            over_seeds = loop.noise_of(runs, loop.PRIOR_OVER_SEEDS * deviation)
            luck = loop.luck_of(parent[: seed + 1], parent[:made], deviation, over_seeds)
            gains = [difference - luck for difference in differences]
            verdict = rule(gains, deviation, size, loop.spread_of(changes, deviation))
        if verdict != "again":
            changes.append(-loop.effect_of(gains, deviation))
            runs.append(candidate[: len(gains)])
        if verdict == "keep":
            change = changes[-1], deviation / math.sqrt(len(differences))
            rows.append(loop.Row("", 0, 0, "keep", "", *change, candidate[: len(differences)]))
            truth, parent, own, made = truth + effect, candidate, inherited, len(differences)
            false += effect >= 0
    reported, error = loop.night_gain(rows, 1)
    measured = -sum(row.change for row in rows[1:])
    learned = deviation / pair
    return -truth, measured, reported, error, false, len(rows) - 1, tried, learned


def deviation_of_pair(noise, share, stays=False):
    """The deviation of a difference: two files' own parts, or the one that the edit brings."""
    return share * noise * (1 if stays else math.sqrt(2))


def mean_night(nights, *args, **kwargs):
    """Means over the nights of what simulate() returns, by name."""
    columns = zip(*[simulate(chances, *args, **kwargs) for chances in nights], strict=True)
    names = ("true", "measured", "reported", "error", "false", "keeps", "tried", "learned")
    return argparse.Namespace(**dict(zip(names, map(fmean, columns), strict=True)))


def judge(args):
    """Nights of 100 runs, with true effects drawn from a real night's and the same chances for every rule."""
    nights, many = [*draw_nights(args.nights, args.seed)], STRICT_NIGHTS * args.nights
    print(f"{args.nights} nights of {RUNS} runs each; a run: true value + its seed's to all + its own.")
    print(f"strict: {many} nights, as luck is most of what it gains where the noise is large")
    print("fresh: the own part is each file's; stays: each edit's, inherited by what is built on it")
    baselines = {noise: mean_night(draw_nights(many, args.seed), strict, noise, 1) for noise in NOISES}
    show_gains(nights, baselines)
    show_priors(nights, baselines)
    show_bad_runs(nights)
    show_no_effect(nights)
    show_simpler(nights)
    show_frontier(nights, baselines)


def show_gains(nights, baselines):
    print(f"\ngoals at a fifth: {GOALS} x strict, false keeps at most 0.25 x, reported within 10 % of true;")
    print("unpaired, the rule that this one replaced (a seed for each run): 0.90, 1.06, 1.68 x strict")
    print("                          true gain         false keeps        measured  reported")
    print("noise   particular        bpb  x strict  a night  x strict   x true    x true  keeps  experiments")
    for noise in NOISES:
        one = baselines[noise]
        print(gain_line(noise, "strict", one, one))
        for stays, shares in ((False, (0.1, 0.2, 1 / 3, 1)), (True, (0.1, 0.2, 1 / 3))):
            for share in shares:
                kind = "unpaired" if share == 1 else f"{share:.2f} {'stays' if stays else 'fresh'}"
                ours = mean_night(nights, loop.judge, noise, share, stays)
                print(gain_line(noise, kind, ours, one), flush=True)


def gain_line(noise, kind, night, one):
    gain = f"{night.true:.5f} {night.true / one.true:9.2f}"
    false = f"{night.false:8.2f} {night.false / one.false:9.2f}"
    reported = f"{'':8}" if kind == "strict" else f"{night.reported / night.true:8.2f}"
    claims = f"{night.measured / night.true:9.2f}  {reported}"
    return f"{noise:.4f}  {kind:13} {gain} {false} {claims} {night.keeps:6.1f} {night.tried:12.0f}"


def show_priors(nights, baselines):
    print("\nthe ruler's prior is wrong (a fifth, fresh), at the three noises: true gain and false keeps")
    print("x strict, and the noise known at the end x true")
    for prior in (1 / 3, 1, 3):
        cells = []
        for noise in NOISES:
            ours, one = mean_night(nights, loop.judge, noise, 0.2, prior=prior), baselines[noise]
            cells.append(f"{ours.true / one.true:.2f} {ours.false / one.false:.2f} {ours.learned:.2f}")
        print(f"  {prior:4.2f} times the true one:   " + "    ".join(cells), flush=True)


def show_bad_runs(nights):
    print("\none bad run a night (0.0007, a fifth, fresh): true gain, reported, noise known at the end")
    for size in (0, -0.05):
        for worse in (0, 0.1, 0.3):
            cells = []
            for kind in ("bad_run", "bad_parent"):
                ours = mean_night(nights, loop.judge, 0.0007, 0.2, size=size, **{kind: worse})
                cells.append(f"{ours.true:.5f} {ours.reported:.5f} {ours.learned:.2f}")
            line = f"  edits add {size:3.0%}, worse by {worse:3}:"
            print(f"{line}  a candidate's {cells[0]}   a parent's {cells[1]}", flush=True)


def show_no_effect(nights):
    print("\nedits without effect (0.0007, a fifth): kept, share of experiments, measured and reported gain")
    for size in (0, 0.05, -0.01, -0.03, -0.1):
        cells = []
        for stays in (False, True):
            ours = mean_night(nights, loop.judge, 0.0007, 0.2, stays, effects=[0], size=size)
            share = ours.keeps / ours.tried
            gain = f"{ours.measured:8.5f} {ours.reported:8.5f} +-{ours.error:.5f}"
            cells.append(f"{ours.keeps:5.2f} {share:3.0%} {gain}")
        print(f"  each adds {size:4.0%}:   fresh {cells[0]}    stays {cells[1]}", flush=True)
    one = mean_night(nights, strict, 0.0007, 1, effects=[0])
    print(f"  strict:           {one.keeps:5.2f} {one.keeps / one.tried:4.0%} {one.measured:8.5f}")


def show_simpler(nights):
    print("\neach edit takes out 5 % and is worse by so many noises of a difference (0.0007, a fifth): kept,")
    print("then the night's end in such noises and in bpb (positive is worse)")
    for worse in (0, 0.1, 0.3, 1, 3):
        cells = []
        for stays in (False, True):
            pair = deviation_of_pair(0.0007, 0.2, stays)
            ours = mean_night(nights, loop.judge, 0.0007, 0.2, stays, effects=[worse * pair], size=-0.05)
            cells.append(f"{ours.keeps:5.2f} {-ours.true / pair:5.2f} {-ours.true:8.5f}")
        print(f"  worse by {worse:3}:   fresh {cells[0]}    stays {cells[1]}", flush=True)


def show_frontier(nights, baselines):
    print("\nother limits (fresh): true gain x strict at the three noises, most false keeps x strict")
    chosen = loop.LIMIT
    for loop.LIMIT in (0.6, 0.75, 0.9, 1.05, 1.2):
        cells = []
        for share in (0.2, 1):
            ours = {noise: mean_night(nights, loop.judge, noise, share) for noise in NOISES}
            gains = " ".join(f"{ours[noise].true / baselines[noise].true:5.2f}" for noise in NOISES)
            most = max(ours[noise].false / baselines[noise].false for noise in NOISES)
            cells.append(f"{gains}, {most:.2f}")
        print(f"  LIMIT {loop.LIMIT}:  a fifth {cells[0]}   unpaired {cells[1]}", flush=True)
    loop.LIMIT = chosen


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("baseline", help=baseline.__doc__)
    command.add_argument("--budget", type=float, default=300)
    command.add_argument("--seeds", type=int, default=3)
    command.set_defaults(run=baseline)
    command = commands.add_parser("clock", help=clock.__doc__)
    command.add_argument("--budget", type=float, default=60)
    command.add_argument("--runs", type=int, default=10)
    command.add_argument(
        "--alone", action="store_true", help="each by the clock alone, none by the tokens of the first"
    )
    command.set_defaults(run=clock)
    command = commands.add_parser("pairs", help=pairs.__doc__)
    command.add_argument("--budget", type=float, default=60)
    command.add_argument("--seeds", type=int, default=5)
    command.set_defaults(run=pairs)
    command = commands.add_parser("judge", help=judge.__doc__)
    command.add_argument("--nights", type=int, default=1500)
    command.add_argument("--seed", type=int, default=0)
    command.set_defaults(run=judge)
    command = commands.add_parser("overhead", help=speed.overhead.__doc__)
    command.add_argument("--cycles", type=int, default=20)
    command.set_defaults(run=speed.overhead)
    command = commands.add_parser("speed", help=speed.speed.__doc__)
    command.add_argument("--budget", type=float, default=300, help="seconds of a real run")
    command.add_argument("--runs", type=int, default=3, help="real runs in the loop")
    command.add_argument(
        "--cycles", type=int, default=20, help="runs that end at once, for the loop's own seconds"
    )
    command.add_argument(
        "--devices", type=int, default=8, help="stand-in devices that a model has to keep busy"
    )
    command.add_argument("--run", type=float, default=10, help="seconds of a run there", dest="run_seconds")
    command.add_argument("--experiments", type=int, default=80, help="runs there")
    command.set_defaults(run=speed.speed)
    command = commands.add_parser("written", help=written.__doc__)
    command.add_argument("--budget", type=float, default=60)
    command.add_argument("--hours", type=float, default=0.25)
    command.add_argument("--sandbox", default="auto")
    command.set_defaults(run=written)
    command = commands.add_parser("kills", help=faults.kills.__doc__)
    command.add_argument("--kills", type=int, default=200)
    command.add_argument("--devices", type=int, default=1)
    command.add_argument("--seed", type=int, default=0)
    command.set_defaults(run=faults.kills)
    command = commands.add_parser("soak", help=soak.soak.__doc__)
    command.add_argument("--experiments", type=int)
    command.add_argument("--devices", type=int, default=1)
    command.add_argument("--hours", type=float)
    command.add_argument("--budget", type=float)
    command.add_argument("--real", action="store_true")
    command.add_argument("--sandbox", default="auto")
    command.add_argument("--seed", type=int, default=0)
    command.set_defaults(run=soak.soak)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
