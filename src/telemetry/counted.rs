//! Things that are open, as gauges.

/// Counts in a gauge while it lives.
#[derive(Debug)]
pub struct Counted(&'static str);

impl Counted {
    /// One more.
    pub fn new(gauge: &'static str) -> Self {
        metrics::gauge!(gauge).increment(1.0);
        Counted(gauge)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        metrics::gauge!(self.0).decrement(1.0);
    }
}
