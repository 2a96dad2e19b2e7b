"""Generated requests: from the server's own OpenAPI document, and with random parameters."""

import json
import urllib.error
import urllib.request

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import checks
from server_process import CHAT_TEMPLATE, ServerProcess

BOUNDED = settings(
    max_examples=25, deadline=None, database=None, derandomize=True,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with ServerProcess(
        tmp_path_factory.mktemp("server"), "--dtype", "float32", "--chat-template", CHAT_TEMPLATE,
        "--max-model-len", "64", "--num-pages", "4096",
    ) as process:  # fmt: skip
        yield process
        process.wait_until_idle()
        assert "Traceback" not in process.log.read_text()


def test_openapi(server):
    """For valid and invalid requests: no 5xx, and no status or body that the document does not name."""
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json").exclude(path="/live")
    operations = [result.ok() for result in schema.get_all_operations()]
    assert {"/v1/completions", "/v1/chat/completions", "/v1/models"} <= {o.path for o in operations}
    for operation in operations:

        @BOUNDED
        @given(case=operation.as_strategy())
        def conforms(case):
            response = case.call(timeout=300)
            case.validate_response(
                response,
                checks=[
                    checks.not_a_server_error,
                    checks.status_code_conformance,
                    checks.content_type_conformance,
                    checks.response_schema_conformance,
                ],
            )

        conforms()


numbers = st.one_of(
    st.integers(-(2**66), 2**66), st.floats(), st.sampled_from([0, 1, -1, 0.5, 1e-320, 1e308])
)
anything = st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=5), st.lists(numbers))
parameters = st.fixed_dictionaries(
    {"prompt": st.one_of(st.just("def f"), st.text(max_size=20), st.lists(st.integers(0, 600)))},
    optional={
        "temperature": st.one_of(st.floats(0, 4), anything),
        "top_p": st.one_of(st.floats(1e-9, 1), anything),
        "top_k": st.one_of(st.integers(-1, 600), anything),
        "min_p": st.one_of(st.floats(0, 1), anything),
        "presence_penalty": st.one_of(st.floats(-2, 2), anything),
        "frequency_penalty": st.one_of(st.floats(-2, 2), anything),
        "repetition_penalty": st.one_of(st.floats(0.01, 100), anything),
        "logit_bias": st.one_of(
            st.dictionaries(st.integers(0, 600).map(str), st.floats(-100, 100), max_size=4),
            st.dictionaries(st.text(max_size=3), numbers, max_size=2),
            anything,
        ),
        "allowed_token_ids": st.one_of(
            st.lists(st.integers(0, 511), min_size=1, max_size=4), anything
        ),
        "bad_words": st.one_of(st.lists(st.text(min_size=1, max_size=3), max_size=3), anything),
        "min_tokens": st.one_of(st.integers(0, 20), anything),
        "priority": st.one_of(st.just(0), anything),
        "seed": st.one_of(st.integers(-(2**63), 2**63 - 1), anything),
        "stop": st.one_of(st.text(max_size=3), st.lists(st.text(max_size=3), max_size=3), anything),
        "stop_token_ids": st.one_of(st.lists(st.integers(0, 600), max_size=3), anything),
        "max_tokens": st.one_of(st.integers(0, 20), anything),
        "n": st.one_of(st.integers(1, 3), anything),
        "logprobs": st.one_of(st.integers(0, 20), anything),
        "echo": st.one_of(st.booleans(), anything),
        "ignore_eos": st.booleans(),
        "include_stop_str_in_output": st.booleans(),
    },
)


@settings(BOUNDED, max_examples=150)
@given(body=parameters)
def test_any_sampling_parameters(server, body):
    data = json.dumps(body).encode()
    request = urllib.request.Request(
        f"{server.url}/v1/completions", data, {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            status, document = answer.status, json.load(answer)
    except urllib.error.HTTPError as e:
        status, document = e.code, json.load(e)
    if status == 200:
        assert len(document["choices"]) == (body.get("n") or 1)
        limit = 16 if body.get("max_tokens") is None else body["max_tokens"]
        assert document["usage"]["completion_tokens"] <= limit * (body.get("n") or 1)
        assert all(choice["finish_reason"] in ("stop", "length") for choice in document["choices"])
    else:
        assert status == 400 and document["error"]["message"], document
