"""The ruler of a trading strategy: the Sharpe ratio of strategy.py, walk-forward over real daily prices.

    PYTHONPATH=../.. python ruler.py                  one run; python ../../loop.py makes a night of it
    PYTHONPATH=../.. python ruler.py --source FILE    a CSV of your own: days, then each market's closes

Without --source: S&P 500, Nasdaq and oil, 1999 to 2018, of the package arch. The first half is val, the
second test. The strategy is handed copies of the past alone. Three in four quarters count, as the
seed draws them.
"""

import csv
import gzip

import numpy as np

from prepare import Ruler, package, refuse

MARKETS = {"sp500": "Adj Close", "nasdaq": "Adj Close", "wti": "DCOILWTICO"}
SEEN, QUARTER, YEAR = 250, 63, 252  # days
COST = 0.001  # of what is bought or sold
LOST, TRADED = 0.5, 100  # at most: of the capital, from a peak; times the capital, in a year
API = f"""The file must keep position(prices, held): the share of its capital, from -1 to 1, to hold in a
market from the next close on. prices: its last {SEEN} closes, a numpy array, today's last, scaled so that the
first is 100; held: the share now. It is asked for each market on each day in turn; each has the same part of
the capital. Metric: the yearly Sharpe ratio, less {COST:.1%} of what is traded. A drawdown above {LOST:.0%},
or more than {TRADED} times the capital traded in a year, is a crash. It may import numpy and math, and
nothing else."""


def held_out(source):
    """The closes on the days that all markets have: the first half; the second, and what it sees before."""
    tables = [column(source, name) for name in (next(csv.reader(open(source)))[1:] if source else MARKETS)]
    lines = [
        ",".join(table[day] for table in tables) for day in tables[0] if all(day in table for table in tables)
    ]
    val, test = lines[: len(lines) // 2], lines[len(lines) // 2 - SEEN :]
    return {"val": "\n".join(val).encode(), "test": "\n".join(test).encode()}


def column(source, name):
    """{day: close}, as text."""
    path = source or package("arch", "[trading]") / "data" / name / f"{name}.csv.gz"
    with open(path) if source else gzip.open(path, "rt") as file:
        rows = [([*row.values()][0], row[name if source else MARKETS[name]]) for row in csv.DictReader(file)]
    return {day: close for day, close in rows if close and close.strip(" .")}


def earned(position, prices):
    """(what the capital gains, what share of it is traded) by day, from prices (days, markets)."""
    held = np.zeros(prices.shape)
    for day, market in np.ndindex(len(prices) - SEEN - 1, prices.shape[1]):
        seen, now = prices[day : day + SEEN, market], day + SEEN - 1
        share = position(100 * seen / seen[0], float(held[now - 1, market]))
        if type(share) not in (int, float, np.float64) or not -1 <= share <= 1:
            refuse(f"a position of {share!r}: a number from -1 to 1 is one")
        held[now, market] = share
    traded = np.abs(np.diff(held, axis=0, prepend=0))[SEEN - 1 : -2]
    moves = prices[SEEN + 1 :] / prices[SEEN:-1] - 1  # from the close after the decision to the next
    return (held[SEEN - 1 : -2] * moves - COST * traded).mean(1), traded.mean(1)


def measure(trial):
    prices = np.loadtxt(trial.data.decode().splitlines(), delimiter=",", ndmin=2)
    gains, traded = earned(trial.load().position, prices)
    capital = np.cumprod(1 + gains)
    lost, turnover = 1 - (capital / np.maximum.accumulate(capital)).min(), traded.mean() * YEAR
    if lost > LOST or turnover > TRADED:
        refuse(f"drawdown {lost:.0%}, at most {LOST:.0%}; {turnover:.0f} traded a year, at most {TRADED}")
    trial.summary |= {"drawdown": f"{lost:.1%}", "turnover": f"{turnover:.1f}"}
    quarters = gains[: len(gains) // QUARTER * QUARTER].reshape(-1, QUARTER)
    drawn = trial.rng.permutation(quarters)[: 3 * len(quarters) // 4]
    return drawn.mean() / (drawn.std() + 1e-9) * YEAR**0.5


if __name__ == "__main__":
    own = dict(metric="sharpe", better="higher", edits="strategy.py", held_out=held_out)
    Ruler(measure, **own, api=API, noise=0.1, imports="numpy math").main()
