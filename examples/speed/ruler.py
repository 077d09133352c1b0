"""The ruler of a speed-up: the CPU time of pairs_within() in neighbours.py, as a share of a plain loop's.

    PYTHONPATH=../.. python ruler.py     one run by hand; python ../../loop.py makes a night of it

Each repetition has points that nobody has seen. Both functions get a copy of them, in turns, and must find
the same pairs. Of each kind of points the median quotient counts: other work on the machine slows both down.
"""

from math import prod
from statistics import median
from time import process_time

from prepare import Ruler, refuse

KINDS, REPETITIONS = ("square", "line", "clusters"), 25
POINTS = {"val": 400, "test": 600}  # the audit has other points, and more of them
IMPORTS = "math bisect heapq itertools collections functools operator array"
API = f"""The file must keep pairs_within(points, radius): the list of all pairs (i, j), i < j, of the points,
a list of tuples (x, y) of floats, whose distance is less than the radius, in any order. Metric: its CPU time
as a share of that of a plain loop over all pairs, on sets of about 400 points, each of which it sees once.
Any other answer than the loop's is a crash. It may import {IMPORTS.replace(" ", ", ")}, and nothing else."""


def plain(points, radius):
    """What is right, and what is waited for otherwise."""
    found, squared = [], radius * radius
    for i, (x, y) in enumerate(points):
        for j in range(i + 1, len(points)):
            if (points[j][0] - x) ** 2 + (points[j][1] - y) ** 2 < squared:
                found.append((i, j))
    return found


def draw(rng, count, kind):
    """Points all over the square, along a line or in clusters, and a radius within which a few others lie."""
    points = rng.random((count, 1 if kind == "line" else 2)) + rng.normal(0, 0.01, (count, 2))
    if kind == "clusters":
        points = rng.random((12, 2))[rng.integers(12, size=count)] + rng.normal(0, 0.04, (count, 2))
    return [(float(x), float(y)) for x, y in points], float(rng.uniform(0.02, 0.04))


def timed(function, points, radius):
    points = list(points)  # a copy: what one does to it is not the other's
    began = process_time()
    found = function(points, radius)
    return process_time() - began, found


def quotient(function, points):
    (usual, right), (seconds, found) = (timed(one, *points) for one in (plain, function))
    if type(found) is not list or not {type(part) for pair in found for part in (pair, *pair)} <= {
        tuple,
        int,
    }:
        refuse("the answer is no list of tuples of two whole numbers")
    if sorted(found) != right:
        refuse(f"{len({*found} ^ {*right})} of {len(right)} pairs are wrong, missing or too many")
    return seconds / usual


def measure(trial):
    sets = {kind: [draw(trial.rng, POINTS[trial.split], kind) for _ in range(REPETITIONS)] for kind in KINDS}
    function = trial.load().pairs_within
    return prod(median(quotient(function, points) for points in sets[kind]) for kind in KINDS) ** (1 / 3)


if __name__ == "__main__":
    own = dict(metric="time_share", better="lower", edits="neighbours.py")
    Ruler(measure, **own, api=API, noise=0.003, imports=IMPORTS).main()
