"""The ruler of a speed-up: the CPU time of pairs_within() in neighbours.py, as a share of the plain loop's below.

    PYTHONPATH=../.. python ruler.py     one run by hand; python ../../loop.py makes a night of it

Each repetition has points that nobody has seen. Both get a copy of them, in turns, and must find the same pairs; the
median of the quotients counts. CPU time, so that other work on the machine moves it little.
"""

import gc
from statistics import median
from time import process_time

from prepare import Ruler, refuse

REPETITIONS = 24  # each kind of points comes eight times
POINTS = {"val": 700, "test": 1000}  # the audit has more of them, and others
IMPORTS = "math bisect heapq itertools collections functools operator array"
API = f"""The file must keep pairs_within(points, radius): the list of all pairs (i, j), i < j, of the points, a list of
tuples (x, y) of floats, whose distance is less than the radius, in any order. Metric: its CPU time as a share of that of
a plain loop over all pairs, the median over {REPETITIONS} sets of about 700 points that it hasn't seen, and sees once.
Any other answer than the loop's is a crash. It may import {IMPORTS}, and nothing else."""


def plain(points, radius):
    """What is right, and what is waited for otherwise."""
    found, squared = [], radius * radius
    for i, (x, y) in enumerate(points):
        for j in range(i + 1, len(points)):
            if (points[j][0] - x) ** 2 + (points[j][1] - y) ** 2 < squared:
                found.append((i, j))
    return found


def draw(rng, count, kind):
    """Points all over the square, in clusters, or along a line; and a radius within which a few others lie."""
    spread = {
        "square": rng.random((count, 2)),
        "line": rng.normal(0, 0.01, (count, 2)) + rng.random((count, 1)),
    }
    spread["clusters"] = rng.random((12, 2))[rng.integers(12, size=count)] + rng.normal(0, 0.04, (count, 2))
    return [(float(x), float(y)) for x, y in spread[kind]], float(rng.uniform(0.02, 0.04))


def timed(function, points, radius):
    points = list(points)  # a copy: what one does to it is not the other's
    gc.collect()
    began = process_time()
    found = function(points, radius)
    return process_time() - began, found


def measure(trial):
    sets = [
        draw(trial.rng, POINTS[trial.split], kind)
        for kind in ("square", "line", "clusters") * (REPETITIONS // 3)
    ]
    mine, shares = trial.load().pairs_within, []
    for points in sets:
        (usual, right), (seconds, found) = (timed(function, *points) for function in (plain, mine))
        if type(found) is not list or not {type(n) for pair in found for n in (pair, *pair)} <= {tuple, int}:
            refuse("the answer is no list of tuples of two whole numbers")
        if sorted(found) != right:
            refuse(f"{len({*found} ^ {*right})} of {len(right)} pairs are wrong, missing or too many")
        shares.append(seconds / usual)
    return median(shares)


if __name__ == "__main__":
    Ruler(
        measure,
        metric="time_share",
        better="lower",
        edits="neighbours.py",
        api=API,
        noise=0.005,
        imports=IMPORTS,
    ).main()
