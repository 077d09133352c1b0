"""The shipped train.py: through the real ruler and the real loop, and the parts that only a GPU uses as far as a CPU can show."""

import dataclasses
import json
import shutil

import pytest
import torch
from conftest import ROOT

import loop
import train

T, VOCABULARY = 16, 300
CPU = torch.device("cpu")
TINY = dataclasses.replace(train.CPU, heads=2, head_dim=8, ngram_rows=64, short_window=4, long_every=2, depth=3)


def make(sizes=TINY):
    torch.manual_seed(0)
    model = train.GPT(sizes, VOCABULARY, T, CPU)
    return model, train.make_optimizers(model, sizes, lambda function: function)


def steps(model, optimizers, count=5):
    x = torch.randint(VOCABULARY, (4, T), generator=torch.Generator().manual_seed(1))
    for step in range(count):
        loss = train.mean_loss(model, x, x)
        loss.backward()
        train.optimize(optimizers, step / count)
    return loss.item()


def test_the_loop_measures_the_shipped_baseline_with_the_real_ruler(project, data):
    for name in ("train.py", "prepare.py"):
        shutil.copy(ROOT / name, project.folder)
    source = project.read("train.py")
    label, node = next((label, node) for label, node in loop.numbers(source, "GPU") if label == "CPU.ngram_rows")
    project.write("train.py", source.replace("ngram_rows=524_288", "ngram_rows=512") if node.value == 524_288 else source)
    project.commit("real")
    project.run("--offline", "--budget", "20", "--tag", "t", "--hours", "0.000001", AUTORESEARCH_DATA=str(data))
    (row,) = project.rows()
    assert row["status"] == "keep" and float(row["val_bpb"]) < json.loads((data / "meta.json").read_text())["unigram_bpb"]
    log = next(project.folder.glob("runs/0000-*/run.log")).read_text()
    assert log.startswith("data: ") and "\nsignature: " in log and project.status() == ""


def test_training_learns(capsys):
    model, optimizers = make()
    untrained = train.mean_loss(model, *[torch.zeros(1, T, dtype=torch.int64)] * 2).item()
    assert untrained == pytest.approx(torch.tensor(float(VOCABULARY)).log().item(), rel=1e-5)  # a zero head: all tokens alike
    assert steps(model, optimizers) < untrained


def test_no_logit_sees_a_later_token():
    model, optimizers = make()
    steps(model, optimizers)  # trained: untrained output layers are zero and would hide a leak
    x = torch.randint(VOCABULARY, (2, T), generator=torch.Generator().manual_seed(2))
    changed = x.clone()
    changed[:, 9:] = 7
    with torch.no_grad():
        difference = (model(x) - model(changed)).abs().amax(dim=(0, 2))
    assert difference[:9].max() == 0 and difference[9:].min() > 0


def knobs():
    return [label for label, _ in loop.numbers((ROOT / "train.py").read_text(), "GPU")]


@pytest.mark.parametrize("factor", [0.5, 2])
@pytest.mark.parametrize("label", knobs())
def test_every_knob_may_be_halved_or_doubled(label, factor, monkeypatch):
    sizes, name = TINY, label.removeprefix("CPU.")
    value = getattr(train, label) if name == label else getattr(train.CPU, name)
    value = type(value)(max(value * factor, 1) if isinstance(value, int) else value * factor)
    if name == label:
        monkeypatch.setattr(train, label, value)
    elif name not in ("ngram_rows", "short_window"):
        sizes = dataclasses.replace(TINY, **{name: value})
    assert steps(*make(sizes), count=2) < 50


def test_the_graph_compiles_in_one_piece():
    model, _ = make()
    compiled = torch.compile(train.mean_loss, backend="eager", fullgraph=True, dynamic=False)
    x = torch.zeros(2, T, dtype=torch.int64)
    torch.testing.assert_close(compiled(model, x, x), train.mean_loss(model, x, x))


def test_out_of_memory_halves_the_micro_batch_and_keeps_the_step(capsys):
    model, _ = make()
    sizes = dataclasses.replace(TINY, micro_batch=8, accumulation=3)

    def loss_of(model, x, y):
        if len(x) > 3:
            raise torch.OutOfMemoryError("too many")
        return train.mean_loss(model, x, y)

    assert train.fitting_micro_batch(model, loss_of, sizes, T, CPU) == 2  # 24 sequences a step: a divisor of them
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: flex_attention's blocks against a dense mask")
def test_on_a_gpu_windows_are_what_a_dense_mask_gives():
    q, k, v = torch.randn(3, 2, 2, 256, 64, device="cuda", dtype=torch.bfloat16).unbind()
    blocks = train.window_mask(32, 256, torch.device("cuda"))
    dense = train.window_mask(32, 256, CPU).cuda()
    torch.testing.assert_close(torch.compile(train.attend)(q, k, v, blocks), train.attend(q, k, v, dense), atol=2e-2, rtol=2e-2)
