//! Tokens, roles, ownership, TLS.
