//! Bearer tokens. A token of the database is `brd_<id>_<secret>`. The store has only the hash of
//! the secret. Secrets are 256 random bits, so a fast hash is sufficient. Beside these there are
//! tokens that a file declares, and those of an OIDC issuer.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rand::RngCore;
use tokio::sync::Semaphore;

use super::declared::DeclaredTokens;
use super::oidc::Oidc;
use crate::domain::access::{Caller, Credential, Role};
use crate::domain::job::Millis;
use crate::domain::names::is_valid_id;
use crate::service::error::{Result, ServiceError};
use crate::service::store::tokens::TokenRow;
use crate::service::store::{Store, now};

/// Time for which the result of a look-up is cached. A revoked token is accepted at most this long.
const CACHE_TTL: Duration = Duration::from_secs(5);
/// Maximum number of cached tokens.
const MAX_CACHED_TOKENS: usize = 4096;
const PREFIX: &str = "brd";
/// Maximum number of concurrent look-ups in the database.
const MAX_LOOKUPS: usize = 2;

/// Description of a token, without its secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Token {
    /// Id of the token, which is part of its text.
    pub id: String,
    /// Owner of the jobs and datasets created with the token. Several tokens may share an owner.
    pub owner: String,
    /// Roles of the token.
    pub roles: Vec<Role>,
    /// Creation time, in milliseconds since 1970.
    pub create_time: Millis,
    /// Expiry time, in milliseconds since 1970; `None` never expires.
    pub expire_time: Option<Millis>,
}

/// Creates a token. The second value returned is the token's text, the only copy of its secret.
///
/// # Errors
/// `InvalidArgument` for a bad owner or an empty list of roles.
pub async fn create(
    store: &Store,
    owner: &str,
    roles: &[Role],
    lifetime: Option<Duration>,
) -> Result<(Token, String)> {
    if !is_valid_id(owner) {
        return Err(ServiceError::invalid(
            "owner",
            format!(
                "is {owner:?}: use 1 to 128 letters, digits, - _ and ., and begin with another \
                 character than ."
            ),
        ));
    }
    if roles.is_empty() {
        return Err(ServiceError::invalid(
            "roles",
            "is empty: name at least one of submit, score and admin",
        ));
    }
    let (mut id, mut secret) = ([0; 8], [0; 32]);
    rand::rng().fill_bytes(&mut id);
    rand::rng().fill_bytes(&mut secret);
    let (id, secret) = (hex(&id), hex(&secret));
    let create_time = now();
    let expire_time = lifetime.map(|l| create_time.saturating_add(l.as_millis() as Millis));
    let token = Token {
        id: id.clone(),
        owner: owner.to_owned(),
        roles: roles.to_vec(),
        create_time,
        expire_time,
    };
    let row = TokenRow {
        id: id.clone(),
        owner: owner.to_owned(),
        roles: roles.iter().map(|r| r.name()).collect::<Vec<_>>().join(","),
        hash: blake3::hash(secret.as_bytes()).to_hex().to_string(),
        create_time,
        expire_time,
    };
    store.insert_token(&row).await?;
    Ok((token, format!("{PREFIX}_{id}_{secret}")))
}

/// Returns a random text that may serve as a token which a file declares.
pub fn random() -> String {
    let mut secret = [0; 32];
    rand::rng().fill_bytes(&mut secret);
    format!("{PREFIX}_{}", hex(&secret))
}

/// Returns all tokens, oldest first.
///
/// # Errors
/// `Unavailable` or `Internal` if the database fails.
pub async fn list(store: &Store) -> Result<Vec<Token>> {
    Ok(store
        .tokens()
        .await?
        .into_iter()
        .map(token_from_row)
        .collect())
}

/// Revokes a token.
///
/// # Errors
/// `NotFound` if there is no token with this id.
pub async fn revoke(store: &Store, id: &str) -> Result<()> {
    match store.delete_token(id).await? {
        true => Ok(()),
        false => Err(ServiceError::not_found("token", id)),
    }
}

fn token_from_row(row: TokenRow) -> Token {
    let roles = row.roles.split(',').filter_map(Role::parse).collect();
    Token {
        id: row.id,
        owner: row.owner,
        roles,
        create_time: row.create_time,
        expire_time: row.expire_time,
    }
}

/// Authenticates callers by their tokens. Results are cached for a few seconds. Clones share the
/// cache.
#[derive(Clone)]
pub struct TokenService {
    store: Store,
    cache: Arc<Mutex<HashMap<blake3::Hash, (Caller, Instant)>>>,
    /// Limits concurrent look-ups, so that guessed tokens cannot take all connections to the
    /// database.
    lookups: Arc<Semaphore>,
    declared: Option<DeclaredTokens>,
    oidc: Option<Arc<Oidc>>,
}

impl TokenService {
    /// Creates the service for the tokens in `store`, those that a file declares, and those of an
    /// issuer.
    pub(in crate::service) fn new(
        store: Store,
        declared: Option<DeclaredTokens>,
        oidc: Option<Oidc>,
    ) -> Self {
        TokenService {
            store,
            cache: Arc::default(),
            lookups: Arc::new(Semaphore::new(MAX_LOOKUPS)),
            declared,
            oidc: oidc.map(Arc::new),
        }
    }

    /// Follows changes of the file and of the issuer's keys, forever.
    pub(in crate::service) async fn follow(&self) {
        let file = async {
            if let Some(declared) = &self.declared {
                declared.follow().await;
            }
        };
        let issuer = async {
            if let Some(oidc) = &self.oidc {
                oidc.follow().await;
            }
        };
        tokio::join!(file, issuer);
    }

    /// Returns true if there is no token with which a call could be made: the database has none,
    /// and neither a file nor an issuer is configured, from which tokens may come later.
    ///
    /// # Errors
    /// `Unavailable` or `Internal` if the database fails.
    pub async fn lacks_tokens(&self) -> Result<bool> {
        if self.declared.is_some() || self.oidc.is_some() {
            return Ok(false);
        }
        Ok(self.store.tokens().await?.is_empty())
    }

    /// Returns the state of the issuer's keys, or the problem with them, for people; `None` without
    /// an issuer.
    pub(in crate::service) fn issuer_state(&self) -> Option<std::result::Result<String, String>> {
        self.oidc.as_ref().map(|oidc| oidc.state())
    }

    /// Waits until the caller's token has been revoked or has expired, and returns the error for
    /// the calls that are still open. Never returns for a caller without a token.
    pub async fn until_invalid(&self, caller: &Caller) -> ServiceError {
        let Some(credential) = &caller.token else {
            return std::future::pending().await;
        };
        loop {
            tokio::time::sleep(CACHE_TTL).await;
            let is_valid = match credential {
                Credential::Stored(id) => match self.store.token(id).await {
                    Ok(row) => row.is_some_and(|r| r.expire_time.is_none_or(|t| t > now())),
                    // If the look-up fails, it is repeated in the next round.
                    Err(_) => true,
                },
                Credential::Declared(hash) => {
                    let declared = self.declared.as_ref();
                    declared.is_some_and(|d| d.is_valid(hash, caller))
                }
                Credential::Issued { valid_until } => *valid_until > now(),
            };
            if !is_valid {
                return ServiceError::Unauthenticated {
                    message: "the bearer token is no longer valid: repeat the call with a new one"
                        .into(),
                    log_reason: None,
                };
            }
        }
    }

    /// Returns the caller who presents `token`.
    ///
    /// # Errors
    /// `Unauthenticated` if the token is unknown, expired or revoked; for tokens that the server
    /// made, only `log_reason` says which. `PermissionDenied` if an issuer's token gives no role,
    /// `Unavailable` if it cannot be checked at the moment.
    pub async fn admit(&self, token: &str) -> Result<Caller> {
        if let Some(caller) = self.declared.as_ref().and_then(|d| d.find(token)) {
            return Ok(caller);
        }
        let key = blake3::hash(token.as_bytes());
        if let Some((caller, until)) = self
            .cache
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get(&key)
            && *until > Instant::now()
        {
            return Ok(caller.clone());
        }
        // Our own tokens have no dot, and JWTs have two.
        if let Some(oidc) = &self.oidc
            && token.contains('.')
        {
            let caller = oidc.admit(token).await?;
            self.remember(key, &caller);
            return Ok(caller);
        }
        if let Some((owner, end)) = self.declared.as_ref().and_then(|d| d.find_expired(token)) {
            let end = date(end);
            return Err(refused(format!(
                "a token of {owner} in token_file has expired: {end}"
            )));
        }
        let unknown = || {
            refused("the token is unknown: it has no ID, and token_file does not declare it".into())
        };
        let mut parts = token.splitn(3, '_');
        let (Some(PREFIX), Some(id), Some(secret)) = (parts.next(), parts.next(), parts.next())
        else {
            return Err(unknown());
        };
        if id.len() != 16 || secret.len() != 64 || !is_valid_id(id) {
            return Err(unknown());
        }
        let found = {
            let _lookup = self
                .lookups
                .acquire()
                .await
                .map_err(ServiceError::internal)?;
            self.store.token(id).await?
        };
        let Some(row) = found else {
            return Err(refused(format!(
                "the token {id} does not exist: it was revoked, or is of another database"
            )));
        };
        // `blake3::Hash` compares in constant time.
        let expected = blake3::Hash::from_hex(&row.hash).map_err(ServiceError::internal)?;
        if expected != blake3::hash(secret.as_bytes()) {
            return Err(refused(format!(
                "the text of the token {id} is wrong after its ID: it is mistyped or guessed"
            )));
        }
        if let Some(end) = row.expire_time.filter(|t| *t <= now()) {
            let end = date(end);
            return Err(refused(format!("the token {id} has expired: {end}")));
        }
        let token = token_from_row(row);
        let caller = Caller {
            owner: token.owner,
            roles: token.roles,
            token: Some(Credential::Stored(token.id)),
        };
        self.remember(key, &caller);
        Ok(caller)
    }

    /// Caches the caller of a token, but not beyond the end of an issuer's token.
    fn remember(&self, key: blake3::Hash, caller: &Caller) {
        let lifetime = match caller.token {
            Some(Credential::Issued { valid_until }) => Duration::from_millis(
                u64::try_from(valid_until.saturating_sub(now())).unwrap_or_default(),
            )
            .min(CACHE_TTL),
            _ => CACHE_TTL,
        };
        let mut cached = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        if cached.len() >= MAX_CACHED_TOKENS {
            let at = Instant::now();
            cached.retain(|_, (_, until)| *until > at);
        }
        if cached.len() < MAX_CACHED_TOKENS {
            cached.insert(key, (caller.clone(), Instant::now() + lifetime));
        }
    }
}

/// Returns the refusal of a token. The client gets the same message for every reason; the log has
/// the reason, too, but never a secret.
fn refused(reason: String) -> ServiceError {
    ServiceError::Unauthenticated {
        message: "the bearer token is not valid: ask an administrator for one".into(),
        log_reason: Some(reason),
    }
}

/// Formats a time, which is in milliseconds since 1970.
fn date(time: Millis) -> String {
    jiff::Timestamp::from_millisecond(time)
        .map_or_else(|_| format!("{time} ms"), |t| format!("{t:.0}"))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::service::store::StoreOptions;

    #[tokio::test]
    async fn the_log_has_the_reason_that_the_client_does_not_learn() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path(), &StoreOptions::default())
            .await
            .unwrap();
        let roles = [Role::Score];
        let (valid, text) = create(&store, "a", &roles, None).await.unwrap();
        let (old, old_text) = create(&store, "a", &roles, Some(Duration::ZERO))
            .await
            .unwrap();
        let service = TokenService::new(store, None, None);
        assert_eq!(service.admit(&text).await.unwrap().owner, "a");
        let zeros = "0".repeat(64);
        let mistyped = format!("{PREFIX}_{}_{zeros}", valid.id);
        let absent = format!("{PREFIX}_0000000000000000_{zeros}");
        for (text, reason) in [
            (old_text, format!("the token {} has expired: 2", old.id)),
            (mistyped, format!("the text of the token {} is", valid.id)),
            (
                absent,
                "the token 0000000000000000 does not exist".to_owned(),
            ),
            (zeros, "the token is unknown".to_owned()),
        ] {
            let Err(ServiceError::Unauthenticated {
                message,
                log_reason: Some(said),
            }) = service.admit(&text).await
            else {
                panic!("{text} is admitted");
            };
            assert!(said.starts_with(&reason), "{said}");
            let secret = text.rsplit('_').next().unwrap();
            assert!(!said.contains(secret), "{said}");
            assert!(message.starts_with("the bearer token is not valid"));
        }
    }
}
