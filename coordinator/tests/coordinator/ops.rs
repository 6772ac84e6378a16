//! Probes, CORS, request ids, start and end.

use serde_json::json;
use stoker_coordinator::Coordinator;
use stoker_shared::ports::{Liveness, Ports};

use crate::faults::Confirms;
use crate::fleet::{Fleet, config, faulty_ports, ports};

#[tokio::test]
async fn readiness_follows_the_services() {
    let (ports, queue) = faulty_ports().await;
    let fleet = Fleet::on(ports, config()).await;
    let (status, ready) = fleet.get("/healthz/ready").await;
    assert_eq!((status, &ready["ready"]), (200, &json!(true)), "{ready}");
    queue.set(Confirms::Down);
    let (status, ready) = fleet.get("/healthz/ready").await;
    assert_eq!((status, &ready["ready"]), (503, &json!(false)));
    assert!(ready["queue"].as_str().unwrap().contains("RabbitMQ"));
    let live = fleet.http.get(format!("{}/healthz/live", fleet.url)).send().await.unwrap();
    assert_eq!(live.status(), 200);
}

#[tokio::test]
async fn browsers_may_call_from_the_configured_origins_only() {
    let mut config = config();
    config.http.allowed_origins = vec!["https://app.example".into()];
    let fleet = Fleet::on(ports().await, config).await;
    let preflight = |origin: &'static str| {
        let request = fleet.http.request(reqwest::Method::OPTIONS, format!("{}/api/generate", fleet.url));
        request
            .header("origin", origin)
            .header("access-control-request-method", "POST")
            .header("access-control-request-headers", "content-type,x-stainless-os")
            .send()
    };
    let allowed = preflight("https://app.example").await.unwrap();
    assert_eq!(allowed.status(), 200);
    assert_eq!(allowed.headers()["access-control-allow-origin"], "https://app.example");
    assert!(allowed.headers()["access-control-allow-methods"].to_str().unwrap().contains("POST"));
    assert!(allowed.headers()["access-control-allow-headers"].to_str().unwrap().contains("x-stainless-os"));
    let other = preflight("https://evil.example").await.unwrap();
    assert!(!other.headers().contains_key("access-control-allow-origin"));
    let get =
        fleet.http.get(format!("{}/health", fleet.url)).header("origin", "https://app.example").send().await;
    assert_eq!(get.unwrap().headers()["access-control-allow-origin"], "https://app.example");
}

#[tokio::test]
async fn every_response_has_a_request_id() {
    let fleet = Fleet::on(ports().await, config()).await;
    for path in ["/health", "/healthz/live", "/nothing", "/v1/models", "/", "/openapi.json"] {
        let response = fleet.http.get(format!("{}{path}", fleet.url)).send().await.unwrap();
        assert!(!response.headers()["x-request-id"].is_empty(), "{path}");
    }
    let request = fleet.http.get(format!("{}/health", fleet.url)).header("x-request-id", "mine-1");
    assert_eq!(request.send().await.unwrap().headers()["x-request-id"], "mine-1");
    let (status, description) = fleet.get("/openapi.json").await;
    assert_eq!(status, 200);
    assert!(description["paths"]["/v1/chat/completions"]["post"].is_object());
}

#[tokio::test]
async fn a_taken_port_is_an_error_and_a_clean_end_leaves_no_presence() {
    let ports = ports().await;
    let fleet = Fleet::on(ports.clone(), config()).await;
    let mut taken = config();
    taken.http.port = Some(fleet.coordinator.addr().port());
    let error = Coordinator::start(taken, Ports::clone(&ports), None).await.err().unwrap();
    assert!(error.to_string().contains("can't listen on 127.0.0.1"));
    let id = fleet.coordinator.id().to_owned();
    assert_eq!(ports.bus.coordinator_liveness(&id).await.unwrap(), Liveness::Alive);
    fleet.coordinator.shutdown().await;
    assert_ne!(ports.bus.coordinator_liveness(&id).await.unwrap(), Liveness::Alive);
}
