"""OpenAI's Python SDK, unchanged, against a running fleet (FLEET_URL)."""

import json
import os

import openai
import pytest

MODEL = "SmolLM2-135M-Instruct"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
ANSWER = "The capital of France is Paris."


@pytest.fixture(scope="module")
def client():
    return openai.OpenAI(base_url=os.environ["FLEET_URL"] + "/v1", api_key="none", max_retries=0, timeout=120)


def test_models_are_listed(client):
    ids = {model.id for model in client.models.list()}
    assert {MODEL, "echo"} <= ids
    assert client.models.retrieve(MODEL).id == MODEL


def test_chat(client):
    completion = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0)
    choice = completion.choices[0]
    assert choice.message.role == "assistant"
    assert choice.message.content == ANSWER
    assert choice.finish_reason == "stop"
    usage = completion.usage
    assert usage.prompt_tokens == 37
    assert usage.completion_tokens == 8
    assert usage.total_tokens == 45


def test_chat_streams(client):
    stream = client.chat.completions.create(
        model=MODEL, messages=QUESTION, temperature=0, stream=True, stream_options={"include_usage": True},
        extra_body={"cache": "off"},
    )
    chunks = list(stream)
    pieces = [c.choices[0].delta.content for c in chunks if c.choices and c.choices[0].delta.content]
    assert "".join(pieces) == ANSWER
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].usage.completion_tokens == 8
    assert len({c.id for c in chunks}) == 1


def test_a_long_text_comes_in_pieces(client):
    stream = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "Explain what a hash table is to a ten year old."}],
        temperature=0, max_tokens=200, stream=True, extra_body={"cache": "off"},
    )
    pieces = [c.choices[0].delta.content for c in stream if c.choices and c.choices[0].delta.content]
    assert len(pieces) > 3


def test_completions(client):
    completion = client.completions.create(model=MODEL, prompt="The capital of France is", temperature=0, max_tokens=5)
    assert "Paris" in completion.choices[0].text
    assert completion.choices[0].finish_reason == "length"
    streamed = client.completions.create(
        model=MODEL, prompt="The capital of France is", temperature=0, max_tokens=5, stream=True
    )
    assert "".join(c.choices[0].text for c in streamed if c.choices) == completion.choices[0].text


def test_a_seed_gives_the_same_text_again(client):
    def once():
        return client.chat.completions.create(
            model=MODEL, messages=QUESTION, temperature=1, seed=7, max_tokens=12, extra_body={"cache": "off"}
        )

    assert once().choices[0].message.content == once().choices[0].message.content


def test_a_schema_is_kept_to(client):
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}, "size": {"enum": ["small", "large"]}},
        "required": ["city", "size"],
        "additionalProperties": False,
    }
    completion = client.chat.completions.create(
        model=MODEL, messages=QUESTION, temperature=0, max_tokens=100,
        response_format={"type": "json_schema", "json_schema": {"name": "city", "schema": schema, "strict": True}},
    )
    assert completion.choices[0].finish_reason == "stop"
    answer = json.loads(completion.choices[0].message.content)
    assert answer.keys() == {"city", "size"}
    assert isinstance(answer["city"], str) and len(answer["city"]) <= 20
    assert answer["size"] in ("small", "large")


@pytest.mark.parametrize("stream", [False, True])
def test_a_schema_that_makes_no_sense_is_a_bad_request(client, stream):
    schema = {"type": "array", "uniqueItems": True}
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(
            model=MODEL, messages=QUESTION, stream=stream,
            response_format={"type": "json_schema", "json_schema": {"name": "bad", "schema": schema}},
        )
    assert "uniqueItems" in bad.value.message


def test_stop(client):
    completion = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, stop=[" is Par"])
    assert completion.choices[0].message.content == "The capital of France"
    assert completion.choices[0].finish_reason == "stop"


def test_errors_are_those_of_the_sdk(client):
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="no-such-model", messages=QUESTION)
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as hot:
        client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=3)
    assert hot.value.param == "temperature"
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model=MODEL, messages=[])
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "word " * 20000}])
    assert long.value.code == "context_length_exceeded"
