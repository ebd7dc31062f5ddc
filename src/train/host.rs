//! What a run has of the thread that drives it.

use super::event::RunEvent;
use crate::infer::reference_cache::ReferenceCache;

/// The surroundings of one unit of work.
pub struct Host<'a> {
    /// Reference log-probs by content.
    pub cache: &'a ReferenceCache,
    /// The yield point: called between the blocks of every pass, milliseconds apart, so that the
    /// thread may do other work there, such as scoring. It is called only where no weight is half
    /// updated.
    pub pause: &'a mut dyn FnMut(),
    /// Takes what the run reports.
    pub emit: &'a mut dyn FnMut(RunEvent),
}
