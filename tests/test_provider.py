"""Claims about a provider that fails: what can be waited out is waited out, what is too long is shortened, and the view says so."""

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
    monkeypatch.setattr(loop, "REPLY_SECONDS", 0.5)
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
def test_an_answer_without_a_choice_is_an_empty_reply(model, server, body):
    server.replies += [(200, body)]
    assert model.ask([*TEXT], Event()) == ("", 0)
