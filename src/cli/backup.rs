//! `bradley backup`, `restore` and `migrate`: work on a data directory itself, not through a
//! server.

use std::future::Future;
use std::time::Duration;

use indicatif::ProgressBar;
use serde_json::json;

use super::args::{BackupArgs, MigrateArgs, Output, RestoreArgs};
use super::failure::{Failure, Outcome};
use super::output::{self, human};
use super::progress::{say, warn};
use super::settings::{Sources, vendor_variables};
use super::telemetry;
use crate::service::backup::{self, BackupManifest};
use crate::service::transfer;

/// Maximum number of missing files that a message lists.
const MAX_LISTED_FILES: usize = 20;

/// Shows on standard error, if it is a terminal, what a command does until it is done.
async fn with_spinner<T>(what: &'static str, work: impl Future<Output = T>) -> T {
    let spinner = ProgressBar::new_spinner().with_message(what);
    spinner.enable_steady_tick(Duration::from_millis(200));
    let result = work.await;
    spinner.finish_and_clear();
    result
}

pub(super) async fn back_up(args: BackupArgs, output_format: Output) -> Outcome {
    if args.database.database_url.is_some() {
        return Err(Failure::Usage(
            "--database-url: PostgreSQL has its own tools; back up the database with pg_dump, and \
             then the bucket (docs/backup.md)"
                .to_owned(),
        ));
    }
    // Warnings about what an interrupted backup has left.
    telemetry::log("warn", false, None, None)?;
    let work = backup::back_up(&args.database.data_dir, &args.dir);
    let manifest = with_spinner("copying the database and its files", work).await?;
    output::resource(output_format, &summary(&manifest, output_format));
    if manifest.missing.is_empty() {
        return Ok(());
    }
    let listed: Vec<&str> = manifest
        .missing
        .iter()
        .take(MAX_LISTED_FILES)
        .map(String::as_str)
        .collect();
    Err(Failure::Failed(format!(
        "the backup is complete, but the data directory itself lacks {} of the files that its \
         database names:\n  {}",
        manifest.missing.len(),
        listed.join("\n  ")
    )))
}

pub(super) async fn restore(args: RestoreArgs, output_format: Output) -> Outcome {
    let work = backup::restore(&args.dir, &args.data_dir);
    let manifest = with_spinner("restoring the database and its files", work).await?;
    output::resource(output_format, &summary(&manifest, output_format));
    for warning in missing_file_warnings(&manifest.missing) {
        warn(&warning);
    }
    Ok(())
}

/// Returns the warnings about files that a backup does not have.
fn missing_file_warnings(missing: &[String]) -> Vec<String> {
    let named = missing.iter().take(MAX_LISTED_FILES);
    let mut warnings: Vec<String> = named
        .map(|lost| format!("the backup itself lacks {lost}"))
        .collect();
    match missing.len().saturating_sub(MAX_LISTED_FILES) {
        0 => {}
        more => warnings.push(format!(
            "the backup itself lacks {more} more: its manifest.json lists all"
        )),
    }
    warnings
}

pub(super) async fn migrate(args: MigrateArgs, output_format: Output) -> Outcome {
    if args.undo {
        transfer::undo(&args.data_dir).await?;
        let place = args.data_dir.display().to_string();
        output::done(output_format, "undone", &place);
        say(
            "start the server with the --artifact-url of its PostgreSQL servers, and without \
             --database-url",
        );
        return Ok(());
    }
    // The command line requires one of the two.
    let to = args.to.unwrap_or_default();
    let sources = Sources::environment();
    let artifact_store = args
        .artifact_url
        .map(|url| (url, vendor_variables(&sources)));
    let work = transfer::migrate(&args.data_dir, &to, artifact_store.as_ref());
    let copied = with_spinner("copying and comparing files and rows", work).await?;
    let rows = copied
        .iter()
        .map(|table| vec![table.name.clone(), table.rows.to_string()])
        .collect();
    let json = copied
        .iter()
        .map(|table| json!({"table": table.name, "rows": table.rows}))
        .collect();
    output::list(output_format, &["table", "rows"], rows, json);
    Ok(())
}

fn summary(manifest: &BackupManifest, output_format: Output) -> serde_json::Value {
    let bytes: u64 = manifest.files.values().map(|file| file.size_bytes).sum();
    let mut summary = json!({
        "created": manifest.create_time,
        "version": manifest.bradley,
        "jobs": manifest.jobs,
        "datasets": manifest.datasets,
        "checkpoints": manifest.checkpoints,
        "files": manifest.files.len(),
        "bytes": bytes,
    });
    if let Some(store) = &manifest.artifact_store {
        summary["artifact_store"] = format!("{store}: not in the backup").into();
    }
    if output_format == Output::Table {
        summary["bytes"] = human::bytes(bytes).into();
    }
    summary
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_that_are_not_listed_are_counted() {
        let missing: Vec<String> = (0..23).map(|i| format!("dataset {i}")).collect();
        assert_eq!(
            missing_file_warnings(&missing[..1]),
            ["the backup itself lacks dataset 0"]
        );
        assert_eq!(missing_file_warnings(&missing[..20]).len(), 20);
        let warnings = missing_file_warnings(&missing);
        assert_eq!(warnings.len(), 21);
        assert!(warnings[20].contains("lacks 3 more"), "{warnings:?}");
    }
}
