//! Chat templates, rendered as transformers renders them.

pub use crate::domain::dataset::ChatMessage;
