//! `bradley tokens`: manages tokens in the server's database, to which only administrators have
//! access.

use std::time::Duration;

use super::args::{DatabaseArgs, Output, TokensCommand};
use super::failure::{Failure, Outcome};
use super::output;
use crate::domain::access::Role;
use crate::service::auth::tokens::{self, Token};
use crate::service::error::ServiceError;
use crate::service::store::{Store, StoreOptions};

const DAY: u64 = 24 * 3600;

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
            let parse_role = |name: &String| {
                Role::parse(name).ok_or_else(|| {
                    Failure::Usage(format!("--roles: {name:?} is not submit, score or admin"))
                })
            };
            let roles = roles
                .iter()
                .map(parse_role)
                .collect::<Result<Vec<Role>, Failure>>()?;
            let store = open(&database).await?;
            let lifetime = days.map(|d| Duration::from_secs(u64::from(d) * DAY));
            let (token, secret) = tokens::create(&store, &owner, &roles, lifetime).await?;
            store.close().await;
            let mut shown = token_json(&token);
            shown["token"] = secret.into();
            output::resource(output_format, &shown);
        }
        TokensCommand::List(database) => {
            let store = open(&database).await?;
            let all = tokens::list(&store).await?;
            store.close().await;
            let rows = all
                .iter()
                .map(|t| {
                    vec![
                        t.id.clone(),
                        t.owner.clone(),
                        roles(t),
                        time(Some(t.create_time)),
                        time(t.expire_time),
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
            let store = open(&database).await?;
            tokens::revoke(&store, &id).await?;
            store.close().await;
        }
    }
    Ok(())
}

async fn open(database: &DatabaseArgs) -> Result<Store, Failure> {
    std::fs::create_dir_all(&database.data_dir)
        .map_err(|e| Failure::Failed(format!("{}: {e}", database.data_dir.display())))?;
    let options = StoreOptions {
        database_url: database.database_url.clone(),
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

fn token_json(t: &Token) -> serde_json::Value {
    serde_json::json!({
        "id": t.id,
        "owner": t.owner,
        "roles": roles(t),
        "created": time(Some(t.create_time)),
        "ends": time(t.expire_time),
    })
}
