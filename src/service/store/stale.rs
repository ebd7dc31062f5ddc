//! Connections whose prepared statements no longer fit the schema. PostgreSQL refuses a cached
//! statement when a migration has changed the type of its result (SQLSTATE class 0A), and goes on
//! refusing it on that connection. So every connection that is older than the last such refusal is
//! closed before it would be used again.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// When a statement was last refused.
static REFUSED: Mutex<Option<Instant>> = Mutex::new(None);

/// Notes that a statement was refused because the schema changed.
pub fn note_refused() {
    *REFUSED.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
}

/// Whether a connection of that age was opened after the last refusal.
pub fn is_fresh(age: Duration) -> bool {
    let refused = *REFUSED.lock().unwrap_or_else(PoisonError::into_inner);
    refused.is_none_or(|refused| age < refused.elapsed())
}
