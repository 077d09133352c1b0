"""All pairs of points that are nearer to each other than a radius, by a grid of cells, each of which looks at
those around it. Collisions in games, atoms in molecules and crowds need this at every step.
"""

from math import floor, sqrt

CELL = 3.0  # width of a cell, in radiuses
FEW = 20  # so many points are compared each with each


def pairs_within(points, radius):
    """[(i, j), ...] with i < j of the points (x, y) whose distance is less than the radius, in any order."""
    if len(points) <= FEW:
        return compared(points, range(len(points)), range(len(points)), radius)
    cells, found = {}, []
    for number, point in enumerate(points):
        cells.setdefault(cell_of(point, radius), []).append(number)
    for cell in cells:
        for other in around(cell):
            if other in cells:
                found += compared(points, cells[cell], cells[other], radius)
    return found


def cell_of(point, radius):
    return floor(point[0] / (CELL * radius)), floor(point[1] / (CELL * radius))


def around(cell):
    """The cells that a point within the radius of one in this cell may be in."""
    reach = floor(1 / CELL) + 1
    for column in range(cell[0] - reach, cell[0] + reach + 1):
        for row in range(cell[1] - reach, cell[1] + reach + 1):
            yield column, row


def compared(points, some, others, radius):
    """The pairs, one of some and one of the others, found by comparing each with each."""
    found = []
    for i in some:
        for j in others:
            if i < j and distance(points[i], points[j]) < radius:
                found.append((i, j))
    return found


def distance(a, b):
    return sqrt((a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2)
