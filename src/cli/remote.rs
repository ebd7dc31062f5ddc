//! Connects commands to a server, and explains in plain words why a connection failed.

mod probe;

use std::path::Path;
use std::time::Duration;

use self::probe::{Probe, Speaks};
use super::args::{DEFAULT_SERVER, ServerArgs};
use super::failure::{Failure, Outcome};
use super::progress::say;
use crate::rpc::client::{Client, ClientError, Target, root_cause};

/// Time limit for connecting to a server.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Time after which a server that answers no health check is reported as silent. The command goes
/// on, because a server that loads its models answers later.
const HEALTH_TIMEOUT: Duration = Duration::from_secs(3);

/// Connects to a server and checks that it speaks gRPC.
///
/// # Errors
/// Returns a failure that names the cause and a remedy.
pub(super) async fn connect(target: &Target) -> Result<Client, Failure> {
    check_address(&target.address)?;
    match open(target).await {
        Ok(client) => check_protocol(target, client).await,
        Err(error) => Err(not_connected(target, error).await),
    }
}

/// Converts the error of a connection that was not made to a failure that names a remedy.
async fn not_connected(target: &Target, error: ClientError) -> Failure {
    match error {
        ClientError::Unreachable { reason, .. } => {
            Failure::Unreachable(explain(target, &reason).await)
        }
        ClientError::File { path, source } => {
            let flag = flag_of_file(target, &path);
            Failure::Failed(format!("{flag} {path}: {source}"))
        }
        other => other.into(),
    }
}

/// Checks that the server of a connection speaks gRPC.
async fn check_protocol(target: &Target, client: Client) -> Result<Client, Failure> {
    match tokio::time::timeout(HEALTH_TIMEOUT, client.health()).await {
        // A status with a source is an error of the transport. Every other status is the answer of
        // a gRPC server, or of a proxy in front of it.
        Ok(Err(ClientError::Refused(status))) if std::error::Error::source(&*status).is_some() => {
            let reason = root_cause(&*status);
            Err(Failure::Unreachable(explain(target, &reason).await))
        }
        // A gateway may lack the health check. So this is an error only if the port is Bradley's
        // port for metrics and probes.
        Ok(Err(e)) if e.is_unimplemented() => match Probe::of(&target.address) {
            Some(probe) if probe.run().await == Speaks::Probes => {
                Err(Failure::Unreachable(explain(target, &e.to_string()).await))
            }
            _ => Ok(client),
        },
        Ok(_) => Ok(client),
        Err(_) => {
            say(&format!(
                "{} accepts connections but does not answer yet: it may still be loading its \
                 models",
                target.address
            ));
            Ok(client)
        }
    }
}

/// Returns the flag that names a file with certificates or a key.
fn flag_of_file(target: &Target, path: &str) -> &'static str {
    let is = |file: &Path| file.display().to_string() == path;
    match (&target.tls_ca, &target.tls_identity) {
        (Some(ca), _) if is(ca) => "--tls-server-ca",
        (_, Some((certificate, _))) if is(certificate) => "--tls-client-cert",
        _ => "--tls-client-key",
    }
}

/// Checks that a server is serving. A server that does not answer in time is not.
pub(super) async fn check_health(target: &Target) -> Outcome {
    check_address(&target.address)?;
    let address = &target.address;
    let limit = 2 * HEALTH_TIMEOUT;
    let silent = || {
        Failure::Failed(format!(
            "{address} accepts connections and answered no health check within {} seconds",
            limit.as_secs()
        ))
    };
    let client = match Client::connect(target, limit).await {
        Ok(client) => check_protocol(target, client).await?,
        Err(ClientError::SilentTls { .. }) => return Err(silent()),
        Err(error) => return Err(not_connected(target, error).await),
    };
    match tokio::time::timeout(HEALTH_TIMEOUT, client.health()).await {
        Ok(Ok(true)) => Ok(()),
        Ok(Ok(false)) => Err(Failure::Failed(format!("{address} is not serving"))),
        Ok(Err(error)) => Err(error.into()),
        Err(_) => Err(silent()),
    }
}

/// Connects to a server without checking what it speaks.
///
/// # Errors
/// The errors of [`Client::connect`].
pub(super) async fn open(target: &Target) -> Result<Client, ClientError> {
    Client::connect(target, CONNECT_TIMEOUT).await
}

/// Returns `{collection}/{name}`, or `name` unchanged if it already has this prefix.
pub(super) fn full_name(collection: &str, name: &str) -> String {
    if name.starts_with(&format!("{collection}/")) {
        name.to_owned()
    } else {
        format!("{collection}/{name}")
    }
}

/// Returns ` --server ADDRESS` for commands that are shown to the user; empty for the default
/// address.
pub(super) fn server_flag(server: &ServerArgs) -> String {
    match server.server == DEFAULT_SERVER {
        true => String::new(),
        false => format!(" --server {}", server.server),
    }
}

/// Checks the form of an address: scheme and host.
fn check_address(address: &str) -> Result<(), Failure> {
    let wrong = |remedy: String| Failure::Usage(format!("the server's address {remedy}"));
    let rest = match address.split_once("://") {
        Some(("http" | "https", rest)) => rest,
        Some((scheme, rest)) => {
            // dns:///HOST:PORT has a third slash.
            let rest = rest.trim_start_matches('/');
            return Err(wrong(format!(
                "{address} begins with {scheme}://: write http://{rest}, or https://{rest} if the \
                 server uses TLS"
            )));
        }
        None => {
            return Err(wrong(format!(
                "{address:?} has no scheme: write http://{address}, or https://{address} if the \
                 server uses TLS"
            )));
        }
    };
    let is_usable = reqwest::Url::parse(address).is_ok_and(|url| url.has_host());
    match is_usable && !rest.is_empty() {
        true => Ok(()),
        false => Err(wrong(format!(
            "{address:?} is not of the form http://HOST:PORT: give --server such an address, e.g. \
             {DEFAULT_SERVER}"
        ))),
    }
}

/// Explains why the server at an address does not answer. `reason` is the transport's error.
async fn explain(target: &Target, reason: &str) -> String {
    let address = &target.address;
    let cannot = format!("cannot reach {address}");
    let Some(probe) = Probe::of(address) else {
        return format!("{cannot}: {reason}");
    };
    let place = probe.place();
    let uses_tls = address.starts_with("https:");
    let rest = address.split_once("://").map_or("", |(_, rest)| rest);
    match probe.run().await {
        Speaks::UnknownHost => format!(
            "{cannot}: no machine has the name {:?}: check the spelling, or give an IP address",
            probe.host
        ),
        Speaks::Refused => {
            let port = match probe.port_is_given {
                true => String::new(),
                false => " (the address has no port; 50051 is Bradley's default)".to_owned(),
            };
            format!(
                "{cannot}: nothing listens on {place}{port}: start `bradley serve` there, or name \
                 the server's address with --server"
            )
        }
        Speaks::Timeout => format!(
            "{cannot}: {place} does not answer within {} seconds: check the address, and that no \
             firewall is between",
            probe::CONNECT_TIMEOUT.as_secs()
        ),
        Speaks::Unreachable(error) => format!("{cannot}: {place}: {error}: check the address"),
        Speaks::Tls if uses_tls => format!(
            "{cannot}: TLS failed: {reason}: name the authority that signed the server's \
             certificate with --tls-server-ca, use a host name that is in the certificate, and, if \
             the server requires a client certificate, give --tls-client-cert and --tls-client-key"
        ),
        Speaks::Tls => format!("{cannot}: {place} uses TLS: write https://{rest}"),
        Speaks::Probes => format!(
            "{cannot}: {place} is Bradley's port for metrics and probes (its setting http_listen): \
             use the gRPC port (its setting listen, by default 50051)"
        ),
        Speaks::Http => format!(
            "{cannot}: {place} is a web server, not a gRPC server: use the gRPC port of `bradley \
             serve` (its setting listen, by default 50051)"
        ),
        Speaks::Plain if uses_tls => {
            format!("{cannot}: {place} does not use TLS: write http://{rest}")
        }
        Speaks::Plain => format!(
            "{cannot}: {reason}: is {place} the gRPC port of `bradley serve` (its setting listen)?"
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_of_the_connection_is_named_with_its_flag() {
        let target = Target {
            tls_ca: Some("ca.pem".into()),
            tls_identity: Some(("me.pem".into(), "me.key".into())),
            ..Target::plain("https://h:1")
        };
        for (path, flag) in [
            ("ca.pem", "--tls-server-ca"),
            ("me.pem", "--tls-client-cert"),
            ("me.key", "--tls-client-key"),
        ] {
            assert_eq!(flag_of_file(&target, path), flag);
        }
    }

    #[test]
    fn an_address_needs_a_scheme_and_a_host() {
        let said = |address: &str| match check_address(address) {
            Ok(()) => String::new(),
            Err(Failure::Usage(message)) => message,
            Err(other) => panic!("{other:?}"),
        };
        for usable in [
            DEFAULT_SERVER,
            "https://bradley.example",
            "http://[::1]:50051",
        ] {
            assert_eq!(said(usable), "", "{usable}");
        }
        assert!(said("localhost:50051").contains("write http://localhost:50051, or https://"));
        assert!(said("grpc://host:1").contains("write http://host:1"));
        assert!(said("dns:///host:1").contains("write http://host:1, or https://host:1"));
        for wrong in ["http://", "https://:1", "http://a b"] {
            assert!(
                said(wrong).contains("http://HOST:PORT"),
                "{wrong}: {}",
                said(wrong)
            );
        }
    }
}
