//! Audit log.

use crate::domain::access::Caller;

/// Tracing target of the audit log, which records who did what to which resource and who was
/// refused. Each line is inside the span of its call, which has the call's id.
pub const AUDIT: &str = "audit";

/// Writes an audit line for a completed action.
pub(super) fn audit(caller: &Caller, action: &'static str, resource: &str) {
    tracing::info!(target: AUDIT, owner = caller.owner, action, resource, "done");
}
