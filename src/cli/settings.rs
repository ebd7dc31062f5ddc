//! Settings of `bradley serve`. Flags override environment variables, these override a TOML file,
//! and this overrides the defaults. All bad settings are reported together.
//!
//! **The rest of the program gets environment variables from here.** Only libraries read others,
//! e.g. clap those of the client's flags, OpenTelemetry `OTEL_*`, rustls `SSL_CERT_FILE`, reqwest
//! `HTTPS_PROXY`.

mod oidc;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use crate::domain::names::is_valid_id;
use crate::domain::similar::nearest;
use crate::domain::training::Precision;
use crate::domain::violation::Violations;
use crate::engine::api::EngineOptions;
use crate::formats::loader::default_id;
use crate::formats::source::HubOptions;
use crate::model::device::DeviceChoice;
use crate::rpc::{RestHost, TlsFiles};
use crate::service::auth::oidc::OidcOptions;
use crate::service::remote::{URL_FORM, is_url};

/// Name, default and help of every setting. The setting `like_this` has the flag `--like-this`, the
/// environment variable `BRADLEY_LIKE_THIS` and the TOML key `like_this`.
pub const SETTINGS: &[(&str, &str, &str)] = &[
    (
        "models",
        "",
        "Models to serve: [ID=]SOURCE, separated by commas. A SOURCE is a folder, a GGUF file or a \
         hub id; gated models of the hub need the variable HF_TOKEN",
    ),
    (
        "data_dir",
        "bradley-data",
        "Folder for jobs, datasets, checkpoints and exports",
    ),
    ("listen", "127.0.0.1:50051", "Address of the gRPC server"),
    (
        "http_listen",
        "127.0.0.1:9464",
        "Address of /metrics, /livez and /readyz; off disables it",
    ),
    (
        "device",
        "auto",
        "Devices to compute on: auto (all GPUs, or the CPU if there is none), cpu, cuda:N (one \
         GPU), or a list separated by commas (one worker per device)",
    ),
    (
        "missing_devices",
        "refuse",
        "If a listed device cannot be opened: refuse (do not start) or skip (start with the \
         others)",
    ),
    (
        "data_parallel",
        "1",
        "Number of devices that one training run uses; each device computes a share of the \
         rows of every batch",
    ),
    (
        "precision",
        "f32",
        "Precision of matrix multiplications and of frozen weights in memory: f32 or bf16",
    ),
    (
        "threads",
        "0",
        "Number of CPU threads for compute; 0 means all cores",
    ),
    (
        "memory_limit",
        "0",
        "Limit on the estimated host memory of models and jobs together, e.g. 20GiB; 0 means \
         nine tenths of the machine's memory, or of the container's limit if that is lower; a \
         higher limit than this memory is lowered to it",
    ),
    (
        "device_memory_limit",
        "0",
        "Limit on the estimated memory of models and a job on each GPU or MIG slice, e.g. 70GiB; 0 \
         means nine tenths of the memory that is free at the start",
    ),
    (
        "scoring_share",
        "0.4",
        "Share of device time that scoring and generation may use while a job trains, above 0 and \
         at most 1",
    ),
    (
        "queue_tokens",
        "1048576",
        "Maximum number of tokens that wait to be scored",
    ),
    (
        "batch_tokens",
        "4096",
        "Maximum number of tokens in a scoring batch",
    ),
    (
        "max_row_tokens",
        "16384",
        "Maximum number of tokens of a prompt with all of its answers in scoring, and of a prompt \
         with the max_tokens of one sample in generation; training is limited by a job's \
         max_length instead",
    ),
    (
        "reference_cache_tokens",
        "4194304",
        "Size of the cache of reference log-probs, in tokens, both in memory and in the data \
         folder",
    ),
    (
        "generation_cache_tokens",
        "32768",
        "Size of the cache of keys and values of each worker for generation, in tokens: prompts \
         and max_tokens of all samples in progress; further requests wait",
    ),
    (
        "resident_policies",
        "8",
        "Maximum number of adapters and full weights of each worker in memory, besides the base \
         models; memory_limit and device_memory_limit may allow fewer",
    ),
    (
        "max_message_bytes",
        "16MiB",
        "Maximum size of a gRPC message",
    ),
    (
        "max_upload_bytes",
        "16GiB",
        "Maximum size of an uploaded dataset",
    ),
    (
        "events_kept",
        "1000000",
        "Number of a job's newest events that are stored",
    ),
    (
        "drain_timeout",
        "30",
        "Time for which a shutdown waits for open calls and running jobs, in seconds; the process \
         ends at most 40 seconds later",
    ),
    (
        "database_url",
        "",
        "PostgreSQL database that replicas share: postgres://USER:PASSWORD@HOST/NAME; empty \
         means SQLite in data_dir",
    ),
    (
        "artifact_url",
        "",
        "Store of datasets and checkpoints that replicas share: s3://, gs://, az:// or \
         file:///FOLDER; empty means data_dir",
    ),
    (
        "lease",
        "30",
        "Time without a renewal after which a worker loses its job to another worker, in seconds",
    ),
    (
        "time_slice",
        "600",
        "Time after which a job makes room for waiting jobs of the same priority, in seconds",
    ),
    (
        "max_jobs_per_client",
        "1000",
        "Maximum number of unfinished jobs of one client; 0 means no limit",
    ),
    (
        "max_client_priority",
        "0",
        "Highest priority that clients may give to their jobs; administrators may give any",
    ),
    (
        "max_dataset_bytes_per_client",
        "0",
        "Maximum size of all datasets of one client; 0 means no limit",
    ),
    (
        "max_dataset_text_bytes",
        "4GiB",
        "Maximum size of the text of one dataset, which a job holds in memory",
    ),
    (
        "max_scoring_tokens_per_client",
        "0",
        "Maximum number of one client's tokens that wait for scores or texts; 0 means no limit",
    ),
    (
        "adapter_dir",
        "",
        "Folder of PEFT adapters that jobs may start from, by name",
    ),
    (
        "template_date",
        "",
        "Date that chat templates print for base models, YYYY-MM-DD; empty means today. Jobs and \
         their checkpoints have the date of the job's creation",
    ),
    (
        "auth",
        "off",
        "tokens: callers need a bearer token (see bradley tokens); off: everyone may do \
         everything",
    ),
    (
        "token_file",
        "",
        "File that declares tokens besides those of the database: a YAML list of owner, roles, \
         sha256 and expires (see bradley tokens hash). It is read again when it changes",
    ),
    (
        "oidc_issuer",
        "",
        "URL of an OpenID Connect issuer whose JWTs are accepted besides our own tokens, exactly \
         as it stands in their claim iss; empty means none",
    ),
    (
        "oidc_audience",
        "",
        "Audiences of this server, separated by commas: the issuer's tokens must name at least \
         one of them in their claim aud",
    ),
    (
        "oidc_owner_claim",
        "sub",
        "Claim that names the owner of jobs and datasets, which is then oidc:VALUE; email needs \
         email_verified",
    ),
    (
        "oidc_roles_claim",
        "",
        "Claim with the groups or roles that oidc_roles maps, e.g. groups, scope or \
         realm_access.roles",
    ),
    (
        "oidc_roles",
        "",
        "Roles for the values of oidc_roles_claim, as ROLE=VALUE separated by commas, e.g. \
         submit=ml-team,score=*; * is every valid token",
    ),
    (
        "oidc_jwks_url",
        "",
        "URL of the issuer's keys; empty means the jwks_uri of its discovery document",
    ),
    (
        "oidc_ca_file",
        "",
        "PEM file of the certificate authorities of the issuer; empty means those of the system",
    ),
    (
        "oidc_refresh",
        "300",
        "Time after which the issuer's keys are fetched again, in seconds; an unknown key causes \
         a fetch at once",
    ),
    (
        "oidc_max_key_age",
        "86400",
        "Maximum time for which the issuer's keys are used while it does not answer, in seconds",
    ),
    (
        "audit_log",
        "",
        "File for the audit log, as JSON lines; the audit log is also part of the normal log",
    ),
    (
        "tls_cert",
        "",
        "PEM file of the server's certificate chain; together with tls_key it enables TLS on \
         the gRPC port",
    ),
    ("tls_key", "", "PEM file of the certificate's private key"),
    (
        "tls_client_ca",
        "",
        "PEM file of a certificate authority; clients then need a certificate that it signed",
    ),
    (
        "rest",
        "on",
        "REST and server-sent events on the gRPC port, beside gRPC: on or off",
    ),
    (
        "rest_hosts",
        "",
        "Names of hosts under which a server without tokens and TLS answers REST, besides IP \
         addresses, localhost and the machine's own name, separated by commas: NAME, *.NAME, or * \
         for every name",
    ),
    (
        "max_connections",
        "4096",
        "Maximum number of open gRPC connections",
    ),
    (
        "max_connection_age",
        "0",
        "Age at which a connection is closed so that its client connects again, perhaps to \
         another replica, in seconds; 0 means never",
    ),
    (
        "otlp_endpoint",
        "",
        "Endpoint for traces by OTLP over gRPC: http://HOST:4317; empty means no traces",
    ),
    (
        "trace_ratio",
        "1",
        "Share of the traces that begin in this server that is exported, 0 to 1; for other \
         traces the caller decides",
    ),
    ("log", "info", "Log filter, e.g. info or bradley=debug"),
    ("log_format", "text", "Format of log lines: text or json"),
];

/// Settings with values that error messages must not show.
pub(super) const SECRET_SETTINGS: [&str; 1] = ["database_url"];

/// The sources of settings. A later field overrides the earlier ones.
#[derive(Clone, Debug, Default)]
pub struct Sources {
    /// The TOML file's path and table.
    pub file: Option<(PathBuf, toml::Table)>,
    /// The environment.
    pub environment: BTreeMap<String, String>,
    /// Values of the flags that were given, by setting name.
    pub flags: BTreeMap<String, String>,
}

/// The validated settings.
#[derive(Clone)]
pub struct Settings {
    /// `(id, source)` of each model.
    pub models: Vec<(String, String)>,
    /// The folder of the database, datasets, checkpoints and exports.
    pub data_dir: PathBuf,
    /// The gRPC address.
    pub listen: SocketAddr,
    /// Address of the HTTP port; `None` if it is disabled.
    pub http_listen: Option<SocketAddr>,
    /// Number of compute threads; 0 means all cores.
    pub threads: usize,
    /// The engine's limits.
    pub engine: EngineOptions,
    /// Maximum size of a gRPC message, in bytes.
    pub max_message_bytes: usize,
    /// Maximum size of an uploaded dataset, in bytes.
    pub max_upload_bytes: u64,
    /// Number of a job's newest events that are stored.
    pub events_kept: u64,
    /// Time for which a shutdown waits for open calls and running jobs.
    pub drain_timeout: Duration,
    /// URL of a PostgreSQL database that replicas share; `None` means SQLite in `data_dir`.
    pub database_url: Option<String>,
    /// URL of an artifact store that replicas share, with the environment variables of its vendor.
    /// `None` means `data_dir`.
    pub artifact_store: Option<(String, BTreeMap<String, String>)>,
    /// Time without a renewal after which a worker loses the lease of its job.
    pub lease: Duration,
    /// Time that a job may occupy the device while others wait.
    pub time_slice: Duration,
    /// Maximum number of one client's unfinished jobs; `None` means no limit.
    pub max_jobs_per_client: Option<u64>,
    /// Maximum priority that clients may set.
    pub max_client_priority: i32,
    /// Maximum size of all datasets of one client, in bytes; `None` means no limit.
    pub max_dataset_bytes_per_client: Option<u64>,
    /// Maximum size of a dataset's text, in bytes.
    pub max_dataset_text_bytes: u64,
    /// Maximum number of one client's tokens that wait for scores or texts; `None` means no limit.
    pub max_scoring_tokens_per_client: Option<usize>,
    /// Folder of the adapters that jobs may start from.
    pub adapter_dir: Option<PathBuf>,
    /// Date that chat templates print for base models; `None` means today.
    pub template_date: Option<jiff::civil::Date>,
    /// True if callers need a bearer token.
    pub tokens: bool,
    /// File that declares tokens.
    pub token_file: Option<PathBuf>,
    /// Issuer whose tokens are accepted beside our own.
    pub oidc: Option<OidcOptions>,
    /// File for the audit log.
    pub audit_log: Option<PathBuf>,
    /// Certificates of the gRPC port; `None` means no TLS.
    pub tls: Option<TlsFiles>,
    /// True if the gRPC port serves REST, too.
    pub rest: bool,
    /// Further names of hosts under which REST is answered without tokens and TLS.
    pub rest_hosts: Vec<RestHost>,
    /// Maximum number of open gRPC connections.
    pub max_connections: usize,
    /// Age at which a connection is closed, so that its client connects again; `None` means never.
    pub max_connection_age: Option<Duration>,
    /// OTLP endpoint for traces, and the sampled share (0 to 1) of the traces that begin here.
    pub traces: Option<(String, f64)>,
    /// The log filter.
    pub log: String,
    /// True if log lines are JSON.
    pub log_json: bool,
    /// Access to the Hugging Face hub.
    pub hub: HubOptions,
}

/// Returns the process's environment variables, without those that are not UTF-8.
fn process_environment() -> BTreeMap<String, String> {
    std::env::vars_os()
        .filter_map(|(k, v)| Some((k.into_string().ok()?, v.into_string().ok()?)))
        .collect()
}

impl Sources {
    /// Collects the process's environment, the TOML file (`config`, else BRADLEY_CONFIG) and the
    /// flags.
    ///
    /// # Errors
    /// Returns a violation if the file cannot be read or is not TOML.
    pub fn collect(
        config: Option<&Path>,
        flags: BTreeMap<String, String>,
    ) -> Result<Self, Violations> {
        let environment = process_environment();
        let path = config
            .map(Path::to_owned)
            .or_else(|| environment.get("BRADLEY_CONFIG").map(PathBuf::from));
        let file = match path {
            Some(path) => {
                let wrong = |reason: String| Violations::one(path.display().to_string(), reason);
                let text = std::fs::read_to_string(&path)
                    .map_err(|e| wrong(format!("cannot be read: {e}")))?;
                let table = text.parse::<toml::Table>().map_err(|e| {
                    let before = e.span().and_then(|span| text.get(..span.start));
                    let line = before.map(|text| 1 + text.matches('\n').count());
                    let line = line.map(|line| format!(" in line {line}"));
                    let line = line.unwrap_or_default();
                    wrong(format!("is not TOML{line}: {}", e.message()))
                })?;
                Some((path, table))
            }
            None => None,
        };
        Ok(Sources {
            file,
            environment,
            flags,
        })
    }

    /// Collects the process's environment only, for commands that have no settings of a server.
    pub fn environment() -> Self {
        Sources {
            file: None,
            environment: process_environment(),
            flags: BTreeMap::new(),
        }
    }

    /// Returns an environment variable, unless it is unset or empty.
    pub fn variable(&self, name: &str) -> Option<&str> {
        self.environment
            .get(name)
            .map(String::as_str)
            .filter(|v| !v.is_empty())
    }

    /// Returns the value of a setting from the first source that has it (flag, environment, file,
    /// default), and the name of that source for error messages.
    pub(super) fn get(&self, name: &str, default: &str) -> (String, String) {
        if let Some(v) = self.flags.get(name) {
            return (v.clone(), format!("--{}", name.replace('_', "-")));
        }
        let variable = format!("BRADLEY_{}", name.to_uppercase());
        if let Some(v) = self.environment.get(&variable) {
            return (v.clone(), variable);
        }
        if let Some((path, table)) = &self.file
            && let Some(v) = table.get(name)
        {
            let text = match v {
                toml::Value::String(s) => s.clone(),
                toml::Value::Array(items) => items
                    .iter()
                    .map(|i| i.as_str().map_or(i.to_string(), str::to_owned))
                    .collect::<Vec<_>>()
                    .join(","),
                other => other.to_string(),
            };
            return (text, format!("{}: {name}", path.display()));
        }
        (default.to_owned(), format!("the default of {name}"))
    }

    /// Returns true if a source other than the default has the setting.
    fn has(&self, name: &str) -> bool {
        let variable = format!("BRADLEY_{}", name.to_uppercase());
        let is_in_file = |(_, table): &(PathBuf, toml::Table)| table.contains_key(name);
        self.flags.contains_key(name)
            || self.environment.contains_key(&variable)
            || self.file.as_ref().is_some_and(is_in_file)
    }
}

impl Settings {
    /// Validates every setting.
    ///
    /// # Errors
    /// Returns all bad settings, each with its source.
    pub fn resolve(sources: &Sources) -> Result<Self, Violations> {
        let (settings, bad) = Settings::read(sources);
        bad.into_result().map(|()| settings)
    }

    /// Validates every setting. Also returns all bad settings, each with its source. The value of a
    /// bad setting is a stand-in, such as 0, so a server must not start with it.
    pub(super) fn read(sources: &Sources) -> (Self, Violations) {
        let mut bad = Violations::default();
        if let Some((path, table)) = &sources.file {
            for key in table
                .keys()
                .filter(|k| !SETTINGS.iter().any(|(name, ..)| name == k))
            {
                bad.push(
                    format!("{}: {key}", path.display()),
                    match nearest(key, SETTINGS.iter().map(|(name, ..)| *name)) {
                        Some(name) => format!("is not a setting: did you mean {name}?"),
                        None => "is not a setting: `bradley serve --help` lists them".to_owned(),
                    },
                );
            }
        }
        let mut reader = SettingsReader {
            sources,
            bad: &mut bad,
        };
        let models = reader.models();
        let defaults = EngineOptions::default();
        let share = reader.parse("scoring_share", "a number above 0 and at most 1", |s| {
            s.parse::<f64>().ok().filter(|v| *v > 0.0 && *v <= 1.0)
        });
        let seconds = |n: usize| Duration::from_secs(n as u64);
        let is_positive = |n: &usize| *n > 0;
        let database_url = reader.optional(
            "database_url",
            "a URL such as postgres://user:password@host/bradley",
            |s| {
                (s.starts_with("postgres://") || s.starts_with("postgresql://"))
                    .then(|| s.to_owned())
            },
        );
        let artifact_url = reader.optional("artifact_url", URL_FORM, |s| {
            is_url(s).then(|| s.to_owned())
        });
        // A wrong URL is refused above.
        if database_url.is_some() && reader.is_empty("artifact_url") {
            reader.bad.push(
                "artifact_url",
                "is not set: replicas that share a database must find the same files, \
                     e.g. file:///a/shared/folder",
            );
        }
        let devices = reader
            .parse(
                "device",
                "auto, cpu, cuda:N, or different GPUs with commas between",
                DeviceChoice::parse_list,
            )
            .unwrap_or_default();
        let data_parallel = reader.number("data_parallel", 1).unwrap_or(1);
        // The number of devices that `auto` finds is known only when the engine starts. It warns
        // then.
        if !devices.is_empty()
            && !devices.contains(&DeviceChoice::Auto)
            && data_parallel > devices.len()
        {
            let problem = format!(
                "is {data_parallel}, but device names {}: name as many devices, or lower it",
                devices.len()
            );
            reader.bad.push("data_parallel", problem);
        }
        let rest = reader.rest();
        let tls = reader.tls(rest);
        let auth = reader.parse("auth", "off or tokens", |s| match s {
            "off" => Some(false),
            "tokens" => Some(true),
            _ => None,
        });
        // A wrong value, which is refused above, is probably a misspelt `tokens`.
        let (tokens, is_off) = (auth.unwrap_or_default(), auth == Some(false));
        let token_file = reader.optional("token_file", "a path", |s| Some(PathBuf::from(s)));
        if token_file.is_some() && is_off {
            reader.needs_tokens("token_file");
        }
        let oidc = reader.oidc();
        if oidc.is_some() && is_off {
            reader.needs_tokens("oidc_issuer");
        }
        let traces = reader.optional(
            "otlp_endpoint",
            "a URL such as http://collector:4317",
            |s| (s.starts_with("http://") || s.starts_with("https://")).then(|| s.to_owned()),
        );
        let trace_ratio = reader.parse("trace_ratio", "a number from 0 to 1", |s| {
            s.parse::<f64>().ok().filter(|r| (0.0..=1.0).contains(r))
        });
        let settings = Settings {
            models,
            database_url,
            artifact_store: artifact_url.map(|url| (url, vendor_variables(sources))),
            lease: seconds(reader.number("lease", 1).unwrap_or_default()),
            time_slice: seconds(reader.number("time_slice", 1).unwrap_or_default()),
            max_jobs_per_client: reader
                .number("max_jobs_per_client", 0)
                .filter(is_positive)
                .map(|n| n as u64),
            max_client_priority: reader
                .parse(
                    "max_client_priority",
                    "a whole number from -1000 to 1000",
                    |s| s.parse().ok().filter(|n| (-1000..=1000).contains(n)),
                )
                .unwrap_or_default(),
            max_dataset_bytes_per_client: reader
                .bytes("max_dataset_bytes_per_client")
                .filter(|n| *n > 0),
            max_dataset_text_bytes: reader.bytes("max_dataset_text_bytes").unwrap_or_default(),
            max_scoring_tokens_per_client: reader
                .number("max_scoring_tokens_per_client", 0)
                .filter(is_positive),
            adapter_dir: reader.optional("adapter_dir", "a path", |s| Some(PathBuf::from(s))),
            template_date: reader.optional("template_date", "a date such as 2026-07-26", |s| {
                s.parse().ok().filter(|_| s.len() == "2026-07-26".len())
            }),
            tokens,
            token_file,
            oidc,
            audit_log: reader.optional("audit_log", "a path", |s| Some(PathBuf::from(s))),
            tls,
            rest,
            rest_hosts: reader
                .parse(
                    "rest_hosts",
                    "names such as bradley.example.com or *.example.com without ports, separated \
                     by commas, or *",
                    |s| {
                        s.split(',')
                            .map(str::trim)
                            .filter(|name| !name.is_empty())
                            .map(RestHost::parse)
                            .collect()
                    },
                )
                .unwrap_or_default(),
            max_connections: reader.number("max_connections", 1).unwrap_or_default(),
            max_connection_age: reader
                .number("max_connection_age", 0)
                .filter(is_positive)
                .map(seconds),
            data_dir: reader
                .parse("data_dir", "a path", |s| {
                    (!s.is_empty()).then(|| PathBuf::from(s))
                })
                .unwrap_or_default(),
            listen: reader
                .parse(
                    "listen",
                    "an IP address and a port, such as 127.0.0.1:50051, or 0.0.0.0:50051 for all \
                     addresses of this machine",
                    |s| s.parse().ok(),
                )
                .unwrap_or(SocketAddr::from(([127, 0, 0, 1], 0))),
            http_listen: reader
                .parse(
                    "http_listen",
                    "an IP address and a port, such as 127.0.0.1:9464 or 0.0.0.0:9464, or off",
                    |s| {
                        if s == "off" {
                            Some(None)
                        } else {
                            s.parse().ok().map(Some)
                        }
                    },
                )
                .flatten(),
            threads: reader.number("threads", 0).unwrap_or_default(),
            engine: EngineOptions {
                devices,
                skip_missing_devices: reader
                    .parse("missing_devices", "refuse or skip", |s| match s {
                        "refuse" => Some(false),
                        "skip" => Some(true),
                        _ => None,
                    })
                    .unwrap_or_default(),
                data_parallel,
                precision: reader
                    .parse("precision", "f32 or bf16", Precision::parse)
                    .unwrap_or_default(),
                queue_tokens: reader
                    .number("queue_tokens", 1)
                    .unwrap_or(defaults.queue_tokens),
                batch_tokens: reader
                    .number("batch_tokens", 1)
                    .unwrap_or(defaults.batch_tokens),
                max_row_tokens: reader
                    .number("max_row_tokens", 2)
                    .unwrap_or(defaults.max_row_tokens),
                reference_cache_tokens: reader
                    .number("reference_cache_tokens", 0)
                    .unwrap_or(defaults.reference_cache_tokens),
                reference_cache_file: None,
                generation_cache_tokens: reader
                    .number("generation_cache_tokens", 1)
                    .unwrap_or(defaults.generation_cache_tokens),
                resident_policies: reader
                    .number("resident_policies", 1)
                    .unwrap_or(defaults.resident_policies),
                scoring_share: share.unwrap_or(defaults.scoring_share),
                memory_limit: reader.bytes("memory_limit").filter(|n| *n > 0),
                device_memory_limit: reader.bytes("device_memory_limit").filter(|n| *n > 0),
            },
            max_message_bytes: reader.bytes("max_message_bytes").unwrap_or_default() as usize,
            max_upload_bytes: reader.bytes("max_upload_bytes").unwrap_or_default(),
            events_kept: reader.number("events_kept", 1).unwrap_or_default() as u64,
            drain_timeout: Duration::from_secs(
                reader.number("drain_timeout", 1).unwrap_or_default() as u64,
            ),
            traces: traces.map(|endpoint| (endpoint, trace_ratio.unwrap_or_default())),
            log: reader
                .parse("log", "a filter such as info or bradley=debug", |s| {
                    tracing_subscriber::EnvFilter::from_str(s)
                        .is_ok()
                        .then(|| s.to_owned())
                })
                .unwrap_or_default(),
            log_json: reader
                .parse("log_format", "text or json", |s| match s {
                    "text" => Some(false),
                    "json" => Some(true),
                    _ => None,
                })
                .unwrap_or_default(),
            hub: hub(sources),
        };
        refuse_shared_port(&settings, sources, &mut bad);
        (settings, bad)
    }
}

/// Refuses the same address and port in `listen` and `http_listen`. Port 0 stands for any free one.
fn refuse_shared_port(settings: &Settings, sources: &Sources, bad: &mut Violations) {
    let (grpc, http) = (settings.listen, settings.http_listen);
    if grpc.port() == 0 || http != Some(grpc) {
        return;
    }
    // At least one of the two was set, because their defaults differ.
    let (set, other) = match sources.has("http_listen") {
        true => ("http_listen", "listen"),
        false => ("listen", "http_listen"),
    };
    let (_, origin) = sources.get(set, "");
    bad.push(
        origin,
        format!(
            "is {grpc}, which is also the address of {other}: name another port for one of them"
        ),
    );
}

/// Returns the name of the setting whose source (a flag, a variable or a key of the file) is the
/// field of a violation.
pub(super) fn setting_of(field: &str) -> String {
    if let Some((_, key)) = field.rsplit_once(": ") {
        return key.to_owned();
    }
    if let Some(flag) = field.strip_prefix("--") {
        return flag.replace('-', "_");
    }
    match field.strip_prefix("BRADLEY_") {
        Some(variable) => variable.to_lowercase(),
        None => field.to_owned(),
    }
}

/// Returns the environment variables with which vendors of object stores configure their clients.
pub(super) fn vendor_variables(sources: &Sources) -> BTreeMap<String, String> {
    let vendors = ["AWS_", "GOOGLE_", "AZURE_"];
    sources
        .environment
        .iter()
        .filter(|(k, _)| vendors.iter().any(|v| k.starts_with(v)))
        .map(|(k, v)| (k.clone(), v.clone()))
        .collect()
}

/// Reads the environment variables of the Hugging Face hub's own tools.
pub fn hub(sources: &Sources) -> HubOptions {
    let path = |name: &str| sources.variable(name).map(PathBuf::from);
    // Without the variable, the user's entry in /etc/passwd has it.
    let home = path("HOME").or_else(std::env::home_dir);
    let of_home = home.map(|home| home.join(".cache/huggingface/hub"));
    HubOptions {
        endpoint: sources.variable("HF_ENDPOINT").map(str::to_owned),
        token: sources.variable("HF_TOKEN").map(str::to_owned),
        cache_dir: path("HF_HUB_CACHE")
            .or_else(|| path("HF_HOME").map(|p| p.join("hub")))
            .or(of_home),
        offline: sources.variable("HF_HUB_OFFLINE").is_some_and(is_on),
    }
}

/// Returns true for the values with which the hub's own tools turn something on.
fn is_on(value: &str) -> bool {
    let on = ["1", "on", "yes", "true"];
    on.iter().any(|name| value.eq_ignore_ascii_case(name))
}

struct SettingsReader<'a> {
    sources: &'a Sources,
    bad: &'a mut Violations,
}

impl SettingsReader<'_> {
    fn parse<T>(
        &mut self,
        name: &str,
        expected: &str,
        parse: impl Fn(&str) -> Option<T>,
    ) -> Option<T> {
        let default = SETTINGS
            .iter()
            .find(|(n, ..)| *n == name)
            .map_or("", |(_, d, _)| d);
        let (text, origin) = self.sources.get(name, default);
        let parsed = parse(text.trim());
        if parsed.is_none() {
            // The URL may have a password, so it is not shown.
            let shown = if SECRET_SETTINGS.contains(&name) {
                "cannot be used".to_owned()
            } else {
                format!("is {text:?}")
            };
            self.bad
                .push(origin, format!("{shown}: it must be {expected}"));
        }
        parsed
    }

    /// Parses a setting that may be empty.
    fn optional<T>(
        &mut self,
        name: &str,
        expected: &str,
        parse: impl Fn(&str) -> Option<T>,
    ) -> Option<T> {
        self.parse(name, expected, |s| {
            if s.is_empty() {
                Some(None)
            } else {
                parse(s).map(Some)
            }
        })
        .flatten()
    }

    fn rest(&mut self) -> bool {
        let rest = self.parse("rest", "on or off", |s| match s {
            // The second word is that of a TOML or YAML file without quotes.
            "on" | "true" => Some(true),
            "off" | "false" => Some(false),
            _ => None,
        });
        rest.unwrap_or_default()
    }

    fn tls(&mut self, http1: bool) -> Option<TlsFiles> {
        let mut path = |name| self.optional(name, "a path", |s| Some(PathBuf::from(s)));
        let (certificate, key, client_ca) =
            (path("tls_cert"), path("tls_key"), path("tls_client_ca"));
        match (certificate, key) {
            (Some(certificate), Some(key)) => Some(TlsFiles {
                certificate,
                key,
                client_ca,
                http1,
            }),
            (None, None) if client_ca.is_none() => None,
            (certificate, key) => {
                let set = ["tls_cert", "tls_key", "tls_client_ca"]
                    .into_iter()
                    .find(|name| !self.sources.get(name, "").0.is_empty());
                let (_, origin) = self.sources.get(set.unwrap_or("tls_cert"), "");
                let [cert_name, key_name] = ["tls_cert", "tls_key"].map(|n| name_as(&origin, n));
                let missing = match (certificate, key) {
                    (None, None) => format!("{cert_name} and {key_name} are"),
                    (None, _) => format!("{cert_name} is"),
                    _ => format!("{key_name} is"),
                };
                self.bad
                    .push(origin, format!("is set, but {missing} not: TLS needs both"));
                None
            }
        }
    }

    fn is_empty(&self, name: &str) -> bool {
        self.sources.get(name, "").0.trim().is_empty()
    }

    fn needs_tokens(&mut self, name: &str) {
        let (_, origin) = self.sources.get(name, "");
        self.bad.push(
            origin,
            "has no effect while auth is off: set auth to tokens, too",
        );
    }

    fn number(&mut self, name: &str, least: usize) -> Option<usize> {
        self.parse(name, &format!("a whole number, {least} or above"), |s| {
            s.parse().ok().filter(|n| *n >= least)
        })
    }

    fn bytes(&mut self, name: &str) -> Option<u64> {
        self.parse(name, "a size such as 500MiB or 20GiB", parse_bytes)
    }

    fn models(&mut self) -> Vec<(String, String)> {
        let (text, origin) = self.sources.get("models", "");
        let mut models: Vec<(String, String)> = Vec::new();
        for part in text.split(',').map(str::trim).filter(|p| !p.is_empty()) {
            let (id, source) = match part.split_once('=') {
                Some((id, source)) => (id.to_owned(), source.to_owned()),
                None => (default_id(part), part.to_owned()),
            };
            if !is_valid_id(&id) || source.is_empty() {
                self.bad.push(
                    origin.clone(),
                    format!(
                        "{part:?} must be SOURCE or ID=SOURCE \
                         with an id of letters, digits, - _ and ."
                    ),
                );
            } else if models.iter().any(|(other, _)| *other == id) {
                self.bad.push(
                    origin.clone(),
                    format!("the id {id:?} occurs twice: name one of them ID=SOURCE"),
                );
            } else {
                models.push((id, source));
            }
        }
        // After another error this one is not reported, because an unknown key in the file may be a
        // misspelt `models`.
        if models.is_empty() && self.bad.is_empty() {
            self.bad.push(
                "--models",
                "is not set: name at least one model, \
                 e.g. --models HuggingFaceTB/SmolLM2-135M-Instruct",
            );
        }
        models
    }
}

/// Returns a setting's name as `origin` has that of another one: as a flag, a variable or a key.
fn name_as(origin: &str, name: &str) -> String {
    if origin.starts_with("--") {
        format!("--{}", name.replace('_', "-"))
    } else if origin.starts_with("BRADLEY_") {
        format!("BRADLEY_{}", name.to_uppercase())
    } else {
        name.to_owned()
    }
}

/// Parses a size such as `12`, `500K` or `20GiB`. The units are powers of 1024.
fn parse_bytes(text: &str) -> Option<u64> {
    let digits = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let n: u64 = text[..digits].parse().ok()?;
    let shift = match text[digits..]
        .trim()
        .trim_end_matches('B')
        .trim_end_matches('i')
        .to_ascii_uppercase()
        .as_str()
    {
        "" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => return None,
    };
    n.checked_mul(1 << shift)
}

/// Values of TERM for which there is no line editor.
const DUMB_TERMINALS: [&str; 3] = ["dumb", "cons25", "emacs"];

/// Returns the width of the terminal that the variable COLUMNS names.
pub fn terminal_columns() -> Option<usize> {
    std::env::var("COLUMNS").ok()?.parse().ok()
}

/// Returns true if the variable TERM names a terminal whose cursor cannot be moved.
pub fn is_dumb_terminal() -> bool {
    std::env::var("TERM").is_ok_and(|term| DUMB_TERMINALS.contains(&term.as_str()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sources(flags: &[(&str, &str)], environment: &[(&str, &str)], file: &str) -> Sources {
        let owned = |pairs: &[(&str, &str)]| {
            pairs
                .iter()
                .map(|(k, v)| (k.to_string(), v.to_string()))
                .collect()
        };
        Sources {
            flags: owned(flags),
            environment: owned(environment),
            file: Some(("bradley.toml".into(), file.parse().unwrap())),
        }
    }

    #[test]
    fn flags_beat_the_environment_and_that_beats_the_file() {
        let s = sources(
            &[("batch_tokens", "1")],
            &[
                ("BRADLEY_BATCH_TOKENS", "2"),
                ("BRADLEY_QUEUE_TOKENS", "2"),
                ("HF_HUB_OFFLINE", "1"),
                ("HF_HOME", "/hf"),
            ],
            "batch_tokens = 3\nqueue_tokens = 3\nmax_row_tokens = 3\n\
             models = [\"a=/x\", \"/y/b.gguf\"]",
        );
        let settings = Settings::resolve(&s).unwrap();
        let e = &settings.engine;
        assert_eq!(
            (e.batch_tokens, e.queue_tokens, e.max_row_tokens),
            (1, 2, 3)
        );
        assert_eq!(
            settings.models,
            [("a".into(), "/x".into()), ("b".into(), "/y/b.gguf".into())]
        );
        assert!(settings.hub.offline && settings.hub.cache_dir == Some("/hf/hub".into()));
        let of_home = hub(&sources(&[], &[("HOME", "/home/me")], ""));
        let expected = "/home/me/.cache/huggingface/hub";
        assert_eq!(of_home.cache_dir, Some(expected.into()));
    }

    #[test]
    fn every_bad_setting_is_reported_with_its_origin() {
        let s = sources(
            &[("listen", "nowhere")],
            &[("BRADLEY_SCORING_SHARE", "2")],
            "drain_timeout = 0\nmodles = \"x\"\nmodels = \"a=/x,a=/y\"",
        );
        let bad = Settings::resolve(&s).err().unwrap();
        let origins: Vec<&str> = bad.listed().iter().map(|v| v.field.as_str()).collect();
        for expected in [
            "--listen",
            "BRADLEY_SCORING_SHARE",
            "bradley.toml: drain_timeout",
            "bradley.toml: modles",
            "bradley.toml: models",
        ] {
            assert!(
                origins.contains(&expected),
                "{expected} is missing from {origins:?}"
            );
        }
    }

    #[test]
    fn settings_beside_bad_ones_are_read() {
        let s = sources(
            &[("models", "/x"), ("batch_tokens", "none")],
            &[("BRADLEY_LEASE", "soon"), ("BRADLEY_TRACE_RATIO", "2")],
            "listen = \"127.0.0.1:53150\"\nlitsen = 1\ndrain_timeout = 0\n\
             otlp_endpoint = \"http://collector:4317\"",
        );
        let (settings, bad) = Settings::read(&s);
        let collector = settings.traces.map(|(endpoint, _)| endpoint);
        assert_eq!(collector.as_deref(), Some("http://collector:4317"));
        assert_eq!(settings.listen.port(), 53150);
        assert_eq!(settings.models.len(), 1);
        let mut names: Vec<String> = bad.listed().iter().map(|v| setting_of(&v.field)).collect();
        names.sort();
        let expected = [
            "batch_tokens",
            "drain_timeout",
            "lease",
            "litsen",
            "trace_ratio",
        ];
        assert_eq!(names, expected);
        assert_eq!(setting_of("oidc_roles"), "oidc_roles");
    }

    #[test]
    fn a_wrong_value_is_not_also_reported_as_missing() {
        let database = ("database_url", "postgres://u:p@h/d");
        for (flags, field) in [
            (vec![database, ("artifact_url", "bucket")], "--artifact-url"),
            (vec![database], "artifact_url"),
            (
                vec![("auth", "token"), ("token_file", "/etc/tokens.yaml")],
                "--auth",
            ),
            (vec![("token_file", "/etc/tokens.yaml")], "--token-file"),
        ] {
            let bad = Settings::resolve(&sources(&flags, &[], "models = \"/x\""));
            let bad = bad.err().unwrap();
            let fields: Vec<&str> = bad.listed().iter().map(|v| v.field.as_str()).collect();
            assert_eq!(fields, [field], "{flags:?}");
        }
    }

    #[test]
    fn two_ports_cannot_have_the_same_address() {
        let said_of = |flags: &[(&str, &str)], file: &str| {
            let flags = [&[("models", "/x")][..], flags].concat();
            let (_, bad) = Settings::read(&sources(&flags, &[], file));
            let listed = bad.listed().iter();
            let texts = listed.map(|v| format!("{} {}", v.field, v.description));
            texts.collect::<Vec<String>>()
        };
        let same = ("listen", "127.0.0.1:9464");
        let wanted = "--listen is 127.0.0.1:9464, which is also the address of http_listen";
        let said = said_of(&[same], "");
        assert!(said.len() == 1 && said[0].starts_with(wanted), "{said:?}");
        let wanted = "bradley.toml: http_listen is 127.0.0.1:9464, which is also the address of";
        let said = said_of(&[same], "http_listen = \"127.0.0.1:9464\"");
        assert!(said.len() == 1 && said[0].starts_with(wanted), "{said:?}");
        for http in ["off", "127.0.0.1:9465", "127.0.0.2:9464"] {
            assert!(said_of(&[same, ("http_listen", http)], "").is_empty());
        }
        let any = [("listen", "127.0.0.1:0"), ("http_listen", "127.0.0.1:0")];
        assert!(said_of(&any, "").is_empty());
    }

    #[test]
    fn a_run_cannot_use_more_devices_than_are_named() {
        let resolve = |device, n| {
            Settings::resolve(&sources(
                &[("models", "/x"), ("device", device), ("data_parallel", n)],
                &[],
                "",
            ))
        };
        let bad = resolve("cuda:0,cuda:1", "3").err().unwrap();
        assert!(
            bad.listed()
                .iter()
                .any(|v| v.field == "data_parallel" && v.description.contains("device names 2")),
            "{bad:?}"
        );
        assert!(
            resolve("cuda:0,cuda:1", "2").is_ok()
                && resolve("auto", "8").is_ok()
                && resolve("cpu", "1").is_ok()
        );
    }

    #[test]
    fn hosts_of_rest_are_a_list() {
        let s = sources(
            &[],
            &[],
            "models = \"/x\"\nrest_hosts = [\"bradley\", \"*.svc.cluster.local\"]",
        );
        let names = Settings::resolve(&s).unwrap().rest_hosts;
        let expected = ["bradley", "*.svc.cluster.local"].map(|n| RestHost::parse(n).unwrap());
        assert_eq!(names, expected);
        let s = sources(&[("rest_hosts", "bradley:50051")], &[], "models = \"/x\"");
        let bad = Settings::resolve(&s).err().unwrap();
        assert_eq!(bad.listed()[0].field, "--rest-hosts");
    }

    #[test]
    fn the_hub_is_offline_for_the_values_that_its_own_tools_accept() {
        let is_offline = |value| hub(&sources(&[], &[("HF_HUB_OFFLINE", value)], "")).offline;
        for on in ["1", "true", "True", "YES", "on"] {
            assert!(is_offline(on), "{on}");
        }
        for off in ["", "0", "false", "False", "NO", "off"] {
            assert!(!is_offline(off), "{off}");
        }
    }

    #[test]
    fn sizes_are_powers_of_1024() {
        assert_eq!(parse_bytes("20GiB"), Some(20 << 30));
        assert_eq!(parse_bytes("5m"), Some(5 << 20));
        assert_eq!(parse_bytes("7"), Some(7));
        assert_eq!(parse_bytes("x"), None);
    }
}
