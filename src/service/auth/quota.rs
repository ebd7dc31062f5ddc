//! Quota of tokens to score and to generate, per client.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use crate::domain::reason::Reason;
use crate::service::error::{Result, ServiceError};

/// Number of tokens of each client's unanswered requests, and the limit. Clones share them.
#[derive(Clone, Debug)]
pub(in crate::service) struct ScoringQuota {
    /// Maximum number of these tokens per client; `None` is no limit.
    limit: Option<usize>,
    unanswered: Arc<Mutex<HashMap<String, usize>>>,
}

/// A client's share of the quota. It is released when dropped.
#[derive(Debug)]
pub(in crate::service) struct QuotaShare {
    quota: ScoringQuota,
    owner: String,
    tokens: usize,
}

impl ScoringQuota {
    /// Creates a quota that is unused.
    pub fn new(limit: Option<usize>) -> Self {
        ScoringQuota {
            limit,
            unanswered: Arc::default(),
        }
    }

    /// Takes `tokens` from a client's quota; returns `None` if there is no limit. A client without
    /// unanswered requests may send one of any size, so that large requests are not refused
    /// forever.
    ///
    /// # Errors
    /// `ResourceExhausted` if the client's requests would have more tokens than the limit.
    pub fn take(&self, owner: &str, tokens: usize) -> Result<Option<QuotaShare>> {
        let Some(limit) = self.limit else {
            return Ok(None);
        };
        let mut all = self
            .unanswered
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let queued = all.get(owner).copied().unwrap_or(0);
        if queued > 0 && queued.saturating_add(tokens) > limit {
            let message = format!(
                "your unanswered requests have {queued} tokens to score or to generate, and this \
                 one has {tokens}: together at most {limit} are allowed, so send it after some are \
                 answered"
            );
            return Err(ServiceError::ResourceExhausted {
                reason: Reason::TooManyTokens,
                message,
            });
        }
        *all.entry(owner.to_owned()).or_default() += tokens;
        Ok(Some(QuotaShare {
            quota: self.clone(),
            owner: owner.to_owned(),
            tokens,
        }))
    }
}

impl Drop for QuotaShare {
    fn drop(&mut self) {
        let mut all = self
            .quota
            .unanswered
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(queued) = all.get_mut(&self.owner) {
            *queued -= self.tokens;
            if *queued == 0 {
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
        // A first request may be larger than the limit, but then nothing is let in beside it.
        let first = quota.take("a", 150).unwrap();
        let refused = quota.take("a", 1).unwrap_err().to_string();
        assert!(
            refused.contains("have 150 tokens to score or to generate, and this one has 1:"),
            "{refused}"
        );
        let other = quota.take("b", 60).unwrap();
        assert!(quota.take("b", 41).is_err() && quota.take("b", 40).is_ok());
        drop((first, other));
        assert!(
            quota.unanswered.lock().unwrap().is_empty(),
            "an entry remains for a client without requests"
        );
        assert!(
            ScoringQuota::new(None)
                .take("a", usize::MAX)
                .unwrap()
                .is_none()
        );
    }
}
