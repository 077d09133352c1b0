"""Claims about a provider that fails: what can be waited out is waited out, what is too long is shortened, what servers
differ in is found by trying, and the view says so."""

import json
import time
from threading import Event

import pytest
from rich.console import Console

import loop

TEXT = [
    {"role": "system", "content": "rules"},
    {"role": "user", "content": "program and code\n\n# Results so far\n\n" + "a row\n" * 500 + "\n\nMend this edit."},
]
HTML = "<html><body><h1>502 Bad Gateway</h1>[bold]nginx[/bold]</body></html>"
ERROR = {"error": {"message": "Rate limit reached", "type": "requests", "code": "rate_limit_exceeded"}}
QUOTA = {"error": {"message": "You exceeded your current quota", "type": "insufficient_quota", "code": "insufficient_quota"}}
TOO_LONG = {
    "error": {"message": "maximum context length is 8192 tokens", "type": "invalid_request_error", "code": "context_length_exceeded"}
}


@pytest.fixture
def model(server, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    monkeypatch.setattr(loop, "WAITS", (0.01, 0.03))
    console = Console(record=True, width=300, quiet=False, file=open("/dev/null", "w"))
    model = loop.Model(None, loop.Facts(console))
    model.said = lambda: console.export_text(clear=False)
    return model


def late(request):
    time.sleep(1)
    return "too late"


FAULTS = {
    "a rate limit": ((429, ERROR), "Rate limit reached"),
    "a rate limit that says when": ((429, ERROR, {"Retry-After": "1"}), "going on in"),
    "a rate limit with a date": ((429, ERROR, {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}), "going on in"),
    "a rate limit with a fraction": ((429, ERROR, {"Retry-After": "0.02"}), "going on in"),
    "an error of the server": ((500, {"error": {"message": "internal"}}), "internal"),
    "a gateway's page": ((502, HTML, {"Content-Type": "text/html"}), "502"),
    "a page where JSON was due": ((200, HTML, {"Content-Type": "application/json"}), "going on in"),
    "an overloaded server": ((503, ""), "503"),
    "a connection that breaks in mid-reply": (b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n{", "going on in"),
    "a connection that is closed at once": (b"", "going on in"),
    "a reply that never comes": (late, "timed out"),
    "a key revoked at night": ((401, {"error": {"message": "Incorrect API key provided: sk-secret"}}), "401"),
    "an account that may not": ((403, {"error": {"message": "not allowed"}}), "not allowed"),
    "a model taken away": ((404, {"error": {"message": "no such model"}}), "no such model"),
    "a quota used up": ((429, QUOTA), "exceeded your current quota"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_waited_out_and_said(model, server, name):
    fault, said = FAULTS[name]
    if fault is late:
        model.client = model.client.with_options(timeout=0.5)
    server.replies += [fault, fault, "an edit"]
    text, tokens = model.ask([*TEXT], Event())
    assert text == "an edit" and tokens == 100 and len(server.requests) == 3
    assert said in model.said() and "sk-secret" not in model.said()


def test_a_server_that_went_away_and_comes_back_is_asked_again(model, server):
    real = model.client
    model.client = model.openai.OpenAI(api_key="k", base_url="http://127.0.0.1:9/v1", max_retries=0)
    said = model.facts.say
    model.facts.say = lambda text: (said(text), setattr(model, "client", real))
    server.replies += ["an edit"]
    assert model.ask([*TEXT], Event())[0] == "an edit" and "Connection error" in model.said()


def test_waits_grow_up_to_the_longest(model, server, monkeypatch):
    waits, unwanted = [], Event()
    monkeypatch.setattr(unwanted, "wait", waits.append)
    monkeypatch.setattr(loop, "WAITS", (5, 600))
    server.replies += [(500, "")] * 10 + [(429, ERROR, {"Retry-After": "7200"}), "an edit"]
    assert model.ask([*TEXT], unwanted)[0] == "an edit"
    assert waits == [5, 10, 20, 40, 80, 160, 320, 600, 600, 600, 600]


@pytest.mark.parametrize("status, error", [(400, TOO_LONG), (413, {"error": {"message": "Request too large"}}), (422, TOO_LONG)])
def test_a_context_that_is_too_long_loses_the_refusals_first_and_then_the_history(model, server, monkeypatch, status, error):
    unwanted = Event()
    monkeypatch.setattr(unwanted, "wait", lambda _: pytest.fail("what is too long can't be waited out"))
    chat = [*TEXT, {"role": "assistant", "content": "a refused reply"}, {"role": "user", "content": "why"}]
    server.replies += [(status, error), (status, error), "an edit"]
    assert model.ask(chat, unwanted)[0] == "an edit"
    sizes = [sum(len(message["content"]) for message in request["messages"]) for request in server.requests]
    assert [len(request["messages"]) for request in server.requests] == [4, 2, 2] and sizes[2] < sizes[1] < sizes[0]
    last = server.requests[2]["messages"][1]["content"]
    assert "program and code" in last and "a row" not in last and last.endswith("Mend this edit.")  # what is asked for stays


def test_a_request_that_stays_bad_when_it_is_short_is_asked_again_later(model, server):
    server.replies += [(400, TOO_LONG)] * 5 + ["an edit"]
    assert model.ask([*TEXT], Event())[0] == "an edit" and "maximum context length" in model.said()


CUT = {
    "cut off at the longest": {"message": {"role": "assistant", "content": "IDEA: a\n" }, "finish_reason": "length"},
    "cut off by a filter": {"message": {"role": "assistant", "content": "IDEA: a\n"}, "finish_reason": "content_filter"},
    "a refusal": {"message": {"role": "assistant", "content": None, "refusal": "I can't help with that."}},
    "an empty text": {"message": {"role": "assistant", "content": ""}},
    "a call of a tool": {"message": {"role": "assistant", "content": None, "tool_calls": []}, "finish_reason": "tool_calls"},
}  # fmt: skip


@pytest.mark.parametrize("name", CUT)
def test_a_reply_that_is_not_whole_is_refused_and_never_applied(model, server, name):
    server.replies += [CUT[name]]
    with pytest.raises(loop.Refused):
        loop.parse_reply(model.ask([*TEXT], Event())[0])


@pytest.mark.parametrize("body", [{"choices": []}, {"choices": None}, {}, {"choices": [{}]}, {"choices": [{"message": None}]}])
def test_an_answer_without_a_reply_is_a_fault_of_the_server(model, server, body):
    server.replies += [(200, body | {"error": {"message": "no upstream"}}), "an edit"]
    assert model.ask([*TEXT], Event()) == ("an edit", 100) and "no upstream" in model.said()


# ---- what servers differ in: found by trying, remembered


def streamed(*pieces, end="stop", usage=True):
    """A reply in pieces, as a stream; without an `end` it breaks off."""
    choices = [{"index": 0, "delta": {"content": piece}, "finish_reason": None} for piece in pieces]
    chunks = [{"choices": [choice]} for choice in choices]
    chunks += [{"choices": [{"index": 0, "delta": {}, "finish_reason": end}]}] if end else []
    chunks += [{"choices": [], "usage": {"completion_tokens": 10, "total_tokens": 100}}] if usage else []
    return 200, "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n" * bool(end), EVENTS


EVENTS = {"Content-Type": "text/event-stream"}
NO_SYSTEM = {"object": "error", "message": "System role not supported", "code": 400}
NO_LIMIT = {"error": {"message": "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.", "param": "max_tokens"}}
# (what it answers a request that it can't take, which those are, tokens that it counts)
DIFFERENT = {
    "no system role": ((400, NO_SYSTEM), lambda request: has_system(request), 100),
    "no system role, said by a broken template": ((500, "jinja2.exceptions.TemplateError"), lambda request: has_system(request), 100),
    "streams only": ((400, {"error": {"message": "only stream mode"}}), lambda request: not request.get("stream"), 100),
    "streams only, also unasked": (streamed("an ", "edit"), lambda request: not request.get("stream"), 100),
    "streams only, and doesn't count": ((422, NO_LIMIT), lambda request: not request.get("stream") or "stream_options" in request, 0),
    "streams only, no system role": ((422, NO_SYSTEM), lambda request: has_system(request) or not request.get("stream"), 100),
}


def has_system(request):
    return any(message["role"] == "system" for message in request["messages"])


def different(refusal, cannot):
    """A server's answers."""

    def answer(request):
        edit = streamed("an ", "edit", usage="stream_options" in request) if request.get("stream") else "an edit"
        return refusal if cannot(request) else edit

    return answer


@pytest.mark.parametrize("name", DIFFERENT)
def test_a_server_that_wants_another_form_of_request_is_asked_in_it_from_the_start(model, server, name):
    refusal, cannot, tokens = DIFFERENT[name]
    server.ready = server.default = different(refusal, cannot)
    model.agree()
    chat = [*TEXT, {"role": "assistant", "content": "a refused reply"}, {"role": "user", "content": "why"}]
    assert [model.ask([*chat], Event()) for _ in range(2)] == [("an edit", tokens)] * 2
    assert len(server.requests) == 2 and not any(map(cannot, server.requests))
    texts = "".join(message["content"] for message in server.requests[0]["messages"])
    assert texts.replace("\n\n", "") == "".join(message["content"] for message in chat).replace("\n\n", "")  # nothing is lost
    assert not any("max" in word for request in server.requests for word in request)  # no limit where none is needed


def test_a_refusal_within_a_stream_is_one_too(model, server):
    def answer(request):
        if not request.get("stream"):
            return 400, {"error": {"message": "only stream mode"}}
        return (200, 'data: {"error": {"message": "no system role"}}\n\n', EVENTS) if has_system(request) else streamed("ready")

    server.ready = answer
    model.agree()
    assert model.form[1] and model.form[0]["stream"]


def test_a_server_that_drops_the_connection_after_an_error_is_asked_on_a_new_one(model, server, monkeypatch):
    handler = server.http.RequestHandlerClass
    finish = handler.finish
    monkeypatch.setattr(handler, "finish", lambda self: (time.sleep(0.2), finish(self)))
    kept_open = b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 2\r\n\r\n{}"
    server.ready = lambda request: kept_open if has_system(request) else "ready"
    model.agree()
    assert model.form == ({}, True)


def test_a_server_that_takes_no_form_of_request_ends_the_loop_at_the_first_call(model, server):
    server.ready = (400, {"error": {"message": "no chat template for sk-secret"}})
    with pytest.raises(loop.Stop, match="failed at the first call: .*no chat template for ...$") as stop:
        loop.Model(None, model.facts)
    assert stop.value.code == 2


def test_a_server_that_fails_to_list_its_models_can_be_told_which(model, server, monkeypatch):
    monkeypatch.setattr(server.http.RequestHandlerClass, "do_GET", lambda self: self.send(200, ""))
    with pytest.raises(loop.Stop, match="failed to list its models .name one: --model NAME.: "):
        loop.Model(None, model.facts)
    assert loop.Model("mine", model.facts).name == "mine"


def test_a_page_where_a_reply_was_due_ends_the_loop_at_the_first_call(model, server):
    server.ready = (200, HTML, {"Content-Type": "text/html"})
    with pytest.raises(loop.Stop, match="502 Bad Gateway"):
        loop.Model(None, model.facts)


@pytest.mark.parametrize("reply", [streamed("half an ", end=None), (200, 'data: {"error": {"message": "out of memory"}}\n\n', EVENTS)])
def test_a_stream_that_breaks_off_is_waited_out(model, server, reply):
    server.ready = different((400, NO_SYSTEM), lambda request: not request.get("stream"))
    model.agree()
    server.replies += [reply, streamed("an edit")]
    assert model.ask([*TEXT], Event()) == ("an edit", 100) and "going on in" in model.said()


def test_a_stream_that_never_ends_is_given_up(model, server, monkeypatch):
    server.ready = different((400, NO_SYSTEM), lambda request: not request.get("stream"))
    model.agree()
    monkeypatch.setattr(loop, "REPLY_SECONDS", 0)
    server.replies += [streamed("for ", "ever and ", "ever")]
    server.default = lambda request: setattr(loop, "REPLY_SECONDS", 9) or streamed("an edit")
    assert model.ask([*TEXT], Event())[0] == "an edit" and "going on in" in model.said()


def stops_early(*refused, most=512):
    """A server that ends a reply after few tokens unless told otherwise."""

    def answer(request):
        if any(name in request for name in refused):
            return 400, NO_LIMIT
        length = max(request.get("max_tokens", most), request.get("max_completion_tokens", most))
        return "an edit" if length > 4000 else {"message": {"role": "assistant", "content": "an e"}, "finish_reason": "length"}

    return answer


@pytest.mark.parametrize("refused, name", [((), "max_tokens"), (("max_tokens",), "max_completion_tokens")])
def test_a_server_that_ends_replies_early_is_told_how_long_they_may_be(model, server, refused, name):
    server.default = stops_early(*refused)
    assert model.ask([TEXT[0], {"role": "user", "content": "go"}], Event())[0] == "an edit"
    asked = len(server.requests)
    assert model.ask([*TEXT], Event()) == ("an edit", 100) and len(server.requests) == asked + 1
    assert server.requests[-1][name] == loop.REPLY_TOKENS and "Results so far" in server.requests[-1]["messages"][1]["content"]


def test_a_reply_that_was_cut_off_and_asked_for_again_counts(model, server):
    server.default = stops_early()
    assert model.ask([*TEXT], Event()) == ("an edit", 200)


def test_a_server_that_takes_no_limit_gives_a_reply_that_is_cut_off(model, server):
    server.default = stops_early("max_tokens", "max_completion_tokens")
    for asked in (5, 6):  # without a limit, with one, the same without the history, with the other, without one; then at once
        with pytest.raises(loop.Refused, match="cut off"):
            loop.parse_reply(model.ask([*TEXT], Event())[0])
        assert len(server.requests) == asked


def test_a_reply_that_ends_at_the_models_own_limit_is_not_asked_for_again(model, server):
    choice = {"index": 0, "message": {"role": "assistant", "content": "long"}, "finish_reason": "length"}
    server.replies += [(200, {"choices": [choice], "usage": {"completion_tokens": loop.REPLY_TOKENS, "total_tokens": 30000}})]
    assert model.ask([*TEXT], Event())[1] == 30000 and len(server.requests) == 1


HM = {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}
SAID = {
    "in parts": ({"content": [HM, {"type": "text", "text": "an "}, {"text": "edit"}]}, "an edit"),
    "after reasoning": ({"content": "an edit", "reasoning_content": "hm", "reasoning": "hm"}, "an edit"),
    "only in reasoning": ({"content": None, "reasoning_content": "an edit?"}, ""),  # a draft is no answer
    "nowhere": ({}, ""),
}


@pytest.mark.parametrize("name", SAID)
def test_a_reply_is_the_content_and_not_the_reasoning(model, server, name):
    said, text = SAID[name]
    server.replies += [{"message": {"role": "assistant", **said}}]
    assert model.ask([*TEXT], Event())[0] == text


def test_tokens_that_a_server_does_not_count_are_0(model, server):
    server.replies += [(200, {"choices": [{"index": 0, "message": {"role": "assistant", "content": "an edit"}, "finish_reason": "stop"}]})]
    assert model.ask([*TEXT], Event()) == ("an edit", 0)
