//! Connects commands to a server.

use std::time::Duration;

use super::failure::Failure;
use crate::rpc::client::{Client, Target};

/// Time limit for connecting to a server.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Connects to a server.
pub(super) async fn connect(target: &Target) -> Result<Client, Failure> {
    Ok(Client::connect(target, CONNECT_TIMEOUT).await?)
}

/// Returns `{collection}/{name}`, or `name` unchanged if it already has this prefix.
pub(super) fn full_name(collection: &str, name: &str) -> String {
    if name.starts_with(&format!("{collection}/")) {
        name.to_owned()
    } else {
        format!("{collection}/{name}")
    }
}
