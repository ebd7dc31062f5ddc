//! Services that the thread driving a run provides to it.

use super::event::RunEvent;
use crate::infer::reference_cache::ReferenceCache;

/// Context of one unit of work.
pub struct RunContext<'a> {
    /// Cache of reference log-probs by content.
    pub cache: &'a ReferenceCache,
    /// Yield point: called before every block of every pass, and while a checkpoint waits to be
    /// written again, so that the thread can do other work such as scoring. It is called only when
    /// no weight is partially updated.
    pub yield_point: &'a mut dyn FnMut(),
    /// Receives the run's events.
    pub emit: &'a mut dyn FnMut(RunEvent),
}
