//! Time limit for getting a connection to the database, and the error when none was got.

use std::time::Duration;

/// Maximum time that a call waits for a connection. If the database does not answer, callers get an
/// error after this time.
pub const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(5);

/// Returns the error about a database that gave no connection within [`ACQUIRE_TIMEOUT`]. The
/// library's own text reads as if all connections were in use, also when the database is down.
pub fn no_connection(database: &str) -> String {
    format!(
        "{database} gave no connection within {} seconds: check that it runs and answers, and how \
         many connections it allows",
        ACQUIRE_TIMEOUT.as_secs()
    )
}
