//! Accepts connections, with TLS if it is configured. The number of open connections is limited:
//! each needs a [`Place`]. Certificates are read again when their files change.

use std::fmt;
use std::future::Future as _;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{InconsistentKeys, RootCertStore, ServerConfig};
use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::time::Sleep;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::WaitForCancellationFutureOwned;
use tonic::transport::server::Connected;

use super::certificate::{IS_AUTHORITY, is_authority};
use super::connections::{Activity, Connections, Place};
use crate::telemetry::gauge_guard::GaugeGuard;

/// Time limit for a TLS handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Time limit for a client to send the HTTP/2 connection preface (`.0`), and the preface's length
/// in bytes (`.1`). A client of HTTP/1.1 has no preface and must send as many bytes in that time.
const PREFACE: (Duration, usize) = (Duration::from_secs(10), 24);
/// Interval at which the certificate files are checked for changes.
const CERTIFICATE_CHECK_INTERVAL: Duration = Duration::from_secs(10);
/// Time without data after which TCP asks if the client's machine is still there (`.0`), time
/// between two such probes (`.1`), and number of probes without an answer after which the
/// connection is closed (`.2`). HTTP/1.1 has no pings.
const TCP_KEEPALIVE: (Duration, Duration, u32) =
    (Duration::from_secs(60), Duration::from_secs(15), 4);
/// Maximum number of accepted connections that wait for the server to take them.
const MAX_WAITING_CONNECTIONS: usize = 64;
/// Pause after a connection could not be accepted, e.g. because no file descriptors are left.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// Paths of the certificate files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    /// PEM file of the server's certificate chain.
    pub certificate: PathBuf,
    /// PEM file of the certificate's private key.
    pub key: PathBuf,
    /// PEM file of a CA. If set, clients must have a certificate that it signed.
    pub client_ca: Option<PathBuf>,
    /// True if clients may speak HTTP/1.1, too.
    pub http1: bool,
}

impl TlsFiles {
    /// Returns the problem because of which clients refuse the server's certificate, and the
    /// remedy. `None` if there is none, or if the file cannot be read.
    pub fn problem(&self) -> Option<&'static str> {
        let chain = certificates("tls_cert", &self.certificate).ok()?;
        is_authority(chain.first()?).then_some(IS_AUTHORITY)
    }
}

/// The reason why a TLS file cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{setting} {}: {reason}", path.display())]
pub struct TlsError {
    setting: &'static str,
    path: PathBuf,
    reason: String,
}

/// The current TLS configuration, which follows changes of the files.
#[derive(Clone)]
pub struct Tls(watch::Receiver<Arc<ServerConfig>>);

impl Tls {
    /// Reads the files, and starts a task that reads them again when they change. If the changed
    /// files cannot be used, the error is logged and the old certificates stay in use.
    ///
    /// # Errors
    /// Returns an error if the files cannot be used now.
    pub fn open(files: TlsFiles) -> Result<Self, TlsError> {
        let mut known = contents(&files)?;
        let (sender, receiver) = watch::channel(Arc::new(configure(&files)?));
        warn_about_certificate(&files);
        tokio::spawn(async move {
            while !sender.is_closed() {
                tokio::time::sleep(CERTIFICATE_CHECK_INTERVAL).await;
                let current = match contents(&files) {
                    Ok(current) if current != known => current,
                    Ok(_) => continue,
                    Err(e) => {
                        tracing::error!(
                            error = %e,
                            "the TLS files cannot be read: the current certificates stay in use"
                        );
                        continue;
                    }
                };
                match configure(&files) {
                    Ok(config) => {
                        tracing::info!(
                            certificate = %files.certificate.display(),
                            "new TLS certificates are in use"
                        );
                        warn_about_certificate(&files);
                        metrics::counter!("bradley_tls_reloads_total").increment(1);
                        sender.send_replace(Arc::new(config));
                        known = current;
                    }
                    // The key may be written after the certificate, so the files are tried again.
                    Err(e) => {
                        tracing::error!(
                            error = %e,
                            "the new TLS files cannot be used: the current certificates stay in use"
                        )
                    }
                }
            }
        });
        Ok(Tls(receiver))
    }

    fn acceptor(&self) -> TlsAcceptor {
        TlsAcceptor::from(self.0.borrow().clone())
    }
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Tls")
    }
}

fn tls_error(setting: &'static str, path: &Path, e: impl fmt::Display) -> TlsError {
    TlsError {
        setting,
        path: path.to_owned(),
        reason: e.to_string(),
    }
}

fn warn_about_certificate(files: &TlsFiles) {
    if let Some(problem) = files.problem() {
        tracing::warn!(certificate = %files.certificate.display(), "{problem}");
    }
}

fn contents(files: &TlsFiles) -> Result<Vec<Vec<u8>>, TlsError> {
    let paths = [
        ("tls_cert", Some(&files.certificate)),
        ("tls_key", Some(&files.key)),
        ("tls_client_ca", files.client_ca.as_ref()),
    ];
    let given = paths
        .into_iter()
        .filter_map(|(setting, path)| Some((setting, path?)));
    given
        .map(|(setting, path)| std::fs::read(path).map_err(|e| tls_error(setting, path, e)))
        .collect()
}

fn certificates(
    setting: &'static str,
    path: &Path,
) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let all: Result<Vec<_>, _> = CertificateDer::pem_file_iter(path)
        .map_err(|e| tls_error(setting, path, e))?
        .collect();
    let all = all.map_err(|e| tls_error(setting, path, e))?;
    if all.is_empty() {
        Err(tls_error(setting, path, "it holds no PEM certificate"))
    } else {
        Ok(all)
    }
}

fn configure(files: &TlsFiles) -> Result<ServerConfig, TlsError> {
    let chain = certificates("tls_cert", &files.certificate)?;
    let key = PrivateKeyDer::from_pem_file(&files.key).map_err(|e| match e {
        pem::Error::NoItemsFound => tls_error("tls_key", &files.key, "it holds no PEM private key"),
        e => tls_error("tls_key", &files.key, e),
    })?;
    let builder = ServerConfig::builder();
    let builder = match &files.client_ca {
        None => builder.with_no_client_auth(),
        Some(path) => {
            let wrong = |e: &dyn fmt::Display| tls_error("tls_client_ca", path, e);
            let mut roots = RootCertStore::empty();
            for authority in certificates("tls_client_ca", path)? {
                roots.add(authority).map_err(|e| wrong(&e))?;
            }
            builder.with_client_cert_verifier(
                WebPkiClientVerifier::builder(Arc::new(roots))
                    .build()
                    .map_err(|e| wrong(&e))?,
            )
        }
    };
    let mut config = builder.with_single_cert(chain, key).map_err(|e| match e {
        rustls::Error::InconsistentKeys(InconsistentKeys::KeyMismatch) => {
            let certificate = files.certificate.display();
            let problem = format!("it is not the key of the certificate in {certificate}");
            tls_error("tls_key", &files.key, problem)
        }
        e => tls_error("tls_cert", &files.certificate, e),
    })?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    if files.http1 {
        config.alpn_protocols.push(b"http/1.1".to_vec());
    }
    Ok(config)
}

/// Accepts one connection, and waits until it gets a place.
async fn accept(
    listener: &TcpListener,
    connections: &Arc<Connections>,
) -> (TcpStream, SocketAddr, Place) {
    loop {
        match listener.accept().await {
            Ok((stream, peer)) => {
                // If this fails, answers may only be slower.
                let _ = stream.set_nodelay(true);
                let keepalive = TcpKeepalive::new()
                    .with_time(TCP_KEEPALIVE.0)
                    .with_interval(TCP_KEEPALIVE.1)
                    .with_retries(TCP_KEEPALIVE.2);
                if let Err(e) = SockRef::from(&stream).set_tcp_keepalive(&keepalive) {
                    tracing::debug!(%peer, error = %e, "a connection has no TCP keepalive");
                }
                return (stream, peer, connections.place().await);
            }
            Err(e) => {
                tracing::warn!(error = %e, "a connection cannot be accepted");
                tokio::time::sleep(ACCEPT_RETRY).await;
            }
        }
    }
}

/// Accepts connections until the returned stream is dropped. When `limit` connections are open, the
/// one that has been idle longest is closed for a new one. If none is idle, further clients wait.
pub(super) fn incoming(
    listener: TcpListener,
    tls: Option<Tls>,
    limit: usize,
) -> ReceiverStream<io::Result<Connection>> {
    let (sender, receiver) = mpsc::channel(MAX_WAITING_CONNECTIONS);
    let connections = Connections::new(limit);
    tokio::spawn(async move {
        loop {
            let (stream, peer, place) = tokio::select! {
                accepted = accept(&listener, &connections) => accepted,
                () = sender.closed() => return,
            };
            let Some(tls) = &tls else {
                if sender
                    .send(Ok(Connection::new(Io::Plain(stream), peer, place)))
                    .await
                    .is_err()
                {
                    return;
                }
                continue;
            };
            let (acceptor, sender, closing) =
                (tls.acceptor(), sender.clone(), place.activity.closing());
            tokio::spawn(async move {
                let handshake = tokio::select! {
                    done = tokio::time::timeout(HANDSHAKE_TIMEOUT, acceptor.accept(stream)) => done,
                    // Another client needs the place.
                    () = closing.cancelled() => return,
                };
                match handshake {
                    Ok(Ok(stream)) => {
                        let _ = sender
                            .send(Ok(Connection::new(Io::Tls(Box::new(stream)), peer, place)))
                            .await;
                    }
                    Ok(Err(e)) => tracing::info!(%peer, error = %e, "a TLS handshake failed"),
                    Err(_) => tracing::info!(%peer, "a TLS handshake took too long"),
                }
            });
        }
    });
    ReceiverStream::new(receiver)
}

enum Io {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

/// Listener of the HTTP port. Its calls are not counted: the idle time of a connection begins with
/// the last write of an answer.
pub(super) struct HttpListener {
    listener: TcpListener,
    connections: Arc<Connections>,
}

impl HttpListener {
    /// Accepts at most `limit` connections at the same time.
    pub fn new(listener: TcpListener, limit: usize) -> Self {
        HttpListener {
            listener,
            connections: Connections::new(limit),
        }
    }
}

impl axum::serve::Listener for HttpListener {
    type Io = Connection;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Connection, SocketAddr) {
        let (stream, peer, place) = accept(&self.listener, &self.connections).await;
        (
            Connection {
                counts_calls: false,
                _open: None,
                ..Connection::new(Io::Plain(stream), peer, place)
            },
            peer,
        )
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

/// An accepted connection. It occupies one of the limited places while it is open.
pub(super) struct Connection {
    io: Io,
    peer: SocketAddr,
    /// Timer for the HTTP/2 preface, or for as many bytes of HTTP/1.1; `None` when the client has
    /// sent them. The transport itself would wait forever.
    preface_timer: Option<Pin<Box<Sleep>>>,
    /// Bytes read so far, up to the end of the preface.
    read: usize,
    /// True if the gRPC layer counts open calls in the connection's [`Activity`]. If false (HTTP
    /// port), each write restarts the idle time instead.
    counts_calls: bool,
    closing: Pin<Box<WaitForCancellationFutureOwned>>,
    closed: bool,
    place: Place,
    _open: Option<GaugeGuard>,
}

impl Connection {
    fn new(io: Io, peer: SocketAddr, place: Place) -> Self {
        Connection {
            io,
            peer,
            preface_timer: Some(Box::pin(tokio::time::sleep(PREFACE.0))),
            read: 0,
            counts_calls: true,
            closing: Box::pin(place.activity.closing().cancelled_owned()),
            closed: false,
            place,
            _open: Some(GaugeGuard::new("bradley_connections")),
        }
    }

    /// Returns true if the connection must be closed. Otherwise the polling task is woken when this
    /// becomes true.
    fn is_closing(&mut self, cx: &mut Context<'_>) -> bool {
        self.closed = self.closed || self.closing.as_mut().poll(cx).is_ready();
        self.closed
    }
}

/// The connection of a request, stored in the request's extensions.
#[derive(Clone, Debug)]
pub(super) struct Peer {
    /// The client's address.
    pub address: SocketAddr,
    /// Open calls and idle time of the connection.
    pub activity: Arc<Activity>,
}

impl Connected for Connection {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        Peer {
            address: self.peer,
            activity: self.place.activity.clone(),
        }
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.is_closing(cx) {
            // End of file, as if the client had left. The transport then closes the connection
            // properly.
            return Poll::Ready(Ok(()));
        }
        let before = buf.filled().len();
        let polled = match &mut this.io {
            Io::Plain(s) => Pin::new(s).poll_read(cx, buf),
            Io::Tls(s) => Pin::new(s).poll_read(cx, buf),
        };
        if let Some(preface_timer) = &mut this.preface_timer {
            this.read += buf.filled().len() - before;
            if this.read >= PREFACE.1 {
                this.preface_timer = None;
            } else if preface_timer.as_mut().poll(cx).is_ready() {
                return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
            }
        }
        polled
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        // A client that reads nothing must not keep a connection open that must be closed.
        if this.is_closing(cx) {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        if !this.counts_calls {
            this.place.activity.touch();
        }
        match &mut this.io {
            Io::Plain(s) => Pin::new(s).poll_write(cx, buf),
            Io::Tls(s) => Pin::new(s).poll_write(cx, buf),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.is_closing(cx) {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        match &mut this.io {
            Io::Plain(s) => Pin::new(s).poll_flush(cx),
            Io::Tls(s) => Pin::new(s).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().io {
            Io::Plain(s) => Pin::new(s).poll_shutdown(cx),
            Io::Tls(s) => Pin::new(s).poll_shutdown(cx),
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    /// Makes a port with one place, a connection that occupies it, and the connection's client.
    async fn connected() -> (Arc<Connections>, Connection, TcpStream) {
        let connections = Connections::new(1);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap())
            .await
            .unwrap();
        let (stream, peer, place) = accept(&listener, &connections).await;
        (
            connections,
            Connection::new(Io::Plain(stream), peer, place),
            client,
        )
    }

    /// Asserts that a dropped connection has freed its place.
    async fn assert_free(connections: &Arc<Connections>) {
        let place = tokio::time::timeout(Duration::from_secs(10), connections.place()).await;
        assert!(place.is_ok(), "its place is not free");
    }

    #[tokio::test]
    async fn a_client_that_reads_nothing_does_not_keep_a_connection_that_is_to_be_closed() {
        let (connections, mut connection, client) = connected().await;
        let (closing, (sender, mut written)) =
            (connection.place.activity.closing(), mpsc::channel(1));
        let writing = tokio::spawn(async move {
            let block = vec![0; 1 << 16];
            loop {
                if let Err(e) = connection.write_all(&block).await {
                    return e.kind();
                }
                let _ = sender.try_send(());
            }
        });
        // The writer is in its loop and nobody reads, so it ends only when the connection is
        // closed.
        written.recv().await.unwrap();
        closing.cancel();
        let ended = tokio::time::timeout(Duration::from_secs(10), writing).await;
        assert_eq!(
            ended.expect("the writer is not woken").unwrap(),
            io::ErrorKind::BrokenPipe
        );
        assert_free(&connections).await;
        drop(client);
    }

    #[tokio::test]
    async fn a_client_whose_machine_is_gone_is_noticed_by_tcp() {
        let (_connections, connection, _client) = connected().await;
        let Io::Plain(stream) = &connection.io else {
            panic!("the connection has TLS");
        };
        let socket = SockRef::from(stream);
        assert!(socket.keepalive().unwrap());
        let set = (
            socket.tcp_keepalive_time().unwrap(),
            socket.tcp_keepalive_interval().unwrap(),
            socket.tcp_keepalive_retries().unwrap(),
        );
        assert_eq!(set, TCP_KEEPALIVE);
    }

    #[tokio::test]
    async fn every_use_of_a_connection_that_is_to_be_closed_ends_it() {
        let (connections, mut connection, mut client) = connected().await;
        connection.write_all(b"before").await.unwrap();
        connection.flush().await.unwrap();
        connection.place.activity.closing().cancel();
        // A flush and a write notice the closing, too, although nothing was read before.
        let flushed = connection.flush().await;
        assert_eq!(flushed.unwrap_err().kind(), io::ErrorKind::BrokenPipe);
        let wrote = connection.write(b"after").await;
        assert_eq!(wrote.unwrap_err().kind(), io::ErrorKind::BrokenPipe);
        assert_eq!(
            connection.read(&mut [0; 8]).await.unwrap(),
            0,
            "as if the client had left"
        );
        connection.shutdown().await.unwrap();
        drop(connection);
        assert_free(&connections).await;
        let mut received = Vec::new();
        client.read_to_end(&mut received).await.unwrap();
        assert_eq!(received, b"before");
    }
}
