//! How much of the scoring queue each client has.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use super::error::{Result, ServiceError};
use crate::domain::reason::Reason;

/// Tokens in the queue, by client.
#[derive(Debug, Default)]
pub(super) struct Shares(Mutex<HashMap<String, usize>>);

/// Some tokens of a client's; given back when dropped.
#[derive(Debug)]
pub(super) struct Share {
    shares: Arc<Shares>,
    owner: String,
    tokens: usize,
}

impl Shares {
    /// Takes `tokens` for a client that may have `limit`. One request is let in whatever its size, so that none is refused for ever.
    ///
    /// # Errors
    /// `ResourceExhausted` when the client has too many already.
    pub fn take(self: &Arc<Self>, owner: &str, tokens: usize, limit: usize) -> Result<Share> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let has = all.get(owner).copied().unwrap_or(0);
        if has > 0 && has + tokens > limit {
            let message = format!("{has} tokens of yours wait to be scored, {limit} are allowed: send more when some are answered");
            return Err(ServiceError::ResourceExhausted { reason: Reason::TooManyTokens, message });
        }
        *all.entry(owner.to_owned()).or_default() += tokens;
        Ok(Share { shares: self.clone(), owner: owner.to_owned(), tokens })
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut all = self.shares.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(has) = all.get_mut(&self.owner) {
            *has -= self.tokens;
            if *has == 0 {
                all.remove(&self.owner);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_has_its_share_and_no_more() {
        let shares = Arc::new(Shares::default());
        let first = shares.take("a", 150, 100).unwrap();
        assert!(shares.take("a", 1, 100).is_err(), "a large first request is let in, nothing beside it");
        let other = shares.take("b", 60, 100).unwrap();
        assert!(shares.take("b", 41, 100).is_err() && shares.take("b", 40, 100).is_ok());
        drop((first, other));
        assert!(shares.0.lock().unwrap().is_empty(), "nothing is kept of clients without requests");
    }
}
