//! A client for the command line, the demo and tests. It uploads datasets, follows events across
//! reconnects, and downloads checkpoints. It checks the file names that a server sends.

/// Well-known protobuf types of message fields.
pub use prost_types::{Duration as ProtoDuration, FieldMask, Struct as ProtoStruct, Timestamp};
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
/// The code of a status.
pub use tonic::Code;
/// The error status with which a server refuses a call.
pub use tonic::Status;
/// The messages of a call that the server answers with a stream.
pub use tonic::Streaming;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity, Uri};
use tonic_types::StatusExt;

use super::certificate;
use super::pb;
use super::pb::checkpoint_service_client::CheckpointServiceClient;
use super::pb::dataset_service_client::DatasetServiceClient;
use super::pb::evaluation_service_client::EvaluationServiceClient;
use super::pb::generation_service_client::GenerationServiceClient;
use super::pb::model_service_client::ModelServiceClient;
use super::pb::scoring_service_client::ScoringServiceClient;
use super::pb::training_service_client::TrainingServiceClient;
use super::pb::usage_service_client::UsageServiceClient;
use super::status::DOMAIN;
/// Converts the error of a pair to a status, for the functions of this module.
pub use super::status::from_rpc_status;
use crate::domain::reason::Reason;

/// Converts a JSON object to a protobuf Struct, which loses the order of its keys.
pub fn json_struct(fields: &serde_json::Map<String, serde_json::Value>) -> prost_types::Struct {
    super::convert::json::to_struct(fields)
}

/// Size of a chunk of an upload, in bytes.
const CHUNK_BYTES: usize = 1 << 20;
/// Maximum size of a server's message, in bytes.
const MAX_MESSAGE_BYTES: usize = 256 << 20;
/// Time limit for the connection with which a port is tried after a silent TLS handshake.
const ACCEPT_TIMEOUT: Duration = Duration::from_secs(1);
/// Maximum number of reconnects of an event stream without an event in between.
const MAX_RECONNECTS: u32 = 30;

/// The reason why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The server cannot be reached.
    #[error("cannot reach {address}: {reason}; is `bradley serve` running there?")]
    Unreachable {
        /// The server's address.
        address: String,
        /// The transport's error.
        reason: String,
    },
    /// The server's certificate is refused.
    #[error("cannot reach {address}: TLS failed: {problem}")]
    BadCertificate {
        /// The server's address.
        address: String,
        /// The problem with the certificate, and the remedy.
        problem: String,
    },
    /// The server accepts connections, but not even the TLS handshake is answered.
    #[error(
        "{address} accepts connections but did not answer the TLS handshake within {seconds} \
         seconds: see whether the server hangs, and whether it uses TLS"
    )]
    SilentTls {
        /// The server's address.
        address: String,
        /// The time limit, in seconds.
        seconds: u64,
    },
    /// The server refused the call or ended it with an error.
    #[error("{}", describe(.0))]
    Refused(Box<Status>),
    /// A local file cannot be read or written.
    #[error("{path}: {source}")]
    File {
        /// The file's path.
        path: String,
        /// The operating system's error.
        source: std::io::Error,
    },
    /// The token has characters that a header cannot have.
    #[error(
        "the token has characters that are not allowed: give the text that `bradley tokens \
         create` printed"
    )]
    BadToken,
    /// The server's answer violates the protocol.
    #[error("the server's answer cannot be used: {0}")]
    Protocol(String),
}

impl ClientError {
    /// Returns true if the caller's arguments caused the error, rather than the server or the
    /// network.
    pub fn is_usage(&self) -> bool {
        match self {
            ClientError::BadToken => true,
            ClientError::Refused(s) => matches!(
                s.code(),
                Code::InvalidArgument
                    | Code::NotFound
                    | Code::FailedPrecondition
                    | Code::AlreadyExists
                    | Code::Aborted
                    | Code::OutOfRange
            ),
            _ => false,
        }
    }

    /// Returns true if the server does not have the method, or is no gRPC server: a web server's
    /// 404 becomes the same code.
    pub fn is_unimplemented(&self) -> bool {
        matches!(self, ClientError::Refused(s) if s.code() == Code::Unimplemented)
    }
}

impl From<Status> for ClientError {
    fn from(s: Status) -> Self {
        ClientError::Refused(Box::new(s))
    }
}

/// The reason why an upload failed.
#[derive(Debug, thiserror::Error)]
pub enum UploadError {
    /// The rows could not be read.
    #[error("the rows cannot be read: {0}")]
    Read(std::io::Error),
    /// The server refused the upload, or the connection failed.
    #[error("{}", describe(.0))]
    Call(Box<Status>),
}

impl From<Status> for UploadError {
    fn from(s: Status) -> Self {
        UploadError::Call(Box::new(s))
    }
}

/// Formats a status for people, with one line for each bad field.
fn describe(status: &Status) -> String {
    match status.get_details_bad_request() {
        Some(bad) if !bad.field_violations.is_empty() => {
            let lines: Vec<String> = bad
                .field_violations
                .iter()
                .map(|v| format!("  {} {}", v.field, v.description))
                .collect();
            format!("the server refused these fields:\n{}", lines.join("\n"))
        }
        _ => format!("{} ({:?})", status.message(), status.code()),
    }
}

/// Returns the bad fields of a refused call, each with the description of what is wrong.
pub fn field_violations(status: &Status) -> Vec<(String, String)> {
    let violations = status
        .get_details_bad_request()
        .map(|bad| bad.field_violations);
    violations
        .unwrap_or_default()
        .into_iter()
        .map(|v| (v.field, v.description))
        .collect()
}

/// Returns true if the answers of a call of ScoreCompletions were refused together, for example
/// because they have more tokens than the server takes at a time. Fewer answers may be accepted.
pub fn are_answers_refused(status: &Status) -> bool {
    let violations = field_violations(status);
    status.code() == Code::InvalidArgument && violations.iter().any(|(f, _)| f == "completions")
}

/// Returns true if a call was refused because of its prompt or its answers, rather than because of
/// a setting.
pub fn is_content_refused(status: &Status) -> bool {
    let is_content = |field: &str| field.is_empty() || field.starts_with("prompt");
    are_answers_refused(status)
        || field_violations(status)
            .iter()
            .any(|(field, _)| is_content(field) || field.starts_with("completions["))
}

/// Returns true if a call was refused because the caller may not make it.
pub fn is_denied(status: &Status) -> bool {
    status.code() == Code::PermissionDenied
}

/// Returns the time after which the server asks to repeat a call.
pub fn retry_after(status: &Status) -> Option<Duration> {
    status.get_details_retry_info()?.retry_delay
}

/// Returns true if a call with this code may succeed when it is repeated, here or at another
/// replica.
pub fn is_transient(code: Code) -> bool {
    matches!(
        code,
        Code::Unavailable
            | Code::ResourceExhausted
            | Code::Aborted
            | Code::Cancelled
            | Code::DeadlineExceeded
            | Code::Internal
            | Code::Unknown
    )
}

/// Returns true if a call failed because its server was reached and then gave no sign of life, so
/// that keep-alive ended the connection.
pub fn has_fallen_silent(status: &Status) -> bool {
    // Only errors of the transport have a source. It gives this code to a connection that was not
    // made, too.
    let mut cause = std::error::Error::source(status);
    let is_of_transport = cause.is_some();
    while let Some(error) = cause {
        if error.is::<tonic::ConnectError>() {
            return false;
        }
        cause = error.source();
    }
    is_of_transport && status.code() == Code::Unavailable
}

/// Returns true if the resource that a call names may not exist for this caller: the code is one
/// that a server answers if there is no such resource, if it belongs to another client, or if its
/// name is not legal. These codes have other causes, too.
pub fn is_absent(status: &Status) -> bool {
    matches!(
        status.code(),
        Code::NotFound | Code::PermissionDenied | Code::InvalidArgument
    )
}

/// Returns true if the server itself failed while it worked on a call: its memory was exhausted, or
/// it had an internal error. The content of the call may be the cause. Errors of the transport and
/// of proxies have the same codes, but no reason that Bradley gives.
pub fn is_server_failure(status: &Status) -> bool {
    let names = [Reason::OutOfMemory, Reason::Internal].map(Reason::name);
    status
        .get_details_error_info()
        .is_some_and(|info| info.domain == DOMAIN && names.contains(&info.reason.as_str()))
}

/// Returns true if a call or a pair was refused because the server is shutting down.
pub fn is_draining(status: &Status) -> bool {
    status
        .get_details_error_info()
        .is_some_and(|info| info.domain == DOMAIN && info.reason == Reason::Draining.name())
}

/// Returns true if the refusal comes from Bradley, and not from the transport or a proxy, which
/// give no reason of ours.
pub fn is_bradleys(status: &Status) -> bool {
    status
        .get_details_error_info()
        .is_some_and(|info| info.domain == DOMAIN)
}

/// Returns true if a call was refused because of a limit or a quota.
pub fn is_exhausted(status: &Status) -> bool {
    status.code() == Code::ResourceExhausted
}

/// Returns the size of a message on the wire, in bytes.
pub fn message_bytes(message: &impl prost::Message) -> usize {
    message.encoded_len()
}

/// Returns the kind of the resource that does not exist, if a call was refused for this reason.
pub fn missing_kind(status: &Status) -> Option<String> {
    Some(status.get_details_resource_info()?.resource_type)
}

/// Returns true if a call was refused because the named resource does not exist.
pub fn is_not_found(status: &Status) -> bool {
    status.code() == Code::NotFound
}

/// Result of a call.
pub type ClientResult<T> = Result<T, ClientError>;

/// Address of a server, and the client's credentials.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Target {
    /// `http://HOST:PORT`, or `https://…` with TLS.
    pub address: String,
    /// A bearer token.
    pub token: Option<String>,
    /// PEM file of the CA that signed the server's certificate. `None` means the system's CAs.
    pub tls_ca: Option<PathBuf>,
    /// PEM files of the client's certificate and key, for servers that require a client
    /// certificate.
    pub tls_identity: Option<(PathBuf, PathBuf)>,
}

impl Target {
    /// Returns a target without TLS and token.
    pub fn plain(address: impl Into<String>) -> Self {
        Target {
            address: address.into(),
            ..Target::default()
        }
    }

    fn tls(&self) -> ClientResult<ClientTlsConfig> {
        let read = |path: &Path| {
            std::fs::read(path).map_err(|source| ClientError::File {
                path: path.display().to_string(),
                source,
            })
        };
        let mut config = match &self.tls_ca {
            Some(ca) => ClientTlsConfig::new().ca_certificate(Certificate::from_pem(read(ca)?)),
            None => ClientTlsConfig::new().with_native_roots(),
        };
        if let Some((certificate, key)) = &self.tls_identity {
            config = config.identity(Identity::from_pem(read(certificate)?, read(key)?));
        }
        Ok(config)
    }
}

/// The event with which [`Client::follow_from`] begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FirstEvent {
    /// The event after this sequence number.
    After(u64),
    /// The oldest of this many of the newest events, at least 1.
    Tail(u32),
}

/// Interceptor that adds the bearer token, if there is one, to every call.
#[derive(Clone)]
pub struct Bearer(Option<MetadataValue<Ascii>>);

impl Interceptor for Bearer {
    fn call(
        &mut self,
        mut request: tonic::Request<()>,
    ) -> std::result::Result<tonic::Request<()>, Status> {
        if let Some(token) = &self.0 {
            request
                .metadata_mut()
                .insert("authorization", token.clone());
        }
        Ok(request)
    }
}

/// The channel that calls go through. It adds the bearer token to each.
pub type Transport = InterceptedService<Channel, Bearer>;

/// A connection to a server.
#[derive(Clone)]
pub struct Client {
    channel: Channel,
    bearer: Bearer,
}

impl Client {
    /// Connects to a server, with TLS including its handshake, within the time `timeout`.
    ///
    /// # Errors
    /// [`ClientError::Unreachable`] if the address, a certificate or a key is wrong or the
    /// connection fails, [`ClientError::BadCertificate`] if the server's certificate is refused,
    /// [`ClientError::SilentTls`] if the TLS handshake is not answered in time,
    /// [`ClientError::File`] if the file of a certificate or key cannot be read,
    /// [`ClientError::BadToken`] if the token has characters that a header cannot have.
    pub async fn connect(target: &Target, timeout: Duration) -> ClientResult<Self> {
        let address = &target.address;
        let unreachable = |reason: String| ClientError::Unreachable {
            address: address.clone(),
            reason,
        };
        let mut bearer = Bearer(None);
        if let Some(token) = &target.token {
            let mut value: MetadataValue<Ascii> = format!("Bearer {token}")
                .parse()
                .map_err(|_| ClientError::BadToken)?;
            value.set_sensitive(true);
            bearer = Bearer(Some(value));
        }
        let mut endpoint =
            Endpoint::from_shared(address.clone()).map_err(|e| unreachable(e.to_string()))?;
        let uses_tls = address.starts_with("https:");
        if uses_tls {
            // This limit is for reconnects. At the first connection the one below ends earlier.
            let tls = target.tls()?.timeout(timeout + ACCEPT_TIMEOUT);
            endpoint = endpoint
                .tls_config(tls)
                .map_err(|e| unreachable(root_cause(&e)))?;
        }
        let endpoint = endpoint
            .connect_timeout(timeout)
            .http2_keep_alive_interval(Duration::from_secs(30))
            .keep_alive_while_idle(true);
        // The limit of the endpoint is for TCP alone.
        let Ok(connected) = tokio::time::timeout(timeout, endpoint.connect()).await else {
            let seconds = timeout.as_secs();
            let is_silent = uses_tls && accepts_connections(endpoint.uri()).await;
            return Err(match is_silent {
                true => ClientError::SilentTls {
                    address: address.clone(),
                    seconds,
                },
                false => unreachable(format!("it does not answer within {seconds} seconds")),
            });
        };
        let channel = connected.map_err(|e| match certificate::problem_in(&e) {
            Some(problem) => ClientError::BadCertificate {
                address: address.clone(),
                problem,
            },
            None => unreachable(root_cause(&e)),
        })?;
        Ok(Client { channel, bearer })
    }

    /// Returns a client for training jobs.
    pub fn training(&self) -> TrainingServiceClient<Transport> {
        TrainingServiceClient::with_interceptor(self.channel.clone(), self.bearer.clone())
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
    }

    /// Returns a client for datasets.
    pub fn datasets(&self) -> DatasetServiceClient<Transport> {
        DatasetServiceClient::with_interceptor(self.channel.clone(), self.bearer.clone())
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
    }

    /// Returns a client for checkpoints.
    pub fn checkpoints(&self) -> CheckpointServiceClient<Transport> {
        CheckpointServiceClient::with_interceptor(self.channel.clone(), self.bearer.clone())
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
    }

    /// Returns a client for scoring.
    pub fn scoring(&self) -> ScoringServiceClient<Transport> {
        ScoringServiceClient::with_interceptor(self.channel.clone(), self.bearer.clone())
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
    }

    /// Returns a client for evaluations.
    pub fn evaluations(&self) -> EvaluationServiceClient<Transport> {
        EvaluationServiceClient::with_interceptor(self.channel.clone(), self.bearer.clone())
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
    }

    /// Returns a client for generation.
    pub fn generation(&self) -> GenerationServiceClient<Transport> {
        GenerationServiceClient::with_interceptor(self.channel.clone(), self.bearer.clone())
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
    }

    /// Returns a client for models.
    pub fn models(&self) -> ModelServiceClient<Transport> {
        ModelServiceClient::with_interceptor(self.channel.clone(), self.bearer.clone())
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
    }

    /// Returns a client for usage.
    pub fn usage(&self) -> UsageServiceClient<Transport> {
        UsageServiceClient::with_interceptor(self.channel.clone(), self.bearer.clone())
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
    }

    /// Returns true if the server's health check answers SERVING.
    ///
    /// # Errors
    /// Returns an error if the call fails.
    pub async fn health(&self) -> ClientResult<bool> {
        let mut client = tonic_health::pb::health_client::HealthClient::new(self.channel.clone());
        let answer = client
            .check(tonic_health::pb::HealthCheckRequest {
                service: String::new(),
            })
            .await?
            .into_inner();
        Ok(answer.status == tonic_health::pb::health_check_response::ServingStatus::Serving as i32)
    }

    /// Uploads a dataset's file. `sent` is called with the number of bytes queued for sending so
    /// far.
    ///
    /// # Errors
    /// [`ClientError::File`] if the file cannot be read: the server then stores nothing, even if it
    /// has received a part. Otherwise the server's refusal.
    pub async fn upload_dataset(
        &self,
        path: &Path,
        metadata: pb::UploadMetadata,
        sent: impl FnMut(u64),
    ) -> ClientResult<pb::Dataset> {
        let failed = |source| ClientError::File {
            path: path.display().to_string(),
            source,
        };
        let file = tokio::fs::File::open(path).await.map_err(failed)?;
        self.upload_rows(file, metadata, sent)
            .await
            .map_err(|error| match error {
                UploadError::Read(source) => failed(source),
                UploadError::Call(status) => ClientError::Refused(status),
            })
    }

    /// Uploads a dataset, the bytes of a file of rows, until `rows` ends. `sent` is called with the
    /// number of bytes queued for sending so far.
    ///
    /// # Errors
    /// [`UploadError::Read`] if `rows` fails: the server then stores nothing, even if it has
    /// received a part. [`UploadError::Call`] if the server refuses the upload.
    pub async fn upload_rows(
        &self,
        rows: impl AsyncRead,
        metadata: pb::UploadMetadata,
        mut sent: impl FnMut(u64),
    ) -> Result<pb::Dataset, UploadError> {
        let (sender, receiver) = mpsc::channel(4);
        let message = |part| pb::UploadDatasetRequest { part: Some(part) };
        // If sending fails, the server has refused the upload, and its answer says why.
        let read = async {
            let metadata = message(pb::upload_dataset_request::Part::Metadata(metadata));
            if sender.send(metadata).await.is_err() {
                return Ok(());
            }
            let mut rows = std::pin::pin!(rows);
            let mut total = 0;
            loop {
                let mut buffer = vec![0; CHUNK_BYTES];
                let n = rows.read(&mut buffer).await?;
                if n == 0 {
                    return Ok::<(), std::io::Error>(());
                }
                buffer.truncate(n);
                let chunk = message(pb::upload_dataset_request::Part::Chunk(buffer));
                if sender.send(chunk).await.is_err() {
                    return Ok(());
                }
                total += n as u64;
                sent(total);
            }
        };
        let mut datasets = self.datasets();
        let mut call = Box::pin(datasets.upload_dataset(ReceiverStream::new(receiver)));
        tokio::select! {
            answer = &mut call => return Ok(answer?.into_inner()),
            result = read => if let Err(error) = result {
                // The call is cancelled while the stream is still open. If the stream ended first,
                // the server would store the part that it has.
                drop(call);
                return Err(UploadError::Read(error));
            },
        }
        drop(sender);
        Ok(call.await?.into_inner())
    }

    /// Calls `each` for every event of `job` with a sequence above `after`, in order and once each,
    /// until the job ends or `each` returns false. If the connection drops, it reconnects and
    /// continues after the last event. Returns the sequence of the last event.
    ///
    /// # Errors
    /// Returns an error if the server refuses the call, or after 30 reconnects without an event.
    /// The codes Unavailable, Unknown, Cancelled and Internal count as a dropped connection, not as
    /// a refusal.
    pub async fn follow(
        &self,
        job: &str,
        after: u64,
        each: impl FnMut(pb::TrainingEvent) -> bool,
    ) -> ClientResult<u64> {
        self.follow_from(job, FirstEvent::After(after), each).await
    }

    /// Calls `each` for every event of `job` as [`Client::follow`] does, beginning with the event
    /// that `first` names.
    ///
    /// # Errors
    /// The errors of [`Client::follow`].
    pub async fn follow_from(
        &self,
        job: &str,
        first: FirstEvent,
        each: impl FnMut(pb::TrainingEvent) -> bool,
    ) -> ClientResult<u64> {
        self.follow_noticing(job, first, each, || {}).await
    }

    /// Follows a job as [`Client::follow_from`] does, and calls `dropped` each time that the
    /// connection is lost or cannot be made, before the next attempt.
    ///
    /// # Errors
    /// The errors of [`Client::follow`].
    pub async fn follow_noticing(
        &self,
        job: &str,
        first: FirstEvent,
        mut each: impl FnMut(pb::TrainingEvent) -> bool,
        mut dropped: impl FnMut(),
    ) -> ClientResult<u64> {
        let (mut cursor, mut tail) = match first {
            FirstEvent::After(sequence) => (sequence, 0),
            FirstEvent::Tail(n) => (0, n),
        };
        let mut failures = 0;
        loop {
            let request = pb::StreamTrainingEventsRequest {
                parent: job.to_owned(),
                after_sequence: cursor,
                tail,
            };
            let error = match self.training().stream_training_events(request).await {
                Ok(stream) => {
                    let mut stream = stream.into_inner();
                    loop {
                        match stream.message().await {
                            Ok(Some(event)) => {
                                (cursor, failures, tail) = (event.sequence, 0, 0);
                                if !each(event) {
                                    return Ok(cursor);
                                }
                            }
                            Ok(None) => return Ok(cursor),
                            Err(e) => break e,
                        }
                    }
                }
                Err(e) => e,
            };
            failures += 1;
            let transient = matches!(
                error.code(),
                Code::Unavailable | Code::Unknown | Code::Cancelled | Code::Internal
            );
            if !transient || failures > MAX_RECONNECTS {
                return Err(error.into());
            }
            tracing::debug!(error = %error, cursor, "event stream dropped; reconnecting");
            dropped();
            tokio::time::sleep(Duration::from_millis(200 * u64::from(failures.min(25)))).await;
        }
    }

    /// Downloads a checkpoint's files into the folder `out`. Returns their names.
    ///
    /// # Errors
    /// The errors of [`Client::download`].
    pub async fn download_checkpoint(
        &self,
        name: &str,
        format: pb::ExportFormat,
        out: &Path,
    ) -> ClientResult<Vec<String>> {
        let request = pb::DownloadCheckpointRequest {
            name: name.to_owned(),
            format: format.into(),
            dtype: String::new(),
        };
        self.download(request, out).await
    }

    /// Downloads the requested checkpoint's files into the folder `out`. Returns their names.
    ///
    /// # Errors
    /// Returns an error if the server refuses the call or ends it with an error; if it sends bytes
    /// without a file header, an empty message, or a file name that leads outside of `out`, deeper
    /// than one folder below it or to a hidden file; or if a file cannot be written.
    pub async fn download(
        &self,
        request: pb::DownloadCheckpointRequest,
        out: &Path,
    ) -> ClientResult<Vec<String>> {
        use pb::download_checkpoint_response::Part;
        let mut stream = self
            .checkpoints()
            .download_checkpoint(request)
            .await?
            .into_inner();
        let failed = |path: &Path, source| ClientError::File {
            path: path.display().to_string(),
            source,
        };
        tokio::fs::create_dir_all(out)
            .await
            .map_err(|e| failed(out, e))?;
        let (mut names, mut open) = (Vec::new(), None);
        while let Some(message) = stream.message().await? {
            match message.part {
                Some(Part::File(file)) => {
                    if !stays_inside(&file.path) {
                        return Err(ClientError::Protocol(format!(
                            "the file name {:?} is not allowed: it must lie in the folder or one \
                             below, without a leading dot",
                            file.path
                        )));
                    }
                    let path = out.join(&file.path);
                    if let Some(folder) = path.parent() {
                        tokio::fs::create_dir_all(folder)
                            .await
                            .map_err(|e| failed(folder, e))?;
                    }
                    open = Some((
                        tokio::fs::File::create(&path)
                            .await
                            .map_err(|e| failed(&path, e))?,
                        path,
                    ));
                    names.push(file.path);
                }
                Some(Part::Chunk(bytes)) => match &mut open {
                    Some((file, path)) => {
                        file.write_all(&bytes).await.map_err(|e| failed(path, e))?
                    }
                    None => return Err(ClientError::Protocol("bytes before a file header".into())),
                },
                None => return Err(ClientError::Protocol("an empty message".into())),
            }
            if let Some((file, path)) = &mut open {
                file.flush().await.map_err(|e| failed(path, e))?;
            }
        }
        Ok(names)
    }
}

/// Returns true if a file name leads into the folder that it is joined to, or into a folder
/// directly below it. Parts that begin with a dot are refused.
fn stays_inside(name: &str) -> bool {
    let part = |p: &str| !p.is_empty() && !p.starts_with('.') && !p.contains(['\\', ':']);
    name.split('/').count() <= 2 && name.split('/').all(part)
}

/// Returns true if the port at an address with TLS accepts a connection within a second.
async fn accepts_connections(address: &Uri) -> bool {
    let Some(host) = address.host() else {
        return false;
    };
    let place = (
        host.trim_matches(['[', ']']),
        address.port_u16().unwrap_or(443),
    );
    let connecting = tokio::net::TcpStream::connect(place);
    matches!(
        tokio::time::timeout(ACCEPT_TIMEOUT, connecting).await,
        Ok(Ok(_))
    )
}

/// Returns the innermost error, because the outer ones of the transport say nothing specific.
pub(crate) fn root_cause(e: &dyn std::error::Error) -> String {
    let mut cause = e;
    while let Some(next) = cause.source() {
        cause = next;
    }
    cause.to_string()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::rpc::status::{status, without_details};
    use crate::service::error::ServiceError;

    #[test]
    fn a_server_failure_is_told_from_a_full_quota_and_from_the_transport() {
        let exhausted = |reason| {
            status(ServiceError::ResourceExhausted {
                reason,
                message: "m".to_owned(),
            })
        };
        assert!(is_server_failure(&exhausted(Reason::OutOfMemory)));
        assert!(is_server_failure(&status(ServiceError::internal("defect"))));
        assert!(!is_server_failure(&exhausted(Reason::TooManyTokens)));
        let transport = without_details(Code::Internal, "h2 protocol error");
        assert!(!is_server_failure(&transport));
        assert!(is_draining(&status(ServiceError::draining())));
        assert!(!is_draining(&exhausted(Reason::TooManyTokens)));
    }

    #[test]
    fn a_server_that_fell_silent_is_told_from_one_that_is_not_reached() {
        let of_transport = |code, source: Arc<dyn std::error::Error + Send + Sync>| {
            let mut status = without_details(code, "http2 error");
            status.set_source(source);
            status
        };
        let expired = || Arc::new(std::io::Error::other("keep-alive timed out"));
        let refused = tonic::ConnectError("connection refused".into());
        assert!(has_fallen_silent(&of_transport(
            Code::Unavailable,
            expired()
        )));
        assert!(!has_fallen_silent(&of_transport(Code::Unknown, expired())));
        assert!(!has_fallen_silent(&of_transport(
            Code::Unavailable,
            Arc::new(refused)
        )));
        // The answer of a server.
        let draining = status(ServiceError::draining());
        assert!(!has_fallen_silent(&draining));
    }
}
