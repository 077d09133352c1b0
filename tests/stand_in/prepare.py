"""A stand-in for the ruler in the loop's tests: signs a result as the real one does, without torch."""

import hmac
import json
import os
import sys
import time
from pathlib import Path

DATA = Path(os.environ.get("AUTORESEARCH_DATA", ".")).expanduser()
secret = os.environ.pop("AUTORESEARCH_TOKEN", "")


def facts():
    """What the loop is told of this ruler: a machine with as many devices as STAND_IN_DEVICES says."""
    sets = (
        [DATA] if (DATA / "meta.json").exists() else sorted(path.parent for path in DATA.glob("*/meta.json"))
    )
    wanted = os.environ.get("AUTORESEARCH_FINGERPRINT")
    found = {json.loads((folder / "meta.json").read_text())["fingerprint"]: folder for folder in sets}
    if wanted and wanted not in found:
        raise SystemExit(f"this branch was measured on the data set {wanted}, which is not in {DATA}")
    data = wanted or [*found][-1]
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    devices = [f"cpu:{core}" for core in cores][:1] or ["cpu"]
    if wanted_devices := int(
        os.environ.get("STAND_IN_DEVICES", 0)
    ):  # more than there are cores: no run is pinned
        devices = [f"fake:{number}" for number in range(wanted_devices)]
    return {
        "metric": "val_bpb",
        "better": "lower",
        "edits": "train.py",
        "devices": devices,
        "device": "cpu, stand-in",
        "software": "none",
        "data": data,
        "noise": 0.0007,
        "api": "It must go on calling prepare.finish().",
        "folder": str(found[data].resolve()),
        "held_out": {},
        "settings": {"PACE": os.environ.get("AUTORESEARCH_PACE", "0.0101")},
        "fixed": ["SECONDS"],
        "budget": 300,
    }


def finish(val_bpb, seconds=0.0, steps=4, trained=1.0, work=100_000):
    """Logs a few lines over `seconds`, then prints the signed result of a run that got a share `trained` of its
    training."""
    for step in range(1, steps + 1):
        time.sleep(seconds / steps)
        print(f"step {step}  {step / steps:6.1%}  loss {9 / step:.4f}  1,000 tokens/s  1 s left", flush=True)
    told = {
        name: os.environ.get(f"AUTORESEARCH_{name}", "")
        for name in ("SEED", "SPLIT", "BUDGET", "WORK", "PACE")
    }
    data = json.loads((DATA / "meta.json").read_text())["fingerprint"]
    result = {"metric": "val_bpb", "value": val_bpb, "memory_mb": 512.0, "trained": trained, "work": work}
    text = json.dumps(result | {"data": data, "told": told, "info": f"{steps} steps"})
    print("---", f"val_bpb:          {val_bpb:.6f}", sep="\n")
    print(f"result: {hmac.new(secret.encode(), text.encode(), 'sha256').hexdigest()} {text}", flush=True)


if __name__ == "__main__" and "--facts" in sys.argv:
    print(json.dumps(facts()))
if __name__ == "__main__" and "--check" in sys.argv:
    print("line 1, reaches outside" if "# outside" in Path(sys.argv[-1]).read_text() else "ok")
if __name__ == "__main__" and "--run" in sys.argv:
    sys.modules["prepare"] = sys.modules["__main__"]
    exec(
        compile(Path("train.py").read_bytes(), "train.py", "exec"),
        {"__name__": "__main__", "__file__": "train.py"},
    )
