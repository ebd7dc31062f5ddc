//! The command line: parses arguments and settings, runs commands and prints results.

mod args;
mod backup;
mod chat;
mod curate;
mod data;
mod demo;
mod doctor;
mod evaluate;
mod failure;
mod flag_names;
mod generate;
mod help_layout;
mod job_columns;
mod job_creation;
mod job_diff;
pub mod job_flags;
mod job_metrics;
mod job_rows;
mod job_wait;
mod loopback;
mod manual;
mod output;
mod pairs;
mod policy_names;
mod progress;
mod remote;
mod resources;
mod rounds;
mod score;
mod score_files;
mod scoring_flags;
pub mod serve;
pub mod settings;
mod short_names;
mod synced_file;
mod telemetry;
mod tokens;
mod train;
mod usage;
mod variables;
mod watch;
mod whole_number;

use std::io::Write as _;
use std::process::ExitCode;
use std::time::Duration;

use clap::parser::ValueSource;
use clap::{ArgMatches, FromArgMatches as _};

use self::args::{Cli, Command, JobsCommand, ServeArgs};
use self::failure::{Failure, Outcome};
use self::settings::{Settings, Sources};
use crate::rpc::TlsError;
use crate::telemetry::metrics;
use crate::train::rows::sandbox;

/// Time limit for sending the last spans when the process ends.
const TRACE_FLUSH_TIMEOUT: Duration = Duration::from_secs(3);

/// Returns the definition of the command line: all commands with their flags. Tests compare the
/// commands in the documents with it.
pub fn command() -> clap::Command {
    help_layout::command()
}

/// Parses the arguments and runs the command.
pub fn main() -> ExitCode {
    tune_allocator();
    // Selects the cryptography for TLS. It fails only if one is already selected.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let mut command = help_layout::with_plain_errors(command());
    let args = help_layout::with_joined_numbers(std::env::args_os());
    let given = command.try_get_matches_from_mut(args);
    let given = given.unwrap_or_else(|e| help_layout::with_current_names(e).exit());
    let mut cli = Cli::from_arg_matches(&given).unwrap_or_else(|e| e.format(&mut command).exit());
    note_sources(&mut cli, &given);
    if let Command::Decode {
        path,
        columns,
        records,
    } = &cli.command
    {
        return decode(path, columns, records.as_deref());
    }
    if let Err(failure) = check_servers(&given) {
        return ExitCode::from(report(failure));
    }
    let runtime = match tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(e) => {
            return ExitCode::from(report(Failure::Failed(format!(
                "the async runtime did not start: {e}"
            ))));
        }
    };
    let outcome = runtime.block_on(run(cli));
    // A blocking task that hangs, e.g. a download, must not delay the exit.
    runtime.shutdown_timeout(Duration::from_secs(1));
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        // A device that the command uses itself may still be at work.
        Err(failure @ Failure::Interrupted(_)) => end_at_once(report(failure)),
        Err(failure) => ExitCode::from(report(failure)),
    }
}

/// Adds to the arguments of some commands what only the sources of their values tell.
fn note_sources(cli: &mut Cli, given: &ArgMatches) {
    if let Command::Doctor(args) = &mut cli.command {
        // An address that equals the default one is as good as any other.
        let of = given.subcommand_matches("doctor");
        let source = of.and_then(|of| of.value_source("server"));
        let is_given = source.is_some_and(|source| source != ValueSource::DefaultValue);
        if is_given && args.address.is_none() {
            args.address = Some(args.server.server.clone());
        }
    }
    if let Command::Jobs(JobsCommand::Metrics(args)) = &mut cli.command {
        let is_typed = |flag: &str| given.value_source(flag) == Some(ValueSource::CommandLine);
        args.is_format_given = is_typed("format") || is_typed("output");
    }
}

/// Refuses an address of a server for `score-files --models`, which has none. A variable with an
/// address is not refused, because it is meant for other commands, too.
fn check_servers(given: &ArgMatches) -> Outcome {
    let is_typed = |of: &ArgMatches, flag: &str| {
        let source = of.value_source(flag);
        source == Some(ValueSource::CommandLine)
    };
    match given.subcommand_matches("score-files") {
        Some(of) if is_typed(of, "models") && is_typed(of, "servers") => Err(Failure::Usage(
            "--server is of no use with --models, which scores in this process: leave one of them \
             out"
            .to_owned(),
        )),
        _ => Ok(()),
    }
}

/// Ends the process without exit handlers, because these must not unload a GPU's libraries during
/// a computation.
fn end_at_once(code: u8) -> ! {
    let _ = std::io::stdout().flush();
    // SAFETY: `_exit` has no preconditions. It ends the process without exit handlers.
    unsafe { libc::_exit(code.into()) }
}

async fn run(mut cli: Cli) -> Outcome {
    let output = cli.take_format().map_err(Failure::Usage)?;
    match cli.command {
        Command::Serve(args) => serve_command(args).await,
        Command::Demo(args) => demo::run(args).await,
        Command::Train(args) => train::run(*args, output).await,
        Command::Jobs(command) => resources::jobs(command, output).await,
        Command::Watch(args) => watch::run(args, output).await,
        Command::Score(args) => score::run(args, output).await,
        Command::Curate(args) => curate::run(*args, output).await,
        Command::ScoreFiles(args) => score_files::run(*args, output).await,
        Command::Generate(args) => generate::run(*args, output).await,
        Command::Chat(args) => chat::run(*args, output).await,
        Command::Pairs(args) => pairs::run(*args, output).await,
        Command::Rounds(args) => rounds::run(*args, output).await,
        Command::Evaluate(args) => evaluate::run(*args, output).await,
        Command::Datasets(command) => resources::datasets(command, output).await,
        Command::Checkpoints(command) => resources::checkpoints(command, output).await,
        Command::Models(command) => resources::models(command, output).await,
        Command::Doctor(args) => doctor::run(*args, output).await,
        Command::Completions { shell } => manual::completions(shell),
        Command::Man { out } => manual::man(out.as_deref()),
        Command::Usage(args) => usage::run(args, output).await,
        Command::Health(server) => remote::check_health(&server.target()).await,
        Command::Tokens(command) => tokens::run(command, output).await,
        Command::Backup(args) => backup::back_up(args, output).await,
        Command::Restore(args) => backup::restore(args, output).await,
        Command::Migrate(args) => backup::migrate(args, output).await,
        Command::Decode { path, .. } => Err(Failure::Usage(format!(
            "{} is decoded without a runtime",
            path.display()
        ))),
    }
}

/// Decodes an untrusted file for the server that started this process. Limits on memory and CPU
/// time are set before the first byte is read.
fn decode(path: &std::path::Path, columns: &[String], records: Option<&str>) -> ExitCode {
    let bytes = std::fs::metadata(path).map_or(0, |m| m.len());
    limit(libc::RLIMIT_AS, sandbox::MEMORY, sandbox::MEMORY);
    // The soft limit sends SIGXCPU, which the server can tell from a kill.
    limit(
        libc::RLIMIT_CPU,
        sandbox::seconds(bytes),
        sandbox::seconds(bytes) + 5,
    );
    limit(libc::RLIMIT_CORE, 0, 0);
    // If memory runs out, the kernel should kill this process, not the server. The write may fail
    // where /proc is not writable.
    let _ = std::fs::write("/proc/self/oom_score_adj", "1000");
    // Signals to the process group are meant for the server, which then ends this process.
    for ignored in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        // SAFETY: SIG_IGN installs no handler, so no code of this process runs on a signal.
        unsafe { libc::signal(ignored, libc::SIG_IGN) };
    }
    let out = std::io::stdout().lock();
    let decoded = match records {
        Some(choice) => sandbox::decode_records(path, choice, out),
        None => sandbox::decode(path, columns, out),
    };
    match decoded {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

fn limit(resource: libc::__rlimit_resource_t, soft: u64, hard: u64) {
    let limit = libc::rlimit {
        rlim_cur: soft,
        rlim_max: hard,
    };
    // SAFETY: the call reads one struct that lives as long as it.
    unsafe { libc::setrlimit(resource, &raw const limit) };
}

async fn serve_command(args: ServeArgs) -> Outcome {
    let bad = |v: crate::domain::violation::Violations| {
        let lines: Vec<String> = v
            .listed()
            .iter()
            .map(|v| format!("  {} {}", v.field, v.description))
            .collect();
        Failure::Usage(format!(
            "these settings cannot be used:\n{}",
            lines.join("\n")
        ))
    };
    let sources = Sources::collect(args.config.as_deref(), args.flags).map_err(bad)?;
    // The log, which later has these remarks, is not configured yet.
    let settings = Settings::resolve(&sources).map_err(|v| {
        let remarks = variables::remarks(&sources.environment);
        remarks
            .iter()
            .fold(bad(v), |failure, remark| failure.with_remark(remark))
    })?;
    let traces = settings
        .traces
        .as_ref()
        .map(|(endpoint, ratio)| telemetry::traces(endpoint, *ratio))
        .transpose();
    let traces = traces.map_err(|e| Failure::Failed(format!("otlp_endpoint: {e:#}")))?;
    telemetry::log(
        &settings.log,
        settings.log_json,
        settings.audit_log.as_deref(),
        traces.as_ref(),
    )
    .map_err(|e| Failure::Failed(format!("{e:#}")))?;
    variables::warn_about_unknown(&sources.environment);
    let metrics = metrics::install().map_err(|e| Failure::Failed(format!("metrics: {e}")))?;
    let served = serve::run(settings, metrics).await;
    if let Some(traces) = traces {
        // Sends the remaining spans. The timeout limits the wait for a collector that does not
        // answer.
        let _ =
            tokio::task::spawn_blocking(move || traces.shutdown_with_timeout(TRACE_FLUSH_TIMEOUT))
                .await;
    }
    let served = served.map_err(|e| match e.downcast_ref::<TlsError>() {
        // A wrong file is a wrong setting.
        Some(wrong) => Failure::Usage(wrong.to_string()),
        None => e.into(),
    });
    match served? {
        serve::Ended::DeviceIdle => Ok(()),
        serve::Ended::DeviceBusy(result) => {
            end_at_once(result.map_or_else(|e| report(e.into()), |()| 0))
        }
    }
}

/// Prints a failure and returns its exit code.
#[allow(clippy::print_stderr)]
fn report(failure: Failure) -> u8 {
    let (message, code) = match failure {
        Failure::Failed(m) => (m, 1),
        Failure::Usage(m) => (m, 2),
        Failure::Unreachable(m) => (m, 3),
        Failure::Interrupted(m) => {
            eprintln!("{m}");
            return 130;
        }
    };
    eprintln!("error: {message}");
    code
}

/// Makes glibc reuse memory instead of returning it. By default it maps each large allocation anew
/// and unmaps it when it is freed, which costs page faults. Activations do not come from glibc but
/// from an arena of their own (`compute/cpu/buffer.rs`), unless that has no memory for them.
pub fn tune_allocator() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: mallopt only sets glibc parameters, before any other thread exists.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 1 << 30);
        libc::mallopt(libc::M_TRIM_THRESHOLD, i32::MAX);
        libc::mallopt(libc::M_TOP_PAD, 64 << 20);
    }
}
