//! The guide's routes: what its React hooks, Kong plugin and nginx file expect.

use serde_json::{Value, json};
use stoker_shared::job::Job;

use crate::fleet::{Fleet, MODEL, events, eventually, json};

#[tokio::test]
async fn generate_suits_both_of_the_guides_readers() {
    let (fleet, worker) = Fleet::echoing().await;
    for path in ["/api/generate", "/api/llm/generate"] {
        let body =
            json!({ "prompt": "a b", "options": { "maxTokens": 3, "temperature": 0.5, "stream": false } });
        let (status, reply) = json(fleet.post(path, body).await).await;
        assert_eq!(status, 200, "{reply}");
        assert_eq!(
            (&reply["success"], &reply["text"], &reply["tokens"]),
            (&json!(true), &json!(" a b a"), &json!(3))
        );
        assert_eq!(reply["metadata"]["model"], MODEL);
        assert!(reply["metadata"]["executionTime"].is_u64());
        assert_eq!(reply["result"]["text"], " a b a");
        assert_eq!(reply["result"]["model"], MODEL);
        assert!(reply["result"]["executionTime"].is_u64());
    }
    let (_, reply) = json(fleet.post("/api/generate", json!({ "prompt": "a" })).await).await;
    assert_eq!(reply["tokens"], 100, "the default");
    let job: Job = serde_json::from_slice(&worker.seen.lock().unwrap()[2].body).unwrap();
    assert_eq!(job.options.temperature, Some(0.7));
}

#[tokio::test]
async fn a_stream_is_made_of_tokens() {
    let (fleet, _worker) = Fleet::echoing().await;
    let body = json!({ "prompt": "a b", "options": { "maxTokens": 3 } });
    for path in ["/api/stream", "/api/llm/stream"] {
        let mut events = events(fleet.post(path, body.clone()).await).await;
        assert_eq!(events.pop().unwrap(), "[DONE]");
        let text: String = events
            .iter()
            .map(|e| serde_json::from_str::<Value>(e).unwrap()["token"].as_str().unwrap().to_owned())
            .collect();
        assert_eq!(text, " a b a");
    }
}

#[tokio::test]
async fn a_gateways_user_id_becomes_the_label() {
    let (fleet, worker) = Fleet::echoing().await;
    let request = fleet.http.post(format!("{}/api/generate", fleet.url)).header("X-User-ID", "ann");
    let response =
        request.json(&json!({ "prompt": "a", "options": { "maxTokens": 2 } })).send().await.unwrap();
    assert_eq!(response.status(), 200);
    let job: Job = serde_json::from_slice(&worker.seen.lock().unwrap()[0].body).unwrap();
    assert_eq!(job.user_id.as_deref(), Some("ann"));
    eventually("the row is there", || async {
        let (_, usage) = fleet.get("/api/usage?userId=ann&timeframe=1h").await;
        usage["usage"]["requestCount"] == 1 && usage["usage"]["totalTokens"] == 2
    })
    .await;
    assert_eq!(fleet.get("/api/usage?userId=ben").await.1["usage"]["requestCount"], 0);
    assert_eq!(fleet.get("/api/usage?timeframe=long").await.0, 400);
    assert_eq!(fleet.get("/api/metrics").await.1["metrics"]["totalTokens"], 2);
}

#[tokio::test]
async fn wrong_values_are_refused_by_name_and_not_clamped() {
    let (fleet, worker) = Fleet::echoing().await;
    for path in ["/api/generate", "/api/stream", "/api/llm/generate"] {
        for (body, name) in [
            (json!({ "prompt": "" }), "prompt"),
            (json!({}), "prompt"),
            (json!({ "prompt": 7 }), "prompt"),
            (json!({ "prompt": "a", "options": { "maxTokens": 0 } }), "maxTokens"),
            (json!({ "prompt": "a", "options": { "maxTokens": 1_000_000_000 } }), "maxTokens"),
            (json!({ "prompt": "a", "options": { "temperature": 3 } }), "temperature"),
            (json!({ "prompt": "a", "options": 7 }), "options"),
        ] {
            let (status, reply) = json(fleet.post(path, body.clone()).await).await;
            assert_eq!((status, &reply["success"]), (400, &json!(false)), "{path} {body}: {reply}");
            assert_eq!(reply["code"], "invalid_request");
            assert!(reply["error"].as_str().unwrap().contains(name), "{reply}");
        }
        let (status, reply) = json(fleet.post_raw(path, "{").await).await;
        assert_eq!((status, &reply["success"]), (400, &json!(false)));
        let (status, reply) = json(fleet.post_raw(path, vec![b'x'; 11 << 20]).await).await;
        assert_eq!((status, &reply["success"]), (413, &json!(false)));
        let body = json!({ "prompt": "a", "options": { "model": "none" } });
        let (status, reply) = json(fleet.post(path, body).await).await;
        assert_eq!((status, &reply["code"]), (404, &json!("model_not_found")));
    }
    assert_eq!(worker.started(), 0);
}

#[tokio::test]
async fn models_and_health_are_told() {
    let (fleet, _worker) = Fleet::echoing().await;
    for prefix in ["/api", "/api/llm"] {
        let (status, reply) = fleet.get(&format!("{prefix}/models")).await;
        assert_eq!((status, &reply["success"]), (200, &json!(true)));
        assert_eq!(
            (&reply["models"][0]["name"], &reply["models"][0]["status"]),
            (&json!(MODEL), &json!("ready"))
        );
        assert!(reply["models"][0]["capabilities"].is_object());
        assert_eq!(fleet.get(&format!("{prefix}/health")).await.0, 200);
    }
    let (status, health) = fleet.get("/health").await;
    assert_eq!((status, &health["status"], &health["router"]), (200, &json!("healthy"), &json!(true)));
    let (status, reply) = fleet.get("/api/nothing").await;
    assert_eq!((status, &reply["success"], &reply["code"]), (404, &json!(false), &json!("not_found")));
    let (status, reply) = fleet.get("/api/generate").await;
    assert_eq!(
        (status, &reply["success"], &reply["code"]),
        (405, &json!(false), &json!("method_not_allowed"))
    );
}
