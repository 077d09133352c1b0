"""The numeric search: which constant moves next, how far, and when nothing is left; and how an edit is
carried from one file to another. Pure functions of text and rows."""

import math
import random
from types import SimpleNamespace

import pytest
from conftest import ROOT, STAND_IN, block

import loop


def steps(source, value_of, most=60, fixed=()):
    """A search on a file whose metric is value_of(names): [(description, status)] to its end, or `most`."""
    history, tried, best = [], {loop.code_hash(source)}, value_of(names_of(source))
    while len(history) < most and (step := loop.search_step(source, history, tried, fixed)):
        description, new = step
        tried.add(loop.code_hash(new))
        value = value_of(names_of(new))
        won = value < best
        history.append((description, "keep" if won else "discard"))
        source, best = (new, value) if won else (source, best)
    return history


def names_of(source):
    """The constants of a file that only assigns."""
    found = {}
    exec(source, {"Sizes": lambda **values: SimpleNamespace(**values)}, found)
    return SimpleNamespace(**found)


def moves(history):
    return [description.removeprefix("search: ") for description, _ in history]


def lost(source, most=500, fixed=()):
    """The moves of a search in which nothing wins."""
    return moves(steps(source, lambda names: 0, most, fixed))


# ---- which numbers are searched


def labels(source, fixed=()):
    return [(label, node.value) for label, node in loop.constants(source, fixed)]


def test_the_numbers_of_top_level_constants_are_found_also_in_tuples_and_in_the_arguments_of_a_call():
    source = "RATE = 0.1\nBETAS = (0.9, 0.99)\nLIST = [1, 2]\nCPU = Sizes(depth=2, wide=True)\nM1 = 5\n"
    assert labels(source) == [
        ("RATE", 0.1), ("BETAS[0]", 0.9), ("BETAS[1]", 0.99), ("LIST[0]", 1), ("LIST[1]", 2),
        ("CPU.depth", 2), ("CPU.wide", True), ("M1", 5),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "statement",
    [
        "name = 5", "Width = 5", "_WIDTH = 5", "WIDTH = 'wide'", "WIDTH = None", "WIDTH = 5j",
        "WIDTH = 2 * 4", "WIDTH = -2", "WIDTH = +0.5", "WIDTH = not 0.5", "WIDTH = {**{'a': 1}}", "WIDTH = RATE", "A, B = 1, 2",
        "WIDTH = ((1.0, 2.0), (3.0, 4.0))",
        "WIDTH = Sizes(4)", "WIDTH: int", "WIDTH += 1", "def f():\n    WIDTH = 1", "if True:\n    WIDTH = 1",
        "self.WIDTH = 1", "WIDTH[0] = 1", "'WIDTH = 1'", "import WIDTH",
    ],
)  # fmt: skip
def test_what_is_no_plain_number_of_a_top_level_constant_is_left_alone(statement):
    assert labels(f"RATE = 0.1\n{statement}\n") == [("RATE", 0.1)]


def test_they_are_found_under_a_type_in_a_dictionary_and_below_zero_where_they_are_no_index():
    source = "RATE: float = 0.1\nOWN = {'one': 1.0, 2: -0.5, 'a b': -1}\nLOSS = -0.25\nBIAS = (-0.5, -1)\n"
    assert labels(source) == [
        ("RATE", 0.1), ("OWN['one']", 1.0), ("OWN[2]", -0.5), ("LOSS", -0.25), ("BIAS[0]", -0.5),
    ]  # fmt: skip
    assert lost(source, 4)[1:] == ["OWN['one'] 1.0 -> 1.49", "OWN[2] -0.5 -> -0.335", "LOSS -0.25 -> -0.168"]


def test_a_name_that_is_deleted_is_no_constant():
    """A search that fails on the file would fail at each turn, for the rest of the night."""
    assert labels("RATE = 0.1\nWIDTH = Sizes(1)\ndel WIDTH\ndel RATE\n") == [("RATE", 0.1)]


def test_what_the_ruler_wants_left_alone_is():
    source = "RATE = 0.1\nGPU = Sizes(depth=8)\nCPU = Sizes(depth=2)\nSECONDS = (1, 2)\n"
    assert labels(source, ["GPU", "SECONDS"]) == [("RATE", 0.1), ("CPU.depth", 2)]
    assert {move.split()[0] for move in lost(source, fixed=["GPU", "SECONDS"])} == {"RATE", "CPU.depth"}


# ---- how far one moves


def both(value, step=loop.FIRST_STEP):
    return loop.moved(value, 1, step), loop.moved(value, -1, step)


def test_below_zero_up_is_towards_zero():
    assert both(-0.25) == (-0.168, -0.373) and both(-3.0) == (-2.01, -4.48)


def test_flags_flip():
    assert both(True) == (False, False) and both(False) == (True, True)


def test_powers_of_two_double_and_halve_whatever_the_step():
    for step in (0.4, 0.2, 0.01):
        assert both(64, step) == (128, 32) and both(8, step) == (16, 4)


def test_whole_numbers_stay_whole_move_by_at_least_one_and_stay_above_zero():
    assert both(10) == (14, 6) and both(10, 0.2) == (12, 8) and both(10, 0.01) == (11, 9)
    assert both(3) == (4, 2) and both(2) == (3, 1)
    assert both(1) == (2, 1) and both(0) == (1, 0)
    assert all(type(value) is int for value in both(10))


def test_fractions_move_by_a_factor_and_back():
    assert both(0.02) == (0.0298, 0.0134) and both(3.0) == (4.48, 2.01) and both(1.0) == (1.49, 0.67)
    for value in (0.02, 3.0, 1e-8, 0.3, 0.95):
        assert loop.moved(loop.moved(value, 1, 0.4), -1, 0.4) == pytest.approx(value, rel=0.01)


def test_what_is_near_one_moves_by_its_distance_from_one_and_stays_below_it():
    assert both(0.95) == pytest.approx((0.9665, 0.9254), abs=0.001)
    for value in (0.51, 0.6, 0.9, 0.999):
        up, down = both(value)
        assert 0 < down < value < up < 1


def test_from_zero_a_fraction_moves_to_something_small():
    assert 0 < both(0.0)[1] < both(0.0)[0] < 0.2 and len(repr(both(0.0)[0])) < 7


@pytest.mark.parametrize("value", [0.02, 0.95, 5.0, 3, 7, 100])
def test_a_smaller_step_stays_nearer(value):
    for direction in (1, -1):
        far, near = (abs(loop.moved(value, direction, step) - value) for step in (0.4, 0.2))
        assert near <= far


# ---- one constant: won, lost, halved


UP, DOWN, FIRST = 1, -1, loop.FIRST_STEP


@pytest.mark.parametrize(
    "past, next_one",
    [
        ([], (UP, FIRST)),
        ([(True, "keep")], (UP, FIRST)),
        ([(True, "keep"), (True, "keep")], (UP, FIRST)),
        ([(True, "discard")], (DOWN, FIRST)),
        ([(True, "crash")], (DOWN, FIRST)),
        ([(True, "running")], (DOWN, FIRST)),
        ([(True, "discard"), (False, "keep")], (DOWN, FIRST)),
        ([(True, "discard"), (False, "discard")], (UP, FIRST / 2)),
        ([(True, "keep"), (True, "discard")], (DOWN, FIRST / 2)),  # down again is where it came from
        ([(True, "discard"), (False, "discard"), (True, "discard")], (DOWN, FIRST / 2)),
        ([(True, "discard"), (False, "discard"), (True, "discard"), (False, "discard")], (UP, FIRST / 4)),
        ([(True, "discard"), (False, "discard"), (True, "keep")], (UP, FIRST / 2)),
    ],
)
def test_a_step_that_wins_is_repeated_one_that_loses_tried_the_other_way_and_both_lost_halve_it(
    past, next_one
):
    assert loop.next_step(past) == next_one


def test_where_both_ways_were_even_the_next_steps_are_wide_again_and_of_another_size():
    even = [(True, "even"), (False, "even")]
    assert loop.next_step(even) == (UP, pytest.approx(FIRST * 2**0.618))
    assert loop.next_step([*even, (True, "discard"), (False, "even")])[1] == pytest.approx(FIRST * 2**-0.382)
    assert loop.next_step([(True, "keep"), (True, "even")])[1] == FIRST / 2  # what it came from is worse
    assert loop.next_step([(True, "discard"), (False, "even")])[1] == FIRST / 2


def test_after_the_smallest_step_wide_ones_come_again_so_that_a_night_goes_on():
    steps = [loop.next_step([(True, "discard"), (False, "discard")] * n)[1] for n in range(13)]
    assert steps[5] == pytest.approx(FIRST / 32) and steps[6] == pytest.approx(FIRST * 2**0.618)
    assert len(lost("RATE = 1.5\n")) > 40


def test_in_a_night_of_noise_no_step_is_smaller_than_what_can_be_seen():
    """Without it, in the second hour of a night all steps were of a percent or less, and all rows were even."""
    noise, rng, source, history, tried = 0.002, random.Random(0), "RATE = 1.3\n", [], set()
    for _ in range(60):
        description, new = loop.search_step(source, history, tried)
        tried.add(loop.code_hash(new))
        worse = math.log(names_of(new).RATE / 1.3) ** 2 / 10 + rng.gauss(0, noise)
        history.append((description, "even" if worse < noise else "discard"))
    values = [names_of(f"RATE = {move.split()[-1]}").RATE for move in moves(history)]
    far = [abs(math.log(value / 1.3)) for value in values]
    assert min(far) > 0.02 and len({*values}) == 60 and sum(step > 0.3 for step in far) > 10


def test_what_is_even_the_row_says():
    def came(change, error, status="discard"):
        return loop.Row("1234567", 1.0, 1.0, status, "an idea", change, error).came_to

    assert came(0.001, 0.002) == came(-0.001, 0.001) == "even" and came(0.003, 0.002) == "discard"
    assert came(-0.001, 0.002, "keep") == "keep" and came(math.nan, math.nan, "crash") == "crash"


def test_one_constant_walks_to_where_it_is_best():
    history = steps("RATE = 0.02\n", lambda names: abs(names.RATE - 0.1))
    assert moves(history)[:6] == [
        "RATE 0.02 -> 0.0298", "RATE 0.0298 -> 0.0445", "RATE 0.0445 -> 0.0664", "RATE 0.0664 -> 0.0991",
        "RATE 0.0991 -> 0.148", "RATE 0.0991 -> 0.0811",
    ]  # fmt: skip
    assert [status for _, status in history[:6]] == ["keep"] * 4 + ["discard"] * 2


def test_one_that_is_best_lower_is_found_lower():
    history = steps("RATE = 0.5\n", lambda names: abs(names.RATE - 0.2))
    assert moves(history)[:3] == ["RATE 0.5 -> 0.746", "RATE 0.5 -> 0.335", "RATE 0.335 -> 0.225"]
    last = [description for description, status in history if status == "keep"][-1]
    assert float(last.split()[-1]) == pytest.approx(0.2, rel=0.01)


def test_a_search_of_several_constants_of_every_kind_comes_near_the_best_of_each():
    source = "RATE = 0.02\nDEPTH = 4\nWIDTH = 64\nBETAS = (0.9, 0.99)\nWIDE = False\nDECAY = 0.0\n"

    def value(names):
        far = [
            abs(math.log(names.RATE / 0.07)),
            abs(names.DEPTH - 7) / 4,
            abs(math.log2(names.WIDTH / 256)),
        ]
        far += [abs(math.log((1 - names.BETAS[0]) / 0.2)), not names.WIDE, abs(names.DECAY - 0.1)]
        return sum(far)

    assert value(names_of(source)) > 5
    history, now = steps(source, value, 60), source
    for description, status in history:
        if status == "keep":
            _, label, before, _, after = description.split()
            node = dict(loop.constants(now))[label]
            assert repr(node.value) == before
            now = loop.with_constant(now, node, loop.ast.literal_eval(after))
    assert value(names_of(now)) < 1


# ---- which constant is next


def test_the_constant_that_was_moved_least_is_next():
    source = "A = 1.5\nB = 1.5\nC = 1.5\n"
    assert [move[0] for move in lost(source, 9)] == list("ABCABCABC")
    history = [
        ("search: A 1.5 -> 2.24", "discard"),
        ("search: B 1.5 -> 2.24", "crash"),
        ("search: A 1.5 -> 1.01", "discard"),
    ]
    assert moves([(loop.search_step(source, history, set())[0], "")]) == ["C 1.5 -> 2.24"]


def test_what_won_goes_on_at_once_though_it_was_moved_most():
    history = [("search: B 1.0 -> 1.49", "discard"), ("search: A 1.0 -> 1.49", "keep")]
    assert loop.search_step("A = 1.49\nB = 1.0\nC = 1.0\n", history, set())[0] == "search: A 1.49 -> 2.22"


def test_what_runs_now_is_left_until_the_others_had_their_turn():
    source, history, found = "A = 1.5\nB = 1.5\n", [("search: A 1.5 -> 2.24", "running")], []
    tried = {loop.code_hash(source.replace("A = 1.5", "A = 2.24"))}
    for _ in range(3):
        description, new = loop.search_step(source, history, tried)
        history.append((description, "running"))
        tried.add(loop.code_hash(new))
        found.append(description)
    assert found == ["search: B 1.5 -> 2.24", "search: A 1.5 -> 1.01", "search: B 1.5 -> 1.01"]


def test_other_experiments_are_no_moves():
    history = [
        ("baseline", "keep"),
        ("A 1.5 -> 2.24", "discard"),
        ("wider A", "keep"),
        ("a search: A 1.5 -> 2.24", "discard"),
    ]
    assert loop.search_step("A = 1.5\n", history, set())[0] == "search: A 1.5 -> 2.24"


def test_the_remark_behind_a_description_changes_nothing():
    plain = [("search: A 1.5 -> 2.24", "crash"), ("search: B True -> False", "discard")]
    remarked = [(f"{description} [out of memory: a -> b]", status) for description, status in plain]
    source = "A = 1.5\nB = True\n"
    assert loop.search_step(source, plain, set()) == loop.search_step(source, remarked, set())


def test_it_follows_from_the_rows_alone():
    source = "A = 1.5\nB = 8\nC = (0.9, True)\n"
    history = steps(source, lambda names: abs(names.A - 3) + abs(names.B - 32), 25)
    for end in range(len(history)):
        now, tried = source, {loop.code_hash(source)}
        for description, status in history[:end]:
            _, label, _, _, after = description.split()
            new = loop.with_constant(now, dict(loop.constants(now))[label], loop.ast.literal_eval(after))
            tried.add(loop.code_hash(new))
            now = new if status == "keep" else now
        assert loop.search_step(now, history[:end], tried)[0] == history[end][0]


# ---- what was tried, and the end


def test_what_was_tried_is_passed_over_in_its_order():
    source = "A = 1.5\n"

    def next_after(*values):
        return loop.search_step(source, [], {loop.code_hash(f"A = {value}") for value in values})[0]

    assert next_after() == "search: A 1.5 -> 2.24"
    assert next_after(2.24) == "search: A 1.5 -> 1.01"
    assert next_after(2.24, 1.01) == "search: A 1.5 -> 1.83"
    assert next_after(2.24, 1.01, 1.83) == "search: A 1.5 -> 1.23"


def test_code_that_differs_in_comments_alone_was_tried():
    assert loop.search_step("A = True  # why\n", [], {loop.code_hash("A = False")}) is None


def test_it_ends_where_nothing_new_is_left():
    assert loop.search_step("import prepare\n", [], set()) is None
    assert lost("A = True\n") == ["A True -> False"]
    assert lost("A = 1\n") == ["A 1 -> 2"]
    assert lost("A = 64\nB = False\n") == ["A 64 -> 128", "B False -> True", "A 64 -> 32"]
    assert loop.search_step("A = -1\n", [], set()) is None


@pytest.mark.every(3)
@pytest.mark.parametrize("value", [1.0, 0.5, -0.5, 0.95, 0.0, 1e-12, 3e22, 7, 4, 3, 0, 1000, 524288])
def test_of_each_constant_it_ends_and_nothing_is_tried_twice(value):
    found = lost(f"A = {value!r}\n")
    assert 1 <= len(found) < 300 and len({*found}) == len(found)


@pytest.mark.slow
def test_every_value_is_read_back_from_its_row():
    """A row that can't be read back is no move: its constant would always be the one that was moved least."""
    for value in (1.0, 0.5, -0.5, 0.0, 1e-12, 3e22, 1e300, 7, True, 12345678901234567890):
        for move in lost(f"A = {value!r}\n", 80):
            assert loop.MOVE.fullmatch(f"search: {move}"), move


@pytest.mark.slow
@pytest.mark.parametrize("path", [STAND_IN / "train.py", ROOT / "train.py"], ids=["stand-in", "shipped"])
def test_every_step_on_a_real_file_compiles_changes_one_line_and_is_new(path):
    source = path.read_text()
    history, tried = [], {loop.code_hash(source)}
    for number in range(12):
        description, new = loop.search_step(source, history, tried)
        code = loop.code_hash(new)
        assert code not in tried
        assert sum(a != b for a, b in zip(source.split("\n"), new.split("\n"), strict=True)) == 1
        tried.add(code)
        won = number % 7 == 3
        history.append((description, "keep" if won else "discard"))
        source = new if won else source


def test_a_constant_is_replaced_where_it_stands_also_behind_characters_of_several_bytes():
    source = "'''é 想法'''; ÄHM = 'ü'; A, B = 1, 2; RATE = 0.5; DEPTH = 3  # 想法\n"
    found = dict(loop.constants(source))
    assert loop.with_constant(source, found["RATE"], 0.25) == source.replace("0.5", "0.25")
    assert loop.with_constant(source, found["DEPTH"], 4) == source.replace("3 ", "4 ")


# ---- an edit, carried to another file


def test_the_difference_of_any_two_texts_turns_the_one_into_the_other():
    rng = random.Random(0)
    lines = ["a", "b", "c", "a", "    a", "  b ", "", " ", "\tx = 1", "if a:"]
    for _ in range(4000):
        before, after = ("\n".join(rng.choices(lines, k=rng.randint(1, 12))) for _ in range(2))
        if before.strip():
            assert loop.apply_blocks(before, loop.blocks_between(before, after)) == after, (before, after)


def test_so_does_that_of_real_files_with_lines_moved_taken_out_and_put_in():
    rng = random.Random(0)
    before = (ROOT / "train.py").read_text()
    for _ in range(20):
        lines = before.split("\n")
        for _ in range(rng.randint(1, 6)):
            at, other = rng.randrange(len(lines)), rng.randrange(len(lines))
            kind = rng.randrange(3)
            if kind == 0:
                del lines[at]
            elif kind == 1:
                lines.insert(at, lines[other])
            else:
                lines[at], lines[other] = lines[other], lines[at]
        after = "\n".join(lines)
        assert loop.apply_blocks(before, loop.blocks_between(before, after)) == after


def test_it_applies_beside_a_change_of_a_neighbouring_constant():
    base = "import prepare\nA = 1\nB = 2\nC = 3\n"
    edit = loop.blocks_between(base, base.replace("B = 2", "B = 20"))
    best = base.replace("A = 1", "A = 10").replace("C = 3", "C = 30")
    assert loop.apply_blocks(best, edit) == "import prepare\nA = 10\nB = 20\nC = 30\n"


def test_edits_of_different_constants_apply_in_any_order():
    rng, names = random.Random(0), [f"NAME_{n}" for n in range(8)]
    base = "".join(f"{name} = {n}\n" for n, name in enumerate(names))

    def edited(source, chosen):
        return "".join(
            f"{line}0\n" if line.split()[0] in chosen else f"{line}\n" for line in source.splitlines()
        )

    for _ in range(200):
        mine, other = {*rng.sample(names, 3)}, {*rng.sample(names, 3)}
        edit = loop.blocks_between(base, edited(base, mine - other))
        assert loop.apply_blocks(edited(base, other), edit) == edited(edited(base, other), mine - other)


def test_what_changes_the_same_line_is_refused():
    base = "A = 1\nB = 2\n"
    with pytest.raises(loop.Refused, match="not in the file"):
        loop.apply_blocks("A = 1\nB = 9\n", loop.blocks_between(base, "A = 1\nB = 3\n"))


# ---- in a night


def described(project):
    return [(row["description"], row["status"]) for row in project.rows()]


@pytest.mark.slow
def test_a_night_in_parts_goes_the_way_of_a_night_in_one(project):
    project.night("--experiments", 3, offline=True)
    whole = described(project)
    project.git("checkout", "--quiet", "main")
    project.git("branch", "-D", "autoresearch/t")
    for number in (2, 1):
        project.night("--experiments", number, offline=True)
    assert described(project) == whole and len(whole) == 4


def test_a_night_searches_all_constants_but_those_that_the_ruler_fixed_and_ends_where_nothing_is_left(
    project,
):
    source = "import prepare\nSECONDS = 1.0\nWIDE = False\nDEEP = 1\nprepare.finish(2.0 + WIDE + DEEP)\n"
    project.write("train.py", source)
    project.commit("two constants")
    session = project.night("--experiments", 9, offline=True)
    assert described(project) == [
        ("baseline", "keep"), ("search: WIDE False -> True", "discard"), ("search: DEEP 1 -> 2", "discard"),
    ]  # fmt: skip
    assert not session.ledger.unfinished


@pytest.mark.every(3)
@pytest.mark.parametrize(
    "idea", ["search: DEPTH 4 -> 5.", "search: DEPTH 4 -> 007", "search: DEPTH ... -> ..."]
)
def test_a_models_idea_in_the_searchs_own_form_is_no_step_of_it(project, idea):
    session = project.night("--experiments", 3, replies=[block("DEPTH = 4", "DEPTH = 5", idea)])
    assert [description for description, _ in described(project)][1] == idea
    assert "Traceback" not in session.output.getvalue() and len(session.ledger.rows) == 4


def test_a_night_of_several_devices_tries_nothing_twice(project):
    session = project.night("--experiments", 5, devices=3, offline=True)
    codes = [experiment.trailers["Code"] for experiment in session.ledger.ended]
    assert len(codes) >= 6 and len({*codes}) == len(codes)
    assert all(description.startswith("search: ") for description, _ in described(project)[1:])
