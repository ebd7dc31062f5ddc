//! Device workers and scheduling of work units.

pub mod api;
