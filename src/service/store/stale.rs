//! Detection of connections whose prepared statements no longer fit the schema. PostgreSQL refuses
//! a cached statement after a migration has changed the type of its result (SQLSTATE class 0A), and
//! keeps refusing it on that connection. Therefore every connection that is older than the last
//! refusal is closed before it is used again.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Time of the last refused statement in this process.
static LAST_REFUSAL: Mutex<Option<Instant>> = Mutex::new(None);

/// Records that a statement was refused because the schema changed.
pub fn note_refused() {
    *LAST_REFUSAL.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
}

/// Returns true if a connection of this age was opened after the last refusal.
pub fn is_fresh(age: Duration) -> bool {
    let refused = *LAST_REFUSAL.lock().unwrap_or_else(PoisonError::into_inner);
    refused.is_none_or(|refused| age < refused.elapsed())
}
