"""As if matplotlib were not installed: the loop draws no pictures."""

import sys

sys.modules["matplotlib"] = None
