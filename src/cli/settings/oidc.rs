//! Settings of an OpenID Connect issuer.

use std::path::PathBuf;
use std::time::Duration;

use super::SettingsReader;
use crate::domain::access::Role;
use crate::service::auth::oidc::{EVERYONE, KeySource, OidcOptions, is_safe_url};

/// Settings without a default that have no effect without `oidc_issuer`.
const DETAILS: [&str; 5] = [
    "oidc_audience",
    "oidc_roles_claim",
    "oidc_roles",
    "oidc_jwks_url",
    "oidc_ca_file",
];

impl SettingsReader<'_> {
    /// Returns the options of the issuer; `None` if none is set.
    pub(super) fn oidc(&mut self) -> Option<OidcOptions> {
        let url = |s: &str| is_safe_url(s).then(|| s.to_owned());
        let text = |s: &str| Some(s.to_owned());
        let expected = "an https URL (http only for this machine)";
        let issuer = self.optional("oidc_issuer", expected, url);
        let jwks_url = self.optional("oidc_jwks_url", expected, url);
        let refresh = self.number("oidc_refresh", 1);
        let max_age = self.number("oidc_max_key_age", 1);
        let owner_claim = self.parse("oidc_owner_claim", "the name of a claim", |s| {
            (!s.is_empty()).then(|| s.to_owned())
        });
        let audiences = self.optional("oidc_audience", "texts with commas between", list);
        let roles_claim = self.optional("oidc_roles_claim", "the name of a claim", text);
        let roles = self.optional(
            "oidc_roles",
            "ROLE=VALUE with commas between, of the roles submit, score and admin, and not \
             admin=*",
            parse_roles,
        );
        let ca_file = self.optional("oidc_ca_file", "a path", |s| Some(PathBuf::from(s)));
        let Some(issuer) = issuer else {
            for name in DETAILS {
                // Another error may be the reason why there is no issuer.
                if !self.is_empty(name) && self.bad.is_empty() {
                    let (_, origin) = self.sources.get(name, "");
                    self.bad
                        .push(origin, "has no effect without oidc_issuer: set it, too");
                }
            }
            return None;
        };
        if issuer.starts_with("https:")
            && jwks_url.as_ref().is_some_and(|u| !u.starts_with("https:"))
        {
            self.bad.push(
                "oidc_jwks_url",
                "must be an https URL, as oidc_issuer is one",
            );
        }
        if self.is_empty("oidc_audience") {
            self.bad.push(
                "oidc_audience",
                "is not set: without it, tokens that the issuer made for other services would \
                 be accepted; name the audience of this server, e.g. bradley",
            );
        }
        match &roles {
            // Another value is refused above.
            None if !self.is_empty("oidc_roles") => {}
            None => self.bad.push(
                "oidc_roles",
                "is not set, so no token would have a role: map values of oidc_roles_claim, e.g. \
                 submit=ml-team,score=ml-team,admin=ml-ops, or give a role to everyone, e.g. \
                 score=*",
            ),
            Some(roles) if roles_claim.is_none() => {
                if let Some((role, value)) = roles.iter().find(|(_, v)| v != EVERYONE) {
                    let entry = format!("{}={value}", role.name());
                    self.bad.push(
                        "oidc_roles_claim",
                        format!(
                            "is not set, but oidc_roles has {entry}: name the claim of this \
                                 value, e.g. groups"
                        ),
                    );
                }
            }
            Some(_) => {}
        }
        let seconds = |n: Option<usize>| Duration::from_secs(n.unwrap_or(1) as u64);
        Some(OidcOptions {
            keys: KeySource {
                issuer,
                jwks_url,
                ca_file,
                refresh: seconds(refresh),
                max_age: seconds(max_age),
            },
            audiences: audiences.unwrap_or_default(),
            owner_claim: owner_claim.unwrap_or_default(),
            roles_claim,
            roles: roles.unwrap_or_default(),
        })
    }
}

fn list(text: &str) -> Option<Vec<String>> {
    let parts: Vec<String> = text.split(',').map(|p| p.trim().to_owned()).collect();
    parts.iter().all(|p| !p.is_empty()).then_some(parts)
}

/// Parses `ROLE=VALUE,…`. A value may contain `=`.
fn parse_roles(text: &str) -> Option<Vec<(Role, String)>> {
    let parse = |entry: String| {
        let (role, value) = entry.split_once('=')?;
        let (role, value) = (Role::parse(role.trim())?, value.trim());
        let is_too_much = role == Role::Admin && value == EVERYONE;
        (!value.is_empty() && !is_too_much).then(|| (role, value.to_owned()))
    };
    list(text)?.into_iter().map(parse).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::cli::settings::{Settings, Sources};

    /// Resolves these settings, and returns the issuer's options or the fields that are refused.
    fn resolve(settings: &[(&str, &str)]) -> Result<Option<OidcOptions>, Vec<String>> {
        let mut flags = BTreeMap::from([("models".to_owned(), "/x".to_owned())]);
        flags.extend(settings.iter().map(|(k, v)| (k.to_string(), v.to_string())));
        let sources = Sources {
            flags,
            ..Sources::default()
        };
        Settings::resolve(&sources)
            .map(|s| s.oidc)
            .map_err(|bad| bad.listed().iter().map(|v| v.field.clone()).collect())
    }

    const ISSUER: (&str, &str) = ("oidc_issuer", "https://id.example.com/realms/a");
    const AUDIENCE: (&str, &str) = ("oidc_audience", "bradley");
    const TOKENS: (&str, &str) = ("auth", "tokens");

    #[test]
    fn roles_are_mapped() {
        let options = resolve(&[
            ISSUER,
            TOKENS,
            ("oidc_audience", "bradley, api://bradley"),
            ("oidc_roles_claim", "groups"),
            ("oidc_roles", "submit=ml-team, score=*,admin=CN=ops"),
        ]);
        let options = options.unwrap().unwrap();
        assert_eq!(options.audiences, ["bradley", "api://bradley"]);
        assert_eq!(
            options.roles,
            [
                (Role::Submit, "ml-team".into()),
                (Role::Score, "*".into()),
                (Role::Admin, "CN=ops".into())
            ]
        );
        assert_eq!(options.owner_claim, "sub");
        assert!(resolve(&[]).unwrap().is_none());
    }

    #[test]
    fn what_would_let_in_too_many_or_nobody_is_refused() {
        let everyone = ("oidc_roles", "score=*");
        for (settings, field) in [
            (vec![ISSUER, TOKENS, everyone], "oidc_audience"),
            (vec![ISSUER, TOKENS, AUDIENCE], "oidc_roles"),
            (vec![ISSUER, AUDIENCE, everyone], "--oidc-issuer"),
            (
                vec![ISSUER, TOKENS, AUDIENCE, ("oidc_roles", "score=ml")],
                "oidc_roles_claim",
            ),
            (
                vec![ISSUER, TOKENS, AUDIENCE, ("oidc_roles", "admin=*")],
                "--oidc-roles",
            ),
            (
                vec![ISSUER, TOKENS, AUDIENCE, ("oidc_roles", "root=ml")],
                "--oidc-roles",
            ),
            (
                vec![
                    ("oidc_issuer", "http://id.example.com"),
                    TOKENS,
                    AUDIENCE,
                    everyone,
                ],
                "--oidc-issuer",
            ),
            (
                vec![
                    ISSUER,
                    TOKENS,
                    AUDIENCE,
                    everyone,
                    ("oidc_jwks_url", "http://127.0.0.1/keys"),
                ],
                "oidc_jwks_url",
            ),
            (vec![TOKENS, AUDIENCE], "--oidc-audience"),
            (vec![("token_file", "/etc/tokens.yaml")], "--token-file"),
        ] {
            let fields = resolve(&settings).err().unwrap_or_default();
            assert_eq!(fields, [field], "{settings:?}");
        }
    }
}
