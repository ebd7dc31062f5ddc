//! Model configuration, the decoder, its ops, tokenisation, chat templates, weight loading and adapters.

pub mod layout;
pub mod ops;
