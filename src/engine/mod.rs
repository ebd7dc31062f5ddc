//! Device workers and scheduling of work units.
