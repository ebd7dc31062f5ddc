//! Functions that wait for another process or task. Tests poll with a deadline instead of sleeping
//! a fixed time, and the panic names the missing event.

use std::time::{Duration, Instant};

/// Delay between two polls.
const INTERVAL: Duration = Duration::from_millis(50);

/// Waits until `holds` returns true. Panics after `limit`; `what` names the awaited event.
pub async fn until(what: &str, limit: Duration, mut holds: impl AsyncFnMut() -> bool) {
    until_ok(what, limit, async || {
        if holds().await {
            Ok(())
        } else {
            Err(String::new())
        }
    })
    .await;
}

/// Waits until `look` returns a value, and returns it. Panics after `limit`; the message has the
/// last error.
pub async fn until_ok<T>(
    what: &str,
    limit: Duration,
    mut look: impl AsyncFnMut() -> Result<T, String>,
) -> T {
    let start = Instant::now();
    loop {
        match look().await {
            Ok(value) => return value,
            Err(seen) if start.elapsed() >= limit => panic!("{}", message(what, limit, &seen)),
            Err(_) => tokio::time::sleep(INTERVAL).await,
        }
    }
}

/// Does the same as [`until`] for code that is not async.
#[track_caller]
pub fn until_blocking(what: &str, limit: Duration, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < limit, "{}", message(what, limit, ""));
        std::thread::sleep(INTERVAL);
    }
}

/// Checks repeatedly for the duration `time` that `holds` returns true.
pub async fn holds_for(what: &str, time: Duration, mut holds: impl AsyncFnMut() -> bool) {
    let start = Instant::now();
    while start.elapsed() < time {
        assert!(
            holds().await,
            "{what} ended after {:?}, before {time:?}",
            start.elapsed()
        );
        tokio::time::sleep(INTERVAL).await;
    }
}

fn message(what: &str, limit: Duration, seen: &str) -> String {
    let separator = if seen.is_empty() { "" } else { ": " };
    format!("{what} did not happen within {limit:?}{separator}{seen}")
}
