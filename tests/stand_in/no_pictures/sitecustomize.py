"""As if matplotlib were not installed: the loop draws no pictures. And as if site-packages were a folder of a
test's own: a look over the real one's 30,000 files, before and after each run, takes longer than the run."""

import os
import sys
import sysconfig

sys.modules["matplotlib"] = None
get_paths = sysconfig.get_paths
packages = os.environ.get("STAND_IN_PACKAGES", os.devnull + "/none")
sysconfig.get_paths = lambda *args, **kwargs: (
    get_paths(*args, **kwargs) | {"purelib": packages, "platlib": packages}
)
