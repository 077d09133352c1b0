"""Projects with a ruler of their own, in a folder of a repository: what the loop promises them, and the examples."""

import subprocess
import sys

import pytest
from conftest import STAND_IN

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
    command = [sys.executable, project.top / "loop.py", *map(str, words)]
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
    assert "results.tsv on autoresearch-games-chess/" in night(game, "--offline", "--experiments", 3)
    name = branch(game)
    header, *rows = game.git("show", f"{name}:./results.tsv").splitlines()
    assert header.split("\t")[1] == "score" and len(rows) == 4
    kept = [line.split("\t") for line in rows if "\tkeep\t" in line]
    assert kept[1:] and float(kept[-1][1]) > float(kept[0][1])  # higher is better
    assert game.status() == "" and not (game.top / "runs").exists()
    assert game.read("player.py") == game.git("show", f"{name}:./player.py")
    assert name.startswith("autoresearch-games-chess/")


def test_it_goes_on_reports_and_audits_there_too(game):
    night(game, "--offline", "--experiments", 2)
    game.write("player.py", game.read("player.py").replace("LEARNING_RATE = 0.02", "LEARNING_RATE = 0.5"))
    assert "your edit is the next experiment" in night(game, "--offline", "--experiments", 1)
    lines = game.read("results.tsv").splitlines()
    assert len(lines) == 5 and "\tkeep\tyour edit of player.py" in lines[-1]
    assert "score of what was kept" in night(game, "--report")
    assert "audited gain" in night(game, "--audit") and game.read("results.tsv").splitlines() == lines


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
    assert "results.tsv on autoresearch/" in night(game, "--offline", "--experiments", 1)


def test_a_project_may_stand_in_a_repository_of_its_own(game, tmp_path):
    alone = tmp_path / "alone"
    game.folder.rename(alone)
    game.folder = alone
    game.git("init", "--quiet")
    game.commit("start")
    assert "results.tsv on autoresearch/" in night(game, "--offline", "--experiments", 1)
    assert game.status() == ""


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda game: game.write("ruler.py", OWN + "# changed\n"), "ruler.py: missing or not committed"),
        (lambda game: (game.git("rm", "-q", "player.py"), game.commit("x")), "player.py is not committed"),
        (lambda game: (game.write("player.py", "x ="), game.commit("x")), "player.py as it is committed"),
    ],
)
def test_what_is_missing_is_named(game, change, sentence):
    change(game)
    assert sentence in night(game, "--offline", code=2)


def test_the_ruler_is_its_file_and_the_loop_s_prepare_together(game):
    night(game, "--offline", "--experiments", 1)
    (game.top / "prepare.py").write_text(OWN + "# newer\n")
    assert "was measured with another ruler (code was" in night(game, "--offline", code=2)
