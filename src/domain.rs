//! Records and legal states of jobs, datasets, checkpoints and events, and the settings of a run.
//! Plain data, no I/O.

pub mod access;
pub mod dataset;
pub mod dpo;
pub mod identity;
pub mod job;
pub mod logged;
pub mod message;
pub mod names;
pub mod reason;
pub mod training;
pub mod usage;
pub mod violation;
