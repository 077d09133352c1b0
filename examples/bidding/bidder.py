"""An advertiser's bids in a day of auctions: worth by the chance of a conversion, paced so that the budget
lasts."""

VALUE = 20.0  # of a conversion, in the budget's unit, before pacing
USUAL = 0.02  # a chance of a conversion
TRUST = 1.0  # exponent of how unusual a chance is: below 1 it is taken for partly wrong
GAIN = 0.5  # how strongly bids follow the pace: 0 not at all
SLOWEST = 0.2  # times the value that is bid at the least,
FASTEST = 2.0  # and at the most
EVERY = 100  # auctions between two looks at the pace


class Bidder:
    """bid() is asked once for each auction; paid() is told of each that was won."""

    def __init__(self, budget, auctions):
        self.budget, self.auctions = budget, auctions
        self.seen, self.spent, self.pace = 0, 0.0, 1.0

    def bid(self, chance, time):
        """The bid for a user who converts with this chance; time: 0 to 1 over the day."""
        self.seen += 1
        if self.seen % EVERY == 0:
            self.pace *= 1 + GAIN * (self.planned(time) - self.spent / self.budget)
            self.pace = min(max(self.pace, SLOWEST), FASTEST)
        worth = VALUE * USUAL * (chance / USUAL) ** TRUST
        return min(worth * self.pace, self.budget - self.spent)

    def planned(self, time):
        """The share of the budget that should be spent by now."""
        return time

    def paid(self, price):
        self.spent += price
