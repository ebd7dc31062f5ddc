//! How many tokens each client may have in the scoring queue.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use crate::domain::reason::Reason;
use crate::service::error::{Result, ServiceError};

/// Tokens in the queue, by client, and their limit; clones share them.
#[derive(Clone, Debug)]
pub(in crate::service) struct ScoringQuota {
    /// Tokens that one client may have there; `None` is as many as it likes.
    limit: Option<usize>,
    in_queue: Arc<Mutex<HashMap<String, usize>>>,
}

/// Some tokens of a client's; given back when dropped.
#[derive(Debug)]
pub(in crate::service) struct QuotaShare {
    quota: ScoringQuota,
    owner: String,
    tokens: usize,
}

impl ScoringQuota {
    /// Creates a quota of which nothing is taken.
    pub fn new(limit: Option<usize>) -> Self {
        ScoringQuota { limit, in_queue: Arc::default() }
    }

    /// Takes `tokens` for a client; `None` without a limit. One request is let in whatever its
    /// size, so that none is refused for ever.
    ///
    /// # Errors
    /// `ResourceExhausted` when the client has too many already.
    pub fn take(&self, owner: &str, tokens: usize) -> Result<Option<QuotaShare>> {
        let Some(limit) = self.limit else { return Ok(None) };
        let mut all = self.in_queue.lock().unwrap_or_else(PoisonError::into_inner);
        let has = all.get(owner).copied().unwrap_or(0);
        if has > 0 && has + tokens > limit {
            let message = format!(
                "{has} tokens of yours wait to be scored, {limit} are allowed: send more when some are answered"
            );
            return Err(ServiceError::ResourceExhausted { reason: Reason::TooManyTokens, message });
        }
        *all.entry(owner.to_owned()).or_default() += tokens;
        Ok(Some(QuotaShare { quota: self.clone(), owner: owner.to_owned(), tokens }))
    }
}

impl Drop for QuotaShare {
    fn drop(&mut self) {
        let mut all = self.quota.in_queue.lock().unwrap_or_else(PoisonError::into_inner);
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
        let quota = ScoringQuota::new(Some(100));
        let first = quota.take("a", 150).unwrap();
        assert!(quota.take("a", 1).is_err(), "a large first request is let in, nothing beside it");
        let other = quota.take("b", 60).unwrap();
        assert!(quota.take("b", 41).is_err() && quota.take("b", 40).is_ok());
        drop((first, other));
        assert!(
            quota.in_queue.lock().unwrap().is_empty(),
            "nothing is kept of clients without requests"
        );
        assert!(ScoringQuota::new(None).take("a", usize::MAX).unwrap().is_none());
    }
}
