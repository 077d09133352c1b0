"""Claims about a provider that fails: what can be waited out is waited out, what is too long is shortened,
what is wrong in the settings ends the loop in a sentence."""

import time
from threading import Event

import pytest

import loop

TEXT = [
    {
        "role": "user",
        "content": "rules, program and code\n\n# Results so far\n\n"
        + "a row\n" * 500
        + "\n\nMend this edit.",
    },
]
HTML = "<html><body><h1>502 Bad Gateway</h1>[bold]nginx[/bold]</body></html>"
ERROR = {"error": {"message": "Rate limit reached", "type": "requests", "code": "rate_limit_exceeded"}}
QUOTA = {
    "error": {
        "message": "You exceeded your current quota",
        "type": "insufficient_quota",
        "code": "insufficient_quota",
    }
}
TOO_LONG = {
    "error": {
        "message": "maximum context length is 8192 tokens",
        "type": "invalid_request_error",
        "code": "context_length_exceeded",
    }
}


@pytest.fixture
def model(server, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    monkeypatch.setattr(loop, "WAITS", (0.01, 0.03))
    said = []
    model = loop.Model(None, said.append)
    model.said = lambda: "\n".join(said)
    return model


@pytest.fixture
def unwanted(monkeypatch):
    """An Event on which nobody waits in earnest: its `waits` are the seconds."""
    event = Event()
    event.waits = []
    monkeypatch.setattr(event, "wait", event.waits.append)
    return event


def ended(reason, **more):
    """A choice that ended so after the first of two blocks."""
    said = "IDEA: wider\n\n<<<<<<< SEARCH\nWIDTH = 64\n=======\nWIDTH = 128\n>>>>>>> REPLACE\n"
    return {"message": {"role": "assistant", "content": said}, "finish_reason": reason, **more}


FAULTS = {
    "a rate limit": ((429, ERROR), "Rate limit reached"),
    "a rate limit that says when": ((429, ERROR, {"Retry-After": "1"}), "asking again in"),
    "a rate limit with a date": (
        (429, ERROR, {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}),
        "asking again in",
    ),
    "a rate limit with a fraction": ((429, ERROR, {"Retry-After": "0.02"}), "asking again in"),
    "an error of the server": ((500, {"error": {"message": "internal"}}), "internal"),
    "a gateway's page": ((502, HTML, {"Content-Type": "text/html"}), "502"),
    "a page where JSON was due": ((200, HTML, {"Content-Type": "application/json"}), "asking again in"),
    "an overloaded server": ((503, ""), "503"),
    "an overloaded server that says so in its own form": ((529, {"detail": "overloaded"}), "overloaded"),
    "an upstream that failed": (ended("error", error={"message": "upstream failed"}), "upstream failed"),
    "an aborted reply": (ended("abort"), "finish_reason abort"),
    "no resources": (ended("insufficient_system_resource"), "insufficient_system_resource"),
    "an end that nobody knows": (ended("network_error"), "network_error"),
    "no end": (ended(None), "finish_reason none"),
    "an end that is no word": (ended({"type": "stop"}), "no whole reply"),
    "a connection that breaks in mid-reply": (
        b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n{",
        "asking again in",
    ),
    "a connection that is closed at once": (b"", "asking again in"),
    "a key revoked at night": ((401, {"error": {"message": "Incorrect API key provided: sk-secret"}}), "401"),
    "an account that may not": ((403, {"error": {"message": "not allowed"}}), "not allowed"),
    "a model taken away": ((404, {"error": {"message": "no such model"}}), "no such model"),
    "a quota used up": ((429, QUOTA), "exceeded your current quota"),
}


@pytest.mark.every(3)
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_waited_out_and_said(model, server, unwanted, name):
    fault, said = FAULTS[name]
    server.replies += [fault, fault, "an edit"]
    assert model.ask([*TEXT], unwanted) == ("an edit", 100)
    assert len(server.requests) == 3 and len(unwanted.waits) == 2
    assert said in model.said() and "sk-secret" not in model.said()


def test_a_server_that_says_when_is_asked_then_but_not_before_a_second_and_not_after_the_longest_wait(
    model, server, unwanted, monkeypatch
):
    monkeypatch.setattr(loop, "WAITS", (5, 600))
    server.replies += [(429, ERROR, {"Retry-After": seconds}) for seconds in ("20", "0.02", "7200", "soon")]
    server.replies += [(429, ERROR, {"Retry-After": seconds}) for seconds in ("nan", "inf", "-5")]
    server.replies += ["an edit"]
    assert model.ask([*TEXT], unwanted)[0] == "an edit" and unwanted.waits == [20, 1, 600, 40, 1, 600, 1]


def test_a_reply_that_never_comes_is_given_up(model, server):
    real, gave_up = model.client, Event()
    model.client = real.with_options(timeout=0.3)

    def say(text):
        said.append(text)
        gave_up.set()
        model.client = real  # the next request has time enough

    said, model.say = [], say
    server.default = lambda request: "an edit" if gave_up.is_set() else gave_up.wait(60) and "too late"
    assert model.ask([*TEXT], Event())[0] == "an edit" and "timed out" in said[0]
    assert real.timeout == loop.REPLY_SECONDS


def test_a_proposal_that_nobody_wants_any_more_is_not_asked_for_again(model, server):
    unwanted = Event()
    server.default = lambda request: unwanted.set() or (500, "")
    assert model.ask([*TEXT], unwanted) == ("", 0) and len(server.requests) == 1


def test_a_server_that_went_away_and_comes_back_is_asked_again(model, server):
    real = model.client
    model.client = model.openai.OpenAI(api_key="k", base_url="http://127.0.0.1:9/v1", max_retries=0)
    said = model.say
    model.say = lambda text: (said(text), setattr(model, "client", real))
    server.replies += ["an edit"]
    assert model.ask([*TEXT], Event())[0] == "an edit" and "refused" in model.said()


def test_waits_grow_up_to_the_longest(model, server, unwanted, monkeypatch):
    monkeypatch.setattr(loop, "WAITS", (5, 600))
    server.replies += [(500, "")] * 10 + [(429, ERROR, {"Retry-After": "7200"}), "an edit"]
    assert model.ask([*TEXT], unwanted)[0] == "an edit"
    assert unwanted.waits == [5, 10, 20, 40, 80, 160, 320, 600, 600, 600, 600]


@pytest.mark.parametrize(
    "status, error", [(400, TOO_LONG), (413, {"error": {"message": "Request too large"}}), (422, TOO_LONG)]
)
def test_a_context_that_is_too_long_loses_the_refusals_and_the_history(
    model, server, unwanted, status, error
):
    chat = [*TEXT, {"role": "assistant", "content": "a refused reply"}, {"role": "user", "content": "why"}]
    server.replies += [(status, error), "an edit"]
    assert (
        model.ask(chat, unwanted)[0] == "an edit" and not unwanted.waits
    )  # waiting wouldn't make it shorter
    sizes = [sum(len(message["content"]) for message in request["messages"]) for request in server.requests]
    assert [len(request["messages"]) for request in server.requests] == [3, 1] and sizes[1] < sizes[0]
    last = server.requests[1]["messages"][0]["content"]
    assert (
        "program and code" in last and "a row" not in last and last.endswith("Mend this edit.")
    )  # what is asked for stays


def test_a_request_that_stays_bad_when_it_is_short_is_asked_again_later(model, server):
    server.replies += [(400, TOO_LONG)] * 5 + ["an edit"]
    assert model.ask([*TEXT], Event())[0] == "an edit" and "maximum context length" in model.said()


@pytest.mark.every(3)
@pytest.mark.parametrize(
    "reason", ["stop", "STOP", "eos", "eos_token", "stop_sequence", "end_turn", "COMPLETE"]
)
def test_each_name_of_a_good_end_is_one(model, server, reason):
    server.replies += [ended(reason)]
    assert loop.parse_reply(model.ask([*TEXT], Event())[0]).description == "wider"


CUT = {
    "cut off at the longest": {
        "message": {"role": "assistant", "content": "IDEA: a\n"},
        "finish_reason": "length",
    },
    "cut off by a filter": {
        "message": {"role": "assistant", "content": "IDEA: a\n"},
        "finish_reason": "content_filter",
    },
    "cut off, as Anthropic says it": ended("max_tokens"),
    "cut off, as Mistral says it": ended("model_length"),
    "cut off by Gemini's filter": ended("SAFETY"),
    "a refusal": {"message": {"role": "assistant", "content": None, "refusal": "I can't help with that."}},
    "an empty text": {"message": {"role": "assistant", "content": ""}},
    "a call of a tool": {
        "message": {"role": "assistant", "content": None, "tool_calls": []},
        "finish_reason": "tool_calls",
    },
}


@pytest.mark.every(3)
@pytest.mark.parametrize("name", CUT)
def test_a_reply_that_is_not_whole_is_refused_and_never_applied(model, server, name):
    server.replies += [CUT[name]]
    with pytest.raises(loop.Refused):
        loop.parse_reply(model.ask([*TEXT], Event())[0])


@pytest.mark.every(3)
@pytest.mark.parametrize(
    "body", [{"choices": []}, {"choices": None}, {}, {"choices": [{}]}, {"choices": [{"message": None}]}]
)
def test_an_answer_without_a_reply_is_a_fault_of_the_server(model, server, body):
    server.replies += [(200, body | {"error": {"message": "no upstream"}}), "an edit"]
    assert model.ask([*TEXT], Event()) == ("an edit", 100) and "no upstream" in model.said()


# ---- what servers differ in


NO_LIMIT = {
    "error": {
        "message": "Unsupported parameter: 'max_tokens'.",
        "param": "max_tokens",
    }
}


def test_a_server_that_drops_the_connection_after_an_error_is_asked_on_a_new_one(model, server, monkeypatch):
    handler = server.http.RequestHandlerClass
    finish = handler.finish
    monkeypatch.setattr(handler, "finish", lambda self: (time.sleep(0.2), finish(self)))
    kept_open = b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 2\r\n\r\n{}"
    server.ready = lambda request: kept_open if request["model"] == "one" else "ready"
    model.agree(["one", "another"])
    assert model.name == "another"


# ---- what is wrong in the settings ends the loop at the first call


def stopped(name=None):
    with pytest.raises(loop.Stop) as stop:
        loop.Model(name, lambda text: None)
    assert stop.value.code == 2 and "sk-secret" not in str(stop.value) and "\n" not in str(stop.value)
    return str(stop.value)


BUSY = {
    "a model that loads": (
        503,
        {"error": {"message": "Loading model", "type": "unavailable_error", "code": 503}},
    ),
    "an overloaded server": (529, {"type": "error", "error": {"message": "Overloaded"}}),
    "a rate limit": (429, ERROR, {"Retry-After": "7"}),
    "a gateway": (502, HTML, {"Content-Type": "text/html"}),
}


@pytest.fixture
def slept(monkeypatch):
    """Seconds that are waited before there is a model; nobody waits in earnest."""
    seconds = []
    monkeypatch.setattr(loop.time, "sleep", seconds.append)
    return seconds


@pytest.mark.every(2)
@pytest.mark.parametrize("name", BUSY)
def test_a_server_that_is_not_ready_at_the_first_call_is_waited_for(model, server, slept, name):
    answers, said = [BUSY[name]] * 3 + ["ready"], []
    server.ready = lambda request: answers.pop(0)
    assert loop.Model("m", said.append).name == "m"
    assert len(slept) == len(said) == 3 and not answers


@pytest.mark.slow
@pytest.mark.parametrize("name", BUSY)
def test_a_server_that_never_gets_ready_ends_the_loop_in_its_words_after_a_while(model, server, slept, name):
    asked = []
    server.ready = lambda request: asked.append(1) or BUSY[name]
    assert f"{BUSY[name][0]}" in stopped() and len(asked) == loop.FIRST_TRIES == len(slept) + 1


def test_an_account_without_credit_is_told_at_once(model, server, slept):
    server.ready = lambda request: (429, QUOTA)
    assert "exceeded your current quota" in stopped() and not slept


@pytest.mark.every(2)
@pytest.mark.parametrize("name", BUSY)
def test_a_server_that_does_not_list_its_models_yet_is_waited_for(model, server, slept, monkeypatch, name):
    answers = [BUSY[name]] * 3 + [(200, {"object": "list", "data": [{"id": "mine", "object": "model"}]})]
    monkeypatch.setattr(server.http.RequestHandlerClass, "do_GET", lambda self: self.send(*answers.pop(0)))
    assert loop.Model(None, print).name == "mine" and len(slept) == 3


@pytest.mark.every(3)
@pytest.mark.parametrize("status", [401, 402, 403])
@pytest.mark.parametrize(
    "body", [{"error": {"message": "no such account"}}, {"detail": "no such account"}, "no such account"]
)
def test_who_is_denied_is_told_in_the_servers_words_and_asked_once(model, server, status, body):
    asked = []
    server.ready = lambda request: asked.append(1) or (status, body)
    assert f"{status}" in (message := stopped()) and "no such account" in message and len(asked) == 1


@pytest.mark.every(3)
@pytest.mark.parametrize("refusal", [
    (400, {"error": {"message": "does not support chat"}}), (404, {"error": "no chat here"}), (500, "no template"),
    (501, {"detail": "not supported"}), (200, {"error": "embeddings only"}),
])  # fmt: skip
def test_the_first_of_a_servers_models_that_can_chat_is_taken(model, server, monkeypatch, refusal):
    names = ["nomic-embed-text", "whisper", "qwen3:8b", "llama"]
    listed = {"object": "list", "data": [{"id": name, "object": "model"} for name in names]}
    monkeypatch.setattr(server.http.RequestHandlerClass, "do_GET", lambda self: self.send(200, listed))
    server.ready = lambda request: "ready" if request["model"] in names[2:] else refusal
    assert loop.Model(None, print).name == "qwen3:8b"
    server.ready = refusal
    assert "--model" in stopped()


@pytest.mark.every(4)
@pytest.mark.parametrize("answer", [(200, {"error": "Unexpected endpoint or method. (GET /models)"}), (404, "404 page not found"),
                                    (405, {"detail": "Method Not Allowed"}), (200, HTML)])  # fmt: skip
@pytest.mark.parametrize("end", ["", "/"])
def test_a_url_that_does_not_end_as_it_should_is_named_with_the_one_that_does(
    model, server, monkeypatch, answer, end
):
    handler, url = server.http.RequestHandlerClass, server.url.removesuffix("/v1")
    monkeypatch.setattr(handler, "do_GET", lambda self: self.send(*answer))
    monkeypatch.setattr(handler, "do_POST", lambda self: self.send(*answer))
    monkeypatch.setenv("OPENAI_BASE_URL", url + end)
    for name in (None, "mine"):
        assert f"try export OPENAI_BASE_URL={url}/v1;" in stopped(name)


@pytest.mark.every(3)
@pytest.mark.parametrize(
    "url, right",
    [
        ("http://localhost:11434/api", "http://localhost:11434/v1"),
        ("http://localhost:11434/api/chat/", "http://localhost:11434/v1"),
        ("http://localhost:1/api", "http://localhost:1/api/v1"),
        ("http://localhost:1/chat/completions", "http://localhost:1/v1"),
        ("http://localhost:1/v1/chat/completions", "http://localhost:1/v1"),
        ("http://localhost:1/api/v3/chat/completions", "http://localhost:1/api/v3"),
        ("http://localhost:1/V1/", "http://localhost:1/v1"),
        ("localhost:1", "http://localhost:1/v1"),
    ],
)
def test_of_a_url_that_says_too_much_or_too_little_the_right_one_is_named(model, monkeypatch, url, right):
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    assert f"try export OPENAI_BASE_URL={right};" in stopped("mine")


@pytest.mark.every(4)
@pytest.mark.parametrize("body", ['[{"id": "a"}]', '{"data": [{"name": "a"}]}', '{"data": 5}', "null"])
def test_a_list_of_models_of_another_shape_is_none(model, server, monkeypatch, body):
    monkeypatch.setattr(server.http.RequestHandlerClass, "do_GET", lambda self: self.send(200, body))
    assert "lists no model; load one, or name it with --model" in stopped()


@pytest.mark.every(3)
@pytest.mark.parametrize("key", ["“sk-proj-0123456789”", "'sk-proj-0123456789'", "\u200bsk-proj-0123456789"])
def test_quotes_of_any_kind_are_no_part_of_a_key(model, server, monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    assert loop.Model("mine", print).key == "sk-proj-0123456789"


@pytest.mark.every(3)
@pytest.mark.parametrize("key", ["none", "x", "ollama"])
def test_a_key_that_is_none_makes_no_word_unreadable(model, server, monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    server.ready = (400, {"error": {"message": "none of the models exists: ollama pull llama3"}})
    assert "none of the models exists: ollama pull llama3" in stopped("mine")


PARTS = [
    [{"text": "an edit"}], ["an", " edit"], [{"type": "text", "text": None}, {"type": "text", "text": "an edit"}],
    [{"type": "output_text", "text": "an edit"}], [{"type": "thinking", "text": "a draft"}, {"type": "text", "text": "an edit"}],
]  # fmt: skip


@pytest.mark.every(3)
@pytest.mark.parametrize("content", PARTS)
def test_a_reply_in_parts_is_their_text(model, server, content):
    server.replies += [{"message": {"role": "assistant", "content": content}}]
    assert model.ask([*TEXT], Event())[0] == "an edit"


@pytest.mark.every(4)
@pytest.mark.parametrize(
    "body",
    ["null", "[1, 2]", "5", '{"choices": [null]}', '{"choices": "good"}', "<html>", '{"choices": [{"message": "good", "finish_reason": "stop"}]}',
     '{"choices": [{"text": "good", "finish_reason": "stop"}]}'],
)  # fmt: skip
def test_an_answer_of_another_shape_is_a_fault_and_asked_again(model, server, body):
    server.replies += [(200, body), "an edit"]
    assert model.ask([*TEXT], Event())[0] == "an edit"
    assert "asking again" in model.said()


@pytest.mark.every(4)
@pytest.mark.parametrize("usage", ["100", 7, [], {"prompt_tokens": {}}])
def test_a_usage_of_another_shape_is_none(model, server, usage):
    choice = {"index": 0, "message": {"role": "assistant", "content": "an edit"}, "finish_reason": "stop"}
    server.replies += [(200, {"choices": [choice], "usage": usage})]
    assert model.ask([*TEXT], Event()) == ("an edit", 0)


@pytest.mark.every(4)
@pytest.mark.parametrize("name", ["FINISH_REASON_STOP", "end_of_turn", "stop_token", " Stop"])
def test_a_good_end_is_known_however_it_is_written(model, server, name):
    server.replies += [{"finish_reason": name, "message": {"role": "assistant", "content": "an edit"}}]
    assert model.ask([*TEXT], Event())[0] == "an edit"


@pytest.mark.every(3)
@pytest.mark.parametrize("end", ["/v1", "/api/v3", "/v1beta/openai", "/api/paas/v4/", "/openai/v1"])
def test_a_url_with_a_version_is_left_as_it_is(model, server, monkeypatch, end):
    monkeypatch.setenv("OPENAI_BASE_URL", server.url.replace("/v1", "") + "/x" + end)
    assert "try export" not in stopped()


@pytest.mark.every(2)
@pytest.mark.parametrize("empty", ["", " ", "\n", '""'])
def test_an_empty_base_url_is_none(model, monkeypatch, empty):
    monkeypatch.setenv("OPENAI_BASE_URL", empty)
    monkeypatch.setattr(loop, "OPENAI", "http://127.0.0.1:9/v1")
    assert "http://127.0.0.1:9/v1 failed at the first call" in stopped()
    monkeypatch.delenv("OPENAI_API_KEY")
    assert "no model to ask" in stopped()


@pytest.mark.every(2)
@pytest.mark.parametrize("around", ["'{}'", '"{}"', " {}\r\n"])
def test_quotes_and_line_ends_around_the_settings_are_not_part_of_them(model, server, monkeypatch, around):
    monkeypatch.setenv("OPENAI_BASE_URL", around.format(server.url))
    monkeypatch.setenv("OPENAI_API_KEY", around.format("sk-secret"))
    model = loop.Model(None, print)
    assert f"{model.client.base_url}".rstrip("/") == server.url and model.client.api_key == "sk-secret"


WRONG = {
    "a key": (
        (401, {"error": {"message": "Incorrect API key provided: sk-secret"}}),
        "Incorrect API key provided: ***",
    ),
    "an account": ((403, {"error": {"message": "not allowed"}}), "not allowed"),
    "a model": (
        (404, {"error": {"message": "The model `gpt-9` does not exist"}}),
        "The model `gpt-9` does not exist",
    ),
    "a template": (
        (400, {"error": {"message": "no chat template for sk-secret"}}),
        "no chat template for ***",
    ),
    "a page": ((200, HTML, {"Content-Type": "text/html"}), "502 Bad Gateway"),
    "no words": ((500, ""), "500"),
}


@pytest.mark.every(3)
@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_ends_in_the_servers_words_with_its_url_and_the_ways_on(model, server, name):
    server.ready, words = WRONG[name]
    message = stopped("gpt-9")
    for text in (server.url, words, "--model", "/v1", "key", "--offline"):
        assert text in message, text


def test_a_url_that_is_none_of_the_servers_is_named(model, server, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", server.url.replace("/v1", "/v2"))
    message = stopped()
    for text in (server.url.replace("/v1", "/v2"), "404", "--model", "/v1", "key", "--offline"):
        assert text in message, text


def test_where_nobody_answers_the_url_is_named_and_what_went_wrong(model, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    message = stopped()
    for text in ("http://127.0.0.1:9/v1", "refused", "is the server running?", "NO_PROXY"):
        assert text in message, text


def test_without_a_key_and_a_url_the_three_ways_on_are_named(monkeypatch):
    for name in ("OPENAI_BASE_URL", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    message = stopped()
    for text in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "--offline"):
        assert text in message, text
    monkeypatch.setenv("OPENAI_API_KEY", " \n")
    assert stopped() == message


def test_a_server_of_ones_own_needs_no_key_and_is_asked_for_its_first_model(model, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    assert loop.Model(None, print).name == model.name == "local-model"
    assert loop.Model("mine", print).name == "mine"


def test_a_server_without_a_model_says_so(model, server, monkeypatch):
    empty = {"object": "list", "data": []}
    monkeypatch.setattr(server.http.RequestHandlerClass, "do_GET", lambda self: self.send(200, empty))
    assert "lists no model; load one, or name it with --model" in stopped() and server.url in stopped()
    assert loop.Model("mine", print).name == "mine"


def test_a_server_that_fails_to_list_its_models_can_be_told_which(model, server, monkeypatch):
    monkeypatch.setattr(server.http.RequestHandlerClass, "do_GET", lambda self: self.send(200, ""))
    assert "--model" in stopped() and server.url in stopped()
    assert loop.Model("mine", print).name == "mine"


# ---- lengths


def stops_early(refused="", most=512):
    """A server that ends a reply after few tokens unless told otherwise."""

    def answer(request):
        if refused in request:
            return 400, NO_LIMIT
        length = request.get("max_tokens", most)
        return (
            "an edit"
            if length > 4000
            else {"message": {"role": "assistant", "content": "an e"}, "finish_reason": "length"}
        )

    return answer


def test_a_server_that_ends_replies_early_is_told_how_long_they_may_be(model, server):
    server.default = stops_early()
    assert model.ask([{"role": "user", "content": "go"}], Event())[0] == "an edit"
    asked = len(server.requests)
    assert model.ask([*TEXT], Event()) == ("an edit", 100) and len(server.requests) == asked + 1
    assert (
        server.requests[-1]["max_tokens"] == loop.REPLY_TOKENS
        and "Results so far" in server.requests[-1]["messages"][0]["content"]
    )


def test_a_reply_that_was_cut_off_and_asked_for_again_counts(model, server):
    server.default = stops_early()
    assert model.ask([*TEXT], Event()) == ("an edit", 200)


def test_a_server_that_takes_no_limit_gives_a_reply_that_is_cut_off(model, server):
    server.default = stops_early("max_tokens")
    for asked in (4, 5):  # without a limit, with one, the same without the history, without one; then at once
        with pytest.raises(loop.Refused, match="cut off"):
            loop.parse_reply(model.ask([*TEXT], Event())[0])
        assert len(server.requests) == asked


def test_a_reply_that_ends_at_the_models_own_limit_is_not_asked_for_again(model, server):
    choice = {"index": 0, "message": {"role": "assistant", "content": "long"}, "finish_reason": "length"}
    server.replies += [
        (200, {"choices": [choice], "usage": {"completion_tokens": loop.REPLY_TOKENS, "total_tokens": 30000}})
    ]
    assert model.ask([*TEXT], Event())[1] == 30000 and len(server.requests) == 1


HM = {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}
SAID = {
    "beside thoughts": (
        {"content": [{"type": "reasoning", "text": "hm"}, {"type": "text", "text": "an edit"}]},
        "an edit",
    ),
    "in parts": (
        {"content": [HM, {"type": "text", "text": "an "}, {"type": "text", "text": "edit"}]},
        "an edit",
    ),
    "after reasoning": ({"content": "an edit", "reasoning_content": "hm", "reasoning": "hm"}, "an edit"),
    "only in reasoning": ({"content": None, "reasoning_content": "an edit?"}, ""),  # a draft is no answer
    "nowhere": ({}, ""),
}


@pytest.mark.every(3)
@pytest.mark.parametrize("name", SAID)
def test_a_reply_is_the_content_and_not_the_reasoning(model, server, name):
    said, text = SAID[name]
    server.replies += [{"message": {"role": "assistant", **said}}]
    assert model.ask([*TEXT], Event())[0] == text


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_a_server_that_puts_the_answer_into_the_reasoning_is_named_once(model, server, field):
    server.default = {"message": {"role": "assistant", "content": None, field: "IDEA: wider"}}
    for _ in range(2):
        assert model.ask([*TEXT], Event())[0] == ""
    assert model.said().count("reasoning_content") == 1


@pytest.mark.every(2)
@pytest.mark.parametrize(
    "read, cut", [(4096, True), (2048, True), (5600, False), (7500, False), (0, False), (None, False)]
)
def test_a_prompt_that_the_server_cut_is_said_once(model, server, read, cut):
    usage = {"prompt_tokens": read, "completion_tokens": 20, "total_tokens": (read or 0) + 20}
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": "What is this?"},
        "finish_reason": "stop",
    }
    server.default = (200, {"choices": [choice], "usage": usage})
    chat = [{"role": "user", "content": "x = layer\n" * 3000}]
    for _ in range(2):
        model.ask([*chat], Event())
    assert model.said().count("the server cuts the prompt: raise its context") == cut


@pytest.mark.parametrize("reads, cut", [((8192, 8192), True), ((8192, 8500), False), ((0, 0), False)])
def test_a_server_that_reads_as_much_of_a_longer_prompt_cuts_it(model, server, reads, cut):
    """By any share, also one that a tokenizer could explain."""
    for read, lines in zip(reads, (3000, 3200), strict=True):
        usage = {"prompt_tokens": read, "completion_tokens": 20, "total_tokens": read + 20}
        choice = {"message": {"role": "assistant", "content": "What?"}, "finish_reason": "stop"}
        server.replies.append((200, {"choices": [choice | {"index": 0}], "usage": usage}))
        model.ask([{"role": "user", "content": "x = layer\n" * lines}], Event())
    assert ("the server cuts the prompt" in model.said()) == cut


def test_tokens_that_a_server_does_not_count_are_0(model, server):
    server.replies += [
        (
            200,
            {
                "choices": [
                    {
                        "index": 0,
                        "message": {"role": "assistant", "content": "an edit"},
                        "finish_reason": "stop",
                    }
                ]
            },
        )
    ]
    assert model.ask([*TEXT], Event()) == ("an edit", 0)


@pytest.mark.every(3)
@pytest.mark.parametrize("count", [None, -5, 1.5, True, {}])
def test_a_count_of_tokens_that_is_none_is_0(model, server, count):
    choice = {"index": 0, "message": {"role": "assistant", "content": "an edit"}, "finish_reason": "stop"}
    server.replies += [
        (200, {"choices": [choice], "usage": {"completion_tokens": count, "total_tokens": count}})
    ]
    assert model.ask([*TEXT], Event()) == ("an edit", 0)
