"""The ruler of a trading strategy: the Sharpe ratio of strategy.py over days that come after all that it sees.

    PYTHONPATH=../.. python ruler.py                      one run by hand; python ../../loop.py makes a night of it
    PYTHONPATH=../.. python ruler.py --source FILE.csv    other prices: a column Date, then one of closes a market

Walk-forward, without --source over the S&P 500, the Nasdaq and oil from 1999 to 2018, which come with the package
arch. The first half of the days is val, the second test. Each day the strategy is handed a market's last 250
closes, as a copy, and no more; what it then wants to hold is bought at the next day's close. The seed draws which
quarters count, so that a gain which hangs on a few of them is in doubt.
"""

import csv
import gzip
from pathlib import Path

import numpy as np

from prepare import Ruler, package, refuse

MARKETS = {"sp500": "Adj Close", "nasdaq": "Adj Close", "wti": "DCOILWTICO"}

SEEN, QUARTER, YEAR = 250, 63, 252  # days
COST = 0.001  # of what is bought or sold
MOST_LOST, MOST_TRADED = 0.5, 60  # of the capital: from a peak; bought and sold in a year
API = f"""The file must keep position(prices, held): the share of its capital, from -1 to 1, to hold in a market from
the next close on. prices: its last {SEEN} closes, a numpy array, today's last, scaled so that the first is 100; held:
the share now. It is asked for each market on each day in turn; each has the same part of the capital. Metric: the
yearly Sharpe ratio, less {COST:.1%} of what is traded. A drawdown above {MOST_LOST:.0%}, or more than {MOST_TRADED}
times the capital traded in a year, is a crash. It may import numpy and math, and nothing else."""


def held_out(source):
    """The closes on the days that all markets have: the first half, and the second with what it sees before."""
    folder = None if source else package("arch") / "data"
    names = next(csv.reader(open(source)))[1:] if source else MARKETS
    tables = []
    for name in names:
        path, column = (source, name) if source else (folder / name / f"{name}.csv.gz", MARKETS[name])
        with gzip.open(path, "rt") if Path(path).suffix == ".gz" else open(path) as file:
            tables.append(
                {row["Date"]: row[column] for row in csv.DictReader(file) if row[column].strip(" .")}
            )
    days = [day for day in tables[0] if all(day in table for table in tables)]
    lines = [",".join(table[day] for table in tables) for day in days]
    half = len(lines) // 2
    return {"val": "\n".join(lines[:half]).encode(), "test": "\n".join(lines[half - SEEN :]).encode()}


def earned(position, prices):
    """(what the capital gains each day, what share of it is traded), from prices (days, markets)."""
    days, markets = prices.shape
    held = np.zeros((days, markets))
    for day in range(SEEN - 1, days - 2):
        for market in range(markets):
            seen = prices[day - SEEN + 1 : day + 1, market]
            share = position(100 * seen / seen[0], float(held[day - 1, market]))
            if type(share) not in (int, float, np.float64) or not -1 <= share <= 1:
                refuse(f"a position of {share!r}: a number from -1 to 1 is one")
            held[day, market] = share
    traded = np.abs(np.diff(held, axis=0, prepend=0))[SEEN - 1 : -2]
    moves = (
        prices[SEEN + 1 :] / prices[SEEN:-1] - 1
    )  # from the close after the decision to the one after that
    return (held[SEEN - 1 : -2] * moves - COST * traded).mean(1), traded.mean(1)


def measure(trial):
    prices = np.loadtxt(trial.data.decode().splitlines(), delimiter=",", ndmin=2)
    quarters = trial.rng.integers(len(prices) // QUARTER - 4, size=len(prices) // QUARTER - 4)
    gains, traded = earned(trial.load().position, prices)
    capital = np.cumprod(1 + gains)
    lost, turnover = 1 - (capital / np.maximum.accumulate(capital)).min(), traded.mean() * YEAR
    if lost > MOST_LOST or turnover > MOST_TRADED:
        refuse(
            f"a drawdown of {lost:.0%} (at most {MOST_LOST:.0%}), or {turnover:.0f} trades a year ({MOST_TRADED})"
        )
    trial.summary |= {
        "drawdown": f"{lost:.1%}",
        "turnover": f"{turnover:.1f}",
        "whole_period": f"{sharpe(gains):.3f}",
    }
    return sharpe(np.concatenate([gains[QUARTER * n : QUARTER * (n + 1)] for n in quarters]))


def sharpe(gains):
    return float(gains.mean() / (gains.std() + 1e-9) * YEAR**0.5)


if __name__ == "__main__":
    own = dict(metric="sharpe", better="higher", edits="strategy.py", held_out=held_out)
    Ruler(measure, **own, api=API, noise=0.05, imports="numpy math").main()
