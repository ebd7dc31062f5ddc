//! The lines of the audit log.

use crate::domain::access::Caller;

/// Where the audit log's lines go: who did what to which resource, and who was refused. They lie in
/// the span of their call, which has its id.
pub const AUDIT: &str = "audit";

/// Notes what a caller did.
pub(super) fn audit(caller: &Caller, action: &'static str, resource: &str) {
    tracing::info!(target: AUDIT, owner = caller.owner, action, resource, "done");
}
