//! Tokens of an OpenID Connect issuer: JWTs that it signed, checked with the keys that it
//! publishes.
//!
//! **No owner of these tokens is an owner of our own tokens**: the names of these owners begin with
//! `oidc:`, and the names of the others have no colon.

mod keys;
mod signatures;

use std::collections::BTreeSet;
use std::time::Duration;

use jsonwebtoken::errors::ErrorKind;
use jsonwebtoken::{Algorithm, Header, Validation};
use serde_json::{Map, Value};

use self::keys::{IssuerKeys, NoKey};
pub use self::keys::{KeySource, is_safe_url};
use self::signatures::ALGORITHMS;
use crate::domain::access::{Caller, Credential, Role};
use crate::domain::job::Millis;
use crate::domain::reason::Reason;
use crate::service::error::{Result, ServiceError};
use crate::service::store::now;

/// Beginning of the names of owners. No owner of our own tokens has a colon in its name.
const OWNER_PREFIX: &str = "oidc:";
/// Maximum size of a token, in bytes.
const MAX_TOKEN_BYTES: usize = 12 << 10;
/// Maximum size of the claim that names the owner, in bytes.
const MAX_OWNER_BYTES: usize = 200;
/// Difference between the clocks of issuer and server that is tolerated.
const LEEWAY: Duration = Duration::from_secs(30);
/// Value in [`OidcOptions::roles`] that gives a role to every valid token.
pub const EVERYONE: &str = "*";
/// Claims whose text is a list, separated by spaces (RFC 8693; Entra ID).
const SPACE_SEPARATED: [&str; 2] = ["scope", "scp"];

/// The issuer, and the meaning of its tokens.
#[derive(Clone, Debug)]
pub struct OidcOptions {
    /// Issuer and keys.
    pub keys: KeySource,
    /// Audiences of which a token must name one.
    pub audiences: Vec<String>,
    /// Claim with the owner's name.
    pub owner_claim: String,
    /// Claim with the values of `roles`; `None` if every role is for everyone.
    pub roles_claim: Option<String>,
    /// The values that give a role. [`EVERYONE`] gives it to every valid token.
    pub roles: Vec<(Role, String)>,
}

/// The reason why a token is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Refusal {
    TooLong,
    Malformed,
    Algorithm,
    Kind,
    UnknownKey,
    Signature,
    Expired,
    NotYetValid,
    Audience,
    Issuer,
    MissingClaim(String),
    Owner(String),
    UnverifiedEmail,
    NoRole,
    KeysUnavailable,
}

impl Refusal {
    /// Returns the value of the metric's label.
    fn name(&self) -> &'static str {
        match self {
            Refusal::TooLong | Refusal::Malformed | Refusal::Kind => "malformed",
            Refusal::Algorithm => "algorithm",
            Refusal::UnknownKey => "unknown_key",
            Refusal::Signature => "signature",
            Refusal::Expired => "expired",
            Refusal::NotYetValid => "not_yet_valid",
            Refusal::Audience => "audience",
            Refusal::Issuer => "issuer",
            Refusal::MissingClaim(_) | Refusal::Owner(_) | Refusal::UnverifiedEmail => "claims",
            Refusal::NoRole => "no_role",
            Refusal::KeysUnavailable => "keys_unavailable",
        }
    }
}

impl From<Refusal> for ServiceError {
    fn from(refusal: Refusal) -> Self {
        // None of these tells more than the token's text and this server's documentation, except
        // to a caller whose token the issuer has signed.
        let message = match refusal {
            Refusal::TooLong => format!("has more than {MAX_TOKEN_BYTES} bytes"),
            Refusal::Malformed => {
                "is not a JWT that is signed with RS256, PS256, ES256 or EdDSA".to_owned()
            }
            Refusal::Algorithm => {
                "is not signed with RS256, PS256, ES256 or EdDSA: let the issuer use one of these"
                    .to_owned()
            }
            Refusal::Kind => {
                "is not an access token: its header's typ is neither JWT nor at+jwt".to_owned()
            }
            Refusal::UnknownKey => {
                "is signed with a key that the issuer does not publish: get a new token from the \
                 issuer of this server"
                    .to_owned()
            }
            Refusal::Signature => "has a wrong signature: get a new one".to_owned(),
            Refusal::Expired => "has expired: get a new one".to_owned(),
            Refusal::NotYetValid => {
                "is not valid yet: compare the clocks of the issuer and of this server".to_owned()
            }
            Refusal::Audience => {
                "is for another audience: ask the issuer for one for this server".to_owned()
            }
            Refusal::Issuer => "is from another issuer than this server's".to_owned(),
            Refusal::MissingClaim(claim) => {
                format!("has no usable claim {claim:?}: let the issuer add it")
            }
            Refusal::Owner(claim) => format!(
                "has a claim {claim:?} that cannot be an owner: it must be a text of 1 to \
                 {MAX_OWNER_BYTES} bytes that can be printed"
            ),
            Refusal::UnverifiedEmail => {
                "names an e-mail address that the issuer has not verified: its claim \
                 email_verified must be true"
                    .to_owned()
            }
            Refusal::NoRole => {
                return ServiceError::PermissionDenied {
                    message: "the token gives no role on this server: ask an administrator of the \
                              issuer for a group that has one"
                        .to_owned(),
                };
            }
            Refusal::KeysUnavailable => {
                return ServiceError::Unavailable {
                    reason: Reason::IssuerUnavailable,
                    message: "the token cannot be checked, because the issuer's keys cannot be \
                              fetched at the moment: retry later"
                        .to_owned(),
                    retry_after: Duration::from_secs(5),
                };
            }
        };
        ServiceError::Unauthenticated {
            message: format!("the bearer token {message}"),
            log_reason: None,
        }
    }
}

/// Fetches the keys of an issuer once, and returns their number.
///
/// # Errors
/// `InvalidArgument` (`oidc_ca_file`) or `Internal` if there can be no HTTPS client, `Unavailable`
/// if the keys cannot be fetched.
pub(in crate::service) async fn count_keys(source: KeySource) -> Result<usize> {
    signatures::install();
    let counted = IssuerKeys::new(source)?.count().await;
    counted.map_err(|reason| ServiceError::Unavailable {
        reason: Reason::IssuerUnavailable,
        message: format!("the keys of the OIDC issuer cannot be fetched: {reason}"),
        retry_after: Duration::from_secs(5),
    })
}

/// Authenticates callers by an issuer's tokens.
pub(in crate::service) struct Oidc {
    options: OidcOptions,
    keys: IssuerKeys,
}

impl Oidc {
    /// Prepares the checks. The keys are fetched by [`Oidc::follow`].
    ///
    /// # Errors
    /// `InvalidArgument` (`oidc_ca_file`) or `Internal` if there can be no HTTPS client.
    pub fn new(options: OidcOptions) -> Result<Self> {
        signatures::install();
        let keys = IssuerKeys::new(options.keys.clone())?;
        Ok(Oidc { options, keys })
    }

    /// Fetches the issuer's keys forever.
    pub async fn follow(&self) {
        self.keys.follow().await;
    }

    /// Returns a text about the issuer's keys, for people.
    ///
    /// # Errors
    /// Returns the problem with the keys, for people.
    pub fn state(&self) -> std::result::Result<String, String> {
        self.keys.state()
    }

    /// Returns the caller who presents `token`.
    ///
    /// # Errors
    /// `Unauthenticated` if the token is not valid here, `PermissionDenied` if it gives no role,
    /// `Unavailable` if the issuer's keys are not known.
    pub async fn admit(&self, token: &str) -> Result<Caller> {
        self.check(token).await.map_err(|refusal| {
            metrics::counter!("bradley_oidc_refused_total", "reason" => refusal.name())
                .increment(1);
            refusal.into()
        })
    }

    async fn check(&self, token: &str) -> std::result::Result<Caller, Refusal> {
        if token.len() > MAX_TOKEN_BYTES {
            return Err(Refusal::TooLong);
        }
        // The library does not know the algorithm `none`, so such a token is malformed.
        let header = jsonwebtoken::decode_header(token).map_err(|_| Refusal::Malformed)?;
        if !ALGORITHMS.contains(&header.alg) {
            return Err(Refusal::Algorithm);
        }
        if !is_access_token(&header) {
            return Err(Refusal::Kind);
        }
        let key = self
            .keys
            .find(header.kid.as_deref(), header.alg)
            .await
            .map_err(|e| match e {
                NoKey::Unknown => Refusal::UnknownKey,
                NoKey::Unavailable => Refusal::KeysUnavailable,
            })?;
        let claims = jsonwebtoken::decode(token, &key, &self.validation(header.alg))
            .map_err(|e| refusal_of(e.kind()))?
            .claims;
        self.caller(&claims)
    }

    fn validation(&self, algorithm: Algorithm) -> Validation {
        let mut validation = Validation::new(algorithm);
        validation.leeway = LEEWAY.as_secs();
        validation.validate_nbf = true;
        validation.set_issuer(&[&self.options.keys.issuer]);
        validation.set_audience(&self.options.audiences);
        validation.set_required_spec_claims(&["exp", "iss", "aud"]);
        validation
    }

    /// Returns the caller of a token whose signature, times, issuer and audience are right.
    fn caller(&self, claims: &Map<String, Value>) -> std::result::Result<Caller, Refusal> {
        // The library also accepts a list with the issuer in it.
        if claims.get("iss").and_then(Value::as_str) != Some(&self.options.keys.issuer) {
            return Err(Refusal::Issuer);
        }
        let claim = &self.options.owner_claim;
        let owner = find(claims, claim).ok_or_else(|| Refusal::MissingClaim(claim.clone()))?;
        let owner = owner
            .as_str()
            .filter(|name| is_printable(name) && (1..=MAX_OWNER_BYTES).contains(&name.len()))
            .ok_or_else(|| Refusal::Owner(claim.clone()))?;
        // Anyone may enter someone else's address at some issuers.
        if claim == "email" && claims.get("email_verified") != Some(&Value::Bool(true)) {
            return Err(Refusal::UnverifiedEmail);
        }
        let roles = self.roles(claims);
        if roles.is_empty() {
            return Err(Refusal::NoRole);
        }
        let expires = claims
            .get("exp")
            .and_then(Value::as_f64)
            .ok_or_else(|| Refusal::MissingClaim("exp".to_owned()))?;
        let valid_until = ((expires + LEEWAY.as_secs_f64()) * 1000.0) as Millis;
        // The library counts whole seconds. Open calls end at this time, so none may begin later.
        if valid_until <= now() {
            return Err(Refusal::Expired);
        }
        Ok(Caller {
            owner: format!("{OWNER_PREFIX}{owner}"),
            roles,
            token: Some(Credential::Issued { valid_until }),
        })
    }

    fn roles(&self, claims: &Map<String, Value>) -> Vec<Role> {
        let values = match &self.options.roles_claim {
            Some(claim) => values(claims, claim),
            None => BTreeSet::new(),
        };
        let gives = |(_, value): &&(Role, String)| value == EVERYONE || values.contains(&**value);
        let given: Vec<Role> = self
            .options
            .roles
            .iter()
            .filter(gives)
            .map(|(role, _)| *role)
            .collect();
        Role::ALL
            .into_iter()
            .filter(|role| given.contains(role))
            .collect()
    }
}

/// Returns true if a header is not that of another kind of JWT, such as a logout token.
fn is_access_token(header: &Header) -> bool {
    header.typ.as_ref().is_none_or(|kind| {
        let kind = kind.to_ascii_lowercase();
        let kind = kind.strip_prefix("application/").unwrap_or(&kind);
        matches!(kind, "jwt" | "at+jwt")
    })
}

fn refusal_of(e: &ErrorKind) -> Refusal {
    match e {
        ErrorKind::ExpiredSignature => Refusal::Expired,
        ErrorKind::ImmatureSignature => Refusal::NotYetValid,
        ErrorKind::InvalidAudience => Refusal::Audience,
        ErrorKind::InvalidIssuer => Refusal::Issuer,
        ErrorKind::MissingRequiredClaim(claim) | ErrorKind::InvalidClaimFormat(claim) => {
            Refusal::MissingClaim(claim.clone())
        }
        ErrorKind::InvalidSignature => Refusal::Signature,
        _ => Refusal::Malformed,
    }
}

/// Returns true if a name can be shown as it is: no control characters, and none that are invisible
/// or change the direction of the text.
fn is_printable(name: &str) -> bool {
    name.trim() == name
        && !name.chars().any(|c| {
            c.is_control()
                || matches!(c, '\u{ad}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}')
                || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}')
                || matches!(c, '\u{2060}'..='\u{206f}' | '\u{180b}'..='\u{180f}')
                || matches!(
                    c,
                    '\u{61c}' | '\u{115f}' | '\u{1160}' | '\u{2800}' | '\u{3164}'
                )
                || matches!(c, '\u{ffa0}' | '\u{e0000}'..='\u{e0fff}')
        })
}

/// Returns a claim by its name, or by the path to it: `realm_access.roles`. A claim whose name has
/// dots comes first: names of private claims are often URLs.
fn find<'a>(claims: &'a Map<String, Value>, name: &str) -> Option<&'a Value> {
    if let Some(found) = claims.get(name) {
        return Some(found);
    }
    let (first, rest) = name.split_once('.')?;
    find(claims.get(first)?.as_object()?, rest)
}

/// Returns the values of a claim that is a text or a list of texts.
fn values<'a>(claims: &'a Map<String, Value>, claim: &str) -> BTreeSet<&'a str> {
    match find(claims, claim) {
        Some(Value::String(all)) if SPACE_SEPARATED.contains(&claim) => {
            all.split_ascii_whitespace().collect()
        }
        Some(Value::String(one)) => BTreeSet::from([one.as_str()]),
        Some(Value::Array(list)) => list.iter().filter_map(Value::as_str).collect(),
        _ => BTreeSet::new(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::domain::names::is_valid_id;

    fn oidc(owner_claim: &str, roles_claim: Option<&str>, roles: &[(Role, &str)]) -> Oidc {
        // Selects the cryptography for TLS, as `main` does.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let options = OidcOptions {
            keys: KeySource {
                issuer: "http://127.0.0.1:1".into(),
                jwks_url: None,
                ca_file: None,
                refresh: Duration::from_secs(60),
                max_age: Duration::from_secs(60),
            },
            audiences: vec!["bradley".into()],
            owner_claim: owner_claim.into(),
            roles_claim: roles_claim.map(str::to_owned),
            roles: roles.iter().map(|(r, v)| (*r, (*v).to_owned())).collect(),
        };
        Oidc::new(options).unwrap()
    }

    fn claims(more: Value) -> Map<String, Value> {
        let mut all = json!({"iss": "http://127.0.0.1:1", "exp": 2_000_000_000, "sub": "u1"});
        let all = all.as_object_mut().unwrap();
        all.extend(more.as_object().unwrap().clone());
        all.clone()
    }

    #[tokio::test]
    async fn an_issuer_that_does_not_answer_has_no_keys() {
        let oidc = oidc("sub", None, &[]);
        let before = oidc.state().unwrap_err();
        assert_eq!(before, "its keys are not known yet");
        // Nothing listens on port 1.
        let failed = count_keys(oidc.options.keys.clone()).await.unwrap_err();
        let said = failed.to_string();
        let start = "the keys of the OIDC issuer cannot be fetched: \
                     http://127.0.0.1:1/.well-known/openid-configuration: ";
        assert!(said.starts_with(start), "{said}");
        assert!(said.contains("refused"), "{said}");
    }

    #[test]
    fn no_owner_of_an_issuer_is_an_owner_of_our_own_tokens() {
        let oidc = oidc("sub", None, &[(Role::Score, EVERYONE)]);
        for name in ["team-a", "ops", "a.b", "oidc:team-a", "Ünal", "a b"] {
            let caller = oidc.caller(&claims(json!({"sub": name}))).unwrap();
            assert_eq!(caller.owner, format!("oidc:{name}"));
            assert!(!is_valid_id(&caller.owner));
        }
        for bad in [
            json!(""),
            json!(7),
            json!(["team-a"]),
            json!(null),
            json!("a\nb"),
            json!("a\u{202e}b"),
            json!(" a"),
            json!("a".repeat(MAX_OWNER_BYTES + 1)),
        ] {
            let refused = oidc.caller(&claims(json!({"sub": bad}))).unwrap_err();
            assert_eq!(refused, Refusal::Owner("sub".into()), "{bad}");
        }
        let several = oidc
            .caller(&claims(json!({"iss": ["http://127.0.0.1:1", "x"]})))
            .unwrap_err();
        assert_eq!(several, Refusal::Issuer);
    }

    #[test]
    fn an_address_is_an_owner_only_if_the_issuer_verified_it() {
        let oidc = oidc("email", None, &[(Role::Score, EVERYONE)]);
        let of = |verified: Value| {
            oidc.caller(&claims(
                json!({"email": "a@example.com", "email_verified": verified}),
            ))
            .map(|c| c.owner)
        };
        assert_eq!(of(json!(true)).unwrap(), "oidc:a@example.com");
        for unverified in [json!(false), json!("true"), json!(null)] {
            assert_eq!(of(unverified), Err(Refusal::UnverifiedEmail));
        }
    }

    #[test]
    fn roles_come_from_the_values_of_a_claim() {
        let roles = [
            (Role::Score, EVERYONE),
            (Role::Submit, "ml team"),
            (Role::Submit, "interns"),
            (Role::Admin, "ml-ops"),
        ];
        let of = |claim: &str, value: Value| {
            oidc("sub", Some(claim), &roles)
                .caller(&claims(value))
                .unwrap()
                .roles
        };
        assert_eq!(of("groups", json!({})), [Role::Score]);
        assert_eq!(
            of("groups", json!({"groups": ["x", "interns"]})),
            [Role::Submit, Role::Score]
        );
        assert_eq!(
            of("groups", json!({"groups": "ml team"})),
            [Role::Submit, Role::Score],
            "a text is one value"
        );
        assert_eq!(
            of("scope", json!({"scope": "openid ml-ops"})),
            [Role::Score, Role::Admin],
            "scopes are separated by spaces"
        );
        assert_eq!(
            of("realm.roles", json!({"realm": {"roles": ["ml-ops"]}})),
            [Role::Score, Role::Admin]
        );
        assert_eq!(
            of(
                "https://a.b/roles",
                json!({"https://a.b/roles": ["ml-ops"]})
            ),
            [Role::Score, Role::Admin]
        );
        for other in [
            json!({"groups": "ml-ops-emeriti"}),
            json!({"groups": ["ML-OPS"]}),
            json!({"groups": {"ml-ops": true}}),
            json!({"groups": ["*", "admin"]}),
        ] {
            assert_eq!(of("groups", other.clone()), [Role::Score], "{other}");
        }
        let none = oidc("sub", Some("groups"), &[(Role::Admin, "ml-ops")]);
        let refused = none.caller(&claims(json!({}))).unwrap_err();
        assert_eq!(refused, Refusal::NoRole);
    }
}
