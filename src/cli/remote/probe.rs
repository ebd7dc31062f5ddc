//! Finds out what is at an address where no gRPC server answered.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, RootCertStore};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::rpc::ERROR_DOMAIN;

/// Time limit for connecting.
pub(super) const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Time limit for the first bytes of an answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);
/// Number of bytes of an answer that are read.
const ANSWER_BYTES: usize = 1024;

/// The protocol at an address, or the reason why nothing answers there.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Speaks {
    /// The host's name has no address.
    UnknownHost,
    /// No process listens on the port.
    Refused,
    /// The connection was not accepted in time.
    Timeout,
    /// The connection failed for another reason.
    Unreachable(String),
    /// TLS.
    Tls,
    /// Bradley's port for metrics and probes.
    Probes,
    /// HTTP/1 of another program.
    Http,
    /// Bradley's gRPC port without TLS, or neither TLS nor HTTP/1.
    Plain,
}

/// Host and port of an address.
#[derive(Debug)]
pub(super) struct Probe {
    pub host: String,
    pub port: u16,
    /// False if the address has no port, so that `port` is the scheme's.
    pub port_is_given: bool,
}

impl Probe {
    /// Returns the probe of an address; `None` if it is not a URL with a host.
    pub fn of(address: &str) -> Option<Self> {
        let url = reqwest::Url::parse(address).ok()?;
        Some(Probe {
            host: url.host_str()?.trim_matches(['[', ']']).to_owned(),
            port: url.port_or_known_default()?,
            port_is_given: url.port().is_some(),
        })
    }

    /// Returns `HOST:PORT` for messages.
    pub fn place(&self) -> String {
        match self.host.contains(':') {
            true => format!("[{}]:{}", self.host, self.port),
            false => format!("{}:{}", self.host, self.port),
        }
    }

    /// Connects and looks at the answers to the beginnings of two protocols, TLS and HTTP/1.
    pub async fn run(&self) -> Speaks {
        let stream = match self.connect().await {
            Ok(stream) => stream,
            Err(why) => return why,
        };
        // Without a ClientHello TLS cannot be told from a server that closes the connection.
        let answer = match self.client_hello() {
            Some(hello) => exchange(stream, &hello).await,
            None => Vec::new(),
        };
        // Content types 21 (alert) and 22 (handshake), and the major version.
        if matches!(answer[..], [21 | 22, 3, ..]) {
            return Speaks::Tls;
        }
        let request = format!(
            "GET /livez HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n\r\n",
            self.host
        );
        let answer = match self.connect().await {
            Ok(stream) => exchange(stream, request.as_bytes()).await,
            Err(why) => return why,
        };
        if !answer.starts_with(b"HTTP/1.") {
            return Speaks::Plain;
        }
        if answer.ends_with(b"\r\n\r\nok\n") {
            return Speaks::Probes;
        }
        // The gRPC port has REST, too. Its error for a path that does not exist has this domain.
        match String::from_utf8_lossy(&answer).contains(ERROR_DOMAIN) {
            true => Speaks::Plain,
            false => Speaks::Http,
        }
    }

    async fn connect(&self) -> Result<TcpStream, Speaks> {
        let connecting = async {
            let addresses = tokio::net::lookup_host((self.host.as_str(), self.port)).await;
            let addresses: Vec<_> = addresses.map_err(|_| Speaks::UnknownHost)?.collect();
            TcpStream::connect(&addresses[..])
                .await
                .map_err(|e| match e.kind() {
                    io::ErrorKind::ConnectionRefused => Speaks::Refused,
                    io::ErrorKind::TimedOut => Speaks::Timeout,
                    _ => Speaks::Unreachable(e.to_string()),
                })
        };
        tokio::time::timeout(CONNECT_TIMEOUT, connecting)
            .await
            .unwrap_or(Err(Speaks::Timeout))
    }

    /// Returns the first message of a TLS connection.
    fn client_hello(&self) -> Option<Vec<u8>> {
        let config = ClientConfig::builder()
            .with_root_certificates(RootCertStore::empty())
            .with_no_client_auth();
        let name = ServerName::try_from(self.host.clone()).ok()?;
        let mut connection = ClientConnection::new(Arc::new(config), name).ok()?;
        let mut hello = Vec::new();
        connection.write_tls(&mut hello).ok()?;
        Some(hello)
    }
}

/// Sends `bytes` and returns the beginning of the answer; empty if there is none in time.
async fn exchange(mut stream: TcpStream, bytes: &[u8]) -> Vec<u8> {
    let mut answer = Vec::new();
    let talk = async {
        stream.write_all(bytes).await?;
        while answer.len() < ANSWER_BYTES && stream.read_buf(&mut answer).await? > 0 {
            // A TLS server and a gRPC server leave the connection open. Their first bytes suffice.
            if !answer.starts_with(b"HTTP/1.") {
                break;
            }
        }
        io::Result::Ok(())
    };
    // An answer in part may suffice, so that errors do not matter.
    let _ = tokio::time::timeout(ANSWER_TIMEOUT, talk).await;
    answer
}
