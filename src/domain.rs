//! Records and legal states: what a job, a dataset, a checkpoint, an event and a score are. Plain
//! data, no I/O.

pub mod access;
pub mod dataset;
pub mod dpo;
pub mod identity;
pub mod job;
pub mod message;
pub mod names;
pub mod reason;
pub mod training;
pub mod violation;
