//! Command-line arguments.

use std::collections::BTreeMap;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

use super::job_flags::JobFlags;
use super::scoring_flags::ScoringArgs;
use super::settings::SETTINGS;
use super::whole_number::{whole_from, whole_number, whole_size};
use crate::rpc::client::Target;
use crate::train::rows::sandbox::DECODE;

/// Trains language models with Direct Preference Optimization over gRPC, and scores preference
/// pairs with them.
#[derive(Debug, Parser)]
#[command(name = "bradley", version, arg_required_else_help = true, after_help = EXIT_CODES)]
pub struct Cli {
    /// The command to run.
    #[command(subcommand)]
    pub command: Command,
    /// Format of the results. Default: that of the variable BRADLEY_OUTPUT, or else table.
    #[arg(short = 'o', long, global = true, value_enum)]
    pub format: Option<FormatFlag>,
    /// The old name of `--format`. Its variable still sets the default.
    #[arg(long, global = true, value_enum, hide = true, env = "BRADLEY_OUTPUT")]
    pub output: Option<Output>,
}

impl Cli {
    /// Returns the format of the results. `--format merged` of an export, its old meaning, is moved
    /// to `--contents`; `--format parquet` of `score-files` is moved to `--out-format`.
    ///
    /// # Errors
    /// Returns a message if the flag has a value that the command does not accept.
    pub fn take_format(&mut self) -> Result<Output, String> {
        let default = self.output.unwrap_or(Output::Table);
        let Some(format) = self.format else {
            return Ok(default);
        };
        if let FormatFlag::Parquet | FormatFlag::Jsonl = format {
            let Command::ScoreFiles(args) = &mut self.command else {
                return Err("--format is one of table, json, yaml and csv".to_owned());
            };
            args.out_format = match format {
                FormatFlag::Jsonl => PartFormat::Jsonl,
                _ => PartFormat::Parquet,
            };
            return Ok(default);
        }
        let old = match format {
            FormatFlag::Parquet | FormatFlag::Jsonl => return Ok(default),
            FormatFlag::Table => return Ok(Output::Table),
            FormatFlag::Json => return Ok(Output::Json),
            FormatFlag::Yaml => return Ok(Output::Yaml),
            FormatFlag::Csv => return Ok(Output::Csv),
            FormatFlag::Auto => ContentsFlag::Auto,
            FormatFlag::Adapter => ContentsFlag::Adapter,
            FormatFlag::Merged => ContentsFlag::Merged,
        };
        let contents = match &mut self.command {
            Command::Checkpoints(CheckpointsCommand::Export(args)) => &mut args.contents,
            Command::Checkpoints(CheckpointsCommand::Download(args)) => &mut args.contents,
            _ => return Err("--format is one of table, json, yaml and csv".to_owned()),
        };
        if *contents == ContentsFlag::Auto {
            *contents = old;
        }
        Ok(default)
    }
}

const EXIT_CODES: &str = "Exit codes: 0 success, 1 failure (a job failed or was cancelled, \
                          a file or the server failed), 2 wrong arguments or settings, \
                          3 no server reached, 130 ended with Ctrl-C, 141 the reader of standard \
                          output has closed it (as with | head).";

/// Format of the results: a table for people, the others for programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// Columns that fit the terminal.
    Table,
    /// One JSON document with the whole resource, or for streams one document per line.
    Json,
    /// One YAML document with the whole resource.
    Yaml,
    /// A header, and a line for each resource.
    Csv,
}

/// Values of `--format`: those of [`Output`], and two hidden groups. An export accepts its contents
/// here, which this flag named until version 0.2, and `score-files` the formats of its parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum FormatFlag {
    /// Columns that fit the terminal.
    Table,
    /// One JSON document with the whole resource, or for streams one document per line.
    Json,
    /// One YAML document with the whole resource.
    Yaml,
    /// A header, and a line for each resource.
    Csv,
    /// See [`ContentsFlag::Auto`].
    #[value(hide = true)]
    Auto,
    /// See [`ContentsFlag::Adapter`].
    #[value(hide = true)]
    Adapter,
    /// See [`ContentsFlag::Merged`].
    #[value(hide = true)]
    Merged,
    /// See [`PartFormat::Parquet`].
    #[value(hide = true)]
    Parquet,
    /// See [`PartFormat::Jsonl`].
    #[value(hide = true)]
    Jsonl,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the server.
    Serve(ServeArgs),
    /// Train and score a small model end to end, with a server on a local port.
    Demo(DemoArgs),
    /// Upload preference pairs and create a training job.
    Train(Box<TrainArgs>),
    /// List, show, change, pause, resume, cancel and delete training jobs.
    #[command(subcommand)]
    Jobs(JobsCommand),
    /// Follow a job's events until it ends.
    Watch(WatchArgs),
    /// Score the pairs of a file.
    Score(ScoreArgs),
    /// Find wrong labels: scores each pair of a file by an adapter that was trained without it.
    Curate(Box<CurateArgs>),
    /// Score files of any size in parts, each written once: on several machines, restarted at any
    /// time, from and to object stores.
    ScoreFiles(Box<ScoreFilesArgs>),
    /// Report how well a policy's scores agree with the pairs of files or of a dataset.
    Evaluate(Box<EvaluateArgs>),
    /// Continue a prompt, or the prompts of a file, with a policy.
    Generate(Box<GenerateArgs>),
    /// Talk with a policy, or with two policies beside each other.
    Chat(Box<ChatArgs>),
    /// Make preference pairs from a policy's own answers, ranked by the rewards of a judge.
    Pairs(Box<PairsArgs>),
    /// Improve a policy in rounds: make pairs from its own answers, train on them, compare.
    Rounds(Box<RoundsArgs>),
    /// Upload, list, show and delete datasets.
    #[command(subcommand)]
    Datasets(DatasetsCommand),
    /// List, download, export and delete checkpoints.
    #[command(subcommand)]
    Checkpoints(CheckpointsCommand),
    /// Show the server's base models.
    #[command(subcommand)]
    Models(ModelsCommand),
    /// Show what this machine offers and which settings bradley serve would have, and check that
    /// models, database, stores and a running server answer. Exit code 1 means that a check failed.
    Doctor(Box<DoctorArgs>),
    /// Print the completion script of a shell: source <(bradley completions bash).
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
    /// Print the manual page, or write the pages of all commands.
    Man {
        /// Folder for one page per command. Default: print the page of bradley itself.
        #[arg(long, value_name = "FOLDER")]
        out: Option<PathBuf>,
    },
    /// Show the work that was done for each owner: pairs scored, tokens scored and generated, and
    /// device time trained.
    Usage(UsageArgs),
    /// Check that a server is serving. Exit code 0 means yes; for container health checks.
    Health(ServerArgs),
    /// Create, list and revoke bearer tokens in the server's database, and print entries for its
    /// token_file.
    #[command(subcommand)]
    Tokens(TokensCommand),
    /// Copy the database and the files of a server that uses SQLite. The server may run meanwhile.
    Backup(BackupArgs),
    /// Restore a backup into a new data directory.
    Restore(RestoreArgs),
    /// Move a server from SQLite to PostgreSQL and an artifact store, for several replicas: copies
    /// rows and files, and removes nothing. The server must be stopped.
    Migrate(MigrateArgs),
    /// Decode an uploaded Parquet file. The server starts this command in a process of its own,
    /// because the file is not trusted.
    #[command(hide = true, name = DECODE)]
    Decode {
        /// The file.
        path: PathBuf,
        /// Write the records that this JSON object chooses, as they are, instead of all pairs.
        #[arg(long)]
        records: Option<String>,
        /// Columns whose values are returned, too.
        columns: Vec<String>,
    },
}

/// `bradley tokens …`
#[derive(Debug, Subcommand)]
pub enum TokensCommand {
    /// Create a token and print it: it cannot be shown again.
    Create {
        /// Owner of the jobs and datasets that are created with this token. Tokens with the same
        /// owner share them.
        #[arg(long)]
        owner: String,
        /// Roles of the token, separated by commas: submit, score, admin.
        #[arg(long, value_delimiter = ',', default_value = "submit,score")]
        roles: Vec<String>,
        /// Days until the token expires. Default: never.
        #[arg(long, value_parser = whole_from::<0>)]
        days: Option<u32>,
        /// The server's database.
        #[command(flatten)]
        database: DatabaseArgs,
    },
    /// Print the entry of a token for the server's token_file, which has only the token's hash. The
    /// token is a line of standard input. This command needs no database.
    Hash {
        /// Owner of the jobs and datasets that are created with this token.
        #[arg(long)]
        owner: String,
        /// Roles of the token, separated by commas: submit, score, admin.
        #[arg(long, value_delimiter = ',', default_value = "submit,score")]
        roles: Vec<String>,
        /// Days until the token expires. Default: never.
        #[arg(long, value_parser = whole_from::<0>)]
        days: Option<u32>,
        /// Make a random token and print it to standard error. It cannot be shown again.
        #[arg(long)]
        generate: bool,
    },
    /// List tokens, without their secrets.
    List(DatabaseArgs),
    /// Revoke a token. The server refuses it within seconds.
    Revoke {
        /// The token's id, as `tokens list` shows it.
        id: String,
        /// The server's database.
        #[command(flatten)]
        database: DatabaseArgs,
    },
}

/// Location of a server's database.
#[derive(Debug, Args)]
pub struct DatabaseArgs {
    /// The server's data directory.
    #[arg(long, default_value = "bradley-data", env = "BRADLEY_DATA_DIR")]
    pub data_dir: PathBuf,
    /// The server's PostgreSQL database, if it uses one: postgres://…
    #[arg(long, env = "BRADLEY_DATABASE_URL", hide_env_values = true)]
    pub database_url: Option<String>,
}

/// Arguments of `backup`.
#[derive(Debug, Args)]
pub struct BackupArgs {
    /// Folder for the backup. It must be new or empty, and not in the data directory.
    pub dir: PathBuf,
    /// The server's database.
    #[command(flatten)]
    pub database: DatabaseArgs,
}

/// Arguments of `restore`.
#[derive(Debug, Args)]
pub struct RestoreArgs {
    /// Folder with the backup.
    #[arg(value_name = "BACKUP")]
    pub dir: PathBuf,
    /// Data directory to restore into. It must be new or empty.
    #[arg(long, default_value = "bradley-data", env = "BRADLEY_DATA_DIR")]
    pub data_dir: PathBuf,
}

/// Arguments of `migrate`.
#[derive(Debug, Args)]
pub struct MigrateArgs {
    /// The new PostgreSQL database, which must be empty: postgres://…
    #[arg(
        long,
        value_name = "URL",
        env = "BRADLEY_DATABASE_URL",
        hide_env_values = true,
        required_unless_present = "undo"
    )]
    pub to: Option<String>,
    /// Artifact store to which the files are copied: s3://BUCKET/PREFIX, gs://…, az://… or
    /// file:///FOLDER, configured by the variables of its vendor. Not needed if the server has one.
    #[arg(long, value_name = "URL", env = "BRADLEY_ARTIFACT_URL")]
    pub artifact_url: Option<String>,
    /// Copy nothing, but let servers start again on a SQLite database that was moved. First stop
    /// all servers of the PostgreSQL database for good.
    #[arg(long)]
    pub undo: bool,
    /// The server's data directory.
    #[arg(long, default_value = "bradley-data", env = "BRADLEY_DATA_DIR")]
    pub data_dir: PathBuf,
}

/// Flags of `serve`: one for each setting.
#[derive(Debug, Default)]
pub struct ServeArgs {
    /// A TOML file with settings.
    pub config: Option<PathBuf>,
    /// Values of the flags, by setting name.
    pub flags: BTreeMap<String, String>,
}

impl clap::FromArgMatches for ServeArgs {
    fn from_arg_matches(m: &clap::ArgMatches) -> Result<Self, clap::Error> {
        let mut flags = BTreeMap::new();
        for (name, ..) in SETTINGS {
            if let Some(values) = m.get_many::<String>(name) {
                flags.insert(
                    name.to_string(),
                    values.cloned().collect::<Vec<_>>().join(","),
                );
            }
        }
        Ok(ServeArgs {
            config: m.get_one::<PathBuf>("config").cloned(),
            flags,
        })
    }

    fn update_from_arg_matches(&mut self, m: &clap::ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(m)?;
        Ok(())
    }
}

impl Args for ServeArgs {
    fn augment_args(command: clap::Command) -> clap::Command {
        let config = clap::Arg::new("config")
            .long("config")
            .value_name("FILE")
            .value_parser(clap::value_parser!(PathBuf))
            .help("A TOML file with settings [env: BRADLEY_CONFIG]");
        SETTINGS
            .iter()
            .fold(command.arg(config), |command, (name, default, help)| {
                let default = if default.is_empty() {
                    String::new()
                } else {
                    format!(" [default: {default}]")
                };
                let action = if *name == "models" {
                    clap::ArgAction::Append
                } else {
                    clap::ArgAction::Set
                };
                let arg = clap::Arg::new(*name)
                    .long(name.replace('_', "-"))
                    .value_name("VALUE")
                    // The setting's own error says what is allowed.
                    .allow_negative_numbers(true)
                    .action(action);
                command.arg(arg.help(format!(
                    "{help}{default} [env: BRADLEY_{}]",
                    name.to_uppercase()
                )))
            })
    }

    fn augment_args_for_update(command: clap::Command) -> clap::Command {
        Self::augment_args(command)
    }
}

/// Address of a server unless another one is given.
pub const DEFAULT_SERVER: &str = "http://127.0.0.1:50051";

/// Address and credentials of the server.
#[derive(Clone, Debug, Args)]
pub struct ServerArgs {
    /// The server's address: http://HOST:PORT, or https://HOST:PORT with TLS.
    #[arg(long, default_value = DEFAULT_SERVER, env = "BRADLEY_SERVER")]
    pub server: String,
    /// A bearer token, for servers that require one.
    #[arg(long, env = "BRADLEY_TOKEN", hide_env_values = true)]
    pub token: Option<String>,
    /// PEM file of the authority that signed the server's certificate. Default: the system's
    /// authorities.
    #[arg(long, value_name = "FILE", env = "BRADLEY_TLS_SERVER_CA")]
    pub tls_server_ca: Option<PathBuf>,
    /// PEM file of the client's certificate, for servers that require one.
    #[arg(
        long,
        value_name = "FILE",
        requires = "tls_client_key",
        env = "BRADLEY_TLS_CLIENT_CERT"
    )]
    pub tls_client_cert: Option<PathBuf>,
    /// PEM file of the private key of the client's certificate.
    #[arg(
        long,
        value_name = "FILE",
        requires = "tls_client_cert",
        env = "BRADLEY_TLS_CLIENT_KEY"
    )]
    pub tls_client_key: Option<PathBuf>,
}

impl ServerArgs {
    /// Converts the arguments to the client's target.
    pub fn target(&self) -> Target {
        Target {
            address: self.server.clone(),
            token: self.token.clone(),
            tls_ca: self.tls_server_ca.clone(),
            tls_identity: self
                .tls_client_cert
                .clone()
                .zip(self.tls_client_key.clone()),
        }
    }
}

/// Arguments of `doctor`: those of `serve`, and a running server.
#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// The address of a running server to check, too, as http://HOST:PORT. Default: --server if it
    /// is given, or else the address of --listen.
    // The address of --server or of its variable is moved here, unless it is clap's default.
    #[arg(long)]
    pub address: Option<String>,
    /// Token and certificates for the running server.
    #[command(flatten)]
    pub server: ServerArgs,
    /// The settings to check.
    #[command(flatten)]
    pub serve: ServeArgs,
}

/// Arguments of `demo`.
#[derive(Debug, Args)]
pub struct DemoArgs {
    /// A folder, a GGUF file or a hub id. Default: SmolLM2-135M-Instruct, which is downloaded if it
    /// is not in the cache.
    #[arg(long)]
    pub model: Option<String>,
    /// Passes over the training pairs.
    #[arg(long, default_value_t = 2.0)]
    pub epochs: f64,
    /// Precision of matrix multiplications: f32 or bf16.
    #[arg(long, default_value = "f32")]
    pub precision: String,
    /// Devices to compute on: auto (every GPU, else the CPU), cpu, cuda:N, or several separated by
    /// commas.
    #[arg(long, default_value = "auto")]
    pub device: String,
    /// Folder for the job and the trained adapter. Default: a temporary one, which is deleted.
    #[arg(long)]
    pub data_dir: Option<PathBuf>,
}

/// How data files are read.
#[derive(Clone, Debug, Default, Args)]
pub struct DataArgs {
    /// Names of columns in the files, as OURS=THEIRS separated by commas:
    /// prompt=question,chosen=good,rejected=bad. OURS is prompt, chosen, rejected, weight, id,
    /// system, tools, chat_template_kwargs, question, or one of the columns of log-probs:
    /// ref_chosen_logps, ref_rejected_logps, chosen_logps, rejected_logps.
    #[arg(long, value_name = "OURS=THEIRS", value_delimiter = ',')]
    pub columns: Vec<String>,
}

const DATA_HELP: &str = "Formats are recognised by content: JSONL, a JSON array, CSV, Parquet and \
    Arrow, also compressed with gzip or zstd. A FILE may be a pattern such as 'part-*.jsonl', a \
    folder that save_to_disk() of Hugging Face's datasets wrote, \
    hf://datasets/OWNER/NAME[@REVISION][/CONFIG][/SPLIT], or - for standard input (not of curate, \
    which reads the rows several times).";

/// Arguments of `train`. [`JobFlags`] has those that set a field of the job.
#[derive(Debug, Args)]
#[command(after_help = TRAIN_HELP)]
pub struct TrainArgs {
    /// A job as YAML or JSON, with the fields of TrainingJob, e.g. from --print-job; - reads
    /// standard input. Flags override it.
    #[arg(short, long, value_name = "FILE")]
    pub file: Option<PathBuf>,
    /// Show the job's estimated cost in tokens, steps, memory and time, and create no job. The data
    /// is uploaded all the same.
    #[arg(long, conflicts_with_all = ["watch", "validate_only"])]
    pub estimate: bool,
    /// Check the job and create none. The data is uploaded all the same.
    #[arg(long)]
    pub validate_only: bool,
    /// Print the job as YAML, in the form that --file reads, and do nothing else.
    #[arg(long, conflicts_with_all = ["watch", "validate_only", "estimate"])]
    pub print_job: bool,
    /// Follow the job until it ends.
    #[arg(long)]
    pub watch: bool,
    /// Files of preference pairs to train on, as one dataset. They are uploaded, unless the server
    /// has their rows already.
    #[arg(
        long,
        value_name = "FILE",
        num_args = 1..,
        conflicts_with = "dataset",
        required_unless_present_any = ["dataset", "file", "print_job"],
        help_heading = "Data",
        long_help = format!(
            "Files of preference pairs to train on, as one dataset. They are uploaded, unless the \
             server has their rows already. {DATA_HELP}"
        )
    )]
    pub data: Vec<String>,
    /// Files of preference pairs to upload and evaluate on, in the formats of --data.
    #[arg(
        long,
        value_name = "FILE",
        num_args = 1..,
        conflicts_with_all = ["eval-fraction", "eval-dataset"],
        help_heading = "Data"
    )]
    pub eval_data: Vec<String>,
    /// How the files are read.
    #[command(flatten, next_help_heading = "Data")]
    pub reading: DataArgs,
    /// Flags that set the job's fields.
    #[command(flatten)]
    pub job: JobFlags,
    /// Days that the job is stored after its end.
    #[arg(long, value_name = "DAYS", hide = true, conflicts_with = "ttl",
          value_parser = whole_from::<0>)]
    pub ttl_days: Option<u32>,
    /// The server to connect to.
    #[command(flatten, next_help_heading = "Connection")]
    pub server: ServerArgs,
}

const TRAIN_HELP: &str = "\
Sweeps: a number, a choice, a loss or a policy may have several values, as in \
--beta 0.05,0.1 --seed 1,2 (a loss or a policy by giving its flag again). There is a job for each \
combination, at most 64, with the values as labels. --validate-only checks them all.

Examples:
  bradley train --data pairs.jsonl --eval-fraction 0.1 --watch
  bradley train --data pairs.jsonl --loss ipo --beta 0.05,0.1 --label run=a
  bradley train --data pairs.jsonl --rank 32 --use-rslora --print-job > job.yaml
  bradley train -f job.yaml --data pairs.jsonl --seed 7";

/// Arguments of `watch`.
#[derive(Debug, Args)]
pub struct WatchArgs {
    /// The server to connect to.
    #[command(flatten)]
    pub server: ServerArgs,
    /// The job: trainingJobs/ID, ID, the beginning of an ID, or @last.
    pub job: String,
    /// Show only events after this sequence number.
    #[arg(long, default_value_t = 0, value_parser = whole_number)]
    pub after: u64,
    /// Show only the newest N events and those that follow.
    #[arg(long, value_name = "N", conflicts_with = "after",
          value_parser = whole_from::<1>)]
    pub tail: Option<u32>,
}

/// The time for which `generate`, `pairs`, `rounds`, `curate` and `score` repeat calls.
#[derive(Clone, Debug, Args)]
pub struct RetryArgs {
    /// Time in seconds for which calls are repeated while the server is busy or not reached.
    #[arg(
        long,
        value_name = "SECONDS",
        default_value_t = 600,
        help_heading = "Connection",
        value_parser = whole_number
    )]
    pub retry_timeout: u64,
}

/// Arguments of `generate`.
#[derive(Debug, Args)]
#[command(mut_arg("retry_timeout", |timeout| timeout.help(RETRIES_OF_PROMPTS)))]
pub struct GenerateArgs {
    /// The server to connect to.
    #[command(flatten, next_help_heading = "Connection")]
    pub server: ServerArgs,
    /// The prompt: the message of a user, or with `--plain` a text.
    #[arg(
        long,
        value_name = "TEXT",
        help_heading = "Prompts",
        conflicts_with = "data",
        required_unless_present = "data"
    )]
    pub prompt: Option<String>,
    /// Files of prompts: each row has a column prompt with a text or a list of messages.
    #[arg(
        long,
        value_name = "FILE",
        num_args = 1..,
        help_heading = "Prompts",
        long_help = format!(
            "Files of prompts: each row has a column prompt with a text or a list of messages. \
             {DATA_HELP}"
        )
    )]
    pub data: Vec<String>,
    /// How the files are read.
    #[command(flatten, next_help_heading = "Prompts")]
    pub reading: DataArgs,
    /// The file for the results: the rows of `--data`, each with its samples. It is FILE.part until
    /// it is complete. Default: standard output. Not with --prompt.
    #[arg(long, value_name = "FILE", help_heading = "Prompts", requires = "data")]
    pub out: Option<PathBuf>,
    /// The time for which calls are repeated.
    #[command(flatten)]
    pub retries: RetryArgs,
    /// The form of the prompts.
    #[command(flatten)]
    pub form: PromptFormArgs,
    /// The policy: a base model's name, a job (its latest checkpoint), or
    /// JOB/checkpoints/STEP|latest|best.
    #[arg(long, help_heading = "Sampling")]
    pub policy: String,
    /// Number of samples of each prompt.
    #[arg(long, default_value_t = 1, help_heading = "Sampling",
          value_parser = whole_from::<1>)]
    pub samples: u32,
    /// The way in which tokens are chosen.
    #[command(flatten)]
    pub sampling: SamplingArgs,
}

const RETRIES_OF_PROMPTS: &str = "Time in seconds for which prompts of --data are sent again while \
    the server is busy or not reached";

/// The form of the prompts of `generate`, `chat`, `pairs` and `rounds`.
#[derive(Clone, Debug, Args)]
pub struct PromptFormArgs {
    /// The prompts are plain texts, which no chat template renders.
    #[arg(
        long,
        help_heading = "Prompts",
        conflicts_with_all = ["system", "template_args", "tools"]
    )]
    pub plain: bool,
    /// A system message before the prompt.
    #[arg(long, value_name = "TEXT", help_heading = "Prompts")]
    pub system: Option<String>,
    /// Variables for the chat template, as a JSON object: {"enable_thinking": false}.
    #[arg(long, value_name = "JSON", help_heading = "Prompts")]
    pub template_args: Option<String>,
    /// A file with a JSON array of tools.
    #[arg(long, value_name = "FILE", help_heading = "Prompts")]
    pub tools: Option<PathBuf>,
}

/// The way in which `generate`, `chat`, `pairs` and `rounds` choose tokens.
#[derive(Clone, Debug, Args)]
pub struct SamplingArgs {
    /// Maximum number of tokens of each sample.
    #[arg(long, default_value_t = 256, help_heading = "Sampling",
          value_parser = whole_from::<1>)]
    pub max_tokens: u32,
    /// Temperature; 0 always takes the most likely token. Default: 1.
    #[arg(long, allow_negative_numbers = true, help_heading = "Sampling")]
    pub temperature: Option<f64>,
    /// Samples from the most likely tokens whose probabilities add up to this. --top-k comes first:
    /// this is then a share of the probability of its tokens.
    #[arg(long, allow_negative_numbers = true, help_heading = "Sampling")]
    pub top_p: Option<f64>,
    /// Samples from this many of the most likely tokens.
    #[arg(long, help_heading = "Sampling", value_parser = whole_from::<0>)]
    pub top_k: Option<u32>,
    /// Seed of the random numbers; row N, counted through all files, has the seed + N − 1.
    /// Default: random.
    #[arg(long, help_heading = "Sampling", value_parser = whole_number)]
    pub seed: Option<u64>,
    /// A text that ends a sample; may be given several times.
    #[arg(long, value_name = "TEXT", help_heading = "Sampling")]
    pub stop: Vec<String>,
    /// Continue after the model's end-of-sequence tokens.
    #[arg(long, help_heading = "Sampling")]
    pub ignore_eos: bool,
}

/// Arguments of `chat`.
#[derive(Debug, Args)]
#[command(after_help = CHAT_HELP)]
#[command(mut_arg("plain", |plain| plain.hide(true)))]
#[command(mut_arg("seed", |seed| seed.help(CHAT_SEED)))]
pub struct ChatArgs {
    /// The server to connect to.
    #[command(flatten, next_help_heading = "Connection")]
    pub server: ServerArgs,
    /// The form of the messages.
    #[command(flatten)]
    pub form: PromptFormArgs,
    /// The policy: a base model's name, a job (its latest checkpoint), or
    /// JOB/checkpoints/STEP|latest|best.
    #[arg(long, help_heading = "Sampling")]
    pub policy: String,
    /// A policy that answers the same messages with the same seeds beside the other, named as
    /// --policy is. The conversation goes on with the answers of --policy, on the left.
    #[arg(long, value_name = "POLICY", help_heading = "Sampling")]
    pub beside: Option<String>,
    /// The way in which tokens are chosen.
    #[command(flatten)]
    pub sampling: SamplingArgs,
}

const CHAT_SEED: &str = "Seed of the random numbers; answer N of the conversation has the seed \
    + N − 1. Default: random";

const CHAT_HELP: &str = "\
Every line of standard input is a message, and the whole conversation is sent with each. If it is \
too long for the server, its oldest turns are left out, and a note names them. /help lists the \
commands: /reset, /system TEXT, /retry, /seed N, /save FILE and /quit. At a terminal, Ctrl-C stops \
an answer.

Examples:
  bradley chat --policy JOB --beside models/smollm2 --temperature 0.7
  bradley chat --policy smollm2 --system \"Answer in one sentence.\" --seed 1 < questions.txt";

/// Default of `--min-margin`.
pub const DEFAULT_MIN_MARGIN: f64 = 0.1;

/// The prompts and the settings with which `pairs` and `rounds` make pairs.
#[derive(Clone, Debug, Args)]
pub struct PairMakingArgs {
    /// Files of prompts: each row has a column prompt with a text or a list of messages.
    #[arg(
        long,
        visible_alias = "prompts",
        value_name = "FILE",
        num_args = 1..,
        required = true,
        help_heading = "Prompts",
        long_help = format!(
            "Files of prompts: each row has a column prompt with a text or a list of messages. \
             {DATA_HELP}"
        )
    )]
    pub data: Vec<String>,
    /// How the files are read.
    #[command(flatten, next_help_heading = "Prompts")]
    pub reading: DataArgs,
    /// The form of the prompts.
    #[command(flatten)]
    pub form: PromptFormArgs,
    /// The policy that answers: a base model's name, a job (its latest checkpoint), or
    /// JOB/checkpoints/STEP|latest|best.
    #[arg(long, help_heading = "Sampling")]
    pub policy: String,
    /// Number of samples of each prompt.
    #[arg(long, default_value_t = 8, help_heading = "Sampling",
          value_parser = clap::value_parser!(u32).range(2..=64))]
    pub samples: u32,
    /// The way in which tokens are chosen.
    #[command(flatten)]
    pub sampling: SamplingArgs,
    /// Also use samples that --max-tokens has cut off.
    #[arg(long, help_heading = "Ranking")]
    pub keep_cut: bool,
    /// The policy whose rewards rank the samples, named as --policy is. Default: --policy.
    #[arg(long, value_name = "POLICY", help_heading = "Ranking")]
    pub judge: Option<String>,
    /// The reference of the judge, named as --policy is. Default: that of the judge's job; a base
    /// model is its own, so that all its rewards are 0.
    #[arg(long, help_heading = "Ranking")]
    pub reference: Option<String>,
    /// β of the rewards. Default: that of the judge's job, or 0.1 for a base model.
    #[arg(long, allow_negative_numbers = true, help_heading = "Ranking")]
    pub beta: Option<f64>,
    /// Maximum number of tokens of prompt + answer. Default: that of the judge's job, or 1024.
    #[arg(long, help_heading = "Ranking", value_parser = whole_from::<0>)]
    pub max_length: Option<u32>,
    /// Taken off the reward for each token of a sample, against a preference for long ones.
    #[arg(
        long,
        value_name = "REWARD",
        default_value_t = 0.0,
        allow_negative_numbers = true,
        help_heading = "Ranking",
        value_parser = finite_from_zero
    )]
    pub length_penalty: f64,
    /// Minimum difference between the best and the worst reward. Prompts below it have no pair.
    #[arg(
        long,
        value_name = "REWARD",
        default_value_t = DEFAULT_MIN_MARGIN,
        allow_negative_numbers = true,
        help_heading = "Ranking",
        value_parser = finite_from_zero
    )]
    pub min_margin: f64,
}

/// Arguments of `pairs`.
#[derive(Debug, Args)]
#[command(after_help = PAIRS_HELP)]
pub struct PairsArgs {
    /// The server to connect to.
    #[command(flatten, next_help_heading = "Connection")]
    pub server: ServerArgs,
    /// Prompts, policies and settings.
    #[command(flatten)]
    pub making: PairMakingArgs,
    /// The JSONL file to write: a pair for each prompt that has one. An existing file is not
    /// replaced.
    #[arg(long, value_name = "FILE", help_heading = "Prompts")]
    pub out: PathBuf,
    /// The time for which calls are repeated.
    #[command(flatten)]
    pub retries: RetryArgs,
}

/// Arguments of `rounds`.
#[derive(Debug, Args)]
#[command(after_help = ROUNDS_HELP)]
#[command(mut_arg("policy", |policy| policy.help(FIRST_POLICY)))]
#[command(mut_arg("judge", |judge| judge.help(JUDGE_OF_ROUNDS)))]
#[command(mut_arg("retry_timeout", |timeout| timeout.help(RETRIES_OF_ROUNDS)))]
#[command(mut_arg("seed", |seed| seed.help(SEED_OF_ROUNDS)))]
pub struct RoundsArgs {
    /// The server to connect to.
    #[command(flatten, next_help_heading = "Connection")]
    pub server: ServerArgs,
    /// Prompts, policies and settings of the pairs.
    #[command(flatten)]
    pub making: PairMakingArgs,
    /// Number of rounds in all. A larger number continues a run that has ended.
    #[arg(long, value_name = "N", default_value_t = 2, help_heading = "Rounds",
          value_parser = clap::value_parser!(u32).range(1..=100))]
    pub rounds: u32,
    /// The folder for the pairs and the reports of all rounds.
    #[arg(long, value_name = "DIR", help_heading = "Rounds")]
    pub out: PathBuf,
    /// Settings of the training as YAML or JSON, with the fields of TrainingJob, e.g. from bradley
    /// train --print-job; - reads standard input.
    #[arg(short, long, value_name = "FILE", help_heading = "Rounds")]
    pub file: Option<PathBuf>,
    /// Files of preference pairs on which each new policy is evaluated, in the formats of --data,
    /// but not standard input.
    #[arg(long, value_name = "FILE", num_args = 1.., help_heading = "Rounds")]
    pub eval_data: Vec<String>,
    /// Names of columns in the files of --eval-data, as --columns has them for those of --data.
    #[arg(
        long,
        value_name = "OURS=THEIRS",
        value_delimiter = ',',
        requires = "eval_data",
        help_heading = "Rounds"
    )]
    pub eval_columns: Vec<String>,
    /// Number of prompts, the first ones, whose answers are compared before and after each round.
    #[arg(long, value_name = "N", default_value_t = 32, help_heading = "Rounds",
          value_parser = whole_from::<1>)]
    pub compare_prompts: u32,
    /// The time for which calls are repeated.
    #[command(flatten)]
    pub retries: RetryArgs,
}

const RETRIES_OF_ROUNDS: &str = "Time in seconds for which calls about a prompt are repeated while \
    the server is busy or not reached";

const FIRST_POLICY: &str = "The policy of the first round, which answers and is trained further: a \
    base model's name, a job (its latest checkpoint), or JOB/checkpoints/STEP|latest|best";

const JUDGE_OF_ROUNDS: &str = "The policy whose rewards rank the samples of all rounds, named as \
    --policy is. Default: the policy of each round";

const SEED_OF_ROUNDS: &str = "Seed of the random numbers; row N has the seed + N − 1 in the \
    first round, and each later round has the seeds after those. Default: random";

/// Parses a finite number that is not negative.
fn finite_from_zero(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(x) if x.is_finite() && x >= 0.0 => Ok(x),
        _ => Err("it must be a number, at least 0".to_owned()),
    }
}

const PAIRS_HELP: &str = "\
Each prompt gets samples of the policy. The judge's rewards, β·log[π_θ(y|x)/π_ref(y|x)], rank \
those that differ, and the best and the worst become a pair. The same command continues after an \
interruption: FILE.progress has what is done.

Examples:
  bradley pairs --data prompts.jsonl --policy smollm2 --judge JOB --out pairs.jsonl --seed 1
  bradley pairs --data prompts.jsonl --policy JOB --length-penalty 0.01 --out pairs.jsonl";

const ROUNDS_HELP: &str = "\
Each round makes pairs as bradley pairs does, trains the round's policy on them, and compares its \
answers with those of the new policy, which is the policy of the next round. The same command \
continues after an interruption: DIR has what is done.

Examples:
  bradley rounds --data prompts.jsonl --policy smollm2 --judge JOB --out rounds
  bradley rounds --data prompts.jsonl --policy JOB --reference smollm2 -f job.yaml --out rounds";

/// Arguments of `score`.
#[derive(Debug, Args)]
#[command(mut_arg("retry_timeout", |timeout| {
    timeout.help(RETRIES_OF_SCORES).help_heading(None::<&'static str>)
}))]
pub struct ScoreArgs {
    /// The server to connect to.
    #[command(flatten)]
    pub server: ServerArgs,
    /// Files of pairs. chosen is answer a, rejected is answer b.
    #[arg(
        long,
        value_name = "FILE",
        num_args = 1..,
        required = true,
        long_help = format!("Files of pairs. chosen is answer a, rejected is answer b. {DATA_HELP}")
    )]
    pub data: Vec<String>,
    /// How the files are read.
    #[command(flatten)]
    pub reading: DataArgs,
    /// Succeed although some rows cannot be read or scored, e.g. because they are too long. They
    /// have an error in place of a score with and without this flag. If no row has a score, the
    /// command fails all the same.
    #[arg(long)]
    pub skip_bad_rows: bool,
    /// Policy, reference and options of the rewards.
    #[command(flatten)]
    pub scoring: ScoringArgs,
    /// Also print the token ids and log-probs of every answer's tokens. Only in JSON and YAML.
    #[arg(long)]
    pub per_token_logprobs: bool,
    /// Use log-probs that the rows have: those of the reference (ref_chosen_logps and
    /// ref_rejected_logps), or those of both models (chosen_logps and rejected_logps, too), so that
    /// rows are scored without any model, if rewards are sums over tokens. Every row must have
    /// them.
    #[arg(long, value_enum)]
    pub logged: Option<LoggedColumns>,
    /// The time for which calls are repeated.
    #[command(flatten)]
    pub retries: RetryArgs,
}

const RETRIES_OF_SCORES: &str = "Time in seconds for which rows are sent again while the server \
    has no room for any of them";

/// The log-probs of rows that `score` and `score-files` use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum LoggedColumns {
    /// The reference's: ref_chosen_logps and ref_rejected_logps.
    Reference,
    /// The reference's and the policy's: chosen_logps and rejected_logps, too.
    Both,
}

impl LoggedColumns {
    /// Returns the value of `--logged`.
    pub fn name(self) -> &'static str {
        match self {
            LoggedColumns::Reference => "reference",
            LoggedColumns::Both => "both",
        }
    }
}

/// Format of the parts that `score-files` writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum PartFormat {
    /// Parquet with zstd.
    Parquet,
    /// One JSON object a line.
    Jsonl,
}

impl PartFormat {
    /// Returns the ending of the parts' names.
    pub fn ending(self) -> &'static str {
        match self {
            PartFormat::Parquet => "parquet",
            PartFormat::Jsonl => "jsonl",
        }
    }
}

/// Addresses and credentials of the servers that `score-files` uses.
#[derive(Clone, Debug, Args)]
pub struct FleetArgs {
    /// A server's address: http://HOST:PORT, https://HOST:PORT with TLS, or dns:///HOST:PORT for
    /// every address that the name has, e.g. of a headless Service. Several with commas between, or
    /// with the flag repeated.
    #[arg(
        long = "server",
        value_delimiter = ',',
        default_value = DEFAULT_SERVER,
        env = "BRADLEY_SERVER"
    )]
    pub servers: Vec<String>,
    /// Number of connections to each address. One address may stand for several servers.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u8).range(1..=64))]
    pub connections: u8,
    /// Time in seconds for which calls and refused rows are sent again while no row gets a result.
    #[arg(long, value_name = "SECONDS", default_value_t = 600, value_parser = whole_number)]
    pub retry_timeout: u64,
    /// Time in seconds to wait for a first server, for jobs that start together with the servers.
    #[arg(long, value_name = "SECONDS", default_value_t = 0, value_parser = whole_number)]
    pub wait_for_server: u64,
    /// A bearer token, for servers that require one.
    #[arg(long, env = "BRADLEY_TOKEN", hide_env_values = true)]
    pub token: Option<String>,
    /// PEM file of the authority that signed the server's certificate. Default: the system's
    /// authorities. With dns:/// it also turns on TLS.
    #[arg(long, value_name = "FILE", env = "BRADLEY_TLS_SERVER_CA")]
    pub tls_server_ca: Option<PathBuf>,
    /// PEM file of the client's certificate, for servers that require one.
    #[arg(
        long,
        value_name = "FILE",
        requires = "tls_client_key",
        env = "BRADLEY_TLS_CLIENT_CERT"
    )]
    pub tls_client_cert: Option<PathBuf>,
    /// PEM file of the private key of the client's certificate.
    #[arg(
        long,
        value_name = "FILE",
        requires = "tls_client_cert",
        env = "BRADLEY_TLS_CLIENT_KEY"
    )]
    pub tls_client_key: Option<PathBuf>,
}

impl FleetArgs {
    /// Returns the client's target for one address.
    pub fn target(&self, address: &str) -> Target {
        Target {
            address: address.to_owned(),
            token: self.token.clone(),
            tls_ca: self.tls_server_ca.clone(),
            tls_identity: self
                .tls_client_cert
                .clone()
                .zip(self.tls_client_key.clone()),
        }
    }
}

/// Arguments of `score-files`.
#[derive(Debug, Args)]
#[command(after_help = SCORE_FILES_HELP)]
#[command(mut_arg("policy", |policy| policy.help(SETTLED_POLICY)))]
pub struct ScoreFilesArgs {
    /// Files of pairs, JSONL (also .gz and .zst) or Parquet: a path, a pattern such as
    /// 'pairs/**/*.parquet', or a URL of s3://, gs:// or az://, also with a pattern. A URL that
    /// ends with / means every object below it.
    #[arg(long = "in", value_name = "GLOB|URL", num_args = 1.., required = true)]
    pub inputs: Vec<String>,
    /// Folder or URL for the parts.
    #[arg(long, value_name = "DIR|URL")]
    pub out: String,
    /// Policy, reference and options of the rewards.
    #[command(flatten)]
    pub scoring: ScoringArgs,
    /// How the inputs are read.
    #[command(flatten)]
    pub reading: DataArgs,
    /// Use log-probs that the rows have: those of the reference (ref_chosen_logps and
    /// ref_rejected_logps), or those of both models (chosen_logps and rejected_logps, too), so that
    /// no model computes the rows, if rewards are sums over tokens. A row without them, or with
    /// several answers, has an error.
    #[arg(long, value_enum)]
    pub logged: Option<LoggedColumns>,
    /// Columns of the input to copy into the output, separated by commas. In Parquet they are text.
    #[arg(long, value_name = "COL,COL", value_delimiter = ',')]
    pub carry: Vec<String>,
    /// Number of rows of a part.
    #[arg(
        long,
        default_value_t = 8192,
        value_parser = clap::value_parser!(u32).range(1..=1_000_000)
    )]
    pub part_rows: u32,
    /// Do shard I of N only, I from 0. Default: JOB_COMPLETION_INDEX of a Kubernetes Job with
    /// --shards or JOB_COMPLETIONS, else SLURM_ARRAY_TASK_ID of a Slurm array, else everything.
    #[arg(long, value_name = "I/N")]
    pub shard: Option<String>,
    /// Number of shards, if the environment names only the index of this one.
    #[arg(long, value_name = "N", conflicts_with = "shard", value_parser = whole_from::<0>)]
    pub shards: Option<u32>,
    /// Format of the parts; --format parquet and --format jsonl mean the same.
    #[arg(long, value_enum, default_value = "parquet")]
    pub out_format: PartFormat,
    /// The servers that score.
    #[command(flatten)]
    pub fleet: FleetArgs,
    /// Models to load into this process, which then scores without a server: [ID=]SOURCE, separated
    /// by commas. A SOURCE is a folder, a GGUF file or a hub id.
    #[arg(long, value_name = "[ID=]SOURCE", value_delimiter = ',')]
    pub models: Vec<String>,
    /// With --models: devices to compute on: auto (every GPU, else the CPU), cpu, cuda:N, or
    /// several separated by commas.
    #[arg(long, default_value = "auto")]
    pub device: String,
    /// With --models: precision of matrix multiplications: f32 or bf16.
    #[arg(long, default_value = "f32")]
    pub precision: String,
    /// With --models: number of CPU threads for compute; 0 means all cores.
    #[arg(long, default_value_t = 0, value_parser = whole_size)]
    pub threads: usize,
}

const SETTLED_POLICY: &str = "The policy: a base model's name, a job that has ended (its latest \
    checkpoint), or JOB/checkpoints/STEP|latest|best";

const SCORE_FILES_HELP: &str = "Every part is written once, under a name that depends on its rows, \
    the weights and the options. A command that was interrupted in any way is simply run again: it \
    continues with the parts that are missing. The last shard that ends writes _manifest.json.\n\n\
    Exit codes: as for the other commands. A row that cannot be scored has the reason in its \
    column error and does not change the exit code.";

/// Arguments of `evaluate`.
#[derive(Debug, Args)]
pub struct EvaluateArgs {
    /// The server to connect to.
    #[command(flatten, next_help_heading = "Connection")]
    pub server: ServerArgs,
    /// Files of pairs. They are uploaded, unless the server has their rows already, and an upload
    /// is deleted in the end.
    #[arg(
        long,
        value_name = "FILE",
        num_args = 1..,
        conflicts_with = "dataset",
        required_unless_present = "dataset",
        help_heading = "Data",
        long_help = format!(
            "Files of pairs. They are uploaded, unless the server has their rows already, and an \
             upload is deleted in the end. {DATA_HELP}"
        )
    )]
    pub data: Vec<String>,
    /// A dataset on the server: datasets/ID, ID, the beginning of an ID, or @last.
    #[arg(long, help_heading = "Data")]
    pub dataset: Option<String>,
    /// How the files are read.
    #[command(flatten, next_help_heading = "Data")]
    pub reading: DataArgs,
    /// A column by whose values the accuracy is shown separately.
    #[arg(long, value_name = "COLUMN", help_heading = "Data")]
    pub subset_column: Option<String>,
    /// Two columns with the scores that somebody has given to the chosen and to the rejected
    /// answer, with which the margins are compared. Default: score_chosen,score_rejected.
    #[arg(long, value_name = "CHOSEN,REJECTED", help_heading = "Data")]
    pub score_columns: Option<String>,
    /// Succeed although some rows cannot be read or scored. They are in no figure with and without
    /// this flag. If no row has a score, the command fails all the same.
    #[arg(long, help_heading = "Data")]
    pub skip_bad_rows: bool,
    /// Policy, reference and options of the rewards.
    #[command(flatten, next_help_heading = "Scoring")]
    pub scoring: ScoringArgs,
    /// Number of bins of the reliability diagram and of the ECE.
    #[arg(long, default_value_t = 15, value_parser = clap::value_parser!(u32).range(1..=100),
          help_heading = "Report")]
    pub bins: u32,
    /// Store the calibration with the policy's checkpoint. Scores with the same checkpoint,
    /// reference, β and normalization then have a calibrated probability beside Pr.
    #[arg(long, help_heading = "Report")]
    pub save_calibration: bool,
    /// Folder for the reliability diagram and the histogram of margins, as SVG.
    #[arg(long, value_name = "FOLDER", help_heading = "Report")]
    pub plots: Option<PathBuf>,
}

/// `bradley jobs …`
#[derive(Debug, Subcommand)]
pub enum JobsCommand {
    /// List jobs, newest first.
    List(ListJobsArgs),
    /// Show one job.
    Get(GetArgs),
    /// Compare the settings and the contents of two jobs.
    Diff(DiffArgs),
    /// Print the metrics of a job, one row for each logged step.
    Metrics(MetricsArgs),
    /// Change a job's title, labels or priority.
    Update(UpdateArgs),
    /// Pause a job. A running job writes a checkpoint first.
    Pause(NamedArgs),
    /// Follow a job's events until it ends.
    Watch(WatchArgs),
    /// Resume a paused job. A job that waits for a missing input tries again at once.
    Resume(NamedArgs),
    /// Cancel jobs. Their checkpoints stay.
    Cancel(CancelArgs),
    /// Delete an ended job with its events and checkpoints.
    Delete(NamedArgs),
}

/// Arguments of `jobs update`.
#[derive(Debug, Args)]
pub struct UpdateArgs {
    /// The job.
    #[command(flatten)]
    pub named: NamedArgs,
    /// A new title.
    #[arg(long, alias = "name")]
    pub title: Option<String>,
    /// A new priority: higher goes first.
    #[arg(long, allow_negative_numbers = true)]
    pub priority: Option<i32>,
    /// A label as KEY=VALUE; may be given several times. The given labels replace all others.
    #[arg(long, value_parser = label)]
    pub label: Vec<(String, String)>,
    /// Fail if the job has changed since it had this etag.
    #[arg(long, default_value = "")]
    pub etag: String,
}

/// Arguments of `jobs cancel`.
#[derive(Debug, Args)]
pub struct CancelArgs {
    /// The server to connect to.
    #[command(flatten)]
    pub server: ServerArgs,
    /// The jobs, each named as for `jobs get`.
    #[arg(value_name = "NAME", required = true)]
    pub names: Vec<String>,
}

fn label(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("a label is KEY=VALUE")?;
    Ok((key.to_owned(), value.to_owned()))
}

/// `bradley datasets …`
#[derive(Debug, Subcommand)]
pub enum DatasetsCommand {
    /// Upload files as one dataset and show the findings of its validation.
    Upload(UploadArgs),
    /// List datasets, newest first.
    List(ServerArgs),
    /// Show one dataset with its findings.
    Get(GetArgs),
    /// Delete a dataset.
    Delete(NamedArgs),
}

/// `bradley checkpoints …`
#[derive(Debug, Subcommand)]
pub enum CheckpointsCommand {
    /// List a job's checkpoints.
    List(NamedArgs),
    /// Show one checkpoint with its metrics.
    Get(GetArgs),
    /// Download a checkpoint's files.
    Download(DownloadArgs),
    /// Export a checkpoint into the server's data directory or artifact store, and print the
    /// export's folder, relative to that place.
    Export(ExportArgs),
    /// Delete a checkpoint.
    Delete(NamedArgs),
}

/// `bradley models …`
#[derive(Debug, Subcommand)]
pub enum ModelsCommand {
    /// List the models.
    List(ServerArgs),
    /// Show one model.
    Get(GetArgs),
}

/// Arguments of `usage`.
#[derive(Debug, Args)]
pub struct UsageArgs {
    /// The server to connect to.
    #[command(flatten)]
    pub server: ServerArgs,
    /// Only the work of this owner. Default: yours, for administrators that of all owners.
    #[arg(long)]
    pub owner: Option<String>,
    /// First day (UTC), YYYY-MM-DD. Default: the first day of the month of --to.
    #[arg(long)]
    pub from: Option<String>,
    /// Last day (UTC), YYYY-MM-DD. Default: today.
    #[arg(long)]
    pub to: Option<String>,
    /// Show each day.
    #[arg(long)]
    pub by_day: bool,
}

/// A resource on a server.
#[derive(Debug, Args)]
pub struct NamedArgs {
    /// The server to connect to.
    #[command(flatten)]
    pub server: ServerArgs,
    /// The resource's name. The prefix, such as trainingJobs/, may be left out. The beginning of an
    /// ID, at least 4 characters, suffices if no other ID begins so. @last is your own newest job
    /// or dataset. A checkpoint is JOB/checkpoints/STEP; STEP may be latest or best, but not in a
    /// deletion.
    pub name: String,
}

/// A resource that is shown.
#[derive(Debug, Args)]
pub struct GetArgs {
    /// The resource.
    #[command(flatten)]
    pub named: NamedArgs,
    /// Show fields without a value, too. A table still leaves out those that are empty.
    #[arg(long)]
    pub all: bool,
}

/// Arguments of `jobs list`.
#[derive(Debug, Args)]
pub struct ListJobsArgs {
    /// The server to connect to.
    #[command(flatten)]
    pub server: ServerArgs,
    /// Columns, separated by commas: name, state, steps, policy, title, created, or any field of a
    /// job, such as beta, dpo.losses, batch.batch_size, latest_metrics.loss or labels.KEY.
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    pub columns: Vec<String>,
    /// Only jobs in one of these states, separated by commas.
    #[arg(
        long,
        value_name = "STATES",
        value_delimiter = ',',
        value_parser = JOB_STATES
    )]
    pub state: Vec<String>,
    /// Only jobs with this label, KEY=VALUE; may be given several times, for jobs with all of them.
    #[arg(long, value_parser = label)]
    pub label: Vec<(String, String)>,
    /// Only the newest N jobs, of those that the other flags choose. Default: all.
    #[arg(long, value_name = "N", value_parser = whole_from::<1>)]
    pub limit: Option<u32>,
}

/// States of jobs, as the lists show them.
pub const JOB_STATES: [&str; 9] = [
    "queued",
    "preparing",
    "running",
    "pausing",
    "paused",
    "cancelling",
    "cancelled",
    "succeeded",
    "failed",
];

/// Arguments of `jobs diff`.
#[derive(Debug, Args)]
pub struct DiffArgs {
    /// The server to connect to.
    #[command(flatten)]
    pub server: ServerArgs,
    /// A job, as for `jobs get`.
    pub a: String,
    /// The job to compare it with.
    pub b: String,
    /// Compare every field, also names, states, times and metrics.
    #[arg(long)]
    pub all: bool,
}

/// Arguments of `jobs metrics`.
#[derive(Debug, Args)]
pub struct MetricsArgs {
    /// The job.
    #[command(flatten)]
    pub named: NamedArgs,
    /// A file to write to instead of standard output. Its extension is the format unless --format
    /// is given: .csv, .json, .yaml or .yml; any other is the format of BRADLEY_OUTPUT, or CSV.
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
    /// True if the format of the results was typed, i.e. is not from its variable or the default.
    #[arg(skip)]
    pub is_format_given: bool,
    /// Use only events after this sequence number, for jobs whose first events have been deleted.
    #[arg(long, default_value_t = 0, value_parser = whole_number)]
    pub after: u64,
}

/// Arguments of `datasets upload`.
#[derive(Debug, Args)]
pub struct UploadArgs {
    /// The server to connect to.
    #[command(flatten)]
    pub server: ServerArgs,
    /// The files.
    #[arg(
        value_name = "FILE",
        required = true,
        long_help = format!("The files. {DATA_HELP}")
    )]
    pub files: Vec<String>,
    /// How the files are read.
    #[command(flatten)]
    pub reading: DataArgs,
    /// Title of the dataset. Default: the file's name.
    #[arg(long, alias = "name")]
    pub title: Option<String>,
    /// Check lengths, too, with the tokenizer of this model: models/ID or ID.
    #[arg(long, default_value = "")]
    pub model: String,
    /// Maximum number of tokens of prompt + answer, for the check with --model.
    #[arg(long, default_value_t = 1024, value_parser = whole_from::<0>)]
    pub max_length: u32,
}

/// Contents of an export.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ContentsFlag {
    /// An adapter for LoRA jobs, merged weights for full fine-tunes.
    Auto,
    /// A PEFT adapter.
    Adapter,
    /// The full weights, as transformers loads them.
    Merged,
}

/// Arguments of `checkpoints export`.
#[derive(Debug, Args)]
pub struct ExportArgs {
    /// The checkpoint.
    #[command(flatten)]
    pub named: NamedArgs,
    /// Contents of the export.
    #[arg(long, value_enum, default_value_t = ContentsFlag::Auto)]
    pub contents: ContentsFlag,
    /// Element type of merged weights: f32, bf16 or f16. Default: the type in the base model's
    /// files, or f16 if these are quantised.
    #[arg(long, default_value = "")]
    pub dtype: String,
}

/// Arguments of `checkpoints download`.
#[derive(Debug, Args)]
pub struct DownloadArgs {
    /// The checkpoint.
    #[command(flatten)]
    pub named: NamedArgs,
    /// Contents of the download.
    #[arg(long, value_enum, default_value_t = ContentsFlag::Auto)]
    pub contents: ContentsFlag,
    /// Element type of merged weights: f32, bf16 or f16. Default: the type in the base model's
    /// files, or f16 if these are quantised.
    #[arg(long, default_value = "")]
    pub dtype: String,
    /// The folder to write to. It must be new or empty.
    #[arg(long)]
    pub out: PathBuf,
}

/// Arguments of `curate`.
#[derive(Debug, Args)]
#[command(after_help = CURATE_HELP)]
pub struct CurateArgs {
    /// Files of preference pairs.
    #[arg(
        long,
        value_name = "FILE",
        num_args = 1..,
        required = true,
        long_help = format!("Files of preference pairs. {DATA_HELP}")
    )]
    pub data: Vec<String>,
    /// How the files are read.
    #[command(flatten)]
    pub reading: DataArgs,
    /// The JSONL file to write: every row in order, with its own columns and the results.
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
    /// A JSON file for the report.
    #[arg(long, value_name = "FILE")]
    pub report: Option<PathBuf>,
    /// Number of folds into which the rows are divided. For each fold, an adapter is trained on the
    /// others.
    #[arg(long, value_name = "N", default_value_t = 5,
          value_parser = clap::value_parser!(u32).range(2..=100))]
    pub folds: u32,
    /// Seed of the division into folds and of the training.
    #[arg(long, value_name = "N", default_value_t = 42, value_parser = whole_number)]
    pub seed: u64,
    /// Probability from which a row agrees with the other rows. Rows between this and
    /// --flipped-below are doubtful.
    #[arg(long, value_name = "PROBABILITY", default_value_t = 0.6)]
    pub agrees_from: f64,
    /// Probability below which the label of a row is probably flipped.
    #[arg(long, value_name = "PROBABILITY", default_value_t = 0.4)]
    pub flipped_below: f64,
    /// Do not delete the jobs and datasets at the end.
    #[arg(long)]
    pub keep: bool,
    /// The base model, on which the adapters are trained. Default: the server's only model.
    #[arg(
        long,
        visible_alias = "policy",
        default_value = "",
        help_heading = "Training"
    )]
    pub model: String,
    /// Passes over the pairs; may be fractional.
    #[arg(
        long,
        allow_negative_numbers = true,
        value_name = "NUMBER",
        default_value = "2",
        help_heading = "Training"
    )]
    pub epochs: String,
    /// The peak learning rate, above 0.
    #[arg(
        long,
        allow_negative_numbers = true,
        value_name = "NUMBER",
        default_value = "1e-4",
        help_heading = "Training"
    )]
    pub learning_rate: String,
    /// β, above 0: how strongly an adapter is held to the model.
    #[arg(
        long,
        allow_negative_numbers = true,
        value_name = "NUMBER",
        default_value = "0.1",
        help_heading = "Training"
    )]
    pub beta: String,
    /// Share ε of labels that are assumed to be wrong, at least 0 and below 0.5. Default: 0.
    #[arg(
        allow_negative_numbers = true,
        long,
        value_name = "NUMBER",
        help_heading = "Training"
    )]
    pub label_smoothing: Option<String>,
    /// Rank of the adapters, 1 to 1024.
    #[arg(
        long,
        allow_negative_numbers = true,
        value_name = "N",
        default_value = "16",
        help_heading = "Training"
    )]
    pub rank: String,
    /// Pairs in a step.
    #[arg(
        long,
        allow_negative_numbers = true,
        value_name = "N",
        default_value = "4",
        help_heading = "Training"
    )]
    pub batch_size: String,
    /// Maximum number of tokens of prompt + answer. Longer pairs are cut. Default: 1024.
    #[arg(
        long,
        allow_negative_numbers = true,
        value_name = "N",
        help_heading = "Training"
    )]
    pub max_length: Option<String>,
    /// Precision of matrix multiplications: f32 or bf16. Default: the server's own.
    #[arg(long, value_name = "VALUE", help_heading = "Training")]
    pub precision: Option<String>,
    /// Variables for the chat template, as a JSON object: {"enable_thinking": false}. A row's own
    /// chat_template_kwargs override them.
    #[arg(long, value_name = "JSON", help_heading = "Training")]
    pub template_args: Option<String>,
    /// Priority of the jobs, -1000 to 1000: higher goes first. Default: 0.
    #[arg(
        long,
        allow_negative_numbers = true,
        value_name = "N",
        help_heading = "Training"
    )]
    pub priority: Option<String>,
    /// The server to connect to.
    #[command(flatten, next_help_heading = "Connection")]
    pub server: ServerArgs,
    /// The time for which calls are repeated.
    #[command(flatten)]
    pub retries: RetryArgs,
}

const CURATE_HELP: &str = "\
The same command continues after an interruption: it finds its jobs by their label curate=ID, and \
the scores so far in a folder beside --out.

Example:
  bradley curate --data pairs.jsonl --out curated.jsonl --report report.json";
