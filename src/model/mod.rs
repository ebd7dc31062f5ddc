//! Model configuration, the decoder, its ops, tokenisation, chat templates, weight loading and adapters.

pub mod chat;
pub mod config;
pub mod error;
pub mod layout;
pub mod ops;
pub mod rope;
