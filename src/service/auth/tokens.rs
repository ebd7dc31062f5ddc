//! Bearer tokens. A token is `brd_<id>_<secret>`; the store has the secret's hash only. Secrets are
//! 256 random bits, so that a fast hash is enough.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rand::RngCore;
use tokio::sync::Semaphore;

use crate::domain::access::{Caller, Role};
use crate::domain::job::Millis;
use crate::domain::names::is_valid_id;
use crate::service::error::{Result, ServiceError};
use crate::service::store::tokens::TokenRow;
use crate::service::store::{Store, now};

/// How long a token is believed without another look: a revoked one is refused after this.
const BELIEVED: Duration = Duration::from_secs(5);
/// Tokens believed at a time.
const REMEMBERED: usize = 4096;
const PREFIX: &str = "brd";
/// Looks into the database at a time.
const LOOKS: usize = 2;

/// What is known of a token, without its secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Token {
    /// Its id, part of the token itself.
    pub id: String,
    /// Whose jobs it is for; several tokens may share an owner.
    pub owner: String,
    /// What it allows.
    pub roles: Vec<Role>,
    /// When it was made.
    pub create_time: Millis,
    /// When it ends.
    pub expire_time: Option<Millis>,
}

/// Makes a token; what is returned second is the only copy of its secret.
pub async fn create(
    store: &Store,
    owner: &str,
    roles: &[Role],
    lifetime: Option<Duration>,
) -> Result<(Token, String)> {
    if !is_valid_id(owner) {
        return Err(ServiceError::invalid(
            "owner",
            format!("is {owner:?}: use 1 to 128 letters, digits, - _ and ."),
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

/// Every token, oldest first.
pub async fn list(store: &Store) -> Result<Vec<Token>> {
    Ok(store.tokens().await?.into_iter().map(described).collect())
}

/// Revokes a token.
pub async fn revoke(store: &Store, id: &str) -> Result<()> {
    match store.delete_token(id).await? {
        true => Ok(()),
        false => Err(ServiceError::not_found("token", id)),
    }
}

fn described(row: TokenRow) -> Token {
    let roles = row.roles.split(',').filter_map(Role::parse).collect();
    Token {
        id: row.id,
        owner: row.owner,
        roles,
        create_time: row.create_time,
        expire_time: row.expire_time,
    }
}

/// Tells who presents a token; answers are believed for a few seconds. Clones share them.
#[derive(Clone)]
pub struct TokenService {
    store: Store,
    believed: Arc<Mutex<HashMap<blake3::Hash, (Caller, Instant)>>>,
    /// Strangers' guesses must not take all connections to the database.
    looks: Arc<Semaphore>,
}

impl TokenService {
    /// Creates the service for the tokens of a store.
    pub(in crate::service) fn new(store: Store) -> Self {
        TokenService { store, believed: Arc::default(), looks: Arc::new(Semaphore::new(LOOKS)) }
    }

    /// Returns when the caller's token has been revoked or has expired, for calls that go on; never
    /// for a caller without one.
    pub async fn until_invalid(&self, caller: &Caller) -> ServiceError {
        let Some(id) = &caller.token else { return std::future::pending().await };
        loop {
            tokio::time::sleep(BELIEVED).await;
            match self.store.token(id).await {
                Ok(Some(row)) if row.expire_time.is_none_or(|t| t > now()) => {}
                // What cannot be looked up now is looked up again.
                Err(_) => {}
                Ok(_) => {
                    return ServiceError::Unauthenticated {
                        message: "the bearer token is no longer valid".into(),
                    };
                }
            }
        }
    }

    /// Who presents `token`.
    ///
    /// # Errors
    /// `Unauthenticated` for one that is not known, expired or revoked; the answer does not say
    /// which.
    pub async fn admit(&self, token: &str) -> Result<Caller> {
        let key = blake3::hash(token.as_bytes());
        if let Some((caller, until)) =
            self.believed.lock().unwrap_or_else(PoisonError::into_inner).get(&key)
            && *until > Instant::now()
        {
            return Ok(caller.clone());
        }
        let refused = || ServiceError::Unauthenticated {
            message: "the bearer token is not valid: ask an administrator for one".into(),
        };
        let mut parts = token.splitn(3, '_');
        let (Some(PREFIX), Some(id), Some(secret)) = (parts.next(), parts.next(), parts.next())
        else {
            return Err(refused());
        };
        if id.len() != 16 || secret.len() != 64 || !is_valid_id(id) {
            return Err(refused());
        }
        let row = {
            let _look = self.looks.acquire().await.map_err(ServiceError::internal)?;
            self.store.token(id).await?.ok_or_else(refused)?
        };
        // Compared in constant time.
        let expected = blake3::Hash::from_hex(&row.hash).map_err(ServiceError::internal)?;
        if expected != blake3::hash(secret.as_bytes())
            || row.expire_time.is_some_and(|t| t <= now())
        {
            return Err(refused());
        }
        let token = described(row);
        let caller = Caller { owner: token.owner, roles: token.roles, token: Some(token.id) };
        let mut known = self.believed.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= REMEMBERED {
            let at = Instant::now();
            known.retain(|_, (_, until)| *until > at);
        }
        if known.len() < REMEMBERED {
            known.insert(key, (caller.clone(), Instant::now() + BELIEVED));
        }
        Ok(caller)
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}
