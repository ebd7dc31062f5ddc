//! Keys that an issuer publishes. They are fetched again from time to time and when a token names
//! an unknown key. While the issuer does not answer, the last ones stay in use for a limited time.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use jsonwebtoken::jwk::{AlgorithmParameters, EllipticCurve, Jwk, KeyOperations, PublicKeyUse};
use jsonwebtoken::{Algorithm, DecodingKey};
use reqwest::Url;
use serde::Deserialize;
use serde_json::Value;
use tokio::sync::{Notify, Semaphore, watch};

use super::signatures::ALGORITHMS;
use crate::service::audit::AUDIT;
use crate::service::error::{Result, ServiceError};

/// Time limit for an answer of the issuer.
const FETCH_TIMEOUT: Duration = Duration::from_secs(10);
/// Maximum size of an answer of the issuer, in bytes.
const MAX_ANSWER_BYTES: usize = 512 << 10;
/// Maximum number of keys of an issuer.
const MAX_KEYS: usize = 100;
/// Minimum time between two fetches, whatever the callers send.
const MIN_PAUSE: Duration = Duration::from_secs(2);
/// Time between two fetches while the issuer does not answer.
const RETRY_PAUSE: Duration = Duration::from_secs(10);
/// Maximum time that a call with an unknown key waits for a fetch.
const MAX_WAIT: Duration = Duration::from_secs(5);
/// Maximum number of calls that wait for a fetch. Further ones are refused at once.
const MAX_WAITING: usize = 256;

/// Location of an issuer's keys, and how long they are used.
#[derive(Clone, Debug)]
pub struct KeySource {
    /// URL of the issuer, as it stands in its tokens.
    pub issuer: String,
    /// URL of the keys; `None` means the one that the issuer's discovery document names.
    pub jwks_url: Option<String>,
    /// PEM file of the authorities to trust in place of the system's.
    pub ca_file: Option<PathBuf>,
    /// Time after which the keys are fetched again.
    pub refresh: Duration,
    /// Maximum time for which keys are used without a successful fetch.
    pub max_age: Duration,
}

/// The reason why there is no key to check a token with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NoKey {
    /// The issuer publishes no such key.
    Unknown,
    /// The issuer has not answered, so its keys are not known.
    Unavailable,
}

/// The keys of an issuer.
pub(super) struct IssuerKeys {
    source: KeySource,
    http: reqwest::Client,
    published: watch::Sender<Published>,
    /// Asks for a fetch.
    wanted: Notify,
    waiting: Semaphore,
}

/// State after the last fetch.
#[derive(Clone, Default)]
struct Published {
    keys: Arc<Vec<PublishedKey>>,
    /// Time of the last successful fetch.
    fetched: Option<Instant>,
    /// True if the last fetch failed.
    failed: bool,
}

struct PublishedKey {
    id: Option<String>,
    algorithms: Vec<Algorithm>,
    key: DecodingKey,
}

#[derive(Deserialize)]
struct Discovery {
    issuer: String,
    jwks_uri: String,
}

#[derive(Deserialize)]
struct KeySet {
    keys: Vec<Value>,
}

/// Returns true if nobody between this server and the URL's server can change an answer: `https`,
/// or `http` on this machine.
pub fn is_safe_url(url: &str) -> bool {
    // Callers look for the prefix "https:" in lower case.
    let is_lower = url.starts_with("https:") || url.starts_with("http:");
    is_lower
        && Url::parse(url).is_ok_and(|url| match url.scheme() {
            "https" => url.host().is_some(),
            "http" => match url.host_str() {
                Some("localhost" | "[::1]") => true,
                Some(host) => host
                    .parse::<std::net::Ipv4Addr>()
                    .is_ok_and(|address| address.is_loopback()),
                None => false,
            },
            _ => false,
        })
}

impl IssuerKeys {
    /// Prepares the fetches, without one.
    ///
    /// # Errors
    /// `InvalidArgument` (`oidc_ca_file`) if the file cannot be used. `Internal` if there is no
    /// HTTP client, e.g. because the system has no certificates of authorities.
    pub fn new(source: KeySource) -> Result<Self> {
        let mut http = reqwest::Client::builder()
            .timeout(FETCH_TIMEOUT)
            // A redirect could lead to a place that nobody chose.
            .redirect(reqwest::redirect::Policy::none())
            .https_only(source.issuer.starts_with("https:"))
            .user_agent(concat!("bradley/", env!("CARGO_PKG_VERSION")));
        if source.issuer.starts_with("http:") {
            // Without TLS, nothing may leave this machine.
            http = http.no_proxy();
        }
        if let Some(path) = &source.ca_file {
            let wrong = |e: &dyn std::fmt::Display| {
                ServiceError::invalid("oidc_ca_file", format!("{}: {e}", path.display()))
            };
            let pem = std::fs::read(path).map_err(|e| wrong(&e))?;
            let authorities = reqwest::Certificate::from_pem_bundle(&pem).map_err(|e| wrong(&e))?;
            if authorities.is_empty() {
                return Err(wrong(&"it holds no PEM certificate"));
            }
            http = http.tls_certs_only(authorities);
        }
        let http = http.build().map_err(|e| {
            ServiceError::internal(format!(
                "oidc_issuer: no HTTPS client: {}",
                with_sources(&e)
            ))
        })?;
        Ok(IssuerKeys {
            source,
            http,
            published: watch::channel(Published::default()).0,
            wanted: Notify::new(),
            waiting: Semaphore::new(MAX_WAITING),
        })
    }

    /// Returns the key with the id that a token names; if it names none, the only key of the
    /// algorithm. For an unknown key the keys are fetched again, at most every two seconds.
    ///
    /// # Errors
    /// [`NoKey::Unknown`] if the issuer publishes no such key; [`NoKey::Unavailable`] if its keys
    /// are not known at the moment, or if too many calls already wait for a fetch.
    pub async fn find(
        &self,
        id: Option<&str>,
        algorithm: Algorithm,
    ) -> std::result::Result<DecodingKey, NoKey> {
        let mut changes = self.published.subscribe();
        let known = changes.borrow_and_update().clone();
        if let Some(key) = self.look(&known, id, algorithm) {
            return Ok(key);
        }
        let Ok(_place) = self.waiting.try_acquire() else {
            return Err(NoKey::Unavailable);
        };
        self.wanted.notify_one();
        let fetched = tokio::time::timeout(MAX_WAIT, changes.changed()).await;
        let known = self.published.borrow().clone();
        self.look(&known, id, algorithm)
            .ok_or_else(|| match fetched {
                Ok(_) => self.missing(&known),
                // The fetch has not ended, so nobody knows whether the issuer has this key.
                Err(_) => NoKey::Unavailable,
            })
    }

    fn is_current(&self, known: &Published) -> bool {
        known
            .fetched
            .is_some_and(|at| at.elapsed() <= self.source.max_age)
    }

    fn look(
        &self,
        known: &Published,
        id: Option<&str>,
        algorithm: Algorithm,
    ) -> Option<DecodingKey> {
        if !self.is_current(known) {
            return None;
        }
        let mut fitting = known.keys.iter().filter(|k| {
            k.algorithms.contains(&algorithm) && (id.is_none() || k.id.as_deref() == id)
        });
        let first = fitting.next()?;
        (id.is_some() || fitting.next().is_none()).then(|| first.key.clone())
    }

    fn missing(&self, known: &Published) -> NoKey {
        if self.is_current(known) && !known.failed {
            NoKey::Unknown
        } else {
            NoKey::Unavailable
        }
    }

    /// Fetches the keys forever.
    pub async fn follow(&self) {
        loop {
            let failed = self.refresh().await.is_err();
            tokio::time::sleep(MIN_PAUSE).await;
            let pause = match failed {
                true => RETRY_PAUSE.min(self.source.refresh),
                false => self.source.refresh,
            };
            tokio::select! {
                () = self.wanted.notified() => {}
                () = tokio::time::sleep(pause.saturating_sub(MIN_PAUSE)) => {}
            }
        }
    }

    /// Fetches the keys once, and publishes the outcome.
    async fn refresh(&self) -> std::result::Result<(), ()> {
        let before = self.published.borrow().clone();
        match self.fetch().await {
            Ok(keys) => {
                metrics::counter!("bradley_oidc_fetches_total", "result" => "ok").increment(1);
                metrics::gauge!("bradley_oidc_keys").set(keys.len() as f64);
                metrics::gauge!("bradley_oidc_up").set(1.0);
                let ids = |keys: &[PublishedKey]| -> BTreeSet<String> {
                    keys.iter().filter_map(|k| k.id.clone()).collect()
                };
                let (old, new) = (ids(&before.keys), ids(&keys));
                if before.fetched.is_none() || old != new {
                    let issuer = &self.source.issuer;
                    tracing::info!(target: AUDIT, issuer, keys = ?new, "keys of the issuer");
                }
                self.published.send_replace(Published {
                    keys: Arc::new(keys),
                    fetched: Some(Instant::now()),
                    failed: false,
                });
                Ok(())
            }
            Err(reason) => {
                metrics::counter!("bradley_oidc_fetches_total", "result" => "failed").increment(1);
                metrics::gauge!("bradley_oidc_up").set(0.0);
                if !before.failed {
                    tracing::warn!(
                        issuer = self.source.issuer,
                        reason,
                        "the keys of the OIDC issuer cannot be fetched: tokens are checked with \
                         the last ones, if there are any, for at most {} s",
                        self.source.max_age.as_secs()
                    );
                }
                self.published.send_replace(Published {
                    failed: true,
                    ..before
                });
                Err(())
            }
        }
    }

    /// Fetches the keys once, without using them, and returns their number.
    ///
    /// # Errors
    /// Returns the reason why they cannot be fetched.
    pub async fn count(&self) -> std::result::Result<usize, String> {
        Ok(self.fetch().await?.len())
    }

    /// Returns a text about the keys in use, for people.
    ///
    /// # Errors
    /// Returns the problem with the keys, for people.
    pub fn state(&self) -> std::result::Result<String, String> {
        let known = self.published.borrow().clone();
        let keys = known.keys.len();
        match (self.is_current(&known), known.failed) {
            (true, false) => Ok(format!("its keys are known ({keys})")),
            (true, true) => Err(format!(
                "its keys cannot be fetched: the last ones ({keys}) are in use"
            )),
            (false, true) => {
                Err("its keys cannot be fetched: its tokens cannot be checked".to_owned())
            }
            (false, false) => Err("its keys are not known yet".to_owned()),
        }
    }

    async fn fetch(&self) -> std::result::Result<Vec<PublishedKey>, String> {
        let url = match &self.source.jwks_url {
            Some(url) => url.clone(),
            None => self.discover().await?,
        };
        read_keys(&self.get(&url).await?).map_err(|e| format!("{url}: {e}"))
    }

    /// Returns the URL of the keys from the issuer's discovery document.
    async fn discover(&self) -> std::result::Result<String, String> {
        let url = format!(
            "{}/.well-known/openid-configuration",
            self.source.issuer.trim_end_matches('/')
        );
        let found: Discovery = serde_json::from_slice(&self.get(&url).await?)
            .map_err(|e| format!("{url}: is not a discovery document: {e}"))?;
        if found.issuer != self.source.issuer {
            return Err(format!(
                "{url}: names the issuer {:?}: set oidc_issuer to exactly this",
                found.issuer
            ));
        }
        if !is_safe_url(&found.jwks_uri) {
            return Err(format!(
                "{url}: names the jwks_uri {:?}, which is not https",
                found.jwks_uri
            ));
        }
        Ok(found.jwks_uri)
    }

    async fn get(&self, url: &str) -> std::result::Result<Vec<u8>, String> {
        let wrong = |e: reqwest::Error| format!("{url}: {}", with_sources(&e.without_url()));
        let mut answer = self.http.get(url).send().await.map_err(wrong)?;
        if answer.status() != reqwest::StatusCode::OK {
            return Err(format!("{url}: answers {}", answer.status()));
        }
        let mut body = Vec::new();
        while let Some(chunk) = answer.chunk().await.map_err(wrong)? {
            if body.len() + chunk.len() > MAX_ANSWER_BYTES {
                return Err(format!("{url}: answers more than {MAX_ANSWER_BYTES} bytes"));
            }
            body.extend_from_slice(&chunk);
        }
        Ok(body)
    }
}

/// Returns an error with its causes, which say e.g. that a connection was refused.
fn with_sources(e: &dyn std::error::Error) -> String {
    let mut text = e.to_string();
    let mut cause = e.source();
    while let Some(e) = cause {
        text += &format!(": {e}");
        cause = e.source();
    }
    text
}

/// Reads the keys of a JWK set that can check signatures; others are left out.
fn read_keys(json: &[u8]) -> std::result::Result<Vec<PublishedKey>, String> {
    let set: KeySet = serde_json::from_slice(json).map_err(|e| format!("is not a key set: {e}"))?;
    if set.keys.len() > MAX_KEYS {
        return Err(format!(
            "has {} keys, {MAX_KEYS} are allowed",
            set.keys.len()
        ));
    }
    let keys: Vec<PublishedKey> = set.keys.into_iter().filter_map(read_key).collect();
    if keys.is_empty() {
        return Err("has no key for RS256, PS256, ES256 or EdDSA".to_owned());
    }
    Ok(keys)
}

fn read_key(json: Value) -> Option<PublishedKey> {
    let jwk: Jwk = serde_json::from_value(json).ok()?;
    let is_for_signatures = jwk
        .common
        .public_key_use
        .as_ref()
        .is_none_or(|usage| *usage == PublicKeyUse::Signature)
        && jwk
            .common
            .key_operations
            .as_ref()
            .is_none_or(|all| all.contains(&KeyOperations::Verify));
    if !is_for_signatures {
        return None;
    }
    let of_type: &[Algorithm] = match &jwk.algorithm {
        AlgorithmParameters::RSA(_) => &[Algorithm::RS256, Algorithm::PS256],
        AlgorithmParameters::EllipticCurve(p) if p.curve == EllipticCurve::P256 => {
            &[Algorithm::ES256]
        }
        AlgorithmParameters::OctetKeyPair(p) if p.curve == EllipticCurve::Ed25519 => {
            &[Algorithm::EdDSA]
        }
        // Symmetric keys are secrets that an issuer must not publish.
        _ => return None,
    };
    let algorithms: Vec<Algorithm> = match jwk.common.key_algorithm {
        None => of_type.to_vec(),
        Some(named) => ALGORITHMS
            .into_iter()
            .filter(|a| of_type.contains(a) && named.to_string() == format!("{a:?}"))
            .collect(),
    };
    if algorithms.is_empty() {
        return None;
    }
    Some(PublishedKey {
        id: jwk.common.key_id.clone(),
        algorithms,
        key: DecodingKey::from_jwk(&jwk).ok()?,
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn only_https_and_this_machine_are_safe() {
        for (url, expected) in [
            ("https://id.example.com/realms/a", true),
            ("http://127.0.0.1:8080", true),
            ("http://localhost/x", true),
            ("http://[::1]:8080", true),
            ("http://id.example.com", false),
            ("http://127.0.0.1.example.com", false),
            ("http://localhost.example.com", false),
            ("ftp://127.0.0.1", false),
            ("file:///etc/passwd", false),
            ("id.example.com", false),
        ] {
            assert_eq!(is_safe_url(url), expected, "{url}");
        }
    }

    #[test]
    fn keys_for_other_uses_and_algorithms_are_left_out() {
        let point = "f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU";
        let set = |keys: Value| json!({ "keys": keys }).to_string();
        let ec = |more: Value| {
            let mut key = json!({"kty": "EC", "crv": "P-256", "x": point, "y": point, "kid": "k"});
            key.as_object_mut()
                .unwrap()
                .extend(more.as_object().unwrap().clone());
            key
        };
        for refused in [
            ec(json!({"use": "enc"})),
            ec(json!({"key_ops": ["deriveKey"]})),
            ec(json!({"alg": "HS256"})),
            ec(json!({"alg": "RS256"})),
            ec(json!({"crv": "P-384"})),
            json!({"kty": "oct", "k": "c2VjcmV0", "kid": "k"}),
            json!({"kty": "OKP", "crv": "X25519", "x": point, "kid": "k"}),
            json!({"kty": "of a later version"}),
            json!("not a key"),
        ] {
            assert!(
                read_keys(set(json!([refused])).as_bytes()).is_err(),
                "{refused}"
            );
            // One such key does not hide the others.
            let both = read_keys(set(json!([refused, ec(json!({}))])).as_bytes()).unwrap();
            assert_eq!(both.len(), 1);
        }
        for accepted in [
            json!({}),
            json!({"use": "sig"}),
            json!({"alg": "ES256", "key_ops": ["verify"]}),
        ] {
            let keys = read_keys(set(json!([ec(accepted)])).as_bytes()).unwrap();
            assert_eq!(keys[0].algorithms, [Algorithm::ES256]);
            assert_eq!(keys[0].id.as_deref(), Some("k"));
        }
        let many: Vec<Value> = (0..=MAX_KEYS).map(|_| ec(json!({}))).collect();
        assert!(read_keys(set(many.into()).as_bytes()).is_err());
    }
}
