"""The edit: what a model may send, and what becomes of it. Pure functions of text."""

import contextlib
import signal
from types import SimpleNamespace

import pytest
from conftest import block

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
        loop.code_hash(applied(reply, source))
    return str(error.value)


# ---- what models send: each reply applies exactly, or its refusal says what to fix


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


def bare(search, replacement):
    """A block without an IDEA and a reason, as a reply's second one."""
    return block(search, replacement).partition("\n\n")[2]


WIDE, DEEP = ("WIDTH = 64", "WIDTH = 128"), ("DEPTH = 4", "DEPTH = 5")
WIDER, DEEPER = block("WIDTH = 64", "WIDTH = 128"), block("DEPTH = 4", "DEPTH = 5")
BARE, BARE_DEEPER = bare(*WIDE), bare(*DEEP)
BODY = "        x = layer\n        if x:\n            print(x)"
DIFF = "--- a/train.py\n+++ b/train.py\n@@ -3 +3 @@\n-WIDTH = 64\n+WIDTH = 128\n"
ABOUT = '    """Use:\n    ```\n    python train.py\n    ```\n    """\n'
JSON = '{"path": "train.py", "text": "import prepare\\nrun = prepare.Run()\\nrun.finish(1)"}'
TWO = "<<<<<<< %s\nWIDTH = 64\n=======\nWIDTH = 128\n>>>>>>> %s\n"

REPLIES = {
    # several blocks
    "one block": (WIDER, changed(WIDE)),
    "two blocks": (WIDER + BARE_DEEPER, changed(WIDE, DEEP)),
    "two blocks with an IDEA each": (WIDER + DEEPER, "isn't clear"),
    "a block upon a block": (
        WIDER + bare("WIDTH = 128\nDEPTH = 4", "WIDTH = 128\nDEPTH = 6"),
        changed(WIDE, ("DEPTH = 4", "DEPTH = 6")),
    ),
    "a block upon lines that are gone": (
        WIDER + bare("WIDTH = 64\nDEPTH = 4", "DEPTH = 6"),
        "not in the file",
    ),
    "a second block that fits nothing": (WIDER + bare("NOTHING = 1", "NOTHING = 2"), "not in the file"),
    "prose before, between and after": (
        f"Sure! Here it is:\n\n{WIDER}\nand\n{BARE_DEEPER}\nGood luck!",
        changed(WIDE, DEEP),
    ),
    "a deletion": ("<<<<<<< SEARCH\nDEPTH = 4\n=======\n>>>>>>> REPLACE", changed(("DEPTH = 4\n", ""))),
    "a deletion of everything": (f"<<<<<<< SEARCH\n{SOURCE}=======\n>>>>>>> REPLACE", ""),
    # fences
    "a block in a python fence": (f"IDEA: x\n```python\n{BARE}```\n", changed(WIDE)),
    "a block in a diff fence": (f"IDEA: x\n```diff\n{BARE}```\n", changed(WIDE)),
    "a block in a tilde fence": (f"IDEA: x\n~~~\n{BARE}~~~\n", changed(WIDE)),
    "a block in a fence of four": (f"IDEA: x\n````\n{BARE}````\n", changed(WIDE)),
    "a fence in the REPLACE part": (block("WIDTH = 64", "```python\nWIDTH = 128\n```"), "```python"),
    "a fence in both parts": (
        block("```python\nWIDTH = 64\n```", "```python\nWIDTH = 128\n```"),
        changed(WIDE),
    ),
    "a docstring with a fence": (
        block("def main():", "def main():\n" + ABOUT[:-1]),
        changed(("def main():\n", "def main():\n" + ABOUT)),
    ),
    # markers
    "no SEARCH marker": ("WIDTH = 64\n=======\nWIDTH = 128\n>>>>>>> REPLACE", "in this order"),
    "no divider": ("<<<<<<< SEARCH\nWIDTH = 64\n>>>>>>> REPLACE", "in this order"),
    "no REPLACE marker": ("<<<<<<< SEARCH\nWIDTH = 64\n=======\nWIDTH = 1\n", "cut off"),
    "only a SEARCH part": ("<<<<<<< SEARCH\nWIDTH = 64\n", "cut off"),
    "a REPLACE marker too many": (WIDER + ">>>>>>> REPLACE\n", "in this order"),
    "a second divider": (
        "<<<<<<< SEARCH\nWIDTH = 64\n=======\nW\n=======\nX\n>>>>>>> REPLACE",
        "=======",
    ),
    "a divider in the prose": (WIDER + "\n=======\n" + BARE_DEEPER, changed(WIDE, DEEP)),
    "a heading in the replaced code": (
        block('"""Model\n=======\n"""\nWIDTH = 64', "WIDTH = 1"),
        "=======",
    ),
    "a heading in a comment": (
        block("WIDTH = 64", "# Model\n# =======\nWIDTH = 128"),
        changed(("WIDTH = 64", "# Model\n# =======\nWIDTH = 128")),
    ),
    "a block in a block": (
        "<<<<<<< SEARCH\nWIDTH = 64\n<<<<<<< SEARCH\nDEPTH = 4\n=======\nX\n>>>>>>> REPLACE",
        "in this order",
    ),
    "markers of four": ("<<<< SEARCH\nWIDTH = 64\n====\nWIDTH = 1\n>>>> REPLACE", "in this order"),
    **{
        f"markers of {n}": (
            f"{'<' * n} SEARCH\nWIDTH = 64\n{'=' * n}\nWIDTH = 128\n{'>' * n} REPLACE",
            changed(WIDE),
        )
        for n in range(5, 10)
    },
    "markers of ten": (
        WIDER + f"{'<' * 10} SEARCH\nDEPTH = 4\n{'=' * 10}\nDEPTH = 5\n{'>' * 10} REPLACE",
        "in this order",
    ),
    "a conflict of git": (TWO % ("HEAD", "branch"), "in this order"),
    "ORIGINAL and UPDATED after a block": (
        DEEPER + TWO % ("ORIGINAL", "UPDATED"),
        "in this order",
    ),
    "small letters and colons after a block": (
        DEEPER + TWO % ("search:", "replace:"),
        changed(WIDE, DEEP),
    ),
    "minus and plus after a block": (
        DEEPER + "------- SEARCH\nWIDTH = 64\n=======\nW = 1\n+++++++ REPLACE",
        "in this order",
    ),
    "spaces after the markers": (
        WIDER.replace("SEARCH", "SEARCH  ").replace("===\n", "===\t\n").replace(">> REPLACE", ">> REPLACE "),
        changed(WIDE),
    ),
    "indented markers": (
        WIDER.replace("<<<<<<<", "  <<<<<<<").replace("=======", "  =======").replace(">>>>>>>", "  >>>>>>>"),
        changed(WIDE),
    ),
    "an indented block": ("- this:\n" + "".join(f"  {line}\n" for line in BARE.split("\n")), changed(WIDE)),
    "a quoted block": ("".join(f"> {line}\n" for line in BARE.split("\n")), "in this order"),
    "HTML's escapes": (WIDER.replace("<", "&lt;").replace(">", "&gt;"), "no edit"),
    # what SEARCH says
    "an empty SEARCH": ("<<<<<<< SEARCH\n=======\nx = 1\n>>>>>>> REPLACE", "quote more"),
    "a blank SEARCH": (block("\n  \n", "x = 1"), "quote more"),
    "an ambiguous SEARCH": (block("WIDTH = 64", "DEPTH = 4") + BARE_DEEPER, "2 times"),
    "part of a line": (block("= 64", "= 128"), "\nWIDTH = 64\n"),
    "a first line without its indent": (
        block(BODY.strip(), BODY.strip().replace("layer", "1")),
        "        x = layer\n        if x:",
    ),
    "a shift to the left": (
        block("for layer in range(DEPTH):\n    x = layer", "for layer in range(DEPTH):\n    x = 1"),
        changed(("x = layer", "x = 1")),
    ),
    "a shift to the right": (
        block("            x = layer\n            if x:", "            x = 2 * layer\n            if x:"),
        changed(("x = layer", "x = 2 * layer")),
    ),
    "a shift that the REPLACE part hasn't": (
        block("            x = layer\n            if x:", "        x = 2 * layer\n        if x:"),
        "indentation doesn't fit",
    ),
    "trailing spaces in the code": (
        block("WIDTH = 64   \nDEPTH = 4\t", "WIDTH = 128\nDEPTH = 4"),
        changed(WIDE),
    ),
    "tabs for spaces": (
        block("\tfor layer in range(DEPTH):\n\t\tx = layer", "\tfor layer in range(DEPTH):\n\t\tx = 1"),
        "not in the file",
    ),
    "a tab for the only indent": (
        block("\trun = prepare.Run()", "\trun = prepare.Run()\n\ty = 1"),
        changed(("run = prepare.Run()", "run = prepare.Run()\n    y = 1")),
    ),
    "line numbers": (
        block("3 WIDTH = 64\n4 DEPTH = 4", "3 WIDTH = 128\n4 DEPTH = 4"),
        "without line numbers",
    ),
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
    "a whole file with existing code": (
        whole(changed(("WIDTH = 64", "# ... existing code ..."))),
        "abbreviated",
    ),
    "a whole file with an ellipsis": (whole(changed(("WIDTH = 64", "..."))), "abbreviated"),
    "an Ellipsis as an index": (
        block("x = layer", "x = layer[..., None]"),
        changed(("x = layer", "x = layer[..., None]")),
    ),
    # diffs and whole files
    "a diff": (DIFF, "no edit"),
    "a diff in a fence": (f"```diff\n{DIFF}```", "isn't one whole file"),
    "a diff of the whole file": (
        whole("".join(f"+{line}\n" for line in SOURCE.split("\n")), "```diff"),
        "isn't one whole file",
    ),
    "a whole file": (whole(changed(WIDE)), changed(WIDE)),
    "a whole file and prose": (
        whole(changed(WIDE)) + "\nThis should help.\n```bash\npython train.py\n```\n",
        changed(WIDE),
    ),
    "a whole file in a py fence": (whole(changed(WIDE), "```py"), changed(WIDE)),
    "a whole file without a fence": (changed(WIDE), "no edit"),
    "a whole file in an indented fence": (whole(changed(WIDE), "  ```python", "  ```"), "no edit"),
    "a whole file in tildes": (whole(changed(WIDE), "~~~python", "~~~"), "no edit"),
    "a whole file that is cut off": (whole(SOURCE, closing=""), "cut off"),
    "a whole file with an indented fence inside": (whole(ABOUT[4:] + SOURCE), ABOUT[4:] + SOURCE),
    "a whole file with a fence inside": (
        whole(changed(("WIDTH", '"""\n```\nWIDTH\n```\n"""\nWIDTH'))),
        "send all of it",
    ),
    "two whole files": (whole(SOURCE) + "or\n" + whole(changed(WIDE)), "isn't one whole file"),
    "a piece of the file": (whole("WIDTH = 128\n"), "isn't one whole file"),
    # names of files
    "train.py before the block": ("IDEA: x\n\ntrain.py\n" + BARE, changed(WIDE)),
    "train.py in the fence": ("IDEA: x\n```python\ntrain.py\n" + BARE + "```\n", changed(WIDE)),
    "train.py in the block": (block("train.py\nWIDTH = 64", "WIDTH = 128"), "not in the file"),
    "train.py in the marker": (BARE.replace("SEARCH", "SEARCH train.py"), "in this order"),
    "train.py by its whole path": ("`/home/me/main/train.py`\n" + BARE, changed(WIDE)),
    "a block for another file": ("prepare.py\n" + bare("SECONDS = 300", "SECONDS = 600"), "not in the file"),
    # thinking
    "thoughts": (f"<think>maybe\n{DEEPER}no</think>{WIDER}", changed(WIDE)),
    "thoughts with the longer tag": (f"<thinking>\nmaybe\n{DEEPER}\n</thinking>\n{WIDER}", changed(WIDE)),
    "thoughts with only an end": (f"maybe\n{DEEPER}</think>\n{WIDER}", changed(WIDE)),
    "thoughts without an end": (f"<think>\n{WIDER}\nor perhaps", "no edit"),
    "thoughts between two blocks": (f"{WIDER}<think>And now?</think>\n{BARE_DEEPER}", changed(WIDE, DEEP)),
    "thoughts that quote their end": (f"<think>then </think>\n{DEEPER}no</think>\n{WIDER}", changed(WIDE)),
    # other forms
    "JSON": ('{"edit": "WIDTH = 128"}', "no edit"),
    "JSON in a fence with the whole file": (whole(JSON + "\n", "```json"), "isn't one whole file"),
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
    "a lone CR after a comment": (
        block("WIDTH = 64", "# wide\rWIDTH = 128"),
        changed(("WIDTH = 64", "# wide\nWIDTH = 128")),
    ),
    "ANSI codes": (block("\x1b[31mWIDTH\x1b[0m = 64", "\x1b[32mWIDTH = 128\x1b[0m"), changed(WIDE)),
    "a BOM": ("\ufeff" + WIDER, changed(WIDE)),
    "a BOM in a whole file": (whole("\ufeff" + changed(WIDE)), changed(WIDE)),
    "zero-width characters": (block("WIDTH\u200b = 64", "WIDTH\u200b = \u2060128"), changed(WIDE)),
    "non-breaking spaces as indent": (
        block("\xa0" * 4 + "run = prepare.Run()", "\xa0" * 4 + "run = 1"),
        changed(("run = prepare.Run()", "run = 1")),
    ),
    "a non-breaking space in code": (block("WIDTH = 64", "WIDTH =\xa0128"), "U+00A0"),
    "smart quotes": (block("WIDTH = 64", "WIDTH = “wide”"), "U+201C"),
    "Chinese": ("想法：加宽\n" + BARE, changed(WIDE)),
    "Arabic": ("IDEA: شبكة أعرض\nلأنها ضيقة.\n" + BARE, changed(WIDE)),
    "emoji": ("IDEA: 🚀 wider 👩\u200d🔬\n" + BARE + "🎉", changed(WIDE)),
    "names in other scripts": (
        block("        x = layer", "        x = ширина = layer"),
        changed(("x = layer", "x = ширина = layer")),
    ),
    # what Python says, and what is no change
    "Python 2": (block("            print(x)", "            print x"), "Missing parentheses"),
    "a typo": (block("WIDTH = 64", "WIDTH = = 64"), "line 3 WIDTH = = 64"),
    "the same file": (whole(SOURCE), "changes nothing"),
    "the same block": (block("WIDTH = 64", "WIDTH = 64"), "changes nothing"),
    "a change of comments": (block("WIDTH = 64", "WIDTH = 64  # wide"), "changes nothing"),
}


def outcome(reply):
    """The new text, after all that the loop asks of it, or the refusal."""
    nothing_tried = SimpleNamespace(ledger=SimpleNamespace(tried=dict))
    try:
        new = applied(reply)
        loop.Session.check_new(nothing_tried, new, SOURCE)
        return new
    except loop.Refused as error:
        return error


THOUGHTS = {
    "think": ("<think>", "</think>"),
    "a time": ('<think duration="3">', "</think>"),
    "capitals": ("<THINKING>", "</THINKING>"),
    "Mistral's": ("[THINK]", "[/THINK]"),
    "Gemma's": ("<|channel>thought\n", "<channel|>"),
    "an older Gemma's": ("<unused94>thought\n", "<unused95>"),
    "Gemini's": ("<thought>", "</thought>"),
    "Cohere's": ("<|START_THINKING|>", "<|END_THINKING|>"),
    "Kimi's": ("◁think▷", "◁/think▷"),
    "Seed's": ("<seed:think>", "</seed:think>"),
    "OpenThinker's": ("<|begin_of_thought|>", "<|end_of_thought|>"),
    "vLLM's": ("<reasoning>", "</reasoning>"),
    "a scratchpad": ("<scratchpad>", "</scratchpad>"),
    "a monologue": ("<inner_monologue>", "</inner_monologue>"),
    "Open WebUI's": ('<details type="reasoning" done="true">\n<summary>4 s</summary>', "</details>"),
    "harmony": ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
    "harmony, asked for a form": (
        "<|channel|>analysis<|message|>",
        "<|channel|>final <|constrain|>x<|message|>",
    ),
    "harmony, its tokens taken out": ("analysis", "assistantfinal"),
    "harmony's final channel alone": ("", "<|channel|>final<|message|>"),
    "a tag's end alone": ("", "</reasoning>"),
}


@pytest.mark.parametrize("opening, end", THOUGHTS.values(), ids=THOUGHTS)
def test_what_a_model_thinks_is_no_part_of_its_answer_whatever_the_tag(opening, end):
    edit = loop.parse_reply(f"{opening}Deeper?\nIDEA: deeper\n{BARE_DEEPER}No.{end}{WIDER}")
    assert loop.apply_edit(SOURCE, edit) == changed(WIDE) and edit.description == "an idea"
    assert (
        opening[:1].isalpha() or not opening or "no edit" in refused(f"{opening}Wider?\n{WIDER}It is narrow.")
    )


@pytest.mark.parametrize(
    "reply",
    [
        f"Let me try.\n{BARE_DEEPER}No, rather:\n{WIDER}",
        f"IDEA: deeper\n{BARE_DEEPER}{WIDER}",
        f"<try>\n{BARE_DEEPER}</try>\n{BARE}",
        f"[ATTEMPT]\n{BARE_DEEPER}[/ATTEMPT]\n{BARE}",
        f"<|musing|>\n{BARE_DEEPER}<|answer|>\n{BARE}",
        f"{WIDER}\nOr all of it:\n{whole(changed(DEEP))}",
    ],
)
def test_where_a_draft_cannot_be_told_from_the_answer_nothing_is_applied(reply):
    assert "isn't clear" in refused(reply)


APPENDED = [
    "<|im_end|>",
    "<|eot_id|>",
    "</s>",
    "<end_of_turn>",
    "<｜end▁of▁sentence｜>",
    "[EOS]",
    "<|END_OF_TURN_TOKEN|>",
]
APPENDED += [
    "```",
    "```<|endoftext|>",
    "</answer>",
    "<|return|>",
    "<turn|>",
    " <eos> ",
    "<|im_end|>\n<|im_start|>user\nNext.",
]


@pytest.mark.parametrize("appended", APPENDED)
def test_what_a_server_appends_to_a_reply_is_no_part_of_it(appended):
    for reply in (WIDER, WIDER.rstrip(), f"```\n{WIDER.rstrip()}"):
        assert applied(reply + appended) == changed(WIDE)
    if "```" not in appended:
        assert loop.parse_reply(f"{WIDER}LESSON: width pays{appended}").lesson.startswith("width pays")
        assert applied(whole(changed(WIDE)).rstrip() + appended.partition("\n")[0]) == changed(WIDE)


def test_what_follows_the_end_of_a_turn_is_not_applied():
    said = (
        f"{WIDER.rstrip()}<|im_end|>\n<|im_start|>user\nAnd now?<|im_end|>\n<|im_start|>assistant\n{DEEPER}"
    )
    assert applied(said) == changed(WIDE)
    assert applied(f"<|im_start|>assistant\n{WIDER}") == changed(WIDE)


def test_special_tokens_in_code_stay():
    assert applied(block("WIDTH = 64", 'BOS = "</s>"')) == changed((WIDE[0], 'BOS = "</s>"'))
    text = changed((WIDE[0], 'BOS = "<|im_end|>"  # or </s> at an end'))
    assert applied(whole(text)) == text


HEADINGS = [
    "### `CPU.mlp_ratio`",
    "**torch.compile**",
    "## 0.02",
    "nn.Linear:",
    "`run.finish`",
    "v1.2",
    "train.py",
]


@pytest.mark.parametrize("heading", HEADINGS)
def test_a_heading_above_a_block_changes_nothing(heading):
    assert applied(f"IDEA: x\n\n{heading}\n```python\n{BARE}```\n") == changed(WIDE)


@pytest.mark.parametrize(
    "search, replace",
    [
        ("\n\nWIDTH = 64", "\n\nWIDTH = 128"),
        ("WIDTH = 64\n\n", "WIDTH = 128\n\n"),
        ("\n  \nWIDTH = 64\n\t", "WIDTH = 128"),
        ("\n\n\nWIDTH = 64\nDEPTH = 4\n\n\n\n\n", "\nWIDTH = 128\nDEPTH = 4\n"),
    ],
)
def test_blank_lines_at_a_parts_edges_that_are_not_in_the_file_refuse_nothing(search, replace):
    assert applied(block(search, replace)) == changed(WIDE)


@pytest.mark.parametrize(
    "reply",
    [
        f"{WIDER}\nOnce more:\n{BARE}",
        f"{WIDER}\nThe final answer:\n{WIDER}",
        f"{WIDER}{BARE}{BARE}",
        f"<answer>\n{WIDER}</answer>\n{BARE}",
        whole(changed(WIDE)) + whole(changed(WIDE)),
    ],
)
def test_an_edit_that_stands_twice_is_applied_once(reply):
    assert applied(reply) == changed(WIDE)


def test_two_edits_that_stand_twice_are_applied_once():
    assert applied(f"{WIDER}{BARE_DEEPER}Again:\n{WIDER}{BARE_DEEPER}") == changed(WIDE, DEEP)
    adds = block("WIDTH = 64", "WIDTH = 64\nHEADS = 2")
    assert applied(adds * 2) == changed((WIDE[0], "WIDTH = 64\nHEADS = 2"))


PLACEHOLDERS = [
    "(keep the other lines)", "omitted for brevity", "... rest", "remaining code here", "[snip]", "see above", "bleibt wie es war",
    "everything else stays", "rest of the loop as is", "der Rest bleibt unverändert",
    "le reste du code est inchangé", "el resto sigue igual", "il resto è invariato", "o restante fica",
    "остальной код без изменений", "其余代码保持不变", "残りは省略", "나머지는 그대로", "باقي الكود", "बाकी कोड",
]  # fmt: skip


@pytest.mark.parametrize("words", PLACEHOLDERS)
def test_a_comment_that_stands_for_code_left_out_gets_no_run(words):
    assert "abbreviated" in refused(block("    run.finish(x)", f"    y = x\n    # {words}"))
    assert "abbreviated" in refused(block(BODY, f"        x = 1\n\n        # {words}\n"))


KNOWN = [
    "der Rest bleibt unverändert", "keep all remaining lines", "其余代码", "(other code)", "le reste", "остальное прежнее"
]  # fmt: skip


@pytest.mark.parametrize("words", KNOWN)
def test_in_a_whole_file_or_before_other_code_it_is_known_by_its_words(words):
    assert "abbreviated" in refused(
        whole(changed(("        if x:\n            print(x)", f"        # {words}")))
    )
    assert "abbreviated" in refused(block(BODY, f"        # {words}\n        x = 1"))


@pytest.mark.parametrize("words", ["here be the loop", "wie gehabt", "etc", "(4 lines)", "как раньше"])
def test_whatever_a_comment_says_it_is_no_code_where_more_code_was(words):
    """Also in words that nobody thought of."""
    for new in (f"        # {words}", f"        x = 1\n        # {words}", f"        # {words}\n\n"):
        assert "abbreviated" in refused(block(BODY, new)), new
        assert "abbreviated" in refused(whole(changed((BODY, new)))), new


@pytest.mark.parametrize(
    "search, replace",
    [
        (BODY, "        # the layer's number\n        x = layer"),  # on the code below it
        (BODY, "        x = layer  # nothing is printed"),
        (f"    # the loop\n{BODY}\n    # the end", "    # the end, at once"),  # in place of a comment
        ("    run.finish(x)", "    run.finish(x)\n    # that was all"),  # nothing is gone
        ("WIDTH = 64", "WIDTH = 128\n# twice as wide"),
    ],
)
def test_a_comment_in_its_place_is_no_placeholder(search, replace):
    source = (
        SOURCE.replace(BODY, f"    # the loop\n{BODY}\n    # the end") if "# the end" in search else SOURCE
    )
    assert applied(block(search, replace), source) == source.replace(search, replace)


HONEST = [
    "WIDTH = 128  # Muon for matrices, AdamW for the rest", "# everything else stays in float32\nWIDTH = 128",
    "# scaled as above\nWIDTH = 128", "# both windows are the same\nWIDTH = 128", "# 既存の重み\nWIDTH = 128",
    "# lr unchanged during warmup\nWIDTH = 128", "# residual: ... + x\nWIDTH = 128", "WIDTH = 128\nNAME = '# rest'",
    "# WIDTH = 64\n# DEPTH = 3\nWIDTH = 128", "WIDTH = 128  # bias omitted", "# keep the other heads at 64\nWIDTH = 128",
]  # fmt: skip


@pytest.mark.parametrize("new", HONEST)
def test_what_a_comment_says_of_code_that_is_there_refuses_nothing(new):
    assert applied(block("WIDTH = 64", new)) == changed((WIDE[0], new))


LEFT_OUT = [
    "        x = 2 * layer  # rest of the loop unchanged", "        x = 2 * layer  # ... existing code ...",
    "        if layer: pass  # unchanged", "        continue  # rest unchanged",
    "        a = 1\n        c = 2\n        d = 3\n        x = 4\n        # rest of the loop unchanged",
]  # fmt: skip


@pytest.mark.parametrize("new", LEFT_OUT)
def test_words_for_code_left_out_count_behind_code_too_where_more_was(new):
    assert "abbreviated" in refused(block(BODY, new))


@pytest.mark.parametrize(
    "words", ["DEPTH removed: WIDTH does it all", "DEPTH = 4  (too deep)", "no longer deep"]
)
def test_a_comment_that_says_what_is_gone_stands_for_nothing(words):
    search, new = "WIDTH = 64\nDEPTH = 4", f"WIDTH = 128\n# {words}"
    assert applied(block(search, new)) == SOURCE.replace(search, new)


THOUGHTS_BEHIND = [f"{WIDER.rstrip()}<think>and?</think>\n{BARE_DEEPER}", f"{WIDER}Then depth<think>and?</think>\n{BARE_DEEPER}",
                   f"{WIDER}I used `WIDTH`<think>and?</think>\n{BARE_DEEPER}", f"{WIDER}好的<think>嗯</think>\n{BARE_DEEPER}",
                   f"{WIDER}It marks the [end of text] here\n{BARE_DEEPER}", f"{WIDER}Now skip <eos> in the loss:\n{BARE_DEEPER}",
                   f"{WIDER}The deeper net actually needs this, too:\n{BARE_DEEPER}", f"{WIDER}It should wait:\n{BARE_DEEPER}",
                   f"{WIDER}Use five layers instead:\n{BARE_DEEPER}"]  # fmt: skip


@pytest.mark.parametrize("reply", THOUGHTS_BEHIND)
def test_of_two_blocks_none_is_lost_for_what_stands_between(reply):
    assert applied(reply) == changed(WIDE, DEEP)


def test_a_thought_that_begins_behind_a_word_and_never_ends_is_no_answer():
    assert "no edit" in refused(f"IDEA: x\nok<think>draft\n{WIDER}")


@pytest.mark.parametrize("more", [f"More\n{DEEPER}", "Use\n<<<<<<< SEARCH\n", "LESSON: junk\n"])
def test_what_follows_a_whole_file_and_its_end_is_none_of_it(more):
    reply = f"{whole(changed(WIDE)).rstrip()}<|im_end|>\n<|im_start|>user\n{more}"
    assert applied(reply) == changed(WIDE) and not loop.parse_reply(reply).lesson


def test_code_that_is_commented_out_is_not_left_out():
    new = "        x = layer\n        # if x:\n        #     print(x)"
    assert applied(block(BODY, new)) == changed((BODY, new))


@pytest.mark.parametrize(
    "words", ["same loop body", "not shown", "etc.", "loop as it was", "the loop stays", "wie gehabt", "保持原样", "lo mismo"]
)  # fmt: skip
def test_a_comment_in_the_place_of_code_before_other_code_is_known_by_its_words(words):
    loop_of = f"    for layer in range(DEPTH):\n{BODY}\n    run.finish(x)"
    assert "abbreviated" in refused(block(loop_of, f"    # {words}\n    run.finish(2)"))


TOKENS = [
    f"IDEA: a mask at <|endoftext|>\nIt is one.\n\n{BARE}", f"The row ends in </s>\n{BARE}", f"</s>\n{WIDER}",
    f"<|im_end|>\n{WIDER}", f"{WIDER}<|im_end|>\n<|im_start|>user\n{DEEPER}", f"{WIDER.rstrip()}<|eot_id|>assistant\n{DEEPER}",
    f"{WIDER.rstrip()}<|im_end|><|im_start|>user\nThanks", f"{WIDER.rstrip()} [end of text]\n{DEEPER}",
    f"{WIDER}Good luck!<|endoftext|>Human: thanks\n{DEEPER}", f"{WIDER.rstrip()} ###\n", f"{WIDER.rstrip()}.\n",
    f"{whole(changed(WIDE)).rstrip()}<|im_end|>user\n{whole(changed(DEEP))}", f"The `<think>` token costs.\n{WIDER}",
    f"A list<reason> of them, where T = '<think>'.\n{WIDER}", f"[REASON] it is narrow\n{WIDER}",
    f"--- Original idea: wider\n{WIDER}", f"\n---\nSearch for width.\n{WIDER}", f"=== Updated plan\n{WIDER}",
    f"<|think_start|>\n{DEEPER}<|think_end|>\n{WIDER}", f"<|thinking|>\n{DEEPER}</|thinking|>\n{WIDER}",
]  # fmt: skip


@pytest.mark.parametrize("reply", TOKENS)
def test_what_a_reply_says_of_tokens_and_tags_is_no_end_of_it_and_what_follows_an_end_is_none_of_it(reply):
    assert applied(reply) == changed(WIDE)


def test_a_token_within_code_ends_nothing():
    new = "# documents are divided by <|endoftext|>\nWIDTH = 128"
    assert applied(block("WIDTH = 64", new) + BARE_DEEPER) == changed((WIDE[0], new), DEEP)


@pytest.mark.parametrize(
    "between",
    ["Hmm, no. That's too slow.", "Instead:", "Wait, this is better:", "User: thanks\nAssistant: so"],
)
def test_a_draft_that_is_taken_back_is_not_applied_with_the_answer(between):
    assert "isn't clear" in refused(f"{WIDER}\n{between}\n\n{BARE_DEEPER}")


@pytest.mark.parametrize(
    "between", ["The mask is [T] now:", "After <bos>:", "<br>", "</edit>\n<edit>", "<file>train.py</file>"]
)
def test_a_tag_that_begins_no_answer_may_stand_between_two_blocks(between):
    assert applied(f"{WIDER}\n{between}\n{BARE_DEEPER}") == changed(WIDE, DEEP)


COMMENTS = [
    "keep the weights small",
    "keep the same shape",
    "keep as fp32",
    "keep every third",
    "omit the bias",
]
COMMENTS += [
    "restore the mean",
    "truncated backpropagation",
    "the rest use AdamW",
    "leave the original scale",
]


@pytest.mark.parametrize("words", COMMENTS)
def test_a_comment_on_the_code_is_no_placeholder(words):
    new = f"# {words}\nWIDTH = 128  # {words}"
    assert applied(block("WIDTH = 64", new)) == changed((WIDE[0], new))
    assert applied(block("WIDTH = 64", f"WIDTH = 128\n# {words}")) == changed(
        (WIDE[0], f"WIDTH = 128\n# {words}")
    )


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
        ("IDEA: \xa0\n", "no idea given"),
        ("IDEA: \u2028\u3000\n", "no idea given"),
        ("IDEA: ***\n", "no idea given"),
    ],
)
def test_the_idea_is_read_from_the_prose(prose, description):
    edit = loop.parse_reply(prose + BARE)
    assert edit.description == description and len(edit.blocks) == 1
    assert "narrow" not in prose or edit.reasoning.startswith("It was narrow.")


@pytest.mark.parametrize(
    "prose, lesson",
    [
        ("IDEA: x\nBecause.\nLESSON: width  pays\n", "width pays"),
        ("IDEA: x\n**LESSON:** \x1b[1mwidth\x1b[0m pays\n", "width pays"),
        ("lesson: width pays\n", "width pays"),
        ("IDEA: x\nMy LESSON: none\n", ""),
        ("IDEA: x\nBecause.\n", ""),
    ],
)
def test_a_lesson_is_a_line_of_its_own_and_no_part_of_the_reasons(prose, lesson):
    edit = loop.parse_reply(prose + BARE)
    assert edit.lesson == lesson
    assert not lesson or "pays" not in edit.reasoning


def test_a_lesson_after_the_block_or_beside_a_whole_file_is_read_too():
    assert loop.parse_reply(WIDER + "LESSON: width pays\n").lesson == "width pays"
    assert loop.parse_reply(whole(changed(WIDE)) + "LESSON: width pays\n").lesson == "width pays"


def test_code_that_was_tried_is_refused_with_what_came_of_it_but_a_return_to_a_keep_is_not():
    new = applied(WIDER)

    def tried(row):
        begun = {loop.code_hash(new): SimpleNamespace(row=row)}
        session = SimpleNamespace(ledger=SimpleNamespace(tried=lambda: begun))
        loop.Session.check_new(session, "# a comment\n" + new, SOURCE)

    with pytest.raises(loop.Refused, match=r"tried: discard, wide, \+0.1000\+-0.0010"):
        tried(loop.Row("1234567", 1.1, 1.0, "discard", "wide", 0.1, 0.001, [1.1]))
    with pytest.raises(loop.Refused, match="being tried now"):
        tried(None)
    tried(loop.Row("1234567", 1.1, 1.0, "keep", "wide", -0.1, 0.001, [1.1]))


def test_a_search_that_is_not_there_is_refused_with_the_nearest_real_lines():
    message = refused(block("    for layer in range(DEPTHS):\n        x = layer", "    pass"))
    assert "not in the file" in message and "    for layer in range(DEPTH):\n        x = layer" in message


def test_blank_lines_are_not_what_makes_lines_near():
    assert "    run = prepare.Run()" in refused(block("    run = prepare.Ran()\n", "    run = 1"))


def test_a_second_match_is_refused():
    assert "2 times" in refused(block("x = 1", "x = 2"), "x = 1\ny = 1\nx = 1\n")


def test_a_change_of_comments_is_the_same_code_and_a_change_of_code_is_not():
    assert loop.code_hash(SOURCE) == loop.code_hash(
        "# a comment\n" + SOURCE.replace("WIDTH = 64", "WIDTH  =  64")
    )
    assert loop.code_hash(SOURCE) != loop.code_hash(SOURCE.replace("64", "65"))


@pytest.fixture
def reads_at_once():
    """Ends a test in which a regular expression takes minutes: no thread goes on meanwhile."""

    def give_up(number, frame):
        raise AssertionError("10 seconds of CPU time for a reply")

    before = signal.signal(signal.SIGPROF, give_up)
    signal.setitimer(signal.ITIMER_PROF, 10)
    yield
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.signal(signal.SIGPROF, before)


NOISE = {
    "words": "word ",
    "thoughts": "<think>",
    "ends of thoughts": "</think>",
    "fences": "```python\n",
    "ideas": "IDEA: x" + " " * 99,
    "headings": "#" * 99,
    "names of files": "a.b/",
    "dividers": "=======\n",
    "blocks that begin": "<<<<<<< SEARCH\n",
    "blocks that begin and divide": "<<<<<<< SEARCH\n=======\n",
    "blocks without an end": "<<<<<<< SEARCH\nx = 1\n=======\nx = 2\n",
    "blank lines": "\n",
    "lines of spaces": " \n",
    "quotes": ">\n",
    "escapes": "\x1b]",
}


@pytest.mark.every(4)
@pytest.mark.parametrize("noise", NOISE.values(), ids=NOISE)
@pytest.mark.parametrize("size", [190_000, 300_000])
def test_a_reply_of_hundreds_of_kilobytes_is_refused_in_few_words_and_at_once(reads_at_once, noise, size):
    """A model that falls into a loop says one thing again and again."""
    noise *= size // len(noise)
    for reply in (noise, f"```python\n{SOURCE}{noise}```"):
        found = outcome(reply)
        assert isinstance(found, loop.Refused) and len(str(found)) < 3000


BEHIND = {
    "tags of a sign": "<!>" * 40 + " x", "tags": "</a>" * 40 + "x", "more tags": "<a>" * 60, "spaces": " " * 100_000 + "x",
    "a token that has no end": "<|end" + "text" * 40_000, "dividers": "=" * 100_000 + "x", "fences": "`" * 100_000,
}  # fmt: skip


@pytest.mark.parametrize("tail", BEHIND.values(), ids=BEHIND)
def test_whatever_stands_behind_a_marker_is_read_at_once(reads_at_once, tail):
    assert isinstance(outcome(f"{WIDER.rstrip()}{tail}\n"), loop.Refused) or tail[-1] in ">`"


@pytest.mark.every(4)
@pytest.mark.parametrize("noise", NOISE.values(), ids=NOISE)
def test_what_is_said_without_end_beside_a_block_is_read_at_once(reads_at_once, noise):
    noise *= 150_000 // len(noise)
    for reply in (
        WIDER + noise,
        noise + "\n" + WIDER,
        block("WIDTH = 64", noise),
        block(noise, "WIDTH = 64"),
    ):
        with contextlib.suppress(loop.Refused):
            loop.parse_reply(reply)


def test_a_search_of_hundreds_of_kilobytes_is_refused_in_few_words():
    assert (
        len(refused(block("x = 1" * 30_000, "y"))) < 6000
        and len(refused(block("x = 1\n" * 25_000, "y"))) < 6000
    )


def test_a_line_of_hundreds_of_kilobytes_that_does_not_compile_is_refused_in_few_words():
    assert len(refused(block("WIDTH = 64", "WIDTH = = " + "1" * 150_000))) < 1000
