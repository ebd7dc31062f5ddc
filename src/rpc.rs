//! The gRPC API and its REST form: one file per service, conversion between protobuf and domain
//! types, and mapping of errors to statuses.
//!
//! **Only this layer uses the crates for gRPC and protobuf, and only `status.rs` makes a gRPC
//! status.** `cli` uses the messages of [`pb`].

mod auth;
pub mod canonical;
mod certificate;
mod checkpoint;
pub mod client;
mod connections;
mod convert;
mod dataset;
mod evaluation;
mod generation;
mod http;
mod listener;
mod model;
mod observe;
pub mod pb;
mod rest;
mod scoring;
mod status;
mod training;
mod usage;

use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::net::TcpListener;
use tokio::sync::watch;
use tonic::codec::CompressionEncoding;
use tonic::transport::Server;

pub use self::http::serve_http;
pub use self::listener::{Tls, TlsError, TlsFiles};
use self::pb::checkpoint_service_server::CheckpointServiceServer;
use self::pb::dataset_service_server::DatasetServiceServer;
use self::pb::evaluation_service_server::EvaluationServiceServer;
use self::pb::generation_service_server::GenerationServiceServer;
use self::pb::model_service_server::ModelServiceServer;
use self::pb::scoring_service_server::ScoringServiceServer;
use self::pb::training_service_server::TrainingServiceServer;
use self::pb::usage_service_server::UsageServiceServer;
pub use self::rest::RestHost;
pub use self::status::DOMAIN as ERROR_DOMAIN;
use crate::service::Service;

/// Maximum number of open HTTP/2 streams per connection.
const MAX_STREAMS: u32 = 1024;
/// Minimum time that open calls get to receive their final status in a shutdown.
const MIN_FINAL_GRACE: Duration = Duration::from_secs(1);
/// Interval of HTTP/2 pings, which detect that a client's machine is gone.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(30);
/// Time limit for the answer to a ping.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(20);
/// Maximum size of a call's headers, in bytes.
const MAX_HEADERS: u32 = 16 << 10;
/// Time that open calls get to finish on a connection past its maximum age. Event streams resume on
/// another connection from their last sequence.
const AGE_GRACE: Duration = Duration::from_secs(60);

/// Options of the port for gRPC and REST.
#[derive(Clone, Debug)]
pub struct ServeOptions {
    /// Maximum size of a client's message, in bytes.
    pub max_message_bytes: usize,
    /// Time that open calls may continue after a drain began.
    pub drain_timeout: Duration,
    /// TLS settings, including the CA of client certificates if these are required.
    pub tls: Option<Tls>,
    /// True if callers need a bearer token.
    pub tokens: bool,
    /// Maximum number of open connections. When it is reached, the longest idle one is closed.
    pub max_connections: usize,
    /// Age at which a connection is closed, so that its client is balanced over the replicas again.
    /// `None` means never.
    pub max_connection_age: Option<Duration>,
    /// True if the port also serves REST, over HTTP/1.1 and HTTP/2.
    pub rest: bool,
    /// Further names of hosts under which REST is answered if there are neither tokens nor TLS.
    pub rest_hosts: Vec<RestHost>,
}

/// The reason why serving failed.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The transport failed.
    #[error("the gRPC port failed: {0}")]
    Transport(#[from] tonic::transport::Error),
    /// Reflection could not be set up.
    #[error("reflection: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
    /// An annotation `google.api.http` cannot be used.
    #[error("REST: {0}")]
    Rest(String),
}

/// Serves all services on `listener` until `shutdown`, then drains: health says NOT_SERVING,
/// new work is refused, running jobs write a checkpoint and are requeued, and open calls end. All
/// of this happens within the drain timeout, except that open calls always get at least one second
/// after the jobs have stopped, that changes whose callers have left get up to 5 seconds, and that
/// a database which does not answer delays the end by up to 13 seconds.
///
/// # Errors
/// Returns an error if the transport fails, reflection cannot be set up, or an annotation of a
/// method for REST cannot be used.
pub async fn serve(
    listener: TcpListener,
    service: Service,
    options: ServeOptions,
    shutdown: impl Future<Output = ()>,
) -> Result<(), ServeError> {
    let (health, health_service) = tonic_health::server::health_reporter();
    let max = options.max_message_bytes;
    let training = TrainingServiceServer::new(training::TrainingRpc(service.jobs.clone()))
        .max_decoding_message_size(max);
    let datasets = DatasetServiceServer::new(dataset::DatasetRpc(service.datasets.clone()))
        .max_decoding_message_size(max)
        .accept_compressed(CompressionEncoding::Gzip);
    let checkpoints = CheckpointServiceServer::new(checkpoint::CheckpointRpc {
        checkpoints: service.checkpoints.clone(),
        tokens: service.server.tokens().clone(),
    })
    .max_decoding_message_size(max);
    let scoring = ScoringServiceServer::new(scoring::ScoringRpc {
        scoring: service.inference.scoring.clone(),
        tokens: service.server.tokens().clone(),
    })
    .max_decoding_message_size(max)
    .max_encoding_message_size(max)
    .accept_compressed(CompressionEncoding::Gzip)
    .send_compressed(CompressionEncoding::Gzip);
    let evaluations = EvaluationServiceServer::new(evaluation::EvaluationRpc {
        evaluations: service.inference.evaluations.clone(),
        tokens: service.server.tokens().clone(),
    })
    .max_decoding_message_size(max);
    let generation = GenerationServiceServer::new(generation::GenerationRpc {
        generation: service.inference.generation.clone(),
        tokens: service.server.tokens().clone(),
    })
    .max_decoding_message_size(max)
    .accept_compressed(CompressionEncoding::Gzip);
    let models = ModelServiceServer::new(model::ModelRpc(service.server.clone()))
        .max_decoding_message_size(max);
    let usage = UsageServiceServer::new(usage::UsageRpc(service.server.usage().clone()))
        .max_decoding_message_size(max);
    for name in service_names() {
        health
            .set_service_status(name, tonic_health::ServingStatus::Serving)
            .await;
    }

    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(pb::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    if options.rest {
        rest::prepare().map_err(ServeError::Rest)?;
    }
    let mut builder = Server::builder()
        .accept_http1(options.rest)
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .http2_max_header_list_size(MAX_HEADERS)
        .max_concurrent_streams(MAX_STREAMS);
    if let Some(age) = options.max_connection_age {
        builder = builder
            .max_connection_age(age)
            .max_connection_age_grace(AGE_GRACE);
    }
    let log = Arc::<auth::LogRate>::default();
    // Without tokens and TLS, a web page could use this server through a host name of its own that
    // it has pointed here, so REST checks the host's name. Tokens and TLS prevent this: such a page
    // has no token, and the server's certificate is not for its name.
    let is_open = !options.tokens && options.tls.is_none();
    let router = builder
        .layer(rest::RestLayer {
            max_body: options.rest.then_some(max),
            max_headers: MAX_HEADERS as usize,
            hosts: is_open.then(|| options.rest_hosts.into()),
            log: log.clone(),
        })
        .layer(observe::ObserveLayer)
        .layer(auth::AuthLayer {
            authenticator: service.server.tokens().clone(),
            required: options.tokens,
            log,
        })
        .add_service(health_service)
        .add_service(reflection().build_v1()?)
        .add_service(reflection().build_v1alpha()?)
        .add_service(training)
        .add_service(datasets)
        .add_service(checkpoints)
        .add_service(scoring)
        .add_service(evaluations)
        .add_service(generation)
        .add_service(models)
        .add_service(usage);

    let (stop, mut stopping) = watch::channel(false);
    let incoming = listener::incoming(listener, options.tls, options.max_connections);
    let server = router.serve_with_incoming_shutdown(incoming, async move {
        let _ = stopping.wait_for(|s| *s).await;
    });
    tokio::pin!(server);
    tokio::select! {
        result = &mut server => return Ok(result?),
        () = shutdown => {}
    }
    tracing::info!("draining");
    let began = Instant::now();
    for name in service_names() {
        health
            .set_service_status(name, tonic_health::ServingStatus::NotServing)
            .await;
    }
    // Calls continue while the service drains. Event streams end when it has drained.
    tokio::select! {
        () = service.server.drain() => {}
        result = &mut server => return Ok(result?),
    }
    stop.send_replace(true);
    let left = options
        .drain_timeout
        .saturating_sub(began.elapsed())
        .max(MIN_FINAL_GRACE);
    match tokio::time::timeout(left, server).await {
        Ok(result) => result?,
        Err(_) => tracing::warn!("open calls did not end in time: their connections are closed"),
    }
    service.server.close().await;
    tracing::info!("stopped");
    Ok(())
}

/// Names of the services that report their health. The empty name stands for the whole server.
fn service_names() -> [&'static str; 9] {
    [
        "",
        "bradley.v1.TrainingService",
        "bradley.v1.DatasetService",
        "bradley.v1.CheckpointService",
        "bradley.v1.ScoringService",
        "bradley.v1.EvaluationService",
        "bradley.v1.GenerationService",
        "bradley.v1.ModelService",
        "bradley.v1.UsageService",
    ]
}
