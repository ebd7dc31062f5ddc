//! The Hugging Face hub's protocol, served on loopback: download with a token, the cache, offline
//! mode.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use bradley::formats::loader::load_model;
use bradley::formats::source::HubOptions;

use crate::support::golden;

const TOKEN: &str = "hf_only_for_this_test";
const COMMIT: &str = "0123456789012345678901234567890123456789";
const NEXT_COMMIT: &str = "1111111111111111111111111111111111111111";

/// A hub with one repository of two commits.
#[derive(Default)]
struct Hub {
    /// Number of files that the hub has sent.
    served: AtomicUsize,
    /// Number of requests for the list of files.
    listed: AtomicUsize,
    /// A file for which the hub answers 500.
    broken: Mutex<Option<&'static str>>,
    /// True once the branch has moved to the second commit.
    has_moved: AtomicBool,
}

impl Hub {
    /// Returns the commit of a revision.
    fn commit(&self, revision: &str) -> Option<&'static str> {
        match revision {
            "main" if self.has_moved.load(Ordering::Relaxed) => Some(NEXT_COMMIT),
            "main" | COMMIT => Some(COMMIT),
            NEXT_COMMIT => Some(NEXT_COMMIT),
            _ => None,
        }
    }

    /// Returns the numbers of lists and of files that the hub has sent.
    fn counts(&self) -> (usize, usize) {
        (
            self.listed.load(Ordering::Relaxed),
            self.served.load(Ordering::Relaxed),
        )
    }

    /// Serves the hub and returns its address.
    async fn serve(self: &Arc<Self>) -> String {
        let router = Router::new()
            .route("/api/models/tiny/llama/revision/{revision}", get(info))
            .route("/tiny/llama/resolve/{revision}/{file}", get(file))
            .with_state(self.clone());
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(async move { axum::serve(listener, router).await });
        endpoint
    }
}

/// Returns the names of the repository's files in the order in which the hub lists them.
fn names() -> Vec<String> {
    let files = std::fs::read_dir(golden("models/llama"))
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = files.chain(["README.md".into()]).collect();
    names.sort();
    names
}

async fn info(
    Path(revision): Path<String>,
    State(hub): State<Arc<Hub>>,
    headers: HeaderMap,
) -> Response {
    if !authorised(&headers) {
        return StatusCode::UNAUTHORIZED.into_response();
    }
    let Some(commit) = hub.commit(&revision) else {
        return StatusCode::NOT_FOUND.into_response();
    };
    hub.listed.fetch_add(1, Ordering::Relaxed);
    let siblings: Vec<_> = names()
        .into_iter()
        .map(|f| serde_json::json!({"rfilename": f}))
        .collect();
    serde_json::json!({"sha": commit, "siblings": siblings})
        .to_string()
        .into_response()
}

fn authorised(headers: &HeaderMap) -> bool {
    headers
        .get("authorization")
        .is_some_and(|v| v == &format!("Bearer {TOKEN}"))
}

async fn file(
    Path((revision, name)): Path<(String, String)>,
    State(hub): State<Arc<Hub>>,
    headers: HeaderMap,
) -> Response {
    if !authorised(&headers) {
        return StatusCode::UNAUTHORIZED.into_response();
    }
    let Some(commit) = hub.commit(&revision) else {
        return StatusCode::NOT_FOUND.into_response();
    };
    if hub
        .broken
        .lock()
        .unwrap()
        .is_some_and(|broken| broken == name)
    {
        return StatusCode::INTERNAL_SERVER_ERROR.into_response();
    }
    let Ok(bytes) = std::fs::read(golden("models/llama").join(&name)) else {
        return StatusCode::NOT_FOUND.into_response();
    };
    // A client asks for the first byte to learn the size, which does not count.
    if headers
        .get("range")
        .is_none_or(|range| range != "bytes=0-0")
    {
        hub.served.fetch_add(1, Ordering::Relaxed);
    }
    let total = bytes.len();
    let range = headers
        .get("range")
        .and_then(|v| v.to_str().ok())
        .and_then(|v| v.strip_prefix("bytes="))
        .and_then(|v| v.split_once('-'));
    let (from, to) = match range {
        Some((a, b)) => (
            a.parse().unwrap(),
            b.parse().unwrap_or(total - 1).min(total - 1),
        ),
        None => (0, total - 1),
    };
    let headers = [
        ("x-repo-commit", commit.to_owned()),
        ("etag", format!("\"{name}\"")),
        ("content-range", format!("bytes {from}-{to}/{total}")),
        ("accept-ranges", "bytes".to_owned()),
    ];
    (
        StatusCode::PARTIAL_CONTENT,
        headers,
        bytes[from..=to].to_vec(),
    )
        .into_response()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_is_downloaded_once_and_then_read_from_the_cache() {
    let server = Arc::<Hub>::default();
    let endpoint = server.serve().await;
    let cache = tempfile::tempdir().unwrap();
    let hub = HubOptions {
        endpoint: Some(endpoint),
        token: Some(TOKEN.into()),
        cache_dir: Some(cache.path().into()),
        offline: false,
    };
    let open =
        |hub: HubOptions| tokio::task::spawn_blocking(move || load_model(None, "tiny/llama", &hub));

    let e = open(HubOptions {
        token: None,
        ..hub.clone()
    })
    .await
    .unwrap()
    .unwrap_err()
    .to_string();
    assert!(e.contains("tiny/llama") && e.contains("401"), "{e}");
    assert!(e.contains("gated model needs HF_TOKEN"), "{e}");
    let model = open(hub.clone()).await.unwrap().unwrap();
    assert_eq!(
        (model.id.as_str(), model.config.spec.blocks.len()),
        ("llama", 3)
    );
    let before = server.counts();
    assert!(before.0 > 0 && before.1 > 0);
    open(HubOptions {
        offline: true,
        ..hub.clone()
    })
    .await
    .unwrap()
    .unwrap();
    open(hub.clone()).await.unwrap().unwrap();
    assert_eq!(
        server.counts(),
        before,
        "the second time comes from the cache"
    );
    let elsewhere = tempfile::tempdir().unwrap();
    let e = open(HubOptions {
        offline: true,
        cache_dir: Some(elsewhere.path().into()),
        ..hub
    })
    .await
    .unwrap()
    .unwrap_err()
    .to_string();
    assert!(e.contains("offline"), "{e}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interrupted_download_continues_at_its_commit() {
    let server = Arc::<Hub>::default();
    let endpoint = server.serve().await;
    let cache = tempfile::tempdir().unwrap();
    let hub = HubOptions {
        endpoint: Some(endpoint),
        token: Some(TOKEN.into()),
        cache_dir: Some(cache.path().into()),
        offline: false,
    };
    let offline = HubOptions {
        offline: true,
        ..hub.clone()
    };
    let open =
        |hub: HubOptions| tokio::task::spawn_blocking(move || load_model(None, "tiny/llama", &hub));
    let snapshot = cache
        .path()
        .join("models--tiny--llama/snapshots")
        .join(COMMIT);
    // The download fails at the last file, without which a model can be loaded.
    *server.broken.lock().unwrap() = Some("tokenizer_config.json");
    let e = open(hub.clone()).await.unwrap().unwrap_err().to_string();
    assert!(e.contains("500"), "{e}");
    assert!(
        snapshot.join("tokenizer.json").exists()
            && !snapshot.join("tokenizer_config.json").exists()
    );
    let e = open(hub.clone()).await.unwrap().unwrap_err().to_string();
    assert!(
        e.contains("did not end") && e.contains("HF_HUB_OFFLINE=1"),
        "{e}"
    );
    assert!(
        open(offline.clone())
            .await
            .unwrap()
            .unwrap()
            .tokenizer
            .eos_token()
            .is_none(),
        "offline, the incomplete cache is not used as it is"
    );

    // The download continues at its own commit, although the branch has moved.
    *server.broken.lock().unwrap() = None;
    server.has_moved.store(true, Ordering::Relaxed);
    let before = server.counts();
    let model = open(hub.clone()).await.unwrap().unwrap();
    assert_eq!(model.tokenizer.eos_token(), Some("<|eot_id|>"));
    assert_eq!(
        server.counts(),
        (before.0 + 1, before.1 + 1),
        "only the file that was missing is sent"
    );
    assert_eq!(
        snapshot.parent().unwrap().read_dir().unwrap().count(),
        1,
        "files of one commit only"
    );
    open(hub.clone()).await.unwrap().unwrap();
    assert_eq!(
        server.counts(),
        (before.0 + 1, before.1 + 1),
        "nothing is sent again"
    );

    // A cache of another program has no list of files, so the hub is asked once.
    let stored_lists = || {
        snapshot
            .read_dir()
            .unwrap()
            .map(|e| e.unwrap().path())
            .filter(|p| p.ends_with(".bradley-complete.json"))
            .collect::<Vec<_>>()
    };
    std::fs::remove_file(&stored_lists()[0]).unwrap();
    open(offline).await.unwrap().unwrap();
    assert!(
        stored_lists().is_empty(),
        "a list was written without asking the hub"
    );
    open(hub.clone()).await.unwrap().unwrap();
    open(hub.clone()).await.unwrap().unwrap();
    assert_eq!(server.counts(), (before.0 + 2, before.1 + 1));

    // A file that is listed but missing is downloaded again.
    std::fs::remove_file(snapshot.join("chat_template.jinja")).unwrap();
    assert!(
        open(hub)
            .await
            .unwrap()
            .unwrap()
            .tokenizer
            .has_chat_template()
    );
}
