"""What README and MANUAL tell to type: README's blocks run from top to bottom in one checkout, other commands exist with their options."""

import os
import re
import shlex
import subprocess
import sys
from functools import cache

import pytest
from conftest import ROOT, block

BETTER = block("WIDTH = 64", "WIDTH = 128", "twice the width")
TEXTS = {name: (ROOT / name).read_text() for name in ("README.md", "MANUAL.md")}
QUICK = {  # what a test can't do (installing: .ci/run does), and what would take all night
    r"python3 -m venv \S+": "true",
    r"\S*pip install -e '\.(\[\w+\])?'": "true",
    r"--offline": "--offline --budget 20 --experiments 1 --sandbox off",
    r"--model": "--budget 20 --experiments 1 --sandbox off --model",
    r"loop\.py --audit": "loop.py --audit --sandbox off",
    r"OPENAI_API_KEY=\.\.\.": "OPENAI_API_KEY=a-key",
    r"--source PATH": "--source notes.txt",
}


def blocks():
    """The fenced blocks of README that hold commands."""
    found = re.findall(r"^```\n(.*?)^```", TEXTS["README.md"], re.MULTILINE | re.DOTALL)
    return [block for block in found if "python" in block and "pytest" not in block]


@pytest.mark.slow
def test_the_blocks_of_the_readme_run_from_top_to_bottom(project, server):
    (project.folder / ".venv").symlink_to(sys.prefix)
    project.write(".gitignore", project.read(".gitignore") + ".venv\n")
    project.commit("environment")
    server.default = BETTER
    output = ""
    for script in blocks():
        for pattern, quick in QUICK.items():
            script = re.sub(pattern, quick, script)
        path = os.pathsep.join([f"{project.folder}/.venv/bin", project.environment["PATH"]])
        environment = project.environment | {"PATH": path, "OPENAI_BASE_URL": server.url}
        done = subprocess.run(
            ["bash", "-euc", script],
            cwd=project.folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
        output += done.stdout
    assert server.requests[-1]["model"] == "gpt-5" and "kept, in order" in output and "audited gain" in output
    branches = project.git("branch", "--list", "--format=%(refname:short)", "autoresearch/*").split()
    assert (
        len(branches) == 3
        and all(len(project.rows(branch)) == 2 for branch in branches)
        and project.status() == ""
    )


@cache
def help_of(*command):
    environment = os.environ | {"COLUMNS": "200", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *command, "--help"], cwd=ROOT, env=environment, capture_output=True, text=True
    ).stdout


@pytest.mark.slow
def test_every_command_in_the_texts_exists_with_its_options():
    text = "\n".join(TEXTS.values())
    prose = re.sub(r"^```\n.*?^```\n", "", text, flags=re.MULTILINE | re.DOTALL).replace("\n", " ")
    commands = re.findall(r"`(?:\w+ )*python (?!ruler)((?:tests/)?\w+\.py[^`]*)`", prose)
    commands += re.findall(r"^(?:\w+=\w+ )?python (?!ruler)((?:tests/)?\w+\.py[^#\n]*)", text, re.MULTILINE)
    assert len(commands) > 20
    for command in commands:
        file, *rest = shlex.split(command)
        file = file.replace("ruler.py", "examples/speed/ruler.py")  # one of those that it may be
        assert (ROOT / file).exists()
        found = (
            help_of(file, *[word for word in rest[:1] if word.isalpha() and word.islower()])
            if rest and rest != ["&"]
            else ""
        )
        assert all(re.search(rf"{word}\b", found) for word in rest if word.startswith("--")), command


SMALL = {  # benchmarks that README and MANUAL name: what makes them quick, and what they must then say
    "judge": ("--nights 1", [rf"^0\.00{noise} +{rule}" for noise in ("03", "07", "15") for rule in ("strict", "0.20 fresh", "unpaired")]),
    "kills": ("--kills 4", ["^4 kills, [0-9]+ rows, 0 with problems"]),
    "speed": (
        "--budget 20 --runs 1 --cycles 2 --devices 2 --run 0.5 --experiments 4",
        ["^spawn to the end of the first step +[0-9.]+ s", "^training steps", "^the loader alone", "^training seconds, cycle over cycle",
         "^the loop between two runs, at 10,000 rows +[0-9.]+ s", "^2 devices, runs of 0.5 s, thoughts of 0.1 s +[0-9]+ % of the time busy"],
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_the_benchmarks_that_the_texts_name_give_their_figures(name, data):
    options, wanted = SMALL[name]
    assert f"python tests/bench.py {name}" in "\n".join(TEXTS.values())
    command = [sys.executable, "tests/bench.py", name, *options.split()]
    environment = os.environ | {"AUTORESEARCH_DATA": str(data)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for pattern in wanted:
        assert re.search(pattern, done.stdout, re.MULTILINE), done.stdout


def test_every_option_of_the_loop_is_in_the_readme():
    options = set(re.findall(r"--[a-z]+", help_of("loop.py"))) - {"--help"}
    assert options <= set(re.findall(r"--[a-z]+", TEXTS["README.md"]))


@pytest.mark.parametrize("name", TEXTS)
def test_links_within_the_project_lead_somewhere(name):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", TEXTS[name]):
        assert (ROOT / target).exists(), target
