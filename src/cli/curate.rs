//! `bradley curate`: finds wrong labels.
//!
//! Rows are divided into folds. For each fold, a server trains an adapter on the rows of the
//! others, which then scores the rows of the fold: it has not seen them.

mod folder;
mod index;
mod jobs;
mod report;
mod scorer;

use std::collections::VecDeque;
use std::path::Path;
use std::sync::Arc;

use serde_json::json;

use self::folder::{ScoreFolder, check_output};
use self::index::RowIndex;
use self::jobs::{CreateError, FoldJob, FoldJobs, JobTemplate, RUN_LABEL};
use self::report::{CurationReport, Thresholds, write_rows};
use self::scorer::score_fold;
use super::args::{CurateArgs, FleetArgs, Output};
use super::data::DataFiles;
use super::failure::{Failure, Outcome, unless_interrupted};
use super::output::{self, line};
use super::policy_names::PolicyNames;
use super::progress::{self, WorkProgress, say, waiting, warn};
use super::remote::server_flag;
use super::score_files::fleet::Fleet;
use super::synced_file::SyncedFile;
use crate::domain::violation::counted;
use crate::rpc::client::Client;
use crate::rpc::pb;

/// Version of the computation. A curation does not continue with the scores of another version.
const RUN_VERSION: u32 = 2;
/// Number of hexadecimal digits of the id of a curation.
const ID_DIGITS: usize = 16;
/// Endings of names that promise another format than JSON lines.
const OTHER_FORMATS: [&str; 5] = ["csv", "tsv", "parquet", "arrow", "feather"];

pub(super) async fn run(args: CurateArgs, output: Output) -> Outcome {
    let thresholds = Thresholds::new(&args)?;
    check_output("--out", &args.out)?;
    if let Some(report) = &args.report {
        check_output("--report", report)?;
    }
    let data = progress::find(&args.data, &args.reading).await?;
    check_files(&args, &data)?;
    let (fleet, client) = Fleet::connect(fleet_args(&args)).await?;
    let model = model(&client, &args.model).await?;
    let template = JobTemplate::new(&args, &model.name)?;
    template.check(&client).await?;
    let index = read_index(&data, &args).await?;
    let run = run_id(&args, &model, &template, &index)?;
    if args.out.exists() && !ScoreFolder::path(&args.out, &run).exists() {
        return Err(Failure::Usage(format!(
            "--out {} exists: remove it, or name another file",
            args.out.display()
        )));
    }
    if let Some(warning) = format_warning(&args.out) {
        warn(&warning);
    }
    for other in ScoreFolder::others(&args.out, &run) {
        let folder = ScoreFolder::path(&args.out, &other);
        warn(&format!(
            "{} is of an interrupted curation with other rows, another model or other flags; its \
             jobs have the label {RUN_LABEL}={other}",
            folder.display()
        ));
    }
    let flag = server_flag(&args.server);
    let mut curation = Curation {
        folder: ScoreFolder::open(&args.out, &run)?,
        jobs: FoldJobs::find(&client, flag, template, &run, args.folds).await?,
        fleet,
        folds: args.folds,
        data,
        index: Arc::new(index),
        thresholds,
    };
    let result = unless_interrupted("interrupted", curation.work(&args.out)).await;
    let report = match result {
        Ok(report) => report,
        Err(failure) => return Err(resumable(failure, &curation.jobs)),
    };
    let document = report.to_json(&run, &model.name);
    if let Some(path) = &args.report {
        let text = format!("{document:#}\n");
        std::fs::write(path, text)
            .map_err(|e| Failure::Failed(format!("--report {}: {e}", path.display())))?;
    }
    match output {
        Output::Table => report.print(),
        other => output::resource(other, &document),
    }
    if !report.left_out.is_empty() {
        warn(&format!(
            "these columns of the rows are left out, because results have the same names: {}",
            report.left_out.join(", ")
        ));
    }
    if report.errors() > 0 {
        warn(&format!(
            "{} {} not scored: the column error of {} says why",
            counted(report.errors(), "row"),
            if report.errors() == 1 { "was" } else { "were" },
            args.out.display()
        ));
    }
    curation.clean_up(&args, output).await
}

/// Returns the one server, to which refused calls are sent again as `score-files` does.
fn fleet_args(args: &CurateArgs) -> FleetArgs {
    FleetArgs {
        servers: vec![args.server.server.clone()],
        connections: 1,
        retry_timeout: args.retries.retry_timeout,
        wait_for_server: 0,
        token: args.server.token.clone(),
        tls_server_ca: args.server.tls_server_ca.clone(),
        tls_client_cert: args.server.tls_client_cert.clone(),
        tls_client_key: args.server.tls_client_key.clone(),
    }
}

/// Checks that the files can be read several times, and that the output replaces none of them.
fn check_files(args: &CurateArgs, data: &DataFiles) -> Outcome {
    if !data.is_rereadable() {
        return Err(Failure::Usage(
            "--data names standard input or a pipe, and the rows are read several times: write \
             them to a file first"
                .to_owned(),
        ));
    }
    let outputs = [
        ("--out", Some(&args.out)),
        ("--report", args.report.as_ref()),
    ];
    for (flag, path) in outputs {
        if let Some(path) = path.filter(|path| data.contains(path)) {
            return Err(Failure::Usage(format!(
                "{flag} {} is one of the files of --data: name another file",
                path.display()
            )));
        }
    }
    match args.report.as_ref() == Some(&args.out) {
        true => Err(Failure::Usage(
            "--report names the file of --out: name another file".to_owned(),
        )),
        false => Ok(()),
    }
}

/// Returns a warning if the name of the output promises another format than it has.
fn format_warning(out: &Path) -> Option<String> {
    let ending = out.extension()?.to_str()?.to_lowercase();
    OTHER_FORMATS.contains(&ending.as_str()).then(|| {
        format!(
            "--out {} will have the rows as JSON lines, whatever its name: better name it {}",
            out.display(),
            out.with_extension("jsonl").display()
        )
    })
}

/// Returns the base model with its content hashes.
async fn model(client: &Client, given: &str) -> Result<pb::Model, Failure> {
    let names = PolicyNames::of(client).await?;
    let name = match given {
        "" => names.only_model("--model")?,
        given => names.complete("--model", given).await?,
    };
    if !name.starts_with("models/") {
        return Err(Failure::Usage(format!(
            "--model {given} is a job: name a base model, on which the adapters are trained"
        )));
    }
    let request = pb::GetModelRequest { name };
    Ok(client.models().get_model(request).await?.into_inner())
}

/// Reads the rows for the first time, and checks that they can be divided.
async fn read_index(data: &DataFiles, args: &CurateArgs) -> Result<RowIndex, Failure> {
    let (files, seed, folds) = (data.clone(), args.seed, args.folds);
    let reading = tokio::task::spawn_blocking(move || RowIndex::read(&files, seed, folds));
    let index = waiting(&format!("reading {}", data.title()), reading).await;
    let index = index??;
    for fold in (0..folds).filter(|fold| index.scored_count(*fold) > 0) {
        if index.trained_count(fold) == 0 {
            return Err(Failure::Failed(format!(
                "{} leaves no row to train on for fold {}: more rows with different prompts are \
                 needed, or another --seed",
                data.title(),
                fold + 1
            )));
        }
    }
    if index.rows.iter().any(|row| row.fold.is_ok()) {
        return Ok(index);
    }
    let first = index.rows.into_iter().find_map(|row| row.fold.err());
    Err(Failure::Failed(match first {
        Some(first) => format!(
            "no row of {} can be used; the first one: {first}",
            data.title()
        ),
        None => format!("{} has no rows", data.title()),
    }))
}

/// Returns the id of a curation: a hash of everything that its scores depend on.
fn run_id(
    args: &CurateArgs,
    model: &pb::Model,
    template: &JobTemplate,
    index: &RowIndex,
) -> Result<String, Failure> {
    let identity = model.identity.clone().unwrap_or_default();
    let content = json!([
        RUN_VERSION,
        index.content.to_hex().as_str(),
        args.folds,
        args.seed,
        [
            identity.weights,
            identity.config,
            identity.tokenizer,
            identity.chat_template,
        ],
        template.settings()?,
    ]);
    let hash = blake3::hash(content.to_string().as_bytes()).to_hex();
    Ok(hash.chars().take(ID_DIGITS).collect())
}

/// Adds to a failure how to continue, and what is on the server meanwhile.
fn resumable(failure: Failure, jobs: &FoldJobs) -> Failure {
    let mut text = "the same command continues from here".to_owned();
    if let Some(remaining) = jobs.remaining() {
        text.push_str(&format!("; {remaining}"));
    }
    let with = |message: String| format!("{message}\n{text}");
    match failure {
        Failure::Failed(m) => Failure::Failed(with(m)),
        Failure::Usage(m) => Failure::Usage(with(m)),
        Failure::Unreachable(m) => Failure::Unreachable(with(m)),
        Failure::Interrupted(m) => Failure::Interrupted(with(m)),
    }
}

/// A curation in progress.
struct Curation {
    fleet: Arc<Fleet>,
    data: DataFiles,
    index: Arc<RowIndex>,
    folds: u32,
    thresholds: Thresholds,
    folder: ScoreFolder,
    jobs: FoldJobs,
}

impl Curation {
    /// Trains and scores the folds that earlier starts have not finished, and writes the output.
    async fn work(&mut self, out: &Path) -> Result<CurationReport, Failure> {
        // All jobs are created first, so that a server with several devices uses them.
        let mut created: VecDeque<(u32, FoldJob)> = VecDeque::new();
        for fold in 0..self.folds {
            if self.folder.has_scores(fold) || self.index.scored_count(fold) == 0 {
                continue;
            }
            let job = loop {
                let file = self.folder.temporary(&format!("train-{}", fold + 1));
                let rows = (&self.data, &self.index);
                match self.jobs.ensure(rows, fold, file).await {
                    Ok(job) => break job,
                    Err(CreateError::Other(failure)) => return Err(failure),
                    Err(CreateError::Exhausted(failure)) => match created.pop_front() {
                        Some((earlier, job)) => self.finish_fold(earlier, &job).await?,
                        None => return Err(failure),
                    },
                }
            };
            created.push_back((fold, job));
        }
        for (fold, job) in created {
            self.finish_fold(fold, &job).await?;
        }
        self.write_output(out).await
    }

    /// Waits for the job of a fold and scores the fold's rows.
    async fn finish_fold(&self, fold: u32, job: &FoldJob) -> Outcome {
        let name = format!("fold {} of {}", fold + 1, self.folds);
        let training = WorkProgress::steps(&format!("{name}: training"));
        self.jobs.wait(job, &training).await?;
        drop(training);
        let progress = WorkProgress::pairs(&format!("{name}: scoring"));
        progress.set_total(self.index.scored_count(fold));
        let policy = format!("{}/checkpoints/latest", job.name);
        let rows = (&self.data, &self.index);
        let writer = self.folder.create_scores(fold)?;
        let scoring = score_fold(&self.fleet, &policy, rows, fold, (writer, &progress));
        progress.during(scoring).await?;
        drop(progress);
        say(&format!("{name} is scored"));
        Ok(())
    }

    async fn write_output(&self, out: &Path) -> Result<CurationReport, Failure> {
        let path = self.folder.temporary("output");
        let mut file = SyncedFile::create(path)?;
        let rows = (&self.data, &*self.index);
        let report = write_rows(rows, &self.folder, self.folds, self.thresholds, &mut file)?;
        file.move_to(out)?;
        Ok(report)
    }

    /// Deletes jobs and datasets, unless they are to be kept, and the folder with the scores.
    async fn clean_up(mut self, args: &CurateArgs, output: Output) -> Outcome {
        if args.keep {
            if output == Output::Table {
                line(&format!(
                    "kept on the server: {}",
                    self.jobs.names().join(", ")
                ));
            }
            return self.folder.remove();
        }
        match self.jobs.delete().await {
            Ok(()) => self.folder.remove(),
            Err(failure) => {
                let remaining = self.jobs.remaining().unwrap_or_default();
                let done = format!("{} is complete, but {remaining}", args.out.display());
                Err(Failure::Failed(format!("{done}\n{}", failure.message())))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_of_another_format_is_answered_with_one_of_json_lines() {
        for name in ["out/x.jsonl", "x.json", "x", "x.v2", ".csv"] {
            assert_eq!(format_warning(Path::new(name)), None, "{name}");
        }
        for name in ["out/x.csv", "out/x.PARQUET"] {
            let warning = format_warning(Path::new(name)).unwrap();
            assert!(
                warning.starts_with(&format!("--out {name} will have the rows as JSON lines"))
                    && warning.ends_with("better name it out/x.jsonl"),
                "{warning}"
            );
        }
    }
}
