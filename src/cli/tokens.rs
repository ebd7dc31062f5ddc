//! `bradley tokens`: manages tokens in the server's database, to which only administrators have
//! access, and prints entries for the server's `token_file`.

use std::fmt::Display;
use std::io::{BufRead, IsTerminal as _};
use std::time::Duration;

use super::args::{DatabaseArgs, Output, TokensCommand};
use super::failure::{Failure, Outcome};
use super::output;
use super::progress::say;
use crate::domain::access::Role;
use crate::service::auth::declared::{MIN_TOKEN_LENGTH, TokenEntry};
use crate::service::auth::tokens::{self, Token};
use crate::service::error::ServiceError;
use crate::service::store::{DATABASE_FILE, Store, StoreOptions};

const DAY_SECONDS: u64 = 24 * 3600;
/// Maximum length of a token that a file declares. A call's headers have a limit, too.
const MAX_TOKEN_LENGTH: u64 = 4096;

impl From<ServiceError> for Failure {
    fn from(e: ServiceError) -> Self {
        match e {
            ServiceError::InvalidArgument(_) | ServiceError::NotFound { .. } => {
                Failure::Usage(e.to_string())
            }
            e => Failure::Failed(e.to_string()),
        }
    }
}

pub(super) async fn run(command: TokensCommand, output_format: Output) -> Outcome {
    match command {
        TokensCommand::Create {
            owner,
            roles,
            days,
            database,
        } => {
            let roles = parse_roles(&roles)?;
            let is_new = lacks_database(&database);
            let store = open(&database).await?;
            let lifetime = days.map(|d| Duration::from_secs(u64::from(d) * DAY_SECONDS));
            let created = tokens::create(&store, &owner, &roles, lifetime).await;
            store.close().await;
            let (token, secret) = created.map_err(in_flags)?;
            if is_new {
                say(&format!(
                    "note: {} had no database, so one was made: the token is for a server with \
                     this --data-dir",
                    database.data_dir.display()
                ));
            }
            let mut shown = token_json(&token);
            shown["token"] = secret.into();
            output::resource(output_format, &shown);
        }
        TokensCommand::Hash {
            owner,
            roles,
            days,
            generate,
        } => {
            let token = if generate {
                tokens::random()
            } else {
                let input = std::io::stdin();
                if input.is_terminal() {
                    say("type the token and press Enter; --generate makes one:");
                }
                read_token(input.lock())?
            };
            let roles = parse_roles(&roles)?;
            let lifetime = days.map(|d| Duration::from_secs(u64::from(d) * DAY_SECONDS));
            let entry = TokenEntry::new(&owner, &roles, &token, lifetime).map_err(in_flags)?;
            if generate {
                show(&token);
            }
            let unprintable =
                |e: &dyn Display| Failure::Failed(format!("the entry cannot be printed: {e}"));
            let text = match output_format {
                Output::Json => serde_json::to_string(&entry).map_err(|e| unprintable(&e))?,
                _ => yaml_serde::to_string(&[entry]).map_err(|e| unprintable(&e))?,
            };
            output::line(text.trim_end());
        }
        TokensCommand::List(database) => {
            let store = open_existing(&database).await?;
            let all = tokens::list(&store).await?;
            store.close().await;
            let rows = all
                .iter()
                .map(|t| {
                    vec![
                        t.id.clone(),
                        t.owner.clone(),
                        roles(t),
                        to_the_second(t.create_time),
                        t.expire_time
                            .map_or_else(|| "never".to_owned(), to_the_second),
                    ]
                })
                .collect();
            output::list(
                output_format,
                &["id", "owner", "roles", "created", "ends"],
                rows,
                all.iter().map(token_json).collect(),
            );
        }
        TokensCommand::Revoke { id, database } => {
            let store = open_existing(&database).await?;
            tokens::revoke(&store, &id).await?;
            store.close().await;
            output::done(output_format, "revoked", &id);
        }
    }
    Ok(())
}

fn parse_roles(names: &[String]) -> Result<Vec<Role>, Failure> {
    let parse = |name: &String| {
        Role::parse(name).ok_or_else(|| {
            Failure::Usage(format!("--roles: {name:?} is not submit, score or admin"))
        })
    };
    names.iter().map(parse).collect()
}

/// Shows a new token apart from the entry, so that the entry can be redirected to a file.
#[allow(clippy::print_stderr)]
fn show(token: &str) {
    eprintln!("token: {token}");
}

/// Reads the token, one line.
fn read_token(input: impl BufRead) -> Result<String, Failure> {
    let mut line = String::new();
    input
        // The line may end with \r\n.
        .take(MAX_TOKEN_LENGTH + 3)
        .read_line(&mut line)
        .map_err(|e| Failure::Failed(format!("standard input: {e}")))?;
    let token = line.trim_end_matches(['\n', '\r']);
    let problem = if token.len() < MIN_TOKEN_LENGTH {
        "is too short: anyone could find it by trying"
    } else if token.len() as u64 > MAX_TOKEN_LENGTH {
        "is too long for a header"
    } else if token.bytes().any(|b| !b.is_ascii_graphic()) {
        "has spaces, or characters that a header cannot have"
    } else {
        return Ok(token.to_owned());
    };
    Err(Failure::Usage(format!(
        "standard input: the token {problem}: use a line of {MIN_TOKEN_LENGTH} to \
         {MAX_TOKEN_LENGTH} random letters and digits, or --generate"
    )))
}

/// Puts an error of an entry into the words of the flags.
fn in_flags(e: ServiceError) -> Failure {
    let ServiceError::InvalidArgument(bad) = &e else {
        return e.into();
    };
    let lines = bad.listed().iter().map(|v| match v.field.as_str() {
        "token" => format!("--{}", v.description),
        field => format!("--{field} {}", v.description),
    });
    Failure::Usage(lines.collect::<Vec<_>>().join("\n  "))
}

/// Returns true if the database would be a new file of the data directory.
fn lacks_database(database: &DatabaseArgs) -> bool {
    database.database_url.is_none() && !database.data_dir.join(DATABASE_FILE).exists()
}

/// Opens the database, but makes none.
async fn open_existing(database: &DatabaseArgs) -> Result<Store, Failure> {
    if lacks_database(database) {
        return Err(Failure::Usage(format!(
            "--data-dir {} has no {DATABASE_FILE}: name the server's data directory, or its \
             PostgreSQL database with --database-url",
            database.data_dir.display()
        )));
    }
    open(database).await
}

async fn open(database: &DatabaseArgs) -> Result<Store, Failure> {
    if database.database_url.is_none() {
        std::fs::create_dir_all(&database.data_dir)
            .map_err(|e| Failure::Failed(format!("{}: {e}", database.data_dir.display())))?;
    }
    let options = StoreOptions {
        database_url: database.database_url.clone(),
        url_source: "--database-url",
        ..StoreOptions::default()
    };
    Ok(Store::open(&database.data_dir, &options).await?)
}

fn roles(t: &Token) -> String {
    t.roles
        .iter()
        .map(|r| r.name())
        .collect::<Vec<_>>()
        .join(",")
}

fn time(ms: Option<i64>) -> String {
    ms.and_then(|ms| jiff::Timestamp::from_millisecond(ms).ok())
        .map_or_else(String::new, |t| t.to_string())
}

/// Formats a time without its milliseconds, as tables have it.
fn to_the_second(ms: i64) -> String {
    time(Some(ms - ms.rem_euclid(1000)))
}

fn token_json(t: &Token) -> serde_json::Value {
    serde_json::json!({
        "id": t.id,
        "owner": t.owner,
        "roles": roles(t),
        "created": time(Some(t.create_time)),
        "ends": time(t.expire_time),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_database_elsewhere_needs_no_data_directory() {
        let dir = tempfile::tempdir().unwrap();
        let database = DatabaseArgs {
            data_dir: dir.path().join("data"),
            database_url: Some("not a URL".to_owned()),
        };
        assert!(open(&database).await.is_err());
        assert!(!database.data_dir.exists());
    }
}
