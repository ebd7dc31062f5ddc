//! `bradley score-files`: scores files of any size in parts, each of which is written once.
//!
//! ```text
//! inputs ─▶ reader ─▶ parts ─▶ servers ─▶ Parquet or JSON lines ─▶ output
//! ```
//!
//! There is no coordinator. A part's name follows from its rows, the weights and the options, and
//! its shard from the name, so that every process finds out alone what is left to do. Memory is
//! bounded by the parts in work: two are scored, one waits and one is read.

pub(super) mod batch;
mod encode;
pub(super) mod fleet;
mod input;
mod manifest;
mod reader;
mod row;
mod store;
mod weights;

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use self::encode::{PartCounts, RowError, ScoredPart};
use self::fleet::Fleet;
use self::input::ScoreInput;
use self::manifest::RunDescription;
use self::reader::{PartNaming, PartReader, PartToScore, PlannedRows, Shard};
use self::row::RowReading;
use self::store::PartStore;
use self::weights::WeightsIdentity;
use super::args::{LoggedColumns, Output, PartFormat, ScoreFilesArgs};
use super::data::ColumnMap;
use super::failure::{self, Failure, Outcome};
use super::loopback::LoopbackServer;
use super::output::{line, resource};
use super::policy_names::{PolicyNames, same_model_warning};
use super::progress::{WorkProgress, say, waiting, warn};
use super::settings::{Sources, vendor_variables};
use super::short_names::LAST;
use crate::domain::similar::nearest;
use crate::domain::violation::{counted, quoted};
use crate::rpc::client::{Client, ClientError, is_transient, retry_after};
use crate::rpc::pb;
use crate::train::rows::names::listed;

/// Number of parts that are scored at the same time, so that the servers have work while the last
/// pairs of a part are scored.
const PARTS_AT_ONCE: usize = 2;
/// Maximum time for the own engine to load its models.
const START_LIMIT: Duration = Duration::from_secs(1800);
/// Time between two requests for the identity of the weights while the server is busy, unless the
/// server asks for another one.
const IDENTITY_PAUSE: Duration = Duration::from_secs(1);
/// Time between two updates of the display.
const TICK: Duration = Duration::from_millis(250);
/// Remedy for the name of a job with the models of `--models`.
const MERGED_REMEDY: &str = "to score with a checkpoint, download its merged weights (bradley \
    checkpoints download JOB/checkpoints/STEP --contents merged --out FOLDER) and load FOLDER with \
    --models";

pub(super) async fn run(args: ScoreFilesArgs, output: Output) -> Outcome {
    let sources = Sources::environment();
    let shard = shard(&args, &sources)?;
    check_carry(&args.carry)?;
    let columns = ColumnMap::parse(&args.reading.columns).map_err(Failure::Usage)?;
    match args.models.is_empty() {
        true => unless_interrupted(score(args, columns, (shard, &sources), output)).await,
        false => score_here(args, columns, (shard, &sources), output).await,
    }
}

/// Does a part of the command until it ends, or until Ctrl-C.
async fn unless_interrupted(work: impl Future<Output = Outcome>) -> Outcome {
    let said = "interrupted: the parts that are written stay, and the same command continues with \
                the others";
    failure::unless_interrupted(said, work).await
}

/// Scores with the models of `--models`, which a server in this process loads. The server is
/// stopped in any case, so that no device computes while the process ends.
async fn score_here(
    mut args: ScoreFilesArgs,
    columns: ColumnMap,
    (shard, sources): (Shard, &Sources),
    output: Output,
) -> Outcome {
    refuse_job("--policy", &args.scoring.policy)?;
    refuse_job("--reference", &args.scoring.reference)?;
    super::telemetry::log("warn", false, None, None)?;
    // The engine's log of jobs and its cache of reference log-probs are of no use later.
    let folder = tempfile::tempdir().map_err(|e| Failure::Failed(e.to_string()))?;
    let settings = [
        ("models", args.models.join(",")),
        ("data_dir", folder.path().display().to_string()),
        ("device", args.device.clone()),
        ("precision", args.precision.clone()),
        ("threads", args.threads.to_string()),
    ];
    let server = LoopbackServer::start(&settings, sources).await?;
    args.fleet.servers = vec![server.address.clone()];
    let loading = async {
        let ready = server.connect_when_ready(START_LIMIT);
        waiting("loading the models", ready).await.map(drop)
    };
    let loaded = unless_interrupted(loading).await;
    let has_loaded = loaded.is_ok();
    let outcome = match loaded {
        Ok(()) => unless_interrupted(score(args, columns, (shard, sources), output)).await,
        Err(failure) => Err(failure),
    };
    // A second Ctrl-C ends the wait.
    let stopped = unless_interrupted(server.stop()).await;
    match outcome {
        Ok(()) => stopped,
        Err(failure @ Failure::Interrupted(_)) => Err(failure),
        // If the server has ended with an error, that is the cause.
        Err(failure) if !has_loaded => Err(stopped.err().unwrap_or(failure)),
        Err(failure) => Err(failure),
    }
}

/// Refuses the name of a job, which the own engine does not have, before the models are loaded.
fn refuse_job(flag: &str, given: &str) -> Outcome {
    let is_job =
        given == LAST || given.starts_with("trainingJobs/") || given.contains("/checkpoints/");
    match is_job {
        true => Err(Failure::Usage(format!(
            "{flag} {given}: with --models there are no jobs: {MERGED_REMEDY}"
        ))),
        false => Ok(()),
    }
}

/// Returns the shard that the flags name, or else the environment of Kubernetes or Slurm.
///
/// # Errors
/// Returns a failure if there is no such shard, or if it is not clear which one this is.
fn shard(args: &ScoreFilesArgs, sources: &Sources) -> Result<Shard, Failure> {
    let wrong = |what: String| Failure::Usage(format!("{what}: give --shard I/N with I below N"));
    let number = |name: &str| -> Result<Option<u64>, Failure> {
        match sources.variable(name) {
            None => Ok(None),
            Some(text) => match text.parse() {
                Ok(number) => Ok(Some(number)),
                Err(_) => Err(wrong(format!("the variable {name} is {text:?}"))),
            },
        }
    };
    let (index, count, origin) = if let Some(given) = &args.shard {
        let parsed = given
            .split_once('/')
            .and_then(|(i, n)| Some((i.parse().ok()?, n.parse().ok()?)));
        let (index, count) =
            parsed.ok_or_else(|| wrong(format!("--shard {given:?} is not of the form I/N")))?;
        (index, count, "--shard")
    } else if let Some(index) = number("JOB_COMPLETION_INDEX")? {
        let count = match args.shards {
            Some(count) => Some(u64::from(count)),
            None => number("JOB_COMPLETIONS")?,
        };
        let count = count.ok_or_else(|| {
            Failure::Usage(
                "JOB_COMPLETION_INDEX is set, but not the number of shards: give --shards, or set \
                 JOB_COMPLETIONS"
                    .to_owned(),
            )
        })?;
        (index, count, "JOB_COMPLETION_INDEX")
    } else if let Some(task) = number("SLURM_ARRAY_TASK_ID")? {
        let first = number("SLURM_ARRAY_TASK_MIN")?.unwrap_or(0);
        let step = number("SLURM_ARRAY_TASK_STEP")?.unwrap_or(1).max(1);
        let count = match (number("SLURM_ARRAY_TASK_COUNT")?, args.shards) {
            // The shard of a task follows from the ids of all tasks.
            (Some(tasks), Some(shards)) if tasks != u64::from(shards) => {
                return Err(Failure::Usage(format!(
                    "the Slurm array has {tasks} tasks, but --shards is {shards}, so that it is \
                     not clear which shard task {task} is: give --shard I/{shards}"
                )));
            }
            (tasks, shards) => tasks.or(shards.map(u64::from)),
        };
        let count = count.ok_or_else(|| {
            Failure::Usage(
                "SLURM_ARRAY_TASK_ID is set, but not SLURM_ARRAY_TASK_COUNT: give --shards"
                    .to_owned(),
            )
        })?;
        (
            task.saturating_sub(first) / step,
            count,
            "SLURM_ARRAY_TASK_ID",
        )
    } else {
        match args.shards {
            Some(count) if count > 1 => {
                return Err(Failure::Usage(format!(
                    "--shards {count} says how many shards there are, but nothing says which one \
                     this is: give --shard I/{count}"
                )));
            }
            _ => (0, 1, "--shard"),
        }
    };
    match index < count {
        true => Ok(Shard { index, count }),
        false => Err(wrong(format!(
            "{origin}: shard {index} of {count} does not exist"
        ))),
    }
}

fn check_carry(carry: &[String]) -> Outcome {
    let mut seen = std::collections::BTreeSet::new();
    for name in carry {
        if encode::COLUMNS.contains(&name.as_str()) {
            return Err(Failure::Usage(format!(
                "--carry {name}: the output has a column of this name already: leave it out"
            )));
        }
        if name.is_empty() || !seen.insert(name) {
            return Err(Failure::Usage(format!(
                "--carry: the column {name:?} is empty or named twice"
            )));
        }
    }
    Ok(())
}

/// Everything that the tasks of the parts need.
struct ScoringRun {
    fleet: Arc<Fleet>,
    options: pb::ScoringOptions,
    out: PartStore,
    format: PartFormat,
    carry: Vec<String>,
    /// Names and values for the metadata of Parquet files.
    about: Vec<(&'static str, String)>,
    /// Number of rows that have a result.
    done: AtomicU64,
}

async fn score(
    args: ScoreFilesArgs,
    columns: ColumnMap,
    (shard, sources): (Shard, &Sources),
    output: Output,
) -> Outcome {
    let started = Instant::now();
    let vendor = vendor_variables(sources);
    let out = PartStore::open(&args.out, &vendor)?;
    let inputs = input::find(&args.inputs, &vendor).await?;
    let (fleet, client) = Fleet::connect(args.fleet.clone()).await?;
    let mut options = args.scoring.options()?;
    let names = PolicyNames::of(&client).await?;
    let names = match args.models.is_empty() {
        true => names,
        false => names.without_jobs("--models", MERGED_REMEDY),
    };
    weights::complete_names(&client, &names, &mut options).await?;
    // With log-probs in the rows, the rewards are not against the named reference.
    if args.logged.is_none()
        && let Some(warning) = same_model_warning(&options.policy, &options.reference)
    {
        warn(&warning);
    }
    let patience = Duration::from_secs(args.fleet.retry_timeout);
    let identifying = identify_patiently(&client, &options, patience);
    let weights = waiting("the server scores a first pair", identifying).await?;
    weights.pin(&mut options)?;
    let run = RunDescription {
        weights: weights.clone(),
        beta: options.beta,
        max_length: options.max_length,
        template_args: options.chat_template_kwargs_json.clone(),
        tools: options.tools_json.clone(),
        columns: columns.pairs(),
        logged: args.logged.map_or("", LoggedColumns::name).to_owned(),
        precision: match args.models.is_empty() {
            true => String::new(),
            false => args.precision.clone(),
        },
        carry: args.carry.clone(),
        part_rows: args.part_rows,
        format: args.out_format.ending().to_owned(),
    };
    run.claim(&out).await?;
    fleet.set_expected(options.clone(), weights.clone());
    let naming = PartNaming {
        options: run.options_hash(),
        rows: args.part_rows.into(),
        format: args.out_format,
    };
    let mut about = vec![
        ("bradley.policy", weights.policy.clone()),
        ("bradley.reference", weights.reference.clone()),
        ("bradley.normalization", weights.normalization.clone()),
        ("bradley.options_hash", naming.options.clone()),
    ];
    if !run.logged.is_empty() {
        about.push(("bradley.logged", run.logged.clone()));
    }
    let work = ScoringRun {
        fleet,
        options,
        out: out.clone(),
        format: args.out_format,
        carry: args.carry.clone(),
        about,
        done: AtomicU64::new(0),
    };
    let planned = Arc::new(PlannedRows::default());
    let reader = PartReader {
        inputs: inputs.clone(),
        written: out.list().await?,
        out: out.clone(),
        naming: naming.clone(),
        shard,
        rows: RowReading {
            carry: args.carry,
            columns,
            logged: args.logged,
            ..Default::default()
        },
        planned: Arc::clone(&planned),
    };
    let scored = score_parts(Arc::new(work), reader, &inputs, &planned).await?;
    let complete = manifest::complete(&out, &inputs, &naming, &run, started).await?;
    report(output, &scored, (shard, complete), out.shown(), started);
    if let Some(warning) = error_warning(&scored) {
        warn(&warning);
    }
    match scored.bad_inputs.as_slice() {
        [] => Ok(()),
        bad => Err(Failure::Failed(format!(
            "{} of {} inputs could not be read:\n  {}",
            bad.len(),
            inputs.len(),
            bad.join("\n  ")
        ))),
    }
}

/// Identifies the weights. While the server is busy it is asked again, for at most `patience`.
///
/// # Errors
/// Returns the last failure.
async fn identify_patiently(
    client: &Client,
    options: &pb::ScoringOptions,
    patience: Duration,
) -> Result<WeightsIdentity, Failure> {
    let started = Instant::now();
    loop {
        let answer = weights::identify(client, options);
        let (failure, pause) = match tokio::time::timeout(weights::IDENTITY_LIMIT, answer).await {
            Ok(Ok(weights)) => return Ok(weights),
            Ok(Err(status)) if !is_transient(status.code()) => {
                return Err(ClientError::from(status).into());
            }
            Ok(Err(status)) => {
                let pause = retry_after(&status).unwrap_or(IDENTITY_PAUSE);
                (ClientError::from(status).into(), pause)
            }
            Err(_) => {
                let message = format!(
                    "the server has not scored a first pair within {} seconds: see its log, and \
                     run the command again",
                    weights::IDENTITY_LIMIT.as_secs()
                );
                (Failure::Failed(message), Duration::ZERO)
            }
        };
        if started.elapsed() + pause >= patience {
            return Err(failure);
        }
        tokio::time::sleep(pause).await;
    }
}

/// Parts that one process has scored, and the inputs that it could not read.
#[derive(Default)]
struct ScoredParts {
    parts: u64,
    counts: PartCounts,
    /// Number of rows with a score, also if only some of several answers have one.
    with_score: u64,
    first_error: Option<RowError>,
    /// A text for each input that cannot be read, with the reason.
    bad_inputs: Vec<String>,
}

/// The rows of a part that was written.
struct WrittenPart {
    counts: PartCounts,
    /// Number of rows with a score, also if only some of several answers have one.
    with_score: u64,
    first_error: Option<RowError>,
}

/// Scores the parts that the reader sends, and shows the progress.
async fn score_parts(
    work: Arc<ScoringRun>,
    reader: PartReader,
    inputs: &[ScoreInput],
    planned: &PlannedRows,
) -> Result<ScoredParts, Failure> {
    let (sender, mut parts) = mpsc::channel(1);
    let runtime = tokio::runtime::Handle::current();
    let reading = tokio::task::spawn_blocking(move || reader.run(&runtime, &sender));
    let all_bytes: u64 = inputs.iter().map(|input| input.bytes).sum();
    let progress = WorkProgress::pairs("scoring");
    let mut scored = ScoredParts::default();
    let doing = async {
        let mut running = JoinSet::new();
        let mut is_open = true;
        let mut is_first = true;
        let mut ticks = tokio::time::interval(TICK);
        while is_open || !running.is_empty() {
            tokio::select! {
                part = parts.recv(), if is_open && running.len() < PARTS_AT_ONCE => match part {
                    Some(part) => {
                        if std::mem::take(&mut is_first) {
                            for warning in carry_warnings(&work.carry, &part) {
                                progress.suspend(|| warn(&warning));
                            }
                        }
                        running.spawn(score_part(Arc::clone(&work), part));
                    }
                    None => is_open = false,
                },
                Some(done) = running.join_next() => {
                    let written = done??;
                    scored.parts += 1;
                    scored.counts.rows += written.counts.rows;
                    scored.counts.errors += written.counts.errors;
                    scored.with_score += written.with_score;
                    // Parts end in any order.
                    let errors = [scored.first_error.take(), written.first_error];
                    scored.first_error = errors.into_iter().flatten().min();
                }
                _ = ticks.tick() => {
                    let done = work.done.load(Ordering::Relaxed);
                    progress.set(done);
                    if let Some(total) = expected_rows(planned, all_bytes) {
                        progress.set_total(total.max(done));
                    }
                }
            }
        }
        Ok::<(), Failure>(())
    };
    progress.during(doing).await?;
    progress.set(work.done.load(Ordering::Relaxed));
    let rate = progress.summary();
    drop(progress);
    if let Some(rate) = rate {
        say(&rate);
    }
    scored.bad_inputs = reading.await??;
    Ok(scored)
}

/// Returns a warning for each carried column, such as a misspelt one, in which no row of a part has
/// a value.
fn carry_warnings(carry: &[String], part: &PartToScore) -> Vec<String> {
    // A row that cannot be read carries no values.
    let is_readable = part.rows.iter().any(|row| !row.carried.is_empty());
    let is_empty = |at: usize| {
        let mut values = part.rows.iter().filter_map(|row| row.carried.get(at));
        is_readable && values.all(Value::is_null)
    };
    let found = match part.columns.as_slice() {
        [] => String::new(),
        columns => format!("; found: {}", listed(columns)),
    };
    let empty = carry.iter().enumerate().filter(|(at, _)| is_empty(*at));
    let warning = |(_, name): (usize, &String)| {
        let columns = part.columns.iter().map(String::as_str);
        let meant = match nearest(name, columns) {
            Some(column) if column != name => format!("; did you mean {column}?"),
            _ => String::new(),
        };
        format!(
            "no row of the first part that was read has a value in the column {} of \
             --carry{found}{meant}",
            quoted(name)
        )
    };
    empty.map(warning).collect()
}

/// Estimates the number of rows that this shard has to score, as if all inputs had as many of them
/// for each byte as those whose rows are known. `None` if no input's rows are known yet.
fn expected_rows(planned: &PlannedRows, all_bytes: u64) -> Option<u64> {
    let known = planned.rows.load(Ordering::Relaxed);
    let bytes = planned.bytes.load(Ordering::Relaxed);
    (bytes > 0).then(|| {
        let all = known as f64 * all_bytes as f64 / bytes as f64;
        (all as u64).max(known)
    })
}

/// Scores a part and writes it, if the weights are still those of the start.
async fn score_part(work: Arc<ScoringRun>, part: PartToScore) -> Result<WrittenPart, Failure> {
    let add = |rows| {
        work.done.fetch_add(rows, Ordering::Relaxed);
    };
    let results = batch::score(&work.fleet, &work.options, &part.rows, add).await?;
    let encoding = Arc::clone(&work);
    let encoded = tokio::task::spawn_blocking(move || {
        let scored = ScoredPart {
            input: &part.input,
            rows: &part.rows,
            results: &results,
            carry: &encoding.carry,
            about: &encoding.about,
        };
        let bytes = scored.encode(encoding.format)?;
        let written = WrittenPart {
            counts: scored.counts(),
            with_score: scored.rows_with_score(),
            first_error: scored.first_error(),
        };
        Ok::<_, String>((part.name, written, bytes))
    });
    let (name, written, bytes) = encoded.await?.map_err(Failure::Failed)?;
    work.fleet.verify().await?;
    // If another process has written the part meanwhile, it has the same bytes.
    work.out.create(&name, bytes).await?;
    Ok(written)
}

/// Returns a warning with the first error of the rows that were written, if one has an error.
fn error_warning(scored: &ScoredParts) -> Option<String> {
    let first = scored.first_error.as_ref()?;
    let errors = scored.counts.errors;
    let summary = match scored.with_score {
        0 => "none of the rows that were written has a score".to_owned(),
        _ if errors == 1 => "1 row has an error".to_owned(),
        _ => format!("{errors} rows have an error"),
    };
    // A run with other columns or another input is refused in the same folder.
    let remedy = match scored.with_score == 0 && first.lacks_column {
        true => {
            "; rename the columns, or name them with --columns chosen=NAME, and name another --out"
        }
        false => "",
    };
    let RowError {
        input, row, reason, ..
    } = first;
    Some(format!(
        "{summary}; the first error is in row {row} of {input}: {reason}{remedy}"
    ))
}

/// Says what was done, and what is left. `out` is the argument of `--out`.
fn report(
    output: Output,
    scored: &ScoredParts,
    (shard, complete): (Shard, Option<manifest::RunCounts>),
    out: &str,
    started: Instant,
) {
    let PartCounts { rows, errors } = scored.counts;
    if output != Output::Table {
        let all =
            complete.map(|all| json!({"parts": all.parts, "rows": all.rows, "errors": all.errors}));
        let value = json!({
            "shard": {"index": shard.index, "count": shard.count},
            "written": {"parts": scored.parts, "rows": rows, "errors": errors},
            "complete": all,
            "seconds": started.elapsed().as_secs_f64(),
        });
        return resource(output, &value);
    }
    let has_errors = errors > 0 || complete.as_ref().is_some_and(|all| all.errors > 0);
    line(&format!(
        "{} with {} written, {} with an error",
        counted(scored.parts, "part"),
        counted(rows, "row"),
        counted(errors, "row")
    ));
    match complete {
        Some(all) => line(&format!(
            "complete: {}, {}, {} with an error; see _manifest.json",
            counted(all.parts, "part"),
            counted(all.rows, "row"),
            all.errors
        )),
        None if shard.count > 1 => {
            line("parts of other shards, or of inputs that cannot be read, are missing");
        }
        None => line("parts of inputs that cannot be read are missing"),
    }
    if has_errors {
        line(&format!(
            "the column error of the parts in {out} says why a row has no score"
        ));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser as _;

    fn shard_of(flags: &[&str], environment: &[(&str, &str)]) -> Result<(u64, u64), String> {
        let fixed = [
            "bradley",
            "score-files",
            "--in",
            "x",
            "--out",
            "y",
            "--policy",
            "p",
        ];
        let cli = crate::cli::args::Cli::parse_from([&fixed[..], flags].concat());
        let crate::cli::args::Command::ScoreFiles(args) = cli.command else {
            panic!("{flags:?}")
        };
        let environment = environment
            .iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
            .collect();
        let sources = Sources {
            environment,
            ..Default::default()
        };
        match shard(&args, &sources) {
            Ok(shard) => Ok((shard.index, shard.count)),
            Err(failure) => Err(failure.message().to_owned()),
        }
    }

    #[test]
    fn the_shard_comes_from_the_flag_or_the_environment() {
        let kubernetes = [("JOB_COMPLETION_INDEX", "2"), ("JOB_COMPLETIONS", "5")];
        let slurm = [
            ("SLURM_ARRAY_TASK_ID", "4"),
            ("SLURM_ARRAY_TASK_MIN", "1"),
            ("SLURM_ARRAY_TASK_COUNT", "4"),
        ];
        assert_eq!(shard_of(&[], &[]), Ok((0, 1)));
        assert_eq!(shard_of(&["--shard", "1/3"], &kubernetes), Ok((1, 3)));
        assert_eq!(shard_of(&[], &kubernetes), Ok((2, 5)));
        assert_eq!(shard_of(&["--shards", "8"], &kubernetes[..1]), Ok((2, 8)));
        assert_eq!(shard_of(&[], &slurm), Ok((3, 4)));
        assert_eq!(shard_of(&["--shards", "4"], &slurm), Ok((3, 4)));
        assert_eq!(shard_of(&["--shards", "8"], &slurm[..2]), Ok((3, 8)));
        let with_step = [slurm[0], slurm[2], ("SLURM_ARRAY_TASK_STEP", "2")];
        assert_eq!(shard_of(&[], &with_step), Ok((2, 4)));
        let refused = |flags: &[&str], environment: &[(&str, &str)]| {
            shard_of(flags, environment).unwrap_err()
        };
        assert!(refused(&["--shard", "3/3"], &[]).contains("shard 3 of 3 does not exist"));
        assert!(refused(&["--shard", "3"], &[]).contains("I/N"));
        assert!(refused(&["--shards", "3"], &[]).contains("--shard I/3"));
        assert!(refused(&[], &kubernetes[..1]).contains("--shards"));
        assert!(refused(&[], &[("JOB_COMPLETION_INDEX", "x")]).contains("\"x\""));
        // One task of an array is run again: its id alone does not say which shard it was.
        assert!(refused(&["--shards", "16"], &slurm).contains("--shard I/16"));
    }

    #[test]
    fn the_expected_rows_follow_from_the_known_ones_and_the_bytes() {
        let planned = PlannedRows::default();
        assert_eq!(expected_rows(&planned, 400), None);
        planned.add(100, 200);
        assert_eq!(expected_rows(&planned, 400), Some(200));
        planned.add(30, 200);
        assert_eq!(expected_rows(&planned, 400), Some(130));
    }

    #[test]
    fn the_first_error_is_named_and_columns_only_if_no_row_has_a_score() {
        let warning = |with_score, errors, lacks_column| {
            error_warning(&ScoredParts {
                counts: PartCounts { rows: 9, errors },
                with_score,
                first_error: Some(RowError {
                    input: "x.jsonl".to_owned(),
                    row: 4,
                    reason: "chosen is missing".to_owned(),
                    lacks_column,
                }),
                ..Default::default()
            })
        };
        assert_eq!(error_warning(&ScoredParts::default()), None);
        let first = "the first error is in row 4 of x.jsonl: chosen is missing";
        assert_eq!(
            warning(8, 1, true),
            Some(format!("1 row has an error; {first}"))
        );
        assert_eq!(
            warning(7, 2, true),
            Some(format!("2 rows have an error; {first}"))
        );
        let none = format!("none of the rows that were written has a score; {first}");
        assert_eq!(warning(0, 9, false), Some(none.clone()));
        let renamed = warning(0, 9, true).unwrap();
        assert!(
            renamed.starts_with(&none) && renamed.contains("--columns chosen=NAME"),
            "{renamed}"
        );
    }

    #[test]
    fn a_carried_column_without_values_is_named_with_the_columns_that_there_are() {
        let carry = ["sorce", "source", "note"].map(str::to_owned).to_vec();
        let reading = RowReading {
            carry: carry.clone(),
            ..Default::default()
        };
        let read = |lines: &[&str]| -> Vec<_> {
            let rows = lines.iter().zip(1..);
            rows.filter_map(|(line, row)| reading.line(row, line.as_bytes()))
                .collect()
        };
        let mut part = PartToScore {
            name: "x.jsonl-0".to_owned(),
            input: "x.jsonl".to_owned(),
            rows: read(&["no JSON"]),
            columns: Vec::new(),
        };
        assert!(carry_warnings(&carry, &part).is_empty());
        part.rows = read(&[
            r#"{"prompt": "p", "note": null, "source": 1}"#,
            r#"{"prompt": "q"}"#,
        ]);
        part.columns = reading.first_columns.get().cloned().unwrap();
        let start = "no row of the first part that was read has a value in the column";
        assert_eq!(
            carry_warnings(&carry, &part),
            [
                format!(
                    "{start} \"sorce\" of --carry; found: prompt, note, source; did you mean \
                     source?"
                ),
                format!("{start} \"note\" of --carry; found: prompt, note, source"),
            ]
        );
        part.columns.clear();
        assert!(carry_warnings(&carry, &part)[0].ends_with("\"sorce\" of --carry"));
    }

    #[test]
    fn columns_of_the_output_cannot_be_carried() {
        let check = |names: &[&str]| {
            let names: Vec<String> = names.iter().map(|n| (*n).to_owned()).collect();
            check_carry(&names).map_err(|failure| failure.message().to_owned())
        };
        assert!(check(&["prompt", "source"]).is_ok());
        assert!(check(&["margin"]).unwrap_err().contains("--carry margin"));
        assert!(check(&["a", "a"]).unwrap_err().contains("twice"));
    }
}
