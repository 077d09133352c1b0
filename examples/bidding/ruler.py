"""The ruler of an advertiser's bids: conversions for a day's budget in simulated second-price auctions.

    PYTHONPATH=../.. python ruler.py     one run by hand; python ../../loop.py makes a night of it

A run is 100 days, each another advertiser's: users come as in a day's traffic, each with a chance to convert
that is known up to an error, and the highest of the others' bids, which rises in the evening. Who bids more
wins, and pays that. Counted is the true chance of what was won, so no luck of single conversions.
"""

import numpy as np

from prepare import Ruler, refuse

DAYS, AUCTIONS = 100, 1000
API = """The file must keep the class Bidder: Bidder(budget, auctions) begins a day, with about so many
auctions; bid(chance, time) gives the bid, a float, for a user who converts with about this chance, time being
0 to 1; and paid(price) is called when it won: the price is the second highest bid. Metric: the mean of a
day's conversions over many days, whose budgets, prices and traffic differ. Who spends more than the budget
has no result, so never bid more than is left. It may import math, statistics, collections, bisect and heapq,
and nothing else."""


def draw_day(rng):
    """(budget, time, chance that is told, true chance, price to beat) of a day's auctions."""
    count = rng.poisson(AUCTIONS * rng.uniform(0.7, 1.4))
    peak, share = rng.uniform(0.5, 0.9), rng.uniform(0.2, 0.6)  # of the evening's traffic
    evening = rng.random(count) < share
    time = np.sort(np.where(evening, rng.normal(peak, 0.08, count), rng.random(count)).clip(0, 1))
    true = np.exp(rng.normal(np.log(0.02), rng.uniform(0.6, 1.2), count)).clip(0, 0.5)
    told = (true * np.exp(rng.normal(0, 0.4, count))).clip(0, 1)
    crowd = 1 + rng.uniform(0, 1.5) * np.exp(-(((time - peak) / 0.15) ** 2))
    price = rng.lognormal(np.log(rng.uniform(0.2, 0.6)), 0.6, count) * crowd * (true / 0.02) ** 0.5
    return float(rng.uniform(0.05, 0.4) * price.sum()), time, told, true, price


def conversions(bidder, budget, days):
    """What a day's bids are worth."""
    spent = won = 0.0
    for time, told, true, price in zip(*(column.tolist() for column in days), strict=True):
        bid = bidder.bid(told, time)
        if type(bid) not in (int, float) or not 0 <= bid < 1e9:
            refuse(f"a bid of {bid!r}: a number from 0 on is one")
        if bid > price:
            spent, won = spent + price, won + true
            bidder.paid(price)
        if spent > budget + 1e-9:
            refuse(f"{spent:.2f} was spent of a budget of {budget:.2f}")
    return won


def measure(trial):
    days = [draw_day(trial.rng) for _ in range(DAYS)]
    start = trial.load().Bidder
    return float(
        np.mean([conversions(start(budget, AUCTIONS), budget, auctions) for budget, *auctions in days])
    )


if __name__ == "__main__":
    own = dict(metric="conversions", better="higher", edits="bidder.py")
    Ruler(measure, **own, api=API, noise=0.05, imports="math statistics collections bisect heapq").main()
