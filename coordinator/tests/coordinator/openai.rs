//! OpenAI's routes.

use serde_json::{Value, json};

use crate::fleet::{Fleet, MODEL, events, json};
use crate::worker::{Script, echo};
use stoker_shared::outcome::{JobError, code};

fn chat(content: &str) -> Value {
    json!({ "model": MODEL, "messages": [{ "role": "user", "content": content }], "max_tokens": 4 })
}

#[tokio::test]
async fn a_chat_completion_has_openais_shape() {
    let (fleet, worker) = Fleet::echoing().await;
    let mut body = chat("one two");
    body["user"] = "ann".into();
    body["metadata"] = json!({ "a": "b" });
    body["response_format"] = json!({ "type": "regex", "regex": "( one| two)*" });
    let response = fleet.post("/v1/chat/completions", body).await;
    assert!(response.headers().contains_key("x-request-id"));
    let (status, reply) = json(response).await;
    assert_eq!(status, 200, "{reply}");
    assert!(reply["id"].as_str().unwrap().starts_with("chatcmpl-"));
    assert_eq!(reply["object"], "chat.completion");
    assert_eq!(reply["model"], MODEL);
    assert!(reply["created"].as_i64().unwrap() > 1_700_000_000);
    assert!(reply["system_fingerprint"].as_str().unwrap().starts_with("fp_"));
    let choice = &reply["choices"][0];
    assert_eq!(
        choice["message"],
        json!({ "role": "assistant", "content": " one two one two", "refusal": null })
    );
    assert_eq!(choice["finish_reason"], "length");
    assert_eq!(reply["usage"]["prompt_tokens"], 3);
    assert_eq!(reply["usage"]["completion_tokens"], 4);
    assert_eq!(reply["usage"]["total_tokens"], 7);

    let message = worker.seen.lock().unwrap()[0].clone();
    let job: Value = serde_json::from_slice(&message.body).unwrap();
    assert_eq!(job["id"], message.id.as_str());
    assert_eq!((&job["userId"], &job["metadata"]), (&json!("ann"), &json!({ "a": "b" })));
    assert_eq!(job["options"]["temperature"], 1.0);
    assert!(job["options"]["seed"].is_i64());
    assert_eq!(job["options"]["responseFormat"], json!({ "type": "regex", "regex": "( one| two)*" }));
    assert_eq!(message.headers["x-stoker-once"], "1");
    assert_eq!(message.headers["x-stoker-coordinator"], fleet.coordinator.id());
    assert_eq!(job["streamTo"], format!("llm.tokens.{}", fleet.coordinator.id()));
    assert!(message.headers.contains_key("traceparent"));
}

#[tokio::test]
async fn a_chat_stream_is_made_of_chunks() {
    let (fleet, _worker) = Fleet::echoing().await;
    let mut body = chat("\"quoted\" é\u{2028}");
    body["stream"] = true.into();
    body["stream_options"] = json!({ "include_usage": true });
    let response = fleet.post("/v1/chat/completions", body).await;
    assert_eq!(response.status(), 200);
    assert_eq!(response.headers()["content-type"], "text/event-stream");
    let mut events = events(response).await;
    assert_eq!(events.pop().unwrap(), "[DONE]");
    let chunks: Vec<Value> = events.iter().map(|e| serde_json::from_str(e).unwrap()).collect();
    let id = chunks[0]["id"].as_str().unwrap();
    for chunk in &chunks {
        assert_eq!(chunk["object"], "chat.completion.chunk");
        assert_eq!(chunk["id"], id);
        assert_eq!(chunk["model"], MODEL);
    }
    assert_eq!(chunks[0]["choices"][0]["delta"]["role"], "assistant");
    let (usage, rest) = chunks.split_last().unwrap();
    let text: String = rest.iter().filter_map(|c| c["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(text, " \"quoted\" é\u{2028} \"quoted\" é\u{2028}".replace('\u{2028}', ""));
    assert_eq!(rest.last().unwrap()["choices"][0]["finish_reason"], "length");
    assert!(rest.iter().all(|c| c["usage"].is_null()));
    assert_eq!((&usage["choices"], &usage["usage"]["total_tokens"]), (&json!([]), &json!(7)));
}

#[tokio::test]
async fn completions_take_a_string_or_an_array_of_one() {
    let (fleet, worker) = Fleet::echoing().await;
    for prompt in [json!("a b"), json!(["a b"])] {
        let body = json!({ "model": MODEL, "prompt": prompt });
        let (status, reply) = json(fleet.post("/v1/completions", body).await).await;
        assert_eq!(status, 200, "{reply}");
        assert!(reply["id"].as_str().unwrap().starts_with("cmpl-"));
        assert_eq!(reply["object"], "text_completion");
        assert_eq!(reply["usage"]["completion_tokens"], 16, "the default");
        assert!(reply["choices"][0]["text"].as_str().unwrap().starts_with(" a b a"));
    }
    let body = json!({ "model": MODEL, "prompt": "x", "max_tokens": 2, "stream": true });
    let events = events(fleet.post("/v1/completions", body).await).await;
    let text: String = events
        .iter()
        .filter_map(|e| serde_json::from_str::<Value>(e).ok())
        .filter_map(|c| c["choices"][0]["text"].as_str().map(str::to_owned))
        .collect();
    assert_eq!((text.as_str(), events.last().unwrap().as_str()), (" x x", "[DONE]"));
    assert_eq!(worker.started(), 3);
}

#[tokio::test]
async fn models_are_listed_and_found_by_name() {
    let (fleet, _worker) = Fleet::echoing().await;
    let (status, list) = fleet.get("/v1/models").await;
    assert_eq!((status, &list["object"]), (200, &json!("list")));
    assert_eq!(list["data"][0]["id"], MODEL);
    assert_eq!(list["data"][0]["object"], "model");
    assert_eq!(fleet.get(&format!("/v1/models/{MODEL}")).await.0, 200);
    assert_eq!(fleet.get("/v1/models/test%2Fecho").await.1["id"], MODEL);
    let (status, error) = fleet.get("/v1/models/none").await;
    assert_eq!((status, &error["error"]["code"]), (404, &json!("model_not_found")));
}

#[tokio::test]
async fn no_model_or_auto_means_whatever_serves() {
    let (fleet, _worker) = Fleet::echoing().await;
    for model in [Value::Null, json!("auto")] {
        let mut body = chat("a");
        body["model"] = model;
        let (status, reply) = json(fleet.post("/v1/chat/completions", body).await).await;
        assert_eq!((status, &reply["model"]), (200, &json!(MODEL)));
    }
}

#[tokio::test]
async fn what_is_wrong_is_refused_by_name() {
    let (fleet, worker) = Fleet::echoing().await;
    let messages = json!([{ "role": "user", "content": "a" }]);
    for (body, param) in [
        (json!({ "messages": messages, "temperature": 3 }), json!("temperature")),
        (json!({ "messages": messages, "temperature": "hot" }), json!("temperature")),
        (json!({ "messages": messages, "max_tokens": 0 }), json!("max_tokens")),
        (json!({ "messages": messages, "max_tokens": 1_000_000_000 }), json!("max_tokens")),
        (json!({ "messages": messages, "n": 2 }), json!("n")),
        (json!({ "messages": messages, "logprobs": true }), json!("logprobs")),
        (json!({ "messages": messages, "lane": "fast" }), json!("lane")),
        (json!({ "messages": messages, "response_format": "json" }), json!("response_format")),
        (
            json!({ "messages": messages, "response_format": { "type": "json_schema", "json_schema": { "name": "n" } } }),
            json!("response_format.json_schema.schema"),
        ),
        (
            json!({ "messages": messages, "response_format": { "type": "regex", "regex": 1 } }),
            json!("response_format.regex"),
        ),
        (json!({ "messages": [] }), json!("messages")),
        (json!({ "messages": "a" }), json!("messages")),
        (json!({}), json!("messages")),
        (json!([]), Value::Null),
    ] {
        let (status, reply) = json(fleet.post("/v1/chat/completions", body.clone()).await).await;
        let error = &reply["error"];
        assert_eq!((status, &error["param"]), (400, &param), "{body}: {reply}");
        assert_eq!(error["type"], "invalid_request_error");
        assert_eq!(error["code"], "invalid_request");
        let name = param.as_str().unwrap_or_default();
        assert!(error["message"].as_str().unwrap().contains(name), "{reply}");
    }
    let (status, reply) = json(fleet.post("/v1/completions", json!({ "prompt": "" })).await).await;
    assert_eq!((status, &reply["error"]["param"]), (400, &json!("prompt")));
    assert_eq!(worker.started(), 0);
}

#[tokio::test]
async fn bad_bodies_routes_and_methods_have_the_same_shape() {
    let (fleet, _worker) = Fleet::echoing().await;
    for (body, status) in [
        (b"{\"messages\": [".to_vec(), 400),
        (b"".to_vec(), 400),
        (b"{\"messages\": \"\xff\"}".to_vec(), 400),
        (vec![b' '; 11 << 20], 413),
    ] {
        let (got, reply) = json(fleet.post_raw("/v1/chat/completions", body).await).await;
        assert_eq!(got, status, "{reply}");
        assert!(reply["error"]["message"].is_string() && reply["error"]["code"].is_string(), "{reply}");
    }
    let (status, reply) = fleet.get("/v1/nothing").await;
    assert_eq!((status, &reply["error"]["code"]), (404, &json!("not_found")));
    let response = fleet.http.get(format!("{}/v1/chat/completions", fleet.url)).send().await.unwrap();
    assert_eq!(response.headers()["allow"], "POST");
    let (status, reply) = json(response).await;
    assert_eq!((status, &reply["error"]["code"]), (405, &json!("method_not_allowed")));
}

#[tokio::test]
async fn json_is_taken_whatever_the_content_type_says() {
    let (fleet, _worker) = Fleet::echoing().await;
    let request = fleet.http.post(format!("{}/v1/chat/completions", fleet.url));
    let response =
        request.header("content-type", "text/plain").body(chat("a").to_string()).send().await.unwrap();
    assert_eq!(response.status(), 200);
}

#[tokio::test]
async fn an_unknown_model_is_404_and_one_that_nothing_serves_503() {
    let (fleet, _worker) = Fleet::echoing().await;
    let mut body = chat("a");
    body["model"] = "none".into();
    let (status, reply) = json(fleet.post("/v1/chat/completions", body.clone()).await).await;
    assert_eq!((status, &reply["error"]["code"]), (404, &json!("model_not_found")), "{reply}");
    let gone = stoker_shared::ports::WorkerPresence {
        id: "w-gone".into(),
        draining: true,
        models: vec![stoker_shared::ports::ServedModel { name: "gone".into(), ..Default::default() }],
        ..Default::default()
    };
    fleet.ports.bus.announce_worker(&gone).await.unwrap();
    body["model"] = "gone".into();
    body["stream"] = true.into();
    let response = fleet.post("/v1/chat/completions", body).await;
    assert!(response.headers().contains_key("retry-after"));
    let (status, reply) = json(response).await;
    assert_eq!((status, &reply["error"]["code"]), (503, &json!("model_unavailable")), "{reply}");
}

#[tokio::test]
async fn an_error_before_the_first_token_is_a_status_and_after_it_an_event() {
    let (fleet, _worker) = Fleet::scripted(|job| {
        let context = JobError::field(code::CONTEXT_LENGTH, "messages", "the prompt is too long");
        let pieces = if job.options.max_tokens == Some(1) { vec![] } else { echo(job).pieces };
        // Far enough apart that the first piece is on its way before the error.
        let pause = std::time::Duration::from_millis(200);
        Script { error: Some(context), pieces, pause, ..Script::default() }
    })
    .await;
    for stream in [false, true] {
        let mut body = chat("a");
        body["max_tokens"] = 1.into();
        body["stream"] = stream.into();
        let (status, reply) = json(fleet.post("/v1/chat/completions", body).await).await;
        assert_eq!((status, &reply["error"]["code"]), (400, &json!("context_length_exceeded")), "{reply}");
        assert_eq!(reply["error"]["param"], "messages");
    }
    let mut body = chat("a");
    body["stream"] = true.into();
    let response = fleet.post("/v1/chat/completions", body).await;
    assert_eq!(response.status(), 200);
    let events = events(response).await;
    let last: Value = serde_json::from_str(events.last().unwrap()).unwrap();
    assert_eq!(last["error"]["code"], "context_length_exceeded");
    assert!(events.len() > 1);
}
