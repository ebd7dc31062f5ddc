//! `bradley serve`: opens the ports, loads the models, and starts engine and service.

use std::future::Future;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use metrics_exporter_prometheus::PrometheusHandle;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use super::settings::Settings;
use crate::domain::reason::Reason;
use crate::engine;
use crate::formats::loader::{LoadedModel, load_model};
use crate::rpc::{RestHost, ServeOptions, Tls, serve, serve_http};
use crate::service::error::ServiceError;
use crate::service::{Service, ServiceOptions, check_data_dir_unused};

/// Maximum time for which the server, after its last answer, waits for computations on the device:
/// a scoring batch that no client waits for any more, or a block of a run that did not stop in
/// time.
const DEVICE_DRAIN_TIMEOUT: Duration = Duration::from_secs(10);

/// Number of gRPC connections that must fit beside the reserved descriptors. Otherwise the server
/// does not start.
const MIN_CONNECTIONS: u64 = 16;

/// State of the device when the server ended.
#[derive(Debug)]
pub enum Ended {
    /// The device computes nothing any more.
    DeviceIdle,
    /// The device still computes. The value is the result of serving. The process should end
    /// without exit handlers, because these must not unload a GPU's libraries during a computation.
    DeviceBusy(anyhow::Result<()>),
}

/// Interval at which the metrics recorder merges its recorded values. Without this they would use
/// more and more memory while nobody scrapes them.
const UPKEEP_INTERVAL: Duration = Duration::from_secs(5);

/// Serves until SIGTERM or SIGINT. A second signal ends the process at once.
///
/// # Errors
/// Returns an error if the server cannot start or a port fails.
pub async fn run(settings: Settings, metrics: PrometheusHandle) -> anyhow::Result<Ended> {
    let listener = TcpListener::bind(settings.listen)
        .await
        .map_err(|e| cannot_listen("listen", settings.listen, &e))?;
    let http = match settings.http_listen {
        Some(address) => Some(
            TcpListener::bind(address)
                .await
                .map_err(|e| cannot_listen("http_listen", address, &e))?,
        ),
        None => None,
    };
    let upkeep = metrics.clone();
    // Also without an HTTP port: the values are recorded all the same.
    tokio::spawn(async move {
        loop {
            tokio::time::sleep(UPKEEP_INTERVAL).await;
            upkeep.run_upkeep();
        }
    });
    let mut term = signal(SignalKind::terminate())?;
    let mut int = signal(SignalKind::interrupt())?;
    let shutdown = async move {
        tokio::select! {
            _ = term.recv() => {}
            _ = int.recv() => {}
        }
        tokio::spawn(async move {
            tokio::select! {
                _ = term.recv() => {}
                _ = int.recv() => {}
            }
            tracing::warn!("second signal: stopping at once");
            // SAFETY: `_exit` has no preconditions. It ends the process without exit handlers, as
            // for `Ended::DeviceBusy`.
            unsafe { libc::_exit(130) };
        });
    };
    serve_on(settings, listener, http.map(|l| (l, metrics)), shutdown).await
}

/// Returns the error of a port, with its setting and the remedy.
fn cannot_listen(setting: &str, address: SocketAddr, e: &std::io::Error) -> anyhow::Error {
    let flag = setting.replace('_', "-");
    let remedy = match e.kind() {
        ErrorKind::AddrInUse => format!(
            "another program uses this port, perhaps a server that runs already: stop it, or name \
             another port with --{flag}"
        ),
        ErrorKind::PermissionDenied => format!("name a port from 1024 with --{flag}"),
        _ => format!("name an address of this machine with --{flag}"),
    };
    anyhow::anyhow!("{setting}: cannot listen on {address}: {e}: {remedy}")
}

/// Runs the whole server on `listener` until `shutdown`. Tests, and commands with a server in their
/// own process, call this, because they own the listeners and the shutdown.
///
/// # Errors
/// As [`run`].
pub async fn serve_on(
    settings: Settings,
    listener: TcpListener,
    http: Option<(TcpListener, PrometheusHandle)>,
    shutdown: impl Future<Output = ()>,
) -> anyhow::Result<Ended> {
    tokio::pin!(shutdown);
    // Before the models, because loading these may take minutes.
    let tls = settings.tls.clone().map(Tls::open).transpose()?;
    prepare_data_dir(&settings.data_dir)?;
    check_data_dir_unused(&settings.data_dir)?;
    let engine = tokio::select! {
        engine = start_engine(&settings) => engine?,
        // No request was accepted yet, so there is nothing to drain.
        () = &mut shutdown => return Ok(Ended::DeviceIdle),
    };
    let options = ServiceOptions {
        data_dir: settings.data_dir.clone(),
        max_upload_bytes: settings.max_upload_bytes,
        events_kept: settings.events_kept,
        drain_timeout: settings.drain_timeout,
        database_url: settings.database_url.clone(),
        artifact_store: settings.artifact_store.clone(),
        lease: settings.lease,
        time_slice: settings.time_slice,
        max_jobs_per_client: settings.max_jobs_per_client,
        max_client_priority: settings.max_client_priority,
        max_dataset_bytes_per_client: settings.max_dataset_bytes_per_client,
        max_dataset_text_bytes: settings.max_dataset_text_bytes,
        max_scoring_tokens_per_client: settings.max_scoring_tokens_per_client,
        adapter_dir: settings.adapter_dir.clone(),
        template_date: settings.template_date,
        token_file: settings.token_file.clone(),
        oidc: settings.oidc.clone(),
    };
    // The limit is raised before the HTTP port is served, because its connections need descriptors,
    // too.
    let max_connections = connections_that_fit(settings.max_connections)?;
    if settings.database_url.is_some() || settings.artifact_store.is_some() {
        tracing::info!("opening the database and the artifact store");
    }
    let service = Service::open(engine.clone(), options).await;
    let service = service.map_err(|e| match e {
        ServiceError::Unavailable {
            reason: Reason::ArtifactsUnavailable,
            ..
        } => anyhow::anyhow!(
            "{e}: check artifact_url, the variables of its vendor and the network; \
             --log bradley=debug shows the store's answer"
        ),
        e => e.into(),
    })?;
    if settings.tokens && matches!(service.server.tokens().lacks_tokens().await, Ok(true)) {
        tracing::warn!(
            "auth is tokens, but there is no token yet, so every call is refused: make one with \
             `bradley tokens create --owner NAME --roles admin` and the same --data-dir or \
             --database-url"
        );
    }
    let (stop, mut stopping) = watch::channel(false);
    let http_address = http
        .as_ref()
        .map(|(listener, _)| listener.local_addr())
        .transpose()?;
    let http = http.map(|(listener, handle)| {
        let server = service.server.clone();
        tokio::spawn(serve_http(listener, server, handle, async move {
            let _ = stopping.wait_for(|s| *s).await;
        }))
    });
    tracing::info!(
        address = %listener.local_addr()?,
        http_address = http_address.map(tracing::field::display),
        "serving"
    );
    if !settings.tokens && !settings.listen.ip().is_loopback() {
        tracing::warn!(
            "auth is off: whoever reaches {} may do everything",
            settings.listen
        );
    }
    if settings.tokens && settings.tls.is_none() && !settings.listen.ip().is_loopback() {
        tracing::warn!(
            "tokens are sent unencrypted: set tls_cert and tls_key, \
             or let only a proxy that speaks TLS reach {}",
            settings.listen
        );
    }
    let options = ServeOptions {
        max_message_bytes: settings.max_message_bytes,
        drain_timeout: settings.drain_timeout,
        tls,
        tokens: settings.tokens,
        max_connections,
        max_connection_age: settings.max_connection_age,
        rest: settings.rest,
        rest_hosts: rest_hosts(&settings.rest_hosts),
    };
    let result = serve(listener, service, options, shutdown).await;
    // The HTTP port is stopped last, so that it answers probes until the last call has ended.
    stop.send_replace(true);
    if let Some(http) = http {
        let _ = tokio::time::timeout(Duration::from_secs(1), http).await;
    }
    engine.drain();
    let ended =
        tokio::task::spawn_blocking(move || engine.wait_for_end(DEVICE_DRAIN_TIMEOUT)).await;
    if matches!(ended, Ok(true)) {
        result?;
        return Ok(Ended::DeviceIdle);
    }
    tracing::warn!("the device is still at work: ending all the same");
    Ok(Ended::DeviceBusy(result.map_err(Into::into)))
}

/// Creates the data directory if it does not exist, and checks that files can be created in it.
fn prepare_data_dir(folder: &Path) -> anyhow::Result<()> {
    let shown = folder.display();
    anyhow::ensure!(
        !folder.exists() || folder.is_dir(),
        "data_dir {shown} is a file: name a folder with --data-dir"
    );
    let remedy = |e: &std::io::Error, owned: &str| match e.kind() {
        ErrorKind::PermissionDenied => {
            format!("correct {owned}, or name another folder with --data-dir")
        }
        _ => "name another folder with --data-dir".to_owned(),
    };
    std::fs::create_dir_all(folder).map_err(|e| {
        let advice = remedy(&e, "the owner of the folder above it");
        anyhow::anyhow!("data_dir {shown} cannot be created: {e}: {advice}")
    })?;
    match tempfile::tempfile_in(folder) {
        Ok(_) => Ok(()),
        // A server starts on a full disk, too, and its runs wait.
        Err(e) if matches!(e.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded) => Ok(()),
        Err(e) => {
            let advice = remedy(&e, "its owner");
            Err(anyhow::anyhow!("data_dir {shown}: {e}: {advice}"))
        }
    }
}

/// Returns the names of the setting and the machine's own.
fn rest_hosts(given: &[RestHost]) -> Vec<RestHost> {
    let own = std::fs::read_to_string("/proc/sys/kernel/hostname");
    let own = own.ok().and_then(|name| RestHost::parse(name.trim()));
    given.iter().cloned().chain(own).collect()
}

/// Returns the number of file descriptors reserved for files, the database, the artifact store,
/// uploads and the HTTP port. The others are for gRPC connections.
fn reserved_descriptors(limit: u64) -> u64 {
    (limit / 8).clamp(160, 1024)
}

/// Raises the limit on file descriptors as far as the system allows. Returns the number of
/// connections, at most `wanted`, that fit beside the reserved descriptors.
fn connections_that_fit(wanted: usize) -> anyhow::Result<usize> {
    let limit = raise_descriptor_limit();
    let fitting = limit.saturating_sub(reserved_descriptors(limit));
    anyhow::ensure!(
        fitting >= MIN_CONNECTIONS,
        "the limit on open files is {limit}: at least {} are needed \
         (ulimit -n, LimitNOFILE, or the container runtime's setting)",
        reserved_descriptors(limit) + MIN_CONNECTIONS
    );
    if (wanted as u64) > fitting {
        tracing::warn!(
            max_connections = wanted,
            lowered_to = fitting,
            open_files = limit,
            "max_connections is lowered to what the limit on open files leaves"
        );
    }
    Ok(wanted.min(fitting as usize))
}

/// Raises the soft limit on file descriptors to the hard limit. Returns the limit that applies.
fn raise_descriptor_limit() -> u64 {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: the call writes one struct that lives as long as it.
    if unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) } != 0 {
        return u64::MAX;
    }
    let raised = libc::rlimit {
        rlim_cur: limit.rlim_max,
        ..limit
    };
    // SAFETY: the call reads one struct that lives as long as it.
    match unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const raised) } {
        0 => raised.rlim_cur,
        _ => limit.rlim_cur,
    }
}

async fn start_engine(settings: &Settings) -> anyhow::Result<engine::Engine> {
    if settings.threads > 0 {
        // This has no effect if the thread pool already exists, as in a test process.
        crate::compute::cpu::thread_pool::set_threads(settings.threads);
    }
    let (models, hub, mut options) = (
        settings.models.clone(),
        settings.hub.clone(),
        settings.engine.clone(),
    );
    options.memory_limit = Some(engine::memory::host_limit_for(options.memory_limit));
    options.reference_cache_file = Some(settings.data_dir.join("reference-cache.redb"));
    tokio::task::spawn_blocking(move || {
        let mut loaded: Vec<LoadedModel> = Vec::new();
        for (id, source) in &models {
            let start = std::time::Instant::now();
            let model = load_model(Some(id), source, &hub)?;
            tracing::info!(
                model = id,
                source,
                parameters = model.config.parameter_count(),
                seconds = start.elapsed().as_secs_f64(),
                "model opened"
            );
            loaded.push(model);
        }
        Ok(engine::start(loaded, options)?)
    })
    .await?
}
