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


# ---- what models send: each reply applies exactly, or its refusal says what to mend


def whole(text, opening="```python", closing="```"):
    """A reply with a whole file in a fence."""
    return f"IDEA: an idea\nBecause.\n\n{opening}\n{text}{closing}\n"


def changed(*pairs):
    """SOURCE after its lines were replaced."""
    text = SOURCE
    for old, new in pairs:
        assert text.count(old) == 1
        text = text.replace(old, new)
    return text


WIDER, DEEPER = block("WIDTH = 64", "WIDTH = 128"), block("DEPTH = 4", "DEPTH = 5")
BARE, BARE_DEEPER = (reply.partition("\n\n")[2] for reply in (WIDER, DEEPER))  # without IDEA and reason
WIDE, DEEP = ("WIDTH = 64", "WIDTH = 128"), ("DEPTH = 4", "DEPTH = 5")
BODY = "        x = layer\n        if x:\n            print(x)"
DIFF = "--- a/train.py\n+++ b/train.py\n@@ -3 +3 @@\n-WIDTH = 64\n+WIDTH = 128\n"
ABOUT = '    """Use:\n    ```\n    python train.py\n    ```\n    """\n'
JSON = '{"path": "train.py", "text": "import prepare\\nrun = prepare.Run()\\nrun.finish(1)"}'
TWO = "<<<<<<< %s\nWIDTH = 64\n=======\nWIDTH = 128\n>>>>>>> %s\n"

REPLIES = {
    # several blocks
    "one block": (WIDER, changed(WIDE)),
    "two blocks": (WIDER + BARE_DEEPER, changed(WIDE, DEEP)),
    "two blocks with an IDEA each": (WIDER + DEEPER, changed(WIDE, DEEP)),
    "a block upon a block": (WIDER + block("WIDTH = 128\nDEPTH = 4", "WIDTH = 128\nDEPTH = 6"), changed(WIDE, ("DEPTH = 4", "DEPTH = 6"))),
    "a block upon lines that are gone": (WIDER + block("WIDTH = 64\nDEPTH = 4", "DEPTH = 6"), "not in train.py"),
    "a second block that fits nothing": (WIDER + block("NOTHING = 1", "NOTHING = 2"), "not in train.py"),
    "prose before, between and after": (f"Sure! Here it is:\n\n{WIDER}\nand\n{DEEPER}\nGood luck!", changed(WIDE, DEEP)),
    "a deletion": ("<<<<<<< SEARCH\nDEPTH = 4\n=======\n>>>>>>> REPLACE", changed(("DEPTH = 4\n", ""))),
    "a deletion of everything": (f"<<<<<<< SEARCH\n{SOURCE}=======\n>>>>>>> REPLACE", ""),
    # fences
    "a block in a python fence": (f"IDEA: x\n```python\n{BARE}```\n", changed(WIDE)),
    "a block in a diff fence": (f"IDEA: x\n```diff\n{BARE}```\n", changed(WIDE)),
    "a block in a tilde fence": (f"IDEA: x\n~~~\n{BARE}~~~\n", changed(WIDE)),
    "a block in a fence of four": (f"IDEA: x\n````\n{BARE}````\n", changed(WIDE)),
    "a fence in the REPLACE part": (block("WIDTH = 64", "```python\nWIDTH = 128\n```"), "```python"),
    "a fence in both parts": (block("```python\nWIDTH = 64\n```", "```python\nWIDTH = 128\n```"), "not in train.py"),
    "a docstring with a fence": (block("def main():", "def main():\n" + ABOUT[:-1]), changed(("def main():\n", "def main():\n" + ABOUT))),
    # markers
    "no SEARCH marker": ("WIDTH = 64\n=======\nWIDTH = 128\n>>>>>>> REPLACE", "never began"),
    "no divider": ("<<<<<<< SEARCH\nWIDTH = 64\n>>>>>>> REPLACE", "before its ======="),
    "no REPLACE marker": ("<<<<<<< SEARCH\nWIDTH = 64\n=======\nWIDTH = 1\n", "cut off"),
    "only a SEARCH part": ("<<<<<<< SEARCH\nWIDTH = 64\n", "cut off"),
    "a REPLACE marker too many": (WIDER + ">>>>>>> REPLACE\n", "never began"),
    "a second divider": ("<<<<<<< SEARCH\nWIDTH = 64\n=======\nW\n=======\nX\n>>>>>>> REPLACE", "more than one ======="),
    "a divider in the prose": (WIDER + "\n=======\n" + BARE_DEEPER, changed(WIDE, DEEP)),
    "a heading in the replaced code": (block('"""Model\n=======\n"""\nWIDTH = 64', "WIDTH = 1"), "more than one ======="),
    "a heading in a comment": (
        block("WIDTH = 64", "# Model\n# =======\nWIDTH = 128"),
        changed(("WIDTH = 64", "# Model\n# =======\nWIDTH = 128")),
    ),
    "a block in a block": ("<<<<<<< SEARCH\nWIDTH = 64\n<<<<<<< SEARCH\nDEPTH = 4\n=======\nX\n>>>>>>> REPLACE", "inside another"),
    "markers of four": ("<<<< SEARCH\nWIDTH = 64\n====\nWIDTH = 1\n>>>> REPLACE", "marker, and isn't one of"),
    **{
        f"markers of {n}": (f"{'<' * n} SEARCH\nWIDTH = 64\n{'=' * n}\nWIDTH = 128\n{'>' * n} REPLACE", changed(WIDE)) for n in range(5, 10)
    },
    "markers of ten": (WIDER + f"{'<' * 10} SEARCH\nDEPTH = 4\n{'=' * 10}\nDEPTH = 5\n{'>' * 10} REPLACE", "marker, and isn't one of"),
    "a conflict of git": (TWO % ("HEAD", "branch"), "marker, and isn't one of <<<<<<< SEARCH"),
    "ORIGINAL and UPDATED after a block": (DEEPER + TWO % ("ORIGINAL", "UPDATED"), "looks like a block's marker"),
    "small letters and colons after a block": (DEEPER + TWO % ("search:", "replace:"), "looks like a block's marker"),
    "minus and plus after a block": (DEEPER + "------- SEARCH\nWIDTH = 64\n=======\nW = 1\n+++++++ REPLACE", "looks like a block's marker"),
    "spaces after the markers": (
        WIDER.replace("SEARCH", "SEARCH  ").replace("===\n", "===\t\n").replace(">> REPLACE", ">> REPLACE "),
        changed(WIDE),
    ),
    "indented markers": (
        WIDER.replace("<<<<<<<", "  <<<<<<<").replace("=======", "  =======").replace(">>>>>>>", "  >>>>>>>"),
        changed(WIDE),
    ),
    "an indented block": ("- this:\n" + "".join(f"  {line}\n" for line in BARE.split("\n")), changed(WIDE)),
    "a quoted block": ("".join(f"> {line}\n" for line in BARE.split("\n")), "marker, and isn't one of"),
    "HTML's escapes": (WIDER.replace("<", "&lt;").replace(">", "&gt;"), "no edit"),
    # what SEARCH says
    "an empty SEARCH": ("<<<<<<< SEARCH\n=======\nx = 1\n>>>>>>> REPLACE", "empty"),
    "a blank SEARCH": (block("\n  \n", "x = 1"), "empty"),
    "an ambiguous SEARCH": (block("WIDTH = 64", "DEPTH = 4") + DEEPER, "2 times"),
    "part of a line": (block("= 64", "= 128"), "\nWIDTH = 64\n"),
    "a first line without its indent": (block(BODY.strip(), BODY.strip().replace("layer", "1")), "        x = layer\n        if x:"),
    "a shift to the left": (
        block("for layer in range(DEPTH):\n    x = layer", "for layer in range(DEPTH):\n    x = 1"),
        changed(("x = layer", "x = 1")),
    ),
    "a shift to the right": (
        block("            x = layer\n            if x:", "            x = 2 * layer\n            if x:"),
        changed(("x = layer", "x = 2 * layer")),
    ),
    "trailing spaces in the code": (block("WIDTH = 64   \nDEPTH = 4\t", "WIDTH = 128\nDEPTH = 4"), changed(WIDE)),
    "tabs for spaces": (block("\tfor layer in range(DEPTH):\n\t\tx = layer", "\tfor layer in range(DEPTH):\n\t\tx = 1"), "not in train.py"),
    "a tab for the only indent": (block("\trun = prepare.Run()", "\trun = prepare.Run()\n\ty = 1"), "indentation doesn't fit"),
    "line numbers": (block("3 WIDTH = 64\n4 DEPTH = 4", "3 WIDTH = 128\n4 DEPTH = 4"), "without line numbers"),
    "an ellipsis in SEARCH": (
        block("def main():\n    ...\n    run.finish(x)", "def main():\n    run.finish(1)"),
        "without line numbers or omissions",
    ),
    # what REPLACE leaves out
    **{
        f"{words} in REPLACE": (block(BODY, "        x = 1\n        " + words), f"abbreviated ('{words}')")
        for words in (
            "...",
            "…",
            "# ... rest unchanged ...",
            "# (same as before)",
            "# rest of the loop",
            "pass # unchanged",
            "if x: ...",
            "# [existing code]",
            "# no changes here",
            "# the loop stays the same",
        )
    },
    "a whole file with existing code": (whole(changed(("WIDTH = 64", "# ... existing code ..."))), "abbreviated"),
    "a whole file with an ellipsis": (whole(changed(("WIDTH = 64", "..."))), "abbreviated"),
    "an Ellipsis as an index": (block("x = layer", "x = layer[..., None]"), changed(("x = layer", "x = layer[..., None]"))),
    # diffs and whole files
    "a diff": (DIFF, "no edit"),
    "a diff in a fence": (f"```diff\n{DIFF}```", "isn't one whole train.py"),
    "a diff of the whole file": (whole("".join(f"+{line}\n" for line in SOURCE.split("\n")), "```diff"), "isn't one whole train.py"),
    "a whole file": (whole(changed(WIDE)), changed(WIDE)),
    "a whole file and prose": (whole(changed(WIDE)) + "\nThis should help.\n```bash\npython train.py\n```\n", changed(WIDE)),
    "a whole file in a py fence": (whole(changed(WIDE), "```py"), changed(WIDE)),
    "a whole file without a fence": (changed(WIDE), "no edit"),
    "a whole file in an indented fence": (whole(changed(WIDE), "  ```python", "  ```"), "no edit"),
    "a whole file in tildes": (whole(changed(WIDE), "~~~python", "~~~"), "no edit"),
    "a whole file that is cut off": (whole(SOURCE, closing=""), "cut off"),
    "a whole file with an indented fence inside": (whole(ABOUT[4:] + SOURCE), ABOUT[4:] + SOURCE),
    "a whole file with a fence inside": (whole(changed(("WIDTH", '"""\n```\nWIDTH\n```\n"""\nWIDTH'))), "isn't one whole train.py"),
    "two whole files": (whole(SOURCE) + "or\n" + whole(changed(WIDE)), "isn't one whole train.py"),
    "a piece of the file": (whole("WIDTH = 128\n"), "isn't one whole train.py"),
    # names of files
    "train.py before the block": ("IDEA: x\n\ntrain.py\n" + BARE, changed(WIDE)),
    "train.py in the fence": ("IDEA: x\n```python\ntrain.py\n" + BARE + "```\n", changed(WIDE)),
    "train.py in the block": (block("train.py\nWIDTH = 64", "WIDTH = 128"), "not in train.py"),
    "train.py in the marker": (BARE.replace("SEARCH", "SEARCH train.py"), "never began"),
    "train.py by its whole path": ("`/home/me/main/train.py`\n" + BARE, changed(WIDE)),
    "prepare.py": ("prepare.py\n" + BARE, "only train.py"),
    "program.md": ("IDEA: x\n**program.md**\n```\n" + BARE + "```", "only train.py"),
    "loop.py": ("### `loop.py`\n```python\n" + BARE + "```", "only train.py"),
    # thinking
    "thoughts": (f"<think>maybe\n{DEEPER}no</think>{WIDER}", changed(WIDE)),
    "thoughts with the longer tag": (f"<thinking>\nmaybe\n{DEEPER}\n</thinking>\n{WIDER}", changed(WIDE)),
    "thoughts with only an end": (f"maybe\n{DEEPER}</think>\n{WIDER}", changed(WIDE)),
    "thoughts without an end": (f"<think>\n{WIDER}\nor perhaps", "no edit"),
    "thoughts between two blocks": (f"{WIDER}<think>And now?</think>\n{DEEPER}", changed(WIDE, DEEP)),
    "thoughts that quote their end": (f"<think>then </think>\n{DEEPER}no</think>\n{WIDER}", changed(WIDE)),
    "a channel": (f"<|channel|>analysis<|message|>maybe\n{DEEPER}<|end|><|channel|>final<|message|>\n{WIDER}", "<|channel|>"),
    # other forms
    "JSON": ('{"edit": "WIDTH = 128"}', "no edit"),
    "JSON in a fence with the whole file": (whole(JSON + "\n", "```json"), "isn't one whole train.py"),
    "a tool call": (f'<tool_call>\n{{"name": "write_file", "arguments": {JSON}}}\n</tool_call>', "no edit"),
    "XML": ("<edit>\n<search>WIDTH = 64</search>\n<replace>WIDTH = 128</replace>\n</edit>", "no edit"),
    "an apology": ("I'm sorry, but I can't help with that.", "no edit"),
    "a wish": ("I think we should make it wider.", "no edit"),
    "nothing": ("", "no edit"),
    "white space": (" \n\t\n  ", "no edit"),
    "200 KB of prose": ("wider " * 40_000, "too many"),
    # characters
    "CRLF": (block("WIDTH = 64\nDEPTH = 4", "WIDTH = 128\nDEPTH = 4").replace("\n", "\r\n"), changed(WIDE)),
    "lone CR": (WIDER.replace("\n", "\r"), changed(WIDE)),
    "a lone CR after a comment": (block("WIDTH = 64", "# wide\rWIDTH = 128"), changed(("WIDTH = 64", "# wide\nWIDTH = 128"))),
    "ANSI codes": (block("\x1b[31mWIDTH\x1b[0m = 64", "\x1b[32mWIDTH = 128\x1b[0m"), changed(WIDE)),
    "a BOM": ("\ufeff" + WIDER, changed(WIDE)),
    "a BOM in a whole file": (whole("\ufeff" + changed(WIDE)), changed(WIDE)),
    "zero-width characters": (block("WIDTH\u200b = 64", "WIDTH\u200b = \u2060128"), changed(WIDE)),
    "non-breaking spaces as indent": (block("\xa0" * 4 + "run = prepare.Run()", "\xa0" * 4 + "run = 1"), "indentation doesn't fit"),
    "a non-breaking space in code": (block("WIDTH = 64", "WIDTH =\xa0128"), "U+00A0"),
    "smart quotes": (block("WIDTH = 64", "WIDTH = “wide”"), "U+201C"),
    "Chinese": ("想法：加宽\n" + BARE, changed(WIDE)),
    "Arabic": ("IDEA: شبكة أعرض\nلأنها ضيقة.\n" + BARE, changed(WIDE)),
    "emoji": ("IDEA: 🚀 wider 👩\u200d🔬\n" + BARE + "🎉", changed(WIDE)),
    "names in other scripts": (block("        x = layer", "        x = ширина = layer"), changed(("x = layer", "x = ширина = layer"))),
    # what Python says, and what is no change
    "Python 2": (block("            print(x)", "            print x"), "Missing parentheses"),
    "a typo": (block("WIDTH = 64", "WIDTH = = 64"), "line 3: WIDTH = = 64"),
    "the same file": (whole(SOURCE), "changes nothing"),
    "the same block": (block("WIDTH = 64", "WIDTH = 64"), "changes nothing"),
    "a change of comments": (block("WIDTH = 64", "WIDTH = 64  # wide"), "changes nothing"),
}


def outcome(reply):
    """The new text, after all that the loop asks of it, or the refusal."""
    try:
        return loop.accept(applied(reply), SOURCE, {})
    except loop.Refused as error:
        return error


@pytest.mark.parametrize("reply, expected", REPLIES.values(), ids=REPLIES)
def test_a_reply_applies_exactly_or_its_refusal_says_what_to_mend(reply, expected):
    found = outcome(reply)
    assert len(str(found)) < 1000
    if isinstance(found, loop.Refused):
        assert expected and expected in str(found)
    else:
        assert found == expected


@pytest.mark.parametrize(
    "prose, description",
    [
        ("IDEA: wider\nIDEA: deeper\n", "wider"),
        ("**IDEA:** wider [mlp]\nIt was narrow.\n", "wider [mlp]"),
        ("**IDEA**: wider\n", "wider"),
        ("## IDEA: [bold]wider[/]\n", "[bold]wider[/]"),
        ("\ufeffIDEA: wider\n", "wider"),
        ("IDEA: \x1b[31mred\x1b[0m\x07\tidea\n", "red idea"),
        ("IDEA: half an emoji \ud83d\n", "half an emoji"),
        ("Let us widen it.\n", "Let us widen it."),
        ("", "no idea given"),
    ],
)
def test_the_idea_is_read_from_the_prose(prose, description):
    edit = loop.parse_reply(prose + BARE)
    assert edit.description == description and len(edit.blocks) == 1
    assert "narrow" not in prose or edit.reasoning.startswith("It was narrow.")


def test_a_search_that_is_not_there_is_refused_with_the_nearest_real_lines():
    message = refused(block("    for layer in range(DEPTHS):\n        x = layer", "    pass"))
    assert "not in train.py" in message and "    for layer in range(DEPTH):\n        x = layer" in message


def test_blank_lines_are_not_what_makes_lines_near():
    assert "    run = prepare.Run()" in refused(block("    run = prepare.Run()\n", "    run = 1"))


def test_a_second_match_is_refused():
    assert "2 times" in refused(block("x = 1", "x = 2"), "x = 1\ny = 1\nx = 1\n")


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


def test_a_line_of_hundreds_of_kilobytes_that_does_not_compile_is_refused_in_few_words():
    assert len(refused(block("WIDTH = 64", "WIDTH = = " + "1" * 150_000))) < 1000


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
