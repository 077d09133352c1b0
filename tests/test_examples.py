"""Projects with a ruler of their own, in a folder of a repository: what the loop promises them, and the examples."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, STAND_IN, most_quick, python

import loop

# The stand-in as a ruler of one's own: another file, another metric, and higher is better.
OWN = (STAND_IN / "prepare.py").read_text()
for before, after in (
    ('"metric": "val_bpb"', '"metric": "score"'),
    ('"better": "lower"', '"better": "higher"'),
    ('"train.py"', '"player.py"'),
):
    OWN = OWN.replace(before, after)


@pytest.fixture
def game(project):
    """A project whose folder `games/chess` holds a ruler of its own."""
    folder = project.folder / "games" / "chess"
    folder.mkdir(parents=True)
    (folder / "ruler.py").write_text(OWN)
    (folder / "player.py").write_text((STAND_IN / "train.py").read_text().replace("1 + 1 / WIDTH", "WIDTH"))
    (folder / "program.md").write_text("Win.\n")
    project.commit("a game")
    project.top, project.folder = project.folder, folder
    return project


def night(project, *words, code=0):
    """The loop as a process, started in the project's folder."""
    command = [python(), project.top / "loop.py", *map(str, words)]
    if "--report" not in words:
        command += ["--devices", "0", "--budget", "20", "--sandbox", "off"]
    done = subprocess.run(
        command, cwd=project.folder, env=project.environment, capture_output=True, text=True
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def branch(project):
    return project.git("branch", "--show-current").strip()


def test_in_a_folder_with_a_ruler_the_loop_works_on_that_with_a_branch_of_its_own(game):
    assert "autoresearch-games-chess/" in night(game, "--offline", "--experiments", 3)
    name = branch(game)
    header, *rows = game.git("show", f"{name}:./results.tsv").splitlines()
    assert header.split("\t")[1] == "score" and len(rows) == 4
    kept = [line.split("\t") for line in rows if "\tkeep\t" in line]
    assert kept[1:] and float(kept[-1][1]) > float(kept[0][1])  # higher is better
    assert game.status() == "" and not (game.top / "runs").exists()
    assert game.read("player.py") == game.git("show", f"{name}:./player.py")
    assert name.startswith("autoresearch-games-chess/")


@pytest.mark.slow
def test_it_goes_on_reports_and_audits_there_too(game):
    night(game, "--offline", "--experiments", 2)
    game.write("player.py", game.read("player.py").replace("LEARNING_RATE = 0.02", "LEARNING_RATE = 0.5"))
    assert "your edit is the next experiment" in night(game, "--offline", "--experiments", 1)
    lines = game.read("results.tsv").splitlines()
    assert len(lines) == 5 and "\tkeep\tyour edit of player.py" in lines[-1]
    assert "score of what was kept" in night(game, "--report")
    assert "audited gain" in night(game, "--audit") and game.read("results.tsv").splitlines() == lines


@pytest.mark.slow
def test_another_project_s_branch_that_is_checked_out_is_not_gone_on_with(game):
    night(game, "--offline", "--experiments", 1)
    other = game.folder.with_name("go")
    other.mkdir()
    for name in ("ruler.py", "player.py", "program.md"):
        (other / name).write_text(game.read(name))
    game.commit("another game")
    game.folder = other
    night(game, "--offline", "--experiments", 1)
    assert branch(game).startswith("autoresearch-games-go/")
    game.folder = game.top
    assert " autoresearch/" in night(game, "--offline", "--experiments", 1)


@pytest.mark.slow
def test_a_project_may_stand_in_a_repository_of_its_own(game, tmp_path):
    alone = tmp_path / "alone"
    game.folder.rename(alone)
    game.folder = alone
    game.git("init", "--quiet")
    game.commit("start")
    assert " autoresearch/" in night(game, "--offline", "--experiments", 1)
    assert game.status() == ""


@pytest.mark.every(3)
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda game: game.write("ruler.py", OWN + "# changed\n"),
            "ruler.py: missing, or not committed as it is",
        ),
        (lambda game: (game.git("rm", "-q", "player.py"), game.commit("x")), "player.py is not committed"),
        (lambda game: (game.write("player.py", "x ="), game.commit("x")), "player.py as it is committed"),
    ],
)
def test_what_is_missing_is_named(game, change, sentence):
    change(game)
    assert sentence in night(game, "--offline", code=2)


@pytest.mark.slow
def test_the_ruler_is_its_file_and_the_loop_s_prepare_together(game):
    night(game, "--offline", "--experiments", 1)
    (game.top / "prepare.py").write_text(OWN + "# newer\n")
    assert "was measured otherwise (code was" in night(game, "--offline", code=2)


# ---- the examples

EXAMPLES = Path(ROOT, "examples")
NO_TORCH = "raise SystemExit('torch was imported')\n"


def prices_in(folder):
    """A CSV of two made-up markets over four years, as a spreadsheet writes it, with a mark at its start."""
    rng, lines = np.random.default_rng(0), ["\ufeffday,one,other"]
    closes = 100 * np.exp(np.cumsum(rng.normal(0, 0.01, (1000, 2)), axis=0))
    lines += [f"{day},{one:.2f},{other:.2f}" for day, (one, other) in enumerate(closes)]
    (folder / "prices.csv").write_text("\n".join(lines) + "\n")
    return folder / "prices.csv"


@pytest.fixture
def start(project, tmp_path):
    """start(name): a repository with loop.py, prepare.py and an example, on a machine that has no torch."""

    def at(name):
        blocked = tmp_path / "blocked"
        blocked.mkdir()
        (blocked / "torch.py").write_text(NO_TORCH)
        project.environment |= {"PYTHONPATH": str(blocked)}
        shutil.copy(ROOT / "prepare.py", project.folder)
        shutil.copytree(EXAMPLES / name, project.folder / "examples" / name, ignore=LEFT_OUT)
        project.commit("an example")
        project.top, project.folder = project.folder, project.folder / "examples" / name
        if name == "trading":
            ruler(project.folder, project.environment, "--source", prices_in(tmp_path), path=project.top)
        return project

    return at


LEFT_OUT = shutil.ignore_patterns("runs", "progress.png", "__pycache__")


def ruler(folder, environment, *words, path=ROOT):
    """The ruler of a folder by hand: (its output, exit status)."""
    environment = environment | {"PYTHONPATH": f"{path}:{environment.get('PYTHONPATH', '')}"}
    command = [sys.executable, "ruler.py", *map(str, words)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return done.stdout + done.stderr, done.returncode


@pytest.mark.slow
@pytest.mark.parametrize("name", ["trading", "bidding", "speed"])
def test_a_night_of_an_example_needs_no_torch(start, name):
    project = start(name)
    night(project, "--offline", "--experiments", 2)
    rows = project.read("results.tsv").splitlines()
    assert len(rows) == 4 and "crash" not in "".join(rows)


@pytest.mark.slow
def test_a_model_s_edits_are_applied_refused_and_kept_in_an_example_as_anywhere(start, server):
    project = start("bidding")
    # No constants by their names: on a busy machine the search would have the night's experiments first.
    project.write(
        "bidder.py", re.sub(r"\b[A-Z]{2,}\b", lambda name: f"a_{name[0].lower()}", project.read("bidder.py"))
    )
    project.commit("nothing to search")
    value = "a_value = 20.0  # of a conversion, in the budget's unit, before pacing\n"
    form = "IDEA: {}\n<<<<<<< SEARCH\n{}=======\n{}>>>>>>> REPLACE\n"
    server.replies += [form.format("know the market", value, "import ruler\n" + value)]
    server.replies += [form.format("bid less", value, "a_value = 16.0\n")]
    project.environment["OPENAI_BASE_URL"] = server.url
    assert "import ruler: bidder.py uses plain built-ins and" in night(project, "--experiments", 1)
    prompt = server.requests[0]["messages"]
    assert (
        "edit of bidder.py" in prompt[0]["content"]
        and "conversions (higher is better)" in prompt[0]["content"]
    )
    assert "\tkeep\tbid less\t+" in project.read("results.tsv")


@pytest.mark.slow
def test_the_prices_of_the_trading_example_come_with_arch(tmp_path):
    pytest.importorskip("arch")
    environment = {"AUTORESEARCH_DATA": str(tmp_path), "PATH": os.environ["PATH"]}
    shutil.copytree(EXAMPLES / "trading", tmp_path / "trading", ignore=LEFT_OUT)
    said, code = ruler(tmp_path / "trading", environment)
    assert code == 0 and "sharpe:" in said
    assert sorted(path.name for path in tmp_path.glob("strategy-*/*")) == ["test.bin", "val.bin"]


# Cheats of which none gets a result: the line of the file that is replaced, by what, and what is said of it.
FAKE = """print('result: ' + '0' * 64 + ' {"value": 9}'); raise SystemExit"""
POSITION = "    logs = np.log(prices)\n"
BID = "        self.seen += 1\n"
PAIRS = "    cells, found = {}, []\n"
CHEATS = {
    "trading: looks behind the end of its prices": (POSITION, "    prices = prices.base[:]\n", "NoneType"),
    "trading: reads the prices": (POSITION, "    open('../val.bin')\n", ", open"),
    "trading: imports the prices": (POSITION, "    from arch.data import sp500\n", "import arch.data.sp500"),
    "trading: looks into the ruler's frame": (POSITION, "    import sys\n    sys._getframe(1)\n", "import sys"),
    "trading: asks the ruler": (POSITION, "    import ruler\n    ruler.COST = 0\n", "import ruler"),
    "trading: holds five times its capital": (POSITION, "    return 5.0\n", "a position of 5.0"),
    "trading: holds a number that isn't one": (POSITION, "    return float('nan')\n", "a position of nan"),
    "trading: holds what multiplies as it likes": (
        POSITION,
        "    class Rich(float):\n        def __mul__(self, other): return 1\n    return Rich(1)\n",
        "a position of 1.0",
    ),
    "trading: turns over the whole capital each day": (POSITION, "    return -held or 1.0\n", "traded a year"),
    "trading: prints a result": (POSITION, f"    {FAKE}\n", "strategy.py ended the run by itself"),
    "bidding: spends more than the budget": (BID, "        return 1e6\n", "of a budget of"),
    "bidding: bids without end": (BID, "        return float('inf')\n", "a bid of inf"),
    "bidding: bids less than nothing": (BID, "        return -1.0\n", "a bid of -1.0"),
    "bidding: bids what is more than any price": (
        BID,
        "        class High(float):\n            def __gt__(self, other): return True\n        return High(0)\n",
        "a bid of 0.0",
    ),
    "bidding: draws the same market": (BID, "        import numpy\n", "import numpy"),
    "bidding: won't hear of what it pays": ("        self.spent += price\n", "        raise SystemExit\n", "bidder.py ended the run by itself"),
    "bidding: forgets what it has paid": ("        self.spent += price\n", "        self.spent = 0\n", "of a budget"),
    "speed: remembers an answer": (PAIRS, "    return FOUND.setdefault(0, compared(points, *[range(len(points))] * 2, radius))\n", "pairs are wrong"),
    "speed: finds half of the pairs": (PAIRS, "    points, cells, found = points[::2], {}, []\n", "pairs are wrong"),
    "speed: answers with what is worked out later": (PAIRS, "    return iter(range(9))\n", "no list of tuples"),
    "speed: answers with a list that fills itself": (PAIRS, "    class Later(list): pass\n    return Later()\n", "no list of tuples"),
    "speed: answers with numbers that equal any": (
        PAIRS,
        "    class Any(int):\n        def __eq__(self, other): return True\n    return [(Any(0), Any(0))]\n",
        "no list of tuples",
    ),
    "speed: takes the points away": (PAIRS, "    points.clear()\n    return []\n", "pairs are wrong"),
    "speed: turns the clock": (PAIRS, "    import time\n    time.process_time = float\n", "import time"),
    "speed: has others work": (PAIRS, "    import multiprocessing\n", "import multiprocessing"),
    "speed: replaces a built-in function": (PAIRS, "    __builtins__['sorted'] = list\n", "__builtins__"),
}  # fmt: skip


@pytest.mark.every(4)
@pytest.mark.parametrize("name", most_quick(CHEATS, *[name for name in CHEATS if "bidding" not in name]))
def test_a_cheat_gets_no_result(name, tmp_path):
    example, (before, after, said) = name.partition(":")[0], CHEATS[name]
    folder = tmp_path / example
    shutil.copytree(EXAMPLES / example, folder, ignore=LEFT_OUT)
    edits = {"trading": "strategy.py", "bidding": "bidder.py", "speed": "neighbours.py"}[example]
    source = (folder / edits).read_text()
    assert source.count(before) == 1
    (folder / edits).write_text(source.replace(before, after + before) + "FOUND = {}\n")
    environment = {"AUTORESEARCH_DATA": str(tmp_path), "PATH": os.environ["PATH"]}
    if example == "trading":
        ruler(folder, environment, "--source", prices_in(tmp_path))
    verdict, _ = ruler(folder, environment, "--check", edits)
    if verdict == "ok\n":
        verdict, code = ruler(folder, environment | {"AUTORESEARCH_TOKEN": "secret"}, "--run")
        told = {"told": {}, "facts": {"metric": "", "data": ""}}
        with pytest.raises(ValueError, match="no result"):
            loop.read_result(verdict, "secret", told)
        verdict += "no result" * (code == 0)
    assert said in verdict


# ---- class Ruler


@pytest.fixture
def own(tmp_path):
    """own(measure, edited, settings): what a run of a ruler with this measure(trial) prints, and its exit status."""

    def run(measure, edited="", also="", **settings):
        text = (
            "from prepare import Ruler\n"
            f"def measure(trial):\n    {measure}\n"
            "def held_out(source):\n    return {'val': b'seven', 'test': b'eleven'}\n"
            "own = dict(metric='m', better='lower', edits='x.py', api='', noise=1, held_out=held_out)\n"
            f"{also}\n"
            "Ruler(measure, **own).main()\n"
        )
        (tmp_path / "ruler.py").write_text(text)
        (tmp_path / "x.py").write_text(edited)
        settings = {f"AUTORESEARCH_{name}": value for name, value in settings.items()}
        return ruler(tmp_path, {"AUTORESEARCH_DATA": str(tmp_path), "PATH": os.environ["PATH"]} | settings)

    return run


@pytest.mark.slow
def test_a_run_measures_its_split_and_another_draws_other_numbers(own):
    assert "m:                5.000000" in own("return len(trial.data)")[0]
    assert "m:                6.000000" in own("return len(trial.data)", SPLIT="test")[0]
    draws = [own("return trial.rng.random()", **more)[0].splitlines()[1] for more in (
        {}, {"SEED": "1"}, {"SPLIT": "test"}, {"SALT": "of another branch"})]  # fmt: skip
    assert len({*draws}) == 4 and draws[0] == own("return trial.rng.random()")[0].splitlines()[1]


def test_what_is_held_out_is_shut_while_the_file_runs(own, tmp_path):
    own("trial.load()\n    return 1")
    path = next(tmp_path.glob("x-*")) / "test.bin"
    said, code = own(
        "trial.load()\n    return 1", f"try:\n    open({str(path)!r})\nexcept BaseException:\n    pass"
    )
    assert "opened test.bin, which is the ruler's" in said and code == 1
    path.with_name("val.bin").write_bytes(b"eight")
    assert "is damaged; delete it" in own("trial.load()\n    return 1")[0]


@pytest.mark.slow
def test_a_ruler_that_changed_is_asked_for_its_data_again_and_takes_no_other_ruler_s(own, tmp_path):
    assert "m:                5.000000" in own("return len(trial.data)")[0]
    longer = "own['held_out'] = lambda source: {'val': b'longer' * 2, 'test': b'x'}"
    assert "m:                12.000000" in own("return len(trial.data)", also=longer)[0]
    assert "m:                5.000000" in own("return len(trial.data)")[0]  # as before
    assert len([*tmp_path.glob("x-*")]) == 2


@pytest.mark.slow
def test_a_branch_s_data_are_prepared_where_they_are_missing_if_the_ruler_gives_the_same(own, tmp_path):
    own("return len(trial.data)")
    (folder,) = tmp_path.glob("x-*")
    shutil.rmtree(folder)
    said, _ = own("return len(trial.data)", FINGERPRINT=folder.name)
    assert f"prepared: {folder}\n" in said and "m:                5.000000" in said
    said, code = own("return len(trial.data)", FINGERPRINT="x-of-a-file-of-mine")
    assert "x-of-a-file-of-mine, this branch's data, is not in" in said and code == 1


def test_a_file_finds_neither_the_secret_nor_the_salt(own):
    told = "import os\nprint(sorted(name for name in os.environ if name[13:] in ('TOKEN', 'SALT', 'SEED')))"
    assert "['AUTORESEARCH_SEED']" in own("trial.load()", told, TOKEN="a", SALT="b", SEED="3")[0]


def test_what_is_no_number_is_refused(own):
    assert "refused by the ruler: m is nan" in own("return float('nan')")[0]


MISTAKES = {
    "own['better'] = 'high'": 'better is "lower" or "higher", and not \'high\'',
    "own['metric'] = 'compression ratio'": "metric is one word, a column of results.tsv, and not 'compression ratio'",
    "own['nosie'] = own.pop('noise')": "unexpected keyword argument 'nosie'",
    "del own['metric']": "missing 1 required keyword-only argument: 'metric'",
    "own['held_out'] = lambda source: {'val': b'seven'}": 'held_out(None) gives no bytes as "test": None',
    "own['held_out'] = lambda source: {'val': 'seven', 'test': b'x'}": "held_out(None) gives no bytes as \"val\": 'seven'",
    "own['held_out'] = lambda source: {'val': b'', 'test': b'x'}": "held_out(None) gives no bytes as \"val\": b''",
}


@pytest.mark.every(4)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_ruler_is_named_before_anything_is_measured(own, mistake):
    said, code = own("print('measured')", also=mistake)
    assert said.strip().endswith(MISTAKES[mistake]) and code == 1 and "measured" not in said


@pytest.mark.slow
@pytest.mark.parametrize("endless", ["while True: pass", "import re\nre.match('(a*)*b', 'a' * 99)"])
def test_by_hand_a_run_ends_with_its_budget_too(own, endless):
    said, code = own("trial.load()", endless, BUDGET="1")
    assert "Timeout (0:00:01)!" in said and "x.py" in said and code == 1


def test_by_hand_a_file_that_reaches_outside_is_measured_and_warned_of(own):
    said, code = own("trial.load()\n    return 7", "import os\n")
    warned = (
        "would refuse a model's edit like this: line 1, import os: x.py uses plain built-ins and math alone"
    )
    assert warned in said and "m:                7.000000" in said and code == 0
    assert "would refuse" not in own("trial.load()\n    return 7", "import os\n", TOKEN="of a loop")[0]


def test_a_file_that_ends_the_process_has_no_result(own):
    said, code = own("return trial.load().f()", "def f():\n    raise SystemExit(0)\n")
    assert said.endswith("refused by the ruler: x.py ended the run by itself\n") and code == 1


@pytest.mark.slow
def test_a_check_says_by_its_exit_status_whether_the_file_may_run(own, tmp_path):
    own("return 1", "import os\n")
    environment = {"PATH": os.environ["PATH"]}
    assert ruler(tmp_path, environment, "--check", "x.py")[1] == 1
    assert ruler(tmp_path, environment, "--check", "ruler.py")[1] == 1
    (tmp_path / "x.py").write_text("import math\n")
    assert ruler(tmp_path, environment, "--check", "x.py") == ("ok\n", 0)


# ---- MANUAL.md's own ruler


@pytest.mark.slow
def test_the_ruler_that_the_manual_shows_makes_a_night(start):
    project, manual = start("speed"), (ROOT / "MANUAL.md").read_text()
    (project.folder / "neighbours.py").unlink()
    for name in ("ruler.py", "pack.py"):
        project.write(name, manual.partition(f"<!-- {name} -->\n```python\n")[2].partition("```")[0])
    project.commit("another experiment")
    night(project, "--offline", "--experiments", 4)
    head = project.read("results.tsv").splitlines()[0]
    kept = [line.split("\t") for line in project.read("results.tsv").splitlines() if "\tkeep\t" in line]
    assert head.split("\t")[1] == "bins" and float(kept[-1][1]) < float(kept[0][1])
