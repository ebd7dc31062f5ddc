//! Identity, permissions and quotas of callers.

pub mod access;
pub(super) mod quota;
pub mod tokens;
