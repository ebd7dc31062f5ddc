//! Copy of a SQLite database to an empty PostgreSQL database, in one transaction.

use std::fmt::Write as _;

use sqlx::any::{AnyArguments, AnyRow};
use sqlx::{Any, AnyConnection, AssertSqlSafe, Executor as _, Row as _, Transaction};
use tokio_stream::StreamExt as _;

use super::{Dialect, Store};
use crate::service::error::{Result, ServiceError};

/// Tables that each database fills itself.
const OWN_TABLES: [&str; 2] = ["_sqlx_migrations", "migration_readers"];
/// Maximum number of rows in one INSERT.
const ROWS_AT_A_TIME: usize = 200;
/// Maximum size of the text in one INSERT, in bytes.
const BYTES_AT_A_TIME: usize = 4 << 20;

/// A copied table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CopiedTable {
    /// Name of the table.
    pub name: String,
    /// Number of rows.
    pub rows: u64,
}

/// A column: its name, and true if it has text instead of integers.
type Column = (String, bool);

/// A value of a column.
enum CopiedValue {
    Integer(Option<i64>),
    Text(Option<String>),
}

/// Sum of the hashes of a table's rows. It does not depend on their order, because the databases
/// sort text differently.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
struct Checksum {
    rows: u64,
    sum: u128,
}

impl Checksum {
    fn add(&mut self, row: &[CopiedValue]) {
        let mut hash = blake3::Hasher::new();
        for value in row {
            match value {
                CopiedValue::Integer(None) | CopiedValue::Text(None) => hash.update(b"-"),
                CopiedValue::Integer(Some(n)) => hash.update(b"i").update(&n.to_le_bytes()),
                CopiedValue::Text(Some(text)) => hash
                    .update(b"t")
                    .update(&(text.len() as u64).to_le_bytes())
                    .update(text.as_bytes()),
            };
        }
        let mut half = [0; 16];
        half.copy_from_slice(&hash.finalize().as_bytes()[..16]);
        self.rows += 1;
        self.sum = self.sum.wrapping_add(u128::from_le_bytes(half));
    }
}

impl Store {
    /// Checks that a PostgreSQL database has the tables of this SQLite database, with the same
    /// columns and without rows.
    ///
    /// # Errors
    /// `InvalidArgument` if it has not; `Unavailable` or `Internal` if a database fails.
    pub async fn check_target(&self, target: &Store) -> Result<()> {
        let mut source = self.readers.acquire().await?;
        let mut found = target.readers.begin().await?;
        for table in tables(&mut source).await? {
            let columns = columns(&mut source, &table).await?;
            refuse_columns(&mut found, &table, &columns).await?;
            refuse_rows(&mut found, &table).await?;
        }
        Ok(())
    }

    /// Copies all rows of this SQLite database to an empty PostgreSQL database of the same version,
    /// in one transaction, and compares both before it commits.
    ///
    /// # Errors
    /// `InvalidArgument` if the target has rows, or a row cannot be stored in PostgreSQL;
    /// `Unavailable` or `Internal` if a database fails or the copy differs.
    pub async fn copy_to(&self, target: &Store) -> Result<Vec<CopiedTable>> {
        if (self.dialect, target.dialect) != (Dialect::Sqlite, Dialect::Postgres) {
            let message = "rows are copied from SQLite to PostgreSQL only";
            return Err(ServiceError::internal(message));
        }
        let mut source = self.readers.begin().await?;
        let mut copy = target.writer.begin().await?;
        // A large table takes longer than any statement of the server.
        copy.execute("SET LOCAL statement_timeout = 0").await?;
        copy.execute("SET LOCAL idle_in_transaction_session_timeout = 0")
            .await?;
        let tables = tables(&mut source).await?;
        for table in &tables {
            // No server can write to the table until the transaction ends.
            let lock = format!("LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE");
            copy.execute(AssertSqlSafe(lock)).await?;
            refuse_rows(&mut copy, table).await?;
        }
        let mut copied = Vec::new();
        for table in &tables {
            let columns = columns(&mut source, table).await?;
            let expected = copy_table(&mut source, &mut copy, table, &columns).await?;
            continue_sequence(&mut copy, table, &columns).await?;
            let found = checksum(&mut copy, table, &columns).await?;
            if found != expected {
                return Err(ServiceError::internal(format!(
                    "the copy of table {table} differs from the original ({} rows, {} in the \
                     original): nothing was stored",
                    found.rows, expected.rows
                )));
            }
            copied.push(CopiedTable {
                name: table.clone(),
                rows: expected.rows,
            });
        }
        copy.commit().await?;
        source.rollback().await?;
        Ok(copied)
    }
}

/// Returns the tables to copy, each after those that its rows refer to.
async fn tables(source: &mut AnyConnection) -> Result<Vec<String>> {
    let select = "SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name";
    let all: Vec<String> = sqlx::query_scalar(select).fetch_all(&mut *source).await?;
    let mut waiting: Vec<(String, Vec<String>)> = Vec::new();
    for name in all {
        if name.starts_with("sqlite_") || OWN_TABLES.contains(&name.as_str()) {
            continue;
        }
        let select = format!("SELECT \"table\" FROM pragma_foreign_key_list('{name}')");
        let needed: Vec<String> = sqlx::query_scalar(AssertSqlSafe(select))
            .fetch_all(&mut *source)
            .await?;
        waiting.push((name, needed));
    }
    let mut ordered: Vec<String> = Vec::new();
    while !waiting.is_empty() {
        let is_free = |(name, needed): &(String, Vec<String>)| {
            needed.iter().all(|n| n == name || ordered.contains(n))
        };
        let Some(next) = waiting.iter().position(is_free) else {
            return Err(ServiceError::internal(
                "tables refer to each other in a cycle",
            ));
        };
        ordered.push(waiting.remove(next).0);
    }
    Ok(ordered)
}

async fn columns(source: &mut AnyConnection, table: &str) -> Result<Vec<Column>> {
    let select = format!("SELECT name, type FROM pragma_table_info('{table}') ORDER BY cid");
    let columns: Vec<(String, String)> = sqlx::query_as(AssertSqlSafe(select))
        .fetch_all(source)
        .await?;
    Ok(columns
        .into_iter()
        .map(|(name, kind)| (name, kind == "TEXT"))
        .collect())
}

/// Refuses a table that lacks some of the columns, or needs values for others.
async fn refuse_columns(
    copy: &mut Transaction<'_, Any>,
    table: &str,
    columns: &[Column],
) -> Result<()> {
    let select = "SELECT CAST(column_name AS TEXT), CAST(CASE WHEN is_nullable = 'NO' AND \
                  column_default IS NULL AND is_identity = 'NO' THEN 1 ELSE 0 END AS BIGINT)
                  FROM information_schema.columns
                  WHERE table_schema = current_schema() AND CAST(table_name AS TEXT) = $1";
    let found: Vec<(String, i64)> = sqlx::query_as(select)
        .bind(table)
        .fetch_all(&mut **copy)
        .await?;
    let has = |name: &str| found.iter().any(|(other, _)| other == name);
    let lacks = columns.iter().find(|(name, _)| !has(name));
    let needs = found.iter().find(|(name, is_needed)| {
        *is_needed == 1 && !columns.iter().any(|(other, _)| other == name)
    });
    let difference = match (lacks, needs) {
        (Some((name, _)), _) => format!("lacks the column {name}"),
        (None, Some((name, _))) => format!("also has the column {name}, which has no default"),
        (None, None) => return Ok(()),
    };
    Err(ServiceError::invalid(
        "--to",
        format!(
            "the database is of another version: its table {table} {difference}; create a new \
             database and name that one, or use the newest version of Bradley for both"
        ),
    ))
}

async fn refuse_rows(copy: &mut Transaction<'_, Any>, table: &str) -> Result<()> {
    let count: i64 = sqlx::query_scalar(AssertSqlSafe(format!("SELECT COUNT(*) FROM {table}")))
        .fetch_one(&mut **copy)
        .await?;
    match count {
        0 => Ok(()),
        n => Err(ServiceError::invalid(
            "--to",
            format!(
                "the database is not empty: its table {table} has {n} rows; create a new database \
                 and name that one"
            ),
        )),
    }
}

/// Copies the rows of a table. Returns the checksum of the original.
async fn copy_table(
    source: &mut AnyConnection,
    copy: &mut Transaction<'_, Any>,
    table: &str,
    columns: &[Column],
) -> Result<Checksum> {
    let select = format!("SELECT {} FROM {table}", names(columns));
    let mut rows = sqlx::query(AssertSqlSafe(select)).fetch(source);
    let (mut expected, mut batch, mut bytes) = (Checksum::default(), Vec::new(), 0);
    while let Some(row) = rows.next().await {
        let row = values(&row?, columns)?;
        for (value, (column, _)) in row.iter().zip(columns) {
            if let CopiedValue::Text(Some(text)) = value {
                if text.contains('\0') {
                    return Err(no_nul(table, column, &row));
                }
                bytes += text.len();
            }
        }
        expected.add(&row);
        batch.push(row);
        if batch.len() >= ROWS_AT_A_TIME || bytes >= BYTES_AT_A_TIME {
            insert(copy, table, columns, std::mem::take(&mut batch)).await?;
            bytes = 0;
        }
    }
    insert(copy, table, columns, batch).await?;
    Ok(expected)
}

/// Returns the error for a text that PostgreSQL cannot store.
fn no_nul(table: &str, column: &str, row: &[CopiedValue]) -> ServiceError {
    let text = row.iter().find_map(|value| match value {
        CopiedValue::Text(Some(text)) => Some(text.as_str()),
        _ => None,
    });
    let message = format!(
        "table {table}, column {column}, row {:?}: the text contains a NUL character, which \
         PostgreSQL cannot store; delete this row's job or dataset first",
        text.unwrap_or_default()
    );
    ServiceError::invalid("--data-dir", message)
}

fn names(columns: &[Column]) -> String {
    let names: Vec<&str> = columns.iter().map(|(name, _)| name.as_str()).collect();
    names.join(", ")
}

fn values(row: &AnyRow, columns: &[Column]) -> Result<Vec<CopiedValue>> {
    let value = |(i, (_, is_text)): (usize, &Column)| -> sqlx::Result<CopiedValue> {
        Ok(match is_text {
            true => CopiedValue::Text(row.try_get(i)?),
            false => CopiedValue::Integer(row.try_get(i)?),
        })
    };
    let values: sqlx::Result<Vec<CopiedValue>> = columns.iter().enumerate().map(value).collect();
    Ok(values?)
}

async fn insert(
    copy: &mut Transaction<'_, Any>,
    table: &str,
    columns: &[Column],
    rows: Vec<Vec<CopiedValue>>,
) -> Result<()> {
    if rows.is_empty() {
        return Ok(());
    }
    let mut sql = format!(
        "INSERT INTO {table} ({}) OVERRIDING SYSTEM VALUE VALUES ",
        names(columns)
    );
    for row in 0..rows.len() {
        let first = row * columns.len();
        let places: Vec<String> = (1..=columns.len())
            .map(|i| format!("${}", first + i))
            .collect();
        let comma = if row == 0 { "" } else { ", " };
        // Writing to a String does not fail.
        let _ = write!(sql, "{comma}({})", places.join(", "));
    }
    let mut query: sqlx::query::Query<'_, Any, AnyArguments> = sqlx::query(AssertSqlSafe(sql));
    for value in rows.into_iter().flatten() {
        query = match value {
            CopiedValue::Integer(n) => query.bind(n),
            CopiedValue::Text(text) => query.bind(text),
        };
    }
    query.execute(&mut **copy).await?;
    Ok(())
}

/// Lets a column that the database numbers itself continue after the copied rows.
async fn continue_sequence(
    copy: &mut Transaction<'_, Any>,
    table: &str,
    columns: &[Column],
) -> Result<()> {
    let select = "SELECT COUNT(*) FROM information_schema.columns
                  WHERE table_schema = current_schema() AND CAST(table_name AS TEXT) = $1
                  AND CAST(column_name AS TEXT) = $2 AND is_identity = 'YES'";
    for (column, _) in columns {
        let identities: i64 = sqlx::query_scalar(select)
            .bind(table)
            .bind(column)
            .fetch_one(&mut **copy)
            .await?;
        if identities > 0 {
            let update = format!(
                "SELECT setval(pg_get_serial_sequence('{table}', '{column}'),
                 COALESCE(MAX({column}), 0) + 1, false) FROM {table}"
            );
            copy.execute(AssertSqlSafe(update)).await?;
        }
    }
    Ok(())
}

async fn checksum(
    copy: &mut Transaction<'_, Any>,
    table: &str,
    columns: &[Column],
) -> Result<Checksum> {
    let select = format!("SELECT {} FROM {table}", names(columns));
    let mut rows = sqlx::query(AssertSqlSafe(select)).fetch(&mut **copy);
    let mut found = Checksum::default();
    while let Some(row) = rows.next().await {
        found.add(&values(&row?, columns)?);
    }
    Ok(found)
}
