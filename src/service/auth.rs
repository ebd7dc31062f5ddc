//! Who calls, and what callers may see and take.

pub mod access;
pub(super) mod quota;
pub mod tokens;
