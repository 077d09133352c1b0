"""A stand-in for the ruler in the loop's tests: signs a summary as the real one does, without torch, in milliseconds."""

import hmac
import json
import os
import sys
import time
from pathlib import Path

secret = os.environ.pop("AUTORESEARCH_TOKEN", None)


def facts():
    return json.dumps({"Device": "cpu, stand-in", "Torch": "0", "Noise": 0.0007, "Pace": 0.0101})


def finish(val_bpb, seconds=0.0, steps=4, trained=100.0, tokens=100_000):
    """Logs a few lines over `seconds`, then prints the signed summary of a run that got `trained` percent of its training."""
    for step in range(1, steps + 1):
        time.sleep(seconds / steps)
        print(f"step {step}  {step / steps:6.1%}  loss {9 / step:.4f}  1,000 tokens/s  1 s left", flush=True)
    summary = {f"{os.environ.get('AUTORESEARCH_SPLIT', 'val')}_bpb": f"{val_bpb:.6f}", "training_seconds": "1.0"}
    summary |= dict(trained_percent=f"{trained:.1f}", total_seconds="1.5", peak_vram_mb="512.0")
    summary |= dict(total_tokens_M=f"{tokens / 1e6:.6f}", num_steps=steps, num_params_M="0.1", depth=1)
    lines = [f"{key + ':':17} {value}" for key, value in summary.items()]
    data = json.loads((Path(os.environ["AUTORESEARCH_DATA"]) / "meta.json").read_text())["fingerprint"]
    loop = [f"seed: {os.environ['AUTORESEARCH_SEED']}", f"budget: {float(os.environ['AUTORESEARCH_BUDGET']):g}", f"data: {data}"]
    loop += [f"{name}: {os.environ.get(f'AUTORESEARCH_{name.upper()}', '')}" for name in ("pace", "tokens")]
    signature = hmac.new((secret or "").encode(), "\n".join([*lines, *loop]).encode(), "sha256").hexdigest()
    print("---", *lines, f"{'signature:':17} {signature}", sep="\n", flush=True)


if __name__ == "__main__" and "--facts" in sys.argv:
    print(facts())
if __name__ == "__main__" and "--check" in sys.argv:
    print("line 1, reaches outside" if "# outside" in Path(sys.argv[-1]).read_text() else "ok")
if __name__ == "__main__" and "--run" in sys.argv:
    sys.modules["prepare"] = sys.modules["__main__"]
    exec(compile(Path("train.py").read_bytes(), "train.py", "exec"), {"__name__": "__main__", "__file__": "train.py"})
