"""A daily strategy: with the trend, as the distance of two moving averages shows it, for each market by
itself."""

import numpy as np

DAYS = 10  # of the long average
SHARE = 0.1  # of them, in the short one
SHARP = 2.0  # how soon a trend is taken for a sure one, in usual moves over these days
LONG = 0.0  # added to every position: markets may rise on their own
CALM = 0.1  # yearly volatility above which a position is made smaller
VOLATILITY_DAYS = 10  # that show how volatile a market is now
PATIENCE = 0.0  # a position is changed if it is off by more than this


def position(prices, held):
    """The share of the capital to hold, from -1 (all of it sold short) to 1.

    prices: the market's last 250 closes, today's last; held: the share that is held now.
    """
    logs = np.log(prices)
    usual = np.diff(logs)[-VOLATILITY_DAYS:].std() + 1e-6
    short = max(round(SHARE * DAYS), 1)
    trend = (logs[-short:].mean() - logs[-DAYS:].mean()) / (usual * DAYS**0.5)
    wanted = min(max(np.tanh(SHARP * trend) + LONG, -1.0), 1.0) * min(1.0, CALM / (usual * 252**0.5))
    return held if abs(wanted - held) < PATIENCE else float(wanted)
