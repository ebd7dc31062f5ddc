//! Identity, permissions and quotas of callers.

pub mod access;
pub mod declared;
pub mod oidc;
pub(super) mod quota;
pub mod tokens;
