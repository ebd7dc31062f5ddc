//! Tokens that a file declares: who they belong to, and the hash of each. The file is part of a
//! deployment's configuration, e.g. in a Secret, so that no command has to create these tokens
//! in a database.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use ring::digest;
use serde::{Deserialize, Serialize};

use crate::domain::access::{Caller, Credential, Role};
use crate::domain::job::Millis;
use crate::domain::names::is_valid_id;
use crate::service::audit::AUDIT;
use crate::service::error::{Result, ServiceError};
use crate::service::store::now;

/// Interval at which the file is checked for changes.
const CHECK_INTERVAL: Duration = Duration::from_secs(5);
/// Time for which a changed file must stay the same before it is used. A token that is removed from
/// the file is accepted for two intervals and this time at most.
const SETTLE_TIME: Duration = Duration::from_millis(300);
/// Maximum size of the file, in bytes. A Secret cannot be larger.
const MAX_FILE_BYTES: usize = 1 << 20;
/// Minimum length of a token that `bradley tokens hash` accepts: an unsalted hash protects random
/// tokens only.
pub const MIN_TOKEN_LENGTH: usize = 32;

/// An entry of the file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenEntry {
    /// Owner of the jobs and datasets created with the token.
    pub owner: String,
    /// Names of the token's roles.
    pub roles: Vec<String>,
    /// SHA-256 of the token, in hex.
    pub sha256: String,
    /// Expiry time (RFC 3339); `None` never expires.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires: Option<String>,
}

impl TokenEntry {
    /// Returns the entry of a token.
    ///
    /// # Errors
    /// `InvalidArgument` for a bad owner, an empty list of roles, or a lifetime (field `days`) with
    /// an end that no timestamp can have.
    pub fn new(
        owner: &str,
        roles: &[Role],
        token: &str,
        lifetime: Option<Duration>,
    ) -> Result<TokenEntry> {
        let end = lifetime
            .map(|l| jiff::Timestamp::now().checked_add(l))
            .transpose()
            .map_err(|e| ServiceError::invalid("days", e.to_string()))?;
        let entry = TokenEntry {
            owner: owner.to_owned(),
            roles: roles.iter().map(|r| r.name().to_owned()).collect(),
            sha256: sha256(token).iter().map(|b| format!("{b:02x}")).collect(),
            expires: end.map(|t| format!("{t:.0}")),
        };
        match check(entry.clone()) {
            Ok(_) => Ok(entry),
            Err(reason) => Err(ServiceError::invalid("token", reason)),
        }
    }
}

/// A checked entry.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Declared {
    owner: String,
    roles: Vec<Role>,
    expire_time: Option<Millis>,
}

type TokenTable = HashMap<[u8; 32], Declared>;

/// Authenticates callers by the tokens that a file declares. Clones share them.
#[derive(Clone)]
pub(in crate::service) struct DeclaredTokens {
    path: PathBuf,
    table: Arc<RwLock<Arc<TokenTable>>>,
    /// Bytes of the file at the start, with which [`DeclaredTokens::follow`] compares it first.
    initial: Arc<Vec<u8>>,
}

/// Returns the SHA-256 of a token.
pub fn sha256(token: &str) -> [u8; 32] {
    let mut hash = [0; 32];
    hash.copy_from_slice(digest::digest(&digest::SHA256, token.as_bytes()).as_ref());
    hash
}

/// Reads the file, but at most one byte more than may be used.
async fn read(path: &Path) -> std::result::Result<Vec<u8>, String> {
    use tokio::io::AsyncReadExt as _;
    let file = tokio::fs::File::open(path)
        .await
        .map_err(|e| e.to_string())?;
    let mut bytes = Vec::new();
    file.take(MAX_FILE_BYTES as u64 + 1)
        .read_to_end(&mut bytes)
        .await
        .map_err(|e| e.to_string())?;
    Ok(bytes)
}

impl DeclaredTokens {
    /// Reads the file.
    ///
    /// # Errors
    /// `InvalidArgument` (`token_file`) if it cannot be read or an entry cannot be used.
    pub fn open(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(|e| wrong(path, e))?;
        let table = parse(&bytes).map_err(|e| wrong(path, e))?;
        report(path, &table);
        Ok(DeclaredTokens {
            path: path.to_owned(),
            table: Arc::new(RwLock::new(Arc::new(table))),
            initial: Arc::new(bytes),
        })
    }

    /// Reads the file again whenever it changes, forever. If the changed file cannot be used, the
    /// error is logged and the old tokens stay in use.
    pub async fn follow(&self) {
        let mut known: std::result::Result<Vec<u8>, String> = Ok(self.initial.to_vec());
        loop {
            tokio::time::sleep(CHECK_INTERVAL).await;
            let current = read(&self.path).await;
            if current == known {
                continue;
            }
            // Somebody may be writing the file at this moment. Then the next round looks again.
            tokio::time::sleep(SETTLE_TIME).await;
            if read(&self.path).await != current {
                continue;
            }
            let table = current.as_deref().map_err(Clone::clone).and_then(parse);
            known = current;
            match table {
                Ok(table) => {
                    metrics::counter!("bradley_token_file_reloads_total", "result" => "ok")
                        .increment(1);
                    report(&self.path, &table);
                    *self.table.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(table);
                }
                Err(reason) => {
                    metrics::counter!("bradley_token_file_reloads_total", "result" => "failed")
                        .increment(1);
                    tracing::error!(
                        file = %self.path.display(),
                        reason,
                        "the token file cannot be used: the tokens that it declared before stay \
                         valid until it is corrected"
                    );
                }
            }
        }
    }

    /// Returns the caller who presents `token`, or `None` if the file does not declare it or it has
    /// expired.
    pub fn find(&self, token: &str) -> Option<Caller> {
        let hash = sha256(token);
        let found = self.current(&hash)?;
        Some(Caller {
            owner: found.owner,
            roles: found.roles,
            token: Some(Credential::Declared(hash)),
        })
    }

    /// Returns the owner and the end of an expired token, or `None` if the file does not declare it
    /// or it has not expired.
    pub fn find_expired(&self, token: &str) -> Option<(String, Millis)> {
        let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
        let declared = table.get(&sha256(token))?;
        let end = declared.expire_time.filter(|t| *t <= now())?;
        Some((declared.owner.clone(), end))
    }

    /// Returns true while the file declares the token with this hash for the caller, with all roles
    /// that the caller has.
    pub fn is_valid(&self, hash: &[u8; 32], caller: &Caller) -> bool {
        self.current(hash).is_some_and(|declared| {
            let has_role = |role| declared.roles.contains(role);
            declared.owner == caller.owner && caller.roles.iter().all(has_role)
        })
    }

    // A caller learns nothing from the time that a look-up takes: it does not choose the hash of
    // its token.
    fn current(&self, hash: &[u8; 32]) -> Option<Declared> {
        let table = self
            .table
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        table
            .get(hash)
            .filter(|d| d.expire_time.is_none_or(|t| t > now()))
            .cloned()
    }
}

fn wrong(path: &Path, e: impl std::fmt::Display) -> ServiceError {
    ServiceError::invalid("token_file", format!("{}: {e}", path.display()))
}

fn report(path: &Path, table: &TokenTable) {
    metrics::gauge!("bradley_declared_tokens").set(table.len() as f64);
    tracing::info!(
        target: AUDIT,
        file = %path.display(),
        tokens = table.len(),
        "declared tokens"
    );
}

/// Reads a YAML list of entries, or JSON lines with one entry each.
fn parse(bytes: &[u8]) -> std::result::Result<TokenTable, String> {
    if bytes.len() > MAX_FILE_BYTES {
        return Err(format!("has more than {MAX_FILE_BYTES} bytes"));
    }
    let text = std::str::from_utf8(bytes).map_err(|e| format!("is not UTF-8: {e}"))?;
    let mut table = TokenTable::new();
    for (place, entry) in entries(text)? {
        let (hash, declared) = check(entry).map_err(|e| format!("{place}: {e}"))?;
        if table.insert(hash, declared).is_some() {
            return Err(format!(
                "{place}: sha256: an earlier entry has the same: a token has one owner"
            ));
        }
    }
    Ok(table)
}

/// Returns the entries, each with its place in the file.
fn entries(text: &str) -> std::result::Result<Vec<(String, TokenEntry)>, String> {
    if text.trim_start().starts_with('{') {
        let lines = text.lines().enumerate();
        return lines
            .filter(|(_, line)| !line.trim().is_empty())
            .map(|(i, line)| {
                let place = format!("line {}", i + 1);
                match serde_json::from_str(line) {
                    Ok(entry) => Ok((place, entry)),
                    Err(e) => Err(format!("{place}: {e}")),
                }
            })
            .collect();
    }
    // A file without any entry, e.g. only with comments, declares no token.
    let list: Option<Vec<TokenEntry>> = yaml_serde::from_str(text).map_err(|e| {
        format!(
            "{e}: the file must be a YAML list, or JSON lines, of owner, roles, sha256 and, if \
             the token expires, expires"
        )
    })?;
    let list = list.unwrap_or_default().into_iter().enumerate();
    Ok(list
        .map(|(i, entry)| (format!("entry {}", i + 1), entry))
        .collect())
}

fn check(entry: TokenEntry) -> std::result::Result<([u8; 32], Declared), String> {
    if !is_valid_id(&entry.owner) {
        return Err(format!(
            "owner: is {:?}: use 1 to 128 letters, digits, - _ and ., and begin with another \
             character than .",
            entry.owner
        ));
    }
    let roles = entry.roles.iter().map(|name| {
        Role::parse(name).ok_or_else(|| format!("roles: {name:?} is not submit, score or admin"))
    });
    let roles: Vec<Role> = roles.collect::<std::result::Result<_, _>>()?;
    if roles.is_empty() {
        return Err("roles: is empty: name at least one of submit, score and admin".to_owned());
    }
    let hash = parse_hash(&entry.sha256).ok_or(
        "sha256: is not 64 hexadecimal digits: `bradley tokens hash` prints the entry of a token",
    )?;
    let expire_time = entry.expires.map(|time| {
        let parsed: std::result::Result<jiff::Timestamp, _> = time.parse();
        parsed
            .map(|t| t.as_millisecond())
            .map_err(|_| format!("expires: is {time:?}: use a time such as 2027-01-31T00:00:00Z"))
    });
    let expire_time = expire_time.transpose()?;
    Ok((
        hash,
        Declared {
            owner: entry.owner,
            roles,
            expire_time,
        },
    ))
}

fn parse_hash(hex: &str) -> Option<[u8; 32]> {
    if hex.len() != 64 || !hex.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    let mut hash = [0; 32];
    for (i, byte) in hash.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&hex[2 * i..2 * i + 2], 16).ok()?;
    }
    Some(hash)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// SHA-256 of "abc", an example of FIPS 180-4.
    const ABC: &str = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

    #[test]
    fn yaml_and_json_lines_declare_the_same() {
        let yaml = format!(
            "# Tokens of the platform.\n\
             - owner: team-a\n  roles: [submit, score]\n  sha256: {ABC}\n\
             - owner: ops\n  roles:\n  - admin\n  sha256: \"{}\"\n  \
             expires: 2027-01-31T00:00:00Z\n",
            "0".repeat(64)
        );
        let json = format!(
            "{{\"owner\":\"team-a\",\"roles\":[\"submit\",\"score\"],\"sha256\":\"{ABC}\"}}\n\n\
             {{\"owner\":\"ops\",\"roles\":[\"admin\"],\"sha256\":\"{}\",\
             \"expires\":\"2027-01-31T00:00:00Z\"}}\n",
            "0".repeat(64)
        );
        let table = parse(yaml.as_bytes()).unwrap();
        assert_eq!(table, parse(json.as_bytes()).unwrap());
        assert_eq!(
            table[&sha256("abc")],
            Declared {
                owner: "team-a".into(),
                roles: vec![Role::Submit, Role::Score],
                expire_time: None
            }
        );
        assert_eq!(table[&[0; 32]].expire_time, Some(1_801_353_600_000));
        for nothing in ["", "# none\n", "[]"] {
            assert!(parse(nothing.as_bytes()).unwrap().is_empty());
        }
    }

    #[test]
    fn a_bad_entry_is_named_with_its_field() {
        let entry = |owner: &str, roles: &str, sha256: &str, more: &str| {
            format!("- {{owner: {owner}, roles: {roles}, sha256: '{sha256}'{more}}}\n")
        };
        let good = entry("a", "[score]", ABC, "");
        for (bad, says) in [
            (entry("'a b'", "[score]", ABC, ""), "entry 1: owner"),
            (entry("'oidc:a'", "[score]", ABC, ""), "entry 1: owner"),
            (entry("a", "[root]", ABC, ""), "\"root\" is not submit"),
            (entry("a", "[]", ABC, ""), "roles: is empty"),
            (entry("a", "[score]", "abc", ""), "sha256: is not 64"),
            (
                entry("a", "[score]", &"é".repeat(32), ""),
                "sha256: is not 64",
            ),
            (
                entry("a", "[score]", ABC, ", expires: tomorrow"),
                "expires: is \"tomorrow\"",
            ),
            (
                entry("a", "[score]", ABC, ", expire: 2027-01-31T00:00:00Z"),
                "unknown field `expire`",
            ),
            (format!("{good}{good}"), "entry 2: sha256: an earlier entry"),
            ("owner: a\n".into(), "must be a YAML list"),
            ("{\"owner\": \"a\"}".into(), "line 1: missing field"),
        ] {
            let message = parse(bad.as_bytes()).unwrap_err();
            assert!(message.contains(says), "{bad}: {message}");
        }
    }
}
