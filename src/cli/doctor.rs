//! `bradley doctor`: shows what this machine offers and which settings `bradley serve` would have,
//! and checks that models, database, stores, the issuer, the collector, ports and a server answer.
//! It changes nothing.

use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use super::args::{DoctorArgs, Output};
use super::failure::{Failure, Outcome};
use super::output::{self, bytes};
use super::progress::waiting;
use super::remote::connect;
use super::settings::{SECRET_SETTINGS, SETTINGS, Settings, Sources, setting_of};
use super::variables;
use crate::compute::cpu::gemm::Kernel;
use crate::domain::names::is_hub_id;
use crate::domain::training::Precision;
use crate::engine::memory::HostMemoryOfProcess;
use crate::formats::loader::load_model;
use crate::formats::source::HubOptions;
use crate::model::device::{ComputeDevice, DeviceChoice};
use crate::model::error::ModelError;
use crate::rpc::client::{Client, ClientError, Target};
use crate::rpc::{Tls, pb};
use crate::service::store::DATABASE_FILE;
use crate::service::{check, data_volume};

/// Result of a check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum CheckStatus {
    Ok,
    /// The server works, but perhaps not as intended.
    Warning,
    Failed,
}

impl CheckStatus {
    fn name(self) -> &'static str {
        match self {
            CheckStatus::Ok => "ok",
            CheckStatus::Warning => "warning",
            CheckStatus::Failed => "failed",
        }
    }
}

/// A check: what was checked, its result and the details.
struct CheckResult {
    name: String,
    status: CheckStatus,
    detail: String,
}

/// Everything that the command prints.
#[derive(Default)]
struct DoctorReport {
    machine: Vec<(&'static str, String)>,
    /// Name, value and source of each setting.
    settings: Vec<[String; 3]>,
    checks: Vec<CheckResult>,
}

impl DoctorReport {
    fn add(&mut self, name: impl Into<String>, status: CheckStatus, detail: impl Into<String>) {
        self.checks.push(CheckResult {
            name: name.into(),
            status,
            detail: detail.into(),
        });
    }

    /// Adds a check that either succeeds with a text or fails with one.
    fn add_result(
        &mut self,
        name: impl Into<String>,
        result: Result<String, impl std::fmt::Display>,
    ) {
        match result {
            Ok(detail) => self.add(name, CheckStatus::Ok, detail),
            Err(e) => self.add(name, CheckStatus::Failed, e.to_string()),
        }
    }

    fn to_json(&self) -> Value {
        let machine: serde_json::Map<String, Value> = self
            .machine
            .iter()
            .map(|(name, value)| ((*name).to_owned(), json!(value)))
            .collect();
        let settings: Vec<Value> = self
            .settings
            .iter()
            .map(|[name, value, source]| json!({"name": name, "value": value, "source": source}))
            .collect();
        let checks: Vec<Value> = self
            .checks
            .iter()
            .map(|c| json!({"name": c.name, "status": c.status.name(), "detail": c.detail}))
            .collect();
        json!({"machine": machine, "settings": settings, "checks": checks})
    }

    /// Returns the lines for people.
    fn lines(&self) -> Vec<String> {
        let mut lines = vec!["This machine".to_owned()];
        for (name, value) in &self.machine {
            lines.push(format!("  {name:<16} {value}"));
        }
        lines.push("Settings of bradley serve, and where each comes from".to_owned());
        for [name, value, source] in &self.settings {
            let value = if value.is_empty() { "-" } else { value };
            lines.push(format!("  {name:<30} {value}  ({source})"));
        }
        lines.push("Checks".to_owned());
        for check in &self.checks {
            let (status, name) = (check.status.name(), &check.name);
            lines.push(format!("  {status:<8} {name}: {}", check.detail));
        }
        lines
    }
}

pub(super) async fn run(args: DoctorArgs, output: Output) -> Outcome {
    let sources = Sources::collect(args.serve.config.as_deref(), args.serve.flags.clone())
        .map_err(|bad| Failure::Usage(bad.to_string()))?;
    let mut report = DoctorReport::default();
    list_settings(&sources, &mut report);
    for (variable, meant) in variables::unknown(&sources.environment) {
        let advice = match meant {
            Some(meant) => format!("is unknown and has no effect: did you mean {meant}?"),
            None => "is unknown and has no effect: unset it".to_owned(),
        };
        report.add(variable, CheckStatus::Warning, advice);
    }
    let (settings, bad) = resolve(&sources, &mut report);
    let for_machine = settings.clone();
    let machine = tokio::task::spawn_blocking(move || machine(&for_machine));
    report.machine = waiting("looking at the machine", machine).await?;
    let mut skipped = impossible_checks(&settings, &bad);
    check_server_parts(&settings, &skipped, &mut report).await?;
    let own = if skipped.contains(&"listen") || skipped.contains(&"TLS") {
        OwnAddress::BadSettings
    } else {
        own_address(&settings).map_or(OwnAddress::Unknown, OwnAddress::Known)
    };
    if !check_running_server(&args, own, &mut report).await {
        skipped.push("running server");
    }
    if !skipped.is_empty() {
        let detail = format!(
            "{}: the settings for this cannot be used",
            skipped.join(", ")
        );
        report.add("not checked", CheckStatus::Warning, detail);
    }
    match output {
        Output::Table => report.lines().iter().for_each(|line| output::line(line)),
        _ => output::resource(output, &report.to_json()),
    }
    let failed = report
        .checks
        .iter()
        .filter(|check| check.status == CheckStatus::Failed)
        .count();
    match failed {
        0 => Ok(()),
        1 => Err(Failure::Failed("one check failed".to_owned())),
        n => Err(Failure::Failed(format!("{n} checks failed"))),
    }
}

/// Lists every setting with its value and its source.
fn list_settings(sources: &Sources, report: &mut DoctorReport) {
    for (name, default, _) in SETTINGS {
        let (value, origin) = sources.get(name, default);
        let is_default = origin.starts_with("the default of");
        let source = if is_default { "default" } else { &origin };
        // The URL of a database may have a password.
        let is_secret = SECRET_SETTINGS.contains(name) && !value.is_empty();
        let value = if is_secret {
            "(set, not shown)"
        } else {
            &value
        };
        report
            .settings
            .push([(*name).to_owned(), value.to_owned(), source.to_owned()]);
    }
}

/// Validates the settings. Each bad one is a failed check. Also returns the names of the bad ones.
fn resolve(sources: &Sources, report: &mut DoctorReport) -> (Settings, BTreeSet<String>) {
    let mut sources = sources.clone();
    let names_models = !sources.get("models", "").0.trim().is_empty();
    if !names_models {
        let advice = "none is named: bradley serve needs --models or BRADLEY_MODELS";
        report.add("models", CheckStatus::Warning, advice);
        // A missing model would count as a bad setting, beside which some others are not reported.
        sources.flags.insert("models".to_owned(), ".".to_owned());
    }
    let (mut settings, bad) = Settings::read(&sources);
    if !names_models {
        settings.models.clear();
    }
    if bad.is_empty() {
        report.add("settings", CheckStatus::Ok, "all of them can be used");
    }
    for violation in bad.listed() {
        report.add(
            &violation.field,
            CheckStatus::Failed,
            &violation.description,
        );
    }
    let names = bad.listed().iter().map(|v| setting_of(&v.field));
    (settings, names.collect())
}

/// Returns the names of the checks that cannot be made, because their settings cannot be used.
fn impossible_checks(settings: &Settings, bad: &BTreeSet<String>) -> Vec<&'static str> {
    let is_bad = |name: &str| bad.contains(name);
    // Without a URL, the database is a file in the data directory.
    let lacks_database =
        is_bad("database_url") || (settings.database_url.is_none() && is_bad("data_dir"));
    let lacks_issuer = (is_bad("oidc_issuer") && settings.oidc.is_none())
        || is_bad("oidc_jwks_url")
        || is_bad("oidc_ca_file");
    let checks = [
        ("device", is_bad("device")),
        // The others are opened, and the bad one is a failed setting.
        ("models", is_bad("models") && settings.models.is_empty()),
        ("data_dir", is_bad("data_dir")),
        ("database", lacks_database),
        (
            "artifact store",
            is_bad("artifact_url") || (settings.artifact_store.is_some() && lacks_database),
        ),
        ("issuer", lacks_issuer),
        ("otlp_endpoint", is_bad("otlp_endpoint")),
        ("TLS", bad.iter().any(|name| name.starts_with("tls_"))),
        ("listen", is_bad("listen")),
        ("http_listen", is_bad("http_listen")),
    ];
    let impossible = checks.into_iter().filter(|(_, lacks)| *lacks);
    impossible.map(|(name, _)| name).collect()
}

/// Describes this machine.
fn machine(settings: &Settings) -> Vec<(&'static str, String)> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let cores = match settings.threads {
        0 => cores.to_string(),
        threads => format!("{cores}, of which the setting threads uses {threads}"),
    };
    let kernels: Vec<String> = Kernel::available()
        .iter()
        .map(|k| format!("{k:?}"))
        .collect();
    let kernels = format!(
        "{}; f32 uses {:?}, bf16 uses {:?}",
        kernels.join(", "),
        Kernel::best(Precision::F32),
        Kernel::best(Precision::Bf16)
    );
    let known = |n: Option<u64>, none: &str| n.map_or(none.to_owned(), bytes);
    let HostMemoryOfProcess { machine, group } = HostMemoryOfProcess::read();
    let mut facts = vec![
        (
            "bradley",
            format!(
                "{} for {} on {}",
                env!("CARGO_PKG_VERSION"),
                std::env::consts::ARCH,
                std::env::consts::OS
            ),
        ),
        ("cores", cores),
        ("kernels", kernels),
        ("memory", known(machine, "unknown")),
        ("container limit", known(group, "none")),
    ];
    // Only opening a GPU tells if this build and this machine have one.
    match ComputeDevice::open_all(DeviceChoice::Cuda(0)) {
        Ok(_) => {
            let all = ComputeDevice::open_all(DeviceChoice::Auto).unwrap_or_default();
            let described = all.iter().map(|gpu| {
                let memory = gpu.memory().map_or(String::new(), |(free, total)| {
                    format!(": {} of {} free", bytes(free), bytes(total))
                });
                format!("{}{memory}", gpu.name())
            });
            // One fact, because the names are the keys of a JSON object.
            let described: Vec<String> = described.collect();
            facts.push(("GPU", described.join("; ")));
        }
        Err(reason) => facts.push(("GPU", format!("none: {reason}"))),
    }
    facts
}

/// Checks the parts that `bradley serve` would use with these settings, without the checks in
/// `skipped`.
async fn check_server_parts(
    settings: &Settings,
    skipped: &[&str],
    report: &mut DoctorReport,
) -> Outcome {
    let is_possible = |check: &str| !skipped.contains(&check);
    for device in &settings.engine.devices {
        if let DeviceChoice::Cuda(_) = device {
            let opened = ComputeDevice::open_all(*device).map(|_| "can be opened".to_owned());
            report.add_result(format!("device {device}"), opened);
        }
    }
    for (id, source) in &settings.models {
        let (name, hub) = (format!("model {id}"), settings.hub.clone());
        let source = source.clone();
        let opening = tokio::task::spawn_blocking(move || model(&source, &hub));
        let opened = waiting(&format!("opening the model {id}"), opening).await;
        let (status, detail) = opened?;
        report.add(name, status, detail);
    }
    let mut has_data_dir = true;
    if is_possible("data_dir") {
        let (status, detail) = data_dir(&settings.data_dir);
        has_data_dir = status != CheckStatus::Failed;
        let name = format!("data_dir {}", settings.data_dir.display());
        report.add(name, status, detail);
    }
    let database_url = settings.database_url.as_deref();
    let is_new = database_url.is_none() && !settings.data_dir.join(DATABASE_FILE).exists();
    if is_possible("database") && is_new && !has_data_dir {
        let detail = "is not made, because data_dir cannot be used";
        report.add("database", CheckStatus::Warning, detail);
    } else if is_possible("database") {
        let database = waiting(
            "asking the database",
            check::database(&settings.data_dir, database_url),
        );
        report.add_result("database", database.await);
    }
    if let Some((url, options)) = &settings.artifact_store
        && is_possible("artifact store")
    {
        let asked = waiting(
            "asking the artifact store",
            check::artifact_store(url, options, &settings.data_dir, database_url),
        );
        report.add_result("artifact store", asked.await);
    }
    if let Some(path) = &settings.token_file {
        report.add_result("tokens", check::token_file(path));
    }
    if let Some(path) = &settings.audit_log {
        report.add_result(format!("audit_log {}", path.display()), appendable(path));
    }
    if let Some(oidc) = &settings.oidc
        && is_possible("issuer")
    {
        let asked = waiting("asking the OIDC issuer", check::issuer(&oidc.keys));
        report.add_result(format!("oidc_issuer {}", oidc.keys.issuer), asked.await);
    }
    if let Some((endpoint, _)) = &settings.traces {
        let (status, detail) = waiting("asking the collector", collector(endpoint)).await;
        report.add(format!("otlp_endpoint {endpoint}"), status, detail);
    }
    if let Some(files) = settings.tls.clone() {
        let problem = files.problem();
        let opened = Tls::open(files).map(|_| "certificate and key can be used".to_owned());
        match problem {
            Some(problem) if opened.is_ok() => report.add("TLS", CheckStatus::Warning, problem),
            _ => report.add_result("TLS", opened),
        }
    }
    let ports = [
        (
            "listen",
            Some(settings.listen).filter(|_| is_possible("listen")),
        ),
        (
            "http_listen",
            settings.http_listen.filter(|_| is_possible("http_listen")),
        ),
    ];
    for (name, address) in ports {
        if let Some(address) = address {
            let (status, detail) = port(address);
            report.add(format!("{name} {address}"), status, detail);
        }
    }
    Ok(())
}

/// Opens a model without computing with it. A model of the hub is looked for in the cache only.
fn model(source: &str, hub: &HubOptions) -> (CheckStatus, String) {
    let is_local = Path::new(source).exists();
    let of_cache = HubOptions {
        offline: true,
        ..hub.clone()
    };
    match load_model(None, source, &of_cache) {
        Ok(model) => {
            let parameters = output::human::parameters(model.config.parameter_count() as u64);
            (
                CheckStatus::Ok,
                format!("{source}, {parameters} parameters"),
            )
        }
        // The error says that offline mode forbids the hub, which is so for this check only.
        Err(ModelError::NotFound { .. })
            if !is_local && !hub.offline && is_hub_id(hub_name(source)) =>
        {
            let detail = "is no folder or file here, and not in the cache as a whole: bradley \
                          serve asks the hub for it";
            (CheckStatus::Warning, format!("{source} {detail}"))
        }
        Err(e) => (CheckStatus::Failed, e.to_string()),
    }
}

/// Returns the part of a hub id before its revision.
fn hub_name(source: &str) -> &str {
    source.split_once('@').map_or(source, |(name, _)| name)
}

/// Checks that the data directory can be used, and that its volume has free space.
fn data_dir(folder: &Path) -> (CheckStatus, String) {
    let usable = match writable(folder) {
        Ok(usable) => usable,
        Err(reason) => return (CheckStatus::Failed, reason),
    };
    match data_volume::space(existing_part(folder)) {
        Ok(space) if space.total > 0 => {
            let (free, total) = (bytes(space.free), bytes(space.total));
            match space.is_almost_full() {
                true => (
                    CheckStatus::Warning,
                    format!(
                        "{usable}, but only {free} of {total} are free on its volume: free space, \
                         or name a folder on another volume"
                    ),
                ),
                false => (
                    CheckStatus::Ok,
                    format!("{usable}, {free} of {total} are free on its volume"),
                ),
            }
        }
        // Some file systems do not tell their size.
        _ => (CheckStatus::Ok, usable),
    }
}

/// Returns a folder, or the nearest one above it that exists.
fn existing_part(folder: &Path) -> &Path {
    folder
        .ancestors()
        .map(|f| {
            if f.as_os_str().is_empty() {
                Path::new(".")
            } else {
                f
            }
        })
        .find(|f| f.exists())
        .unwrap_or(folder)
}

/// Checks that files can be created in a folder, or that the folder can be created.
fn writable(folder: &Path) -> Result<String, String> {
    let existing = existing_part(folder);
    if !existing.is_dir() {
        return Err(match existing == folder {
            true => "is a file: name a folder".to_owned(),
            false => format!("{} is a file: name another folder", existing.display()),
        });
    }
    // The file is removed at once.
    tempfile::tempfile_in(existing).map_err(|e| {
        format!(
            "no file can be created in {}: {e}: correct its owner, or name another folder",
            existing.display()
        )
    })?;
    Ok(match existing == folder {
        true => "is writable".to_owned(),
        false => "is created at the first start".to_owned(),
    })
}

/// Checks that lines can be appended to a file, or that the file can be created.
fn appendable(path: &Path) -> Result<String, String> {
    // Opening a named pipe would wait for its reader.
    if path.metadata().is_ok_and(|m| !m.is_file() && !m.is_dir()) {
        return Ok("is not a regular file, and was not opened".to_owned());
    }
    match std::fs::OpenOptions::new().append(true).open(path) {
        Ok(_) => return Ok("can be written".to_owned()),
        Err(e) if e.kind() == ErrorKind::NotFound => {}
        Err(e) => return Err(e.to_string()),
    }
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    folder.metadata().map_err(|e| {
        format!(
            "{e}: create the folder {}, or name another file",
            folder.display()
        )
    })?;
    writable(folder)?;
    Ok("is created at the first start".to_owned())
}

/// Connects to the collector of traces at `endpoint`. The server works without it.
async fn collector(endpoint: &str) -> (CheckStatus, String) {
    let target = Target::plain(endpoint);
    let connected = Client::connect(&target, COLLECTOR_TIMEOUT);
    let reason = match tokio::time::timeout(COLLECTOR_TIMEOUT, connected).await {
        Ok(Ok(_)) => return (CheckStatus::Ok, "accepts connections".to_owned()),
        Ok(Err(ClientError::Unreachable { reason, .. })) => reason,
        Ok(Err(e)) => e.to_string(),
        Err(_) => format!(
            "it does not answer within {} seconds",
            COLLECTOR_TIMEOUT.as_secs()
        ),
    };
    let detail = format!("cannot be reached, so that traces are lost: {reason}");
    (CheckStatus::Warning, detail)
}

/// Checks that a server could listen on an address.
fn port(address: std::net::SocketAddr) -> (CheckStatus, String) {
    match std::net::TcpListener::bind(address) {
        Ok(_) => (CheckStatus::Ok, "is free".to_owned()),
        Err(e) if e.kind() == ErrorKind::AddrInUse => (
            CheckStatus::Warning,
            "is in use, perhaps by a server that runs already".to_owned(),
        ),
        Err(e) => (CheckStatus::Failed, format!("cannot be listened on: {e}")),
    }
}

/// Returns the address at which a server with these settings would be reached from this machine.
/// `None` with TLS, because the certificate may not have this name, and for port 0, which stands
/// for any free one.
fn own_address(settings: &Settings) -> Option<String> {
    let mut address = settings.listen;
    if address.ip().is_unspecified() {
        address.set_ip(match address.is_ipv4() {
            true => Ipv4Addr::LOCALHOST.into(),
            false => Ipv6Addr::LOCALHOST.into(),
        });
    }
    (settings.tls.is_none() && address.port() != 0).then(|| format!("http://{address}"))
}

/// Address of the server that has these settings.
enum OwnAddress {
    Known(String),
    /// The settings give none, see [`own_address`].
    Unknown,
    /// The settings that give it cannot be used.
    BadSettings,
}

/// Asks a running server for its health and its models. Without --address and --server this is the
/// server at the address of `listen`, which need not run; if the settings give no such address,
/// none is asked. Returns false if bad settings are the cause.
async fn check_running_server(
    args: &DoctorArgs,
    own: OwnAddress,
    report: &mut DoctorReport,
) -> bool {
    let is_optional = args.address.is_none();
    let address = match (&args.address, &own) {
        (Some(given), _) => given,
        (None, OwnAddress::Known(address)) => address,
        (None, OwnAddress::BadSettings) => return false,
        (None, OwnAddress::Unknown) => {
            let detail = "is not asked, because the settings do not tell its address (TLS, or port \
                          0): --address names it";
            report.add("server", CheckStatus::Ok, detail);
            return true;
        }
    };
    let target = Target {
        address: address.clone(),
        ..args.server.target()
    };
    let name = format!("server {address}");
    let asked = async {
        let client = connect(&target).await?;
        let is_serving = client.health().await?;
        let models = client
            .models()
            .list_models(pb::ListModelsRequest {})
            .await?
            .into_inner()
            .models;
        let names: Vec<&str> = models.iter().map(|m| m.name.as_str()).collect();
        Ok::<_, Failure>((is_serving, names.join(", ")))
    };
    let asked = tokio::time::timeout(SERVER_TIMEOUT, waiting("asking the server", asked)).await;
    let bad_status = match is_optional {
        // Nobody has asked for this server.
        true => CheckStatus::Warning,
        false => CheckStatus::Failed,
    };
    match asked {
        Ok(Ok((true, models))) => report.add(name, CheckStatus::Ok, format!("serves {models}")),
        Ok(Ok((false, _))) => {
            report.add(name, CheckStatus::Failed, "is not serving: it is stopping")
        }
        Ok(Err(Failure::Unreachable(_))) if is_optional => {
            report.add(
                name,
                CheckStatus::Ok,
                "no server answers there; --address names another one",
            );
        }
        Ok(Err(failure)) => report.add(name, bad_status, failure.message()),
        Err(_) => {
            let detail = format!(
                "does not answer within {} seconds: it may still be loading its models",
                SERVER_TIMEOUT.as_secs()
            );
            report.add(name, bad_status, detail);
        }
    }
    true
}

/// Time limit for a running server.
const SERVER_TIMEOUT: Duration = Duration::from_secs(20);
/// Time limit for the collector of traces.
const COLLECTOR_TIMEOUT: Duration = Duration::from_secs(2);
