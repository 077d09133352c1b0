"""The edit: what a model may send, and what becomes of it. Pure functions of text."""

import random

import pytest
from conftest import ROOT, STAND_IN, block

import loop

SOURCE = """\
import prepare

WIDTH = 64
DEPTH = 4


def main():
    run = prepare.Run()
    for layer in range(DEPTH):
        x = layer
        if x:
            print(x)
    run.finish(x)
"""


def applied(reply, source=SOURCE):
    return loop.apply_edit(source, loop.parse_reply(reply))


def refused(reply, source=SOURCE):
    with pytest.raises(loop.Refused) as error:
        loop.syntax_tree(applied(reply, source))
    return str(error.value)


# ---- what applies


def test_a_block_replaces_its_lines_and_nothing_else():
    assert applied(block("WIDTH = 64", "WIDTH = 128")) == SOURCE.replace("WIDTH = 64", "WIDTH = 128")


def test_several_blocks_apply_one_after_the_other():
    reply = block("WIDTH = 64", "WIDTH = 128") + block("WIDTH = 128\nDEPTH = 4", "WIDTH = 128\nDEPTH = 6")
    assert "WIDTH = 128\nDEPTH = 6" in applied(reply)


def test_idea_and_reasoning_are_read_from_the_prose():
    edit = loop.parse_reply("**IDEA:** wider [mlp]\nIt was narrow.\n" + block("WIDTH = 64", "WIDTH = 65").partition("\n")[2])
    assert edit.description == "wider [mlp]" and edit.reasoning.startswith("It was narrow.")


def test_prose_before_between_and_after_is_no_part_of_the_edit():
    reply = "Sure! Here it is:\n\n" + block("WIDTH = 64", "WIDTH = 128") + "\nand\n" + block("DEPTH = 4", "DEPTH = 5") + "\nGood luck!"
    assert applied(reply) == SOURCE.replace("64", "128").replace("DEPTH = 4", "DEPTH = 5")


def test_blocks_in_a_fence_with_a_filename_apply():
    reply = "IDEA: x\n```python\ntrain.py\n" + block("WIDTH = 64", "WIDTH = 128").partition("\n\n")[2] + "```\n"
    assert "WIDTH = 128" in applied(reply)


@pytest.mark.parametrize("count", [5, 6, 7, 8, 9])
def test_markers_of_five_to_nine_signs_apply(count):
    reply = f"{'<' * count} SEARCH\nWIDTH = 64\n{'=' * count}\nWIDTH = 1\n{'>' * count} REPLACE"
    assert "WIDTH = 1\n" in applied(reply)


def test_windows_line_ends_apply():
    assert "WIDTH = 128" in applied(block("WIDTH = 64\nDEPTH = 4", "WIDTH = 128\nDEPTH = 4").replace("\n", "\r\n"))


def test_thinking_is_not_part_of_the_reply():
    thoughts = "<think>maybe\n" + block("DEPTH = 4", "DEPTH = 9") + "no</think>"
    assert applied(thoughts + block("WIDTH = 64", "WIDTH = 128")) == SOURCE.replace("64", "128")


def test_trailing_space_does_not_matter():
    assert "WIDTH = 128" in applied(block("WIDTH = 64   \nDEPTH = 4\t", "WIDTH = 128\nDEPTH = 4"))


def test_one_uniform_indent_shift_is_undone():
    reply = block("for layer in range(DEPTH):\n    x = layer", "for layer in range(DEPTH):\n    x = layer + 1")
    assert "    for layer in range(DEPTH):\n        x = layer + 1\n" in applied(reply)
    reply = block("        x = layer\n        if x:".replace("        ", "            "), "            x = 2 * layer\n            if x:")
    assert "        x = 2 * layer\n        if x:\n            print(x)" in applied(reply)


def test_a_deletion_is_an_empty_replace():
    assert applied("<<<<<<< SEARCH\nDEPTH = 4\n=======\n>>>>>>> REPLACE") == SOURCE.replace("DEPTH = 4\n", "")


def test_a_whole_file_in_a_fence_is_taken_as_it_is():
    new = SOURCE.replace("64", "32")
    assert applied(f"IDEA: smaller\nHere is all of it.\n```python\n{new}```\n") == new


def test_terminal_escapes_in_a_reply_never_arrive():
    edit = loop.parse_reply("IDEA: \x1b[31mred\x1b[0m\x07\tidea\n" + block("WIDTH = 64", "WIDTH = 1").partition("\n")[2])
    assert edit.description == "red idea"


# ---- what is refused, and what the model is told


def test_a_search_that_is_not_there_is_refused_with_the_nearest_real_lines():
    message = refused(block("    for layer in range(DEPTHS):\n        x = layer", "    pass"))
    assert "not in train.py" in message and "    for layer in range(DEPTH):\n        x = layer" in message


def test_blank_lines_are_not_what_makes_lines_near():
    assert "    run = prepare.Run()" in refused(block("    run = prepare.Run()\n", "    run = 1"))


def test_a_second_match_is_refused():
    assert "2 times" in refused(block("x = 1", "x = 2"), "x = 1\ny = 1\nx = 1\n")


def test_an_empty_search_is_refused():
    assert "empty" in refused("<<<<<<< SEARCH\n\n=======\nx = 1\n>>>>>>> REPLACE")


def test_all_blocks_apply_or_none():
    assert "not in train.py" in refused(block("WIDTH = 64", "WIDTH = 128") + block("NOTHING = 1", "NOTHING = 2"))


def test_code_that_does_not_compile_is_refused_with_its_line():
    message = refused(block("WIDTH = 64", "WIDTH = = 64"))
    assert "doesn't compile" in message and "WIDTH = = 64" in message


def test_tabs_for_spaces_are_refused():
    assert refused(block("\tfor layer in range(DEPTH):\n\t\tx = layer", "\tfor layer in range(DEPTH):\n\t\tx = 1"))


@pytest.mark.parametrize(
    "reply, reason",
    [
        ("", "no edit"),
        ("I think we should make it wider.", "no edit"),
        ('{"edit": "WIDTH = 128"}', "no edit"),
        ("--- a/train.py\n+++ b/train.py\n@@ -3 +3 @@\n-WIDTH = 64\n+WIDTH = 128\n", "no edit"),
        ("```python\nWIDTH = 128\n```", "isn't one whole train.py"),
        (f"```python\n{SOURCE}```\nor\n```python\n{SOURCE}```", "isn't one whole train.py"),
        (f"```python\n{SOURCE.replace('WIDTH = 64', '# ... existing code ...')}```", "abbreviated"),
        (f"```python\n{SOURCE.replace('WIDTH = 64', '...')}```", "abbreviated"),
        ("<<<<<<< SEARCH\nWIDTH = 64\n=======\nWIDTH = 1\n", "cut off"),
        ("<<<<<<< SEARCH\nWIDTH = 64\n>>>>>>> REPLACE", "before its ======="),
        ("<<<<<<< SEARCH\nWIDTH = 64\n=======\nW\n=======\nX\n>>>>>>> REPLACE", "more than one ======="),
        ("<<<<<<< SEARCH\nWIDTH = 64\n<<<<<<< SEARCH\nDEPTH = 4\n=======\nX\n>>>>>>> REPLACE", "inside another"),
        ("prepare.py\n<<<<<<< SEARCH\nWIDTH = 64\n=======\nWIDTH = 1\n>>>>>>> REPLACE", "only train.py"),
        *(
            (
                block("WIDTH = 64", "WIDTH = 1") + other.replace("|", "\nDEPTH = 4\n", 1).replace("|", "\nDEPTH = 5\n", 1),
                "looks like a block's marker",
            )
            for other in (
                "<<<<<<< search:|=======|>>>>>>> replace:",
                "<<<<<<< ORIGINAL|=======|>>>>>>> UPDATED",
                "------- SEARCH|=======|+++++++ REPLACE",
            )
        ),
        ("<<<<<<< HEAD\nWIDTH = 64\n=======\nWIDTH = 1\n>>>>>>> branch", "no edit"),
        ("<think>\n" + block("WIDTH = 64", "WIDTH = 1") + "\nor perhaps", "no edit"),
        ("### `loop.py`\n```python\n<<<<<<< SEARCH\nWIDTH = 64\n=======\nWIDTH = 1\n>>>>>>> REPLACE\n```", "only train.py"),
    ],
)
def test_a_reply_in_another_form_is_refused(reply, reason):
    assert reason in refused(reply)


def test_a_change_of_comments_is_the_same_tree_and_a_change_of_code_is_not():
    assert loop.syntax_tree(SOURCE) == loop.syntax_tree("# a comment\n" + SOURCE.replace("WIDTH = 64", "WIDTH  =  64"))
    assert loop.syntax_tree(SOURCE) != loop.syntax_tree(SOURCE.replace("64", "65"))


@pytest.mark.parametrize(
    "noise",
    ["word ", "<think>", "```python\n", "IDEA: x" + " " * 99, "#" * 99, "=======\n", "<<<<<<< SEARCH\n"],
)
@pytest.mark.parametrize("size", [190_000, 300_000])
def test_a_reply_of_hundreds_of_kilobytes_is_refused_in_few_words(noise, size):
    assert len(refused(noise * (size // len(noise)))) < 3000
    assert len(refused(f"```python\n{SOURCE}{noise * (size // len(noise))}```")) < 3000


def test_a_search_of_hundreds_of_kilobytes_is_refused_in_few_words():
    assert len(refused(block("x = 1" * 30_000, "y"))) < 6000 and len(refused(block("x = 1\n" * 25_000, "y"))) < 6000


# ---- random search


@pytest.mark.parametrize("path", [STAND_IN / "train.py", ROOT / "train.py"], ids=["stand-in", "shipped"])
@pytest.mark.parametrize("other", ["GPU", "CPU"])
def test_every_random_reply_applies_and_compiles(path, other):
    source = path.read_text()
    for seed in range(50):
        reply = loop.random_reply(source, random.Random(seed), other)
        new = applied(reply, source)
        loop.syntax_tree(new)
        assert sum(a != b for a, b in zip(source.split("\n"), new.split("\n"), strict=True)) <= 1


def test_random_search_leaves_the_other_devices_sizes_and_tables_alone():
    source = "RATE = 0.1\nTABLE = ((1.0, 2.0), (3.0, 4.0))\nGPU = Sizes(depth=8)\nCPU = Sizes(depth=2, wide=True)\nname = 5\nA, B = 1, 2\n"
    assert [label for label, _ in loop.numbers(source, "GPU")] == ["RATE", "CPU.depth", "CPU.wide"]


def test_random_values_stay_sane():
    rng = random.Random(0)
    for _ in range(300):
        assert 0 < loop.another_value(0.95, rng) < 1
        assert loop.another_value(1, rng) == 2 and loop.another_value(2, rng) >= 1
        assert loop.another_value(64, rng) in (32, 128)
        assert loop.another_value(True, rng) is False
        assert loop.another_value(0.0, rng) > 0
