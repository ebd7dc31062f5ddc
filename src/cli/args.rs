//! Command-line arguments.

use std::collections::BTreeMap;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

use super::settings::SETTINGS;
use crate::rpc::client::Target;
use crate::train::rows::apart::DECODE;

/// Trains language models with Direct Preference Optimization over gRPC, and scores preference
/// pairs with them.
#[derive(Debug, Parser)]
#[command(name = "bradley", version, arg_required_else_help = true, after_help = EXIT_CODES)]
pub struct Cli {
    /// The command to run.
    #[command(subcommand)]
    pub command: Command,
    /// Format of the results.
    #[arg(long, global = true, value_enum, default_value_t = Output::Table, env = "BRADLEY_OUTPUT")]
    pub output: Output,
}

const EXIT_CODES: &str = "Exit codes: 0 success, 1 failure (a job failed or was cancelled, \
                          a file or the server failed), 2 wrong arguments or settings, \
                          3 no server reached.";

/// Table for people, JSON for programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// Columns.
    Table,
    /// One JSON document, or for streams one document per line.
    Json,
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
    /// Upload, list, show and delete datasets.
    #[command(subcommand)]
    Datasets(DatasetsCommand),
    /// List, download, export and delete checkpoints.
    #[command(subcommand)]
    Checkpoints(CheckpointsCommand),
    /// Show the server's base models.
    #[command(subcommand)]
    Models(ModelsCommand),
    /// Check that a server is serving. Exit code 0 means yes; for container health checks.
    Health(ServerArgs),
    /// Create, list and revoke bearer tokens in the server's database.
    #[command(subcommand)]
    Tokens(TokensCommand),
    /// Decode an uploaded Parquet file. The server starts this command in a process of its own,
    /// because the file is not trusted.
    #[command(hide = true, name = DECODE)]
    Decode {
        /// The file.
        path: PathBuf,
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
        #[arg(long)]
        days: Option<u32>,
        /// The server's database.
        #[command(flatten)]
        database: DatabaseArgs,
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

/// Address and credentials of the server.
#[derive(Clone, Debug, Args)]
pub struct ServerArgs {
    /// The server's address: http://HOST:PORT, or https://HOST:PORT with TLS.
    #[arg(long, default_value = "http://127.0.0.1:50051", env = "BRADLEY_SERVER")]
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
    /// Devices to compute on: cpu, cuda:N, several separated by commas, or auto (every GPU, else
    /// cpu).
    #[arg(long, default_value = "cpu")]
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
    /// system, tools, chat_template_kwargs or question.
    #[arg(long, value_name = "OURS=THEIRS", value_delimiter = ',')]
    pub columns: Vec<String>,
}

const DATA_HELP: &str = "Formats are recognised by content: JSONL, a JSON array, CSV, Parquet and \
    Arrow, also compressed with gzip or zstd. A FILE may be a pattern such as 'part-*.jsonl', a \
    folder that save_to_disk() of Hugging Face's datasets wrote, \
    hf://datasets/OWNER/NAME[@REVISION][/CONFIG][/SPLIT], or - for standard input.";

/// Arguments of `train`.
#[derive(Debug, Args)]
pub struct TrainArgs {
    /// The server to connect to.
    #[command(flatten)]
    pub server: ServerArgs,
    /// Files of preference pairs to upload, as one dataset.
    #[arg(
        long,
        value_name = "FILE",
        num_args = 1..,
        conflicts_with = "dataset",
        required_unless_present = "dataset",
        long_help = format!("Files of preference pairs to upload, as one dataset. {DATA_HELP}")
    )]
    pub data: Vec<String>,
    /// A dataset that is already on the server: datasets/ID or ID.
    #[arg(long)]
    pub dataset: Option<String>,
    /// Files of preference pairs to upload and evaluate on, in the formats of --data.
    #[arg(long, value_name = "FILE", num_args = 1.., conflicts_with = "eval_fraction")]
    pub eval_data: Vec<String>,
    /// How the files are read.
    #[command(flatten)]
    pub reading: DataArgs,
    /// Share of the training pairs to evaluate on instead of training on them, between 0 and 1.
    #[arg(long)]
    pub eval_fraction: Option<f64>,
    /// The policy to train: models/ID or trainingJobs/ID/checkpoints/STEP. Default: the server's
    /// only model.
    #[arg(long)]
    pub policy: Option<String>,
    /// The frozen reference: models/ID or trainingJobs/ID/checkpoints/STEP. Default: the policy's
    /// start weights.
    #[arg(long)]
    pub reference: Option<String>,
    /// Title of the job.
    #[arg(long, default_value = "")]
    pub name: String,
    /// Priority of the job, -1000 to 1000. A job with a higher priority runs first and preempts a
    /// running job with a lower one.
    #[arg(long, default_value_t = 0, allow_negative_numbers = true)]
    pub priority: i32,
    /// Days that the job, its events and its checkpoints are stored after its end. Default: until
    /// it is deleted.
    #[arg(long, value_name = "DAYS")]
    pub ttl_days: Option<u32>,
    /// Variables for the chat template, as a JSON object: {"enable_thinking": false}. A row's own
    /// chat_template_kwargs override them.
    #[arg(long, value_name = "JSON")]
    pub template_args: Option<String>,
    /// Show the job's estimated cost in tokens, steps, memory and time, and create no job. The data
    /// is uploaded all the same.
    #[arg(long, conflicts_with_all = ["watch", "validate_only"])]
    pub estimate: bool,
    /// Train every weight instead of a LoRA adapter.
    #[arg(long)]
    pub full: bool,
    /// LoRA rank. Default: 16.
    #[arg(long)]
    pub rank: Option<u32>,
    /// LoRA α. Default: 2 × rank.
    #[arg(long)]
    pub alpha: Option<f64>,
    /// Linear layers that get a LoRA update, separated by commas, with their names in PEFT.
    /// all-linear stands for all of them. Default: all-linear.
    #[arg(
        long,
        value_name = "NAMES",
        value_delimiter = ',',
        conflicts_with = "full"
    )]
    pub target_modules: Vec<String>,
    /// Loss, or a mix of losses such as sigmoid=0.8,sft=0.2. Default: sigmoid.
    #[arg(long)]
    pub loss: Option<String>,
    /// β of the objective. Default: 0.1.
    #[arg(long)]
    pub beta: Option<f64>,
    /// Label smoothing ε, at least 0 and below 0.5. Default: 0.
    #[arg(long)]
    pub label_smoothing: Option<f64>,
    /// Peak learning rate. Default: 1e-4 for LoRA, 1e-6 with --full.
    #[arg(long)]
    pub learning_rate: Option<f64>,
    /// Learning-rate schedule: constant, constant_with_warmup, linear, cosine or cosine_with_floor.
    /// Default: linear.
    #[arg(long)]
    pub schedule: Option<String>,
    /// Warm-up as a share of all steps. Default: 0. Not allowed with constant.
    #[arg(long)]
    pub warmup_ratio: Option<f64>,
    /// Pairs in a micro-batch. Default: 8.
    #[arg(long)]
    pub batch_size: Option<u32>,
    /// Micro-batches in an optimizer step. Default: 1.
    #[arg(long)]
    pub gradient_accumulation_steps: Option<u32>,
    /// Maximum number of tokens of prompt + answer. Default: 1024.
    #[arg(long)]
    pub max_length: Option<u32>,
    /// Passes over the data. Default: 3.
    #[arg(long)]
    pub epochs: Option<f64>,
    /// Number of optimizer steps. Overrides --epochs.
    #[arg(long)]
    pub max_steps: Option<u64>,
    /// Steps between checkpoints. The final one and each new best one are always written. Default:
    /// only these.
    #[arg(long)]
    pub save_steps: Option<u32>,
    /// Steps between evaluations. Default: only at the end.
    #[arg(long)]
    pub eval_steps: Option<u32>,
    /// Seed of the shuffle, the evaluation split and the adapter's initialisation. Default: 42.
    #[arg(long)]
    pub seed: Option<u64>,
    /// Precision of matrix multiplications, f32 or bf16. Default: the server's precision.
    #[arg(long)]
    pub precision: Option<String>,
    /// Leave out rows that fail validation instead of refusing the job.
    #[arg(long)]
    pub skip_bad_rows: bool,
    /// Check the job and create none. The data is uploaded all the same.
    #[arg(long)]
    pub validate_only: bool,
    /// Follow the job until it ends.
    #[arg(long)]
    pub watch: bool,
}

/// Arguments of `watch`.
#[derive(Debug, Args)]
pub struct WatchArgs {
    /// The server to connect to.
    #[command(flatten)]
    pub server: ServerArgs,
    /// The job: trainingJobs/ID or ID.
    pub job: String,
    /// Show only events after this sequence number.
    #[arg(long, default_value_t = 0)]
    pub after: u64,
}

/// Arguments of `score`.
#[derive(Debug, Args)]
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
    /// Do not fail because of rows that cannot be read or scored, e.g. because they are too long.
    /// They have an error in place of a score with and without this flag.
    #[arg(long)]
    pub skip_bad_rows: bool,
    /// The policy: models/ID or trainingJobs/ID/checkpoints/STEP|latest|best.
    #[arg(long)]
    pub policy: String,
    /// The reference: models/ID or a checkpoint. Default: the reference of the policy's job, or for
    /// a base model the model itself.
    #[arg(long, default_value = "")]
    pub reference: String,
    /// β of the rewards. Default: the job's, or 0.1 for a base model.
    #[arg(long)]
    pub beta: Option<f64>,
    /// Maximum number of tokens of prompt + answer. Default: the job's, or 1024 for a base model.
    #[arg(long)]
    pub max_length: Option<u32>,
    /// Variables for the chat template, as a JSON object: {"enable_thinking": false}. A row's own
    /// chat_template_kwargs override them.
    #[arg(long, value_name = "JSON")]
    pub template_args: Option<String>,
    /// A file with a JSON array of tools, for rows without tools of their own.
    #[arg(long, value_name = "FILE")]
    pub tools: Option<PathBuf>,
    /// Reward of an answer: from the sum over its tokens, from the mean, or as the job trained it.
    #[arg(long, default_value = "as_trained", value_parser = ["as_trained", "sum", "mean"])]
    pub normalization: String,
}

/// `bradley jobs …`
#[derive(Debug, Subcommand)]
pub enum JobsCommand {
    /// List jobs, newest first.
    List(ServerArgs),
    /// Show one job.
    Get(NamedArgs),
    /// Change a job's title, labels or priority.
    Update(UpdateArgs),
    /// Pause a job. A running job writes a checkpoint first.
    Pause(NamedArgs),
    /// Resume a paused job, or try a job that waits for a missing input again at once.
    Resume(NamedArgs),
    /// Cancel a job. Its checkpoints stay.
    Cancel(NamedArgs),
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
    #[arg(long, required_unless_present_any = ["priority", "label"])]
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
    Get(NamedArgs),
    /// Delete a dataset.
    Delete(NamedArgs),
}

/// `bradley checkpoints …`
#[derive(Debug, Subcommand)]
pub enum CheckpointsCommand {
    /// List a job's checkpoints.
    List(NamedArgs),
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
    Get(NamedArgs),
}

/// A resource on a server.
#[derive(Debug, Args)]
pub struct NamedArgs {
    /// The server to connect to.
    #[command(flatten)]
    pub server: ServerArgs,
    /// The resource's name. The prefix, such as trainingJobs/, may be left out.
    pub name: String,
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
    #[arg(long)]
    pub name: Option<String>,
    /// Check lengths, too, with the tokenizer of this model: models/ID or ID.
    #[arg(long, default_value = "")]
    pub model: String,
    /// Maximum number of tokens of prompt + answer, for the check with --model.
    #[arg(long, default_value_t = 1024)]
    pub max_length: u32,
}

/// Contents of an export.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
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
    #[arg(long, value_enum, default_value_t = Format::Auto)]
    pub format: Format,
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
    #[arg(long, value_enum, default_value_t = Format::Auto)]
    pub format: Format,
    /// Element type of merged weights: f32, bf16 or f16. Default: the type in the base model's
    /// files, or f16 if these are quantised.
    #[arg(long, default_value = "")]
    pub dtype: String,
    /// The folder to write to.
    #[arg(long)]
    pub out: PathBuf,
}
