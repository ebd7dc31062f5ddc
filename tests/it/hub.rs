//! The Hugging Face hub's protocol, spoken by a server on loopback: download with a token, the cache, offline mode.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use axum::Router;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use bradley::model::loader::load_model;
use bradley::model::source::HubOptions;

use crate::support::golden;

const TOKEN: &str = "hf_only_for_this_test";
const COMMIT: &str = "0123456789012345678901234567890123456789";

async fn info(headers: HeaderMap) -> Response {
    if !authorised(&headers) {
        return StatusCode::UNAUTHORIZED.into_response();
    }
    let files = std::fs::read_dir(golden("models/llama")).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
    let siblings: Vec<_> = files.chain(["README.md".into()]).map(|f| serde_json::json!({"rfilename": f})).collect();
    serde_json::json!({"sha": COMMIT, "siblings": siblings}).to_string().into_response()
}

fn authorised(headers: &HeaderMap) -> bool {
    headers.get("authorization").is_some_and(|v| v == &format!("Bearer {TOKEN}"))
}

async fn file(Path(name): Path<String>, State(served): State<Arc<AtomicUsize>>, headers: HeaderMap) -> Response {
    if !authorised(&headers) {
        return StatusCode::UNAUTHORIZED.into_response();
    }
    let Ok(bytes) = std::fs::read(golden("models/llama").join(&name)) else { return StatusCode::NOT_FOUND.into_response() };
    served.fetch_add(1, Ordering::Relaxed);
    let total = bytes.len();
    let range = headers.get("range").and_then(|v| v.to_str().ok()).and_then(|v| v.strip_prefix("bytes=")).and_then(|v| v.split_once('-'));
    let (from, to) = match range {
        Some((a, b)) => (a.parse().unwrap(), b.parse().unwrap_or(total - 1).min(total - 1)),
        None => (0, total - 1),
    };
    let headers = [
        ("x-repo-commit", COMMIT.to_owned()),
        ("etag", format!("\"{name}\"")),
        ("content-range", format!("bytes {from}-{to}/{total}")),
        ("accept-ranges", "bytes".to_owned()),
    ];
    (StatusCode::PARTIAL_CONTENT, headers, bytes[from..=to].to_vec()).into_response()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_comes_from_the_hub_once_and_then_from_the_cache() {
    let served = Arc::new(AtomicUsize::new(0));
    let router = Router::new()
        .route("/api/models/tiny/llama/revision/main", get(info))
        .route("/tiny/llama/resolve/main/{file}", get(file))
        .with_state(served.clone());
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move { axum::serve(listener, router).await });

    let cache = tempfile::tempdir().unwrap();
    let hub = HubOptions { endpoint: Some(endpoint), token: Some(TOKEN.into()), cache_dir: Some(cache.path().into()), offline: false };
    let open = |hub: HubOptions| tokio::task::spawn_blocking(move || load_model(None, "tiny/llama", &hub));

    let e = open(HubOptions { token: None, ..hub.clone() }).await.unwrap().unwrap_err().to_string();
    assert!(e.contains("tiny/llama") && e.contains("401"), "{e}");
    let model = open(hub.clone()).await.unwrap().unwrap();
    assert_eq!((model.id.as_str(), model.config.num_layers), ("llama", 3));
    let downloads = served.load(Ordering::Relaxed);
    assert!(downloads > 0);
    open(HubOptions { offline: true, ..hub.clone() }).await.unwrap().unwrap();
    open(hub.clone()).await.unwrap().unwrap();
    assert_eq!(served.load(Ordering::Relaxed), downloads, "the second time comes from the cache");
    let elsewhere = tempfile::tempdir().unwrap();
    let e = open(HubOptions { offline: true, cache_dir: Some(elsewhere.path().into()), ..hub }).await.unwrap().unwrap_err().to_string();
    assert!(e.contains("offline"), "{e}");
}
