//! Error type for a device that has too little free memory.

/// An operation failed because the device has too little free memory.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct OutOfMemory(pub String);

/// Returns true if an operation failed with [`OutOfMemory`]. The reason travels in the error and
/// not in a flag of the device, because several threads share a device and must not see each
/// other's failures.
pub fn is_out_of_memory(e: &candle_core::Error) -> bool {
    use candle_core::Error;
    match e {
        Error::Cuda(e) => e.is::<OutOfMemory>(),
        Error::Context { inner, .. }
        | Error::WithPath { inner, .. }
        | Error::WithBacktrace { inner, .. } => is_out_of_memory(inner),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_says_whether_memory_ran_out() {
        let full =
            || candle_core::Error::Cuda(Box::new(OutOfMemory("the GPU is out of memory".into())));
        assert!(is_out_of_memory(&full()));
        assert!(is_out_of_memory(&full().bt()));
        assert!(is_out_of_memory(&full().context("block 3")));
        assert_eq!(full().to_string(), "the GPU is out of memory");
        assert!(!is_out_of_memory(&candle_core::Error::Msg(
            "the GPU is out of memory".into()
        )));
    }
}
