//! Explains in plain words why a server's certificate is refused.

use std::error::Error;
use std::io;

use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::{CertificateError, OtherError};

/// The problem of a server with the certificate of an authority, and the remedy.
pub(super) const IS_AUTHORITY: &str = "the server's certificate is a CA certificate (CA:TRUE), \
    which clients refuse: issue one with CA:FALSE, e.g. with `openssl req -x509 -newkey rsa:2048 \
    -nodes -keyout server.key -out server.pem -days 365 -subj /CN=HOST -addext \
    subjectAltName=DNS:HOST -addext basicConstraints=critical,CA:FALSE`, with IP: in \
    place of DNS: for an IP address";

/// Returns true if a certificate that is valid now is that of an authority, which clients refuse as
/// a server's.
pub(super) fn is_authority(certificate: &CertificateDer<'_>) -> bool {
    let Ok(parsed) = webpki::EndEntityCert::try_from(certificate) else {
        return false;
    };
    // This is checked before the signer, so that no trusted authority is needed.
    let verified = parsed.verify_for_usage(
        &[],
        &[],
        &[],
        UnixTime::now(),
        webpki::KeyUsage::server_auth(),
        None,
        None,
    );
    matches!(verified, Err(webpki::Error::CaUsedAsEndEntity))
}

/// Returns the problem with the server's certificate because of which a connection failed, and the
/// remedy. `None` if the connection failed for another reason.
pub(super) fn problem_in(error: &(dyn Error + 'static)) -> Option<String> {
    let mut next = Some(error);
    while let Some(cause) = next {
        let refused = cause.downcast_ref::<rustls::Error>();
        if let Some(rustls::Error::InvalidCertificate(problem)) = refused {
            return Some(describe(problem));
        }
        next = match cause.downcast_ref::<io::Error>() {
            // Its `source` leaves out the error that it contains.
            Some(io) => io.get_ref().map(|inner| inner as &(dyn Error + 'static)),
            None => cause.source(),
        };
    }
    None
}

fn describe(problem: &CertificateError) -> String {
    use CertificateError::{
        BadSignature, Expired, ExpiredContext, InvalidPurpose, InvalidPurposeContext, NotValidYet,
        NotValidYetContext, UnknownIssuer,
    };
    let text = match problem {
        Expired | ExpiredContext { .. } => {
            "the server's certificate has expired: renew it, or correct this machine's clock"
        }
        NotValidYet | NotValidYetContext { .. } => {
            "the server's certificate is not valid yet: compare the clocks of both machines"
        }
        UnknownIssuer => {
            "the server's certificate is signed by an authority that is not trusted here: name the \
             authority's certificate with --tls-server-ca"
        }
        BadSignature => {
            "the server's certificate is not signed by the trusted authority that has the name of \
             its issuer: name the certificate of the authority that signed it with --tls-server-ca"
        }
        InvalidPurpose | InvalidPurposeContext { .. } => {
            "the server's certificate is not meant for servers: issue one with the extended key \
             usage serverAuth"
        }
        CertificateError::NotValidForNameContext {
            expected,
            presented,
        } => {
            let names: Vec<&str> = presented.iter().map(|name| bare_name(name)).collect();
            let remedy = match names.is_empty() {
                true => {
                    "it has no names: issue one with the host's name as subjectAltName".to_owned()
                }
                false => format!("use one of its names: {}", names.join(", ")),
            };
            let expected = expected.to_str();
            return format!("the server's certificate is not for the name {expected}: {remedy}");
        }
        CertificateError::Other(OtherError(other))
            if matches!(
                other.downcast_ref::<webpki::Error>(),
                Some(webpki::Error::CaUsedAsEndEntity)
            ) =>
        {
            IS_AUTHORITY
        }
        other => return format!("the server's certificate cannot be used: {other}"),
    };
    text.to_owned()
}

/// Returns the name in a text such as `DnsName("localhost")` or `IpAddress(127.0.0.1)`.
fn bare_name(text: &str) -> &str {
    let inner = text.split_once('(').map_or(text, |(_, inner)| inner);
    inner.trim_end_matches(')').trim_matches('"')
}

#[cfg(test)]
mod tests {
    use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair};
    use rustls::pki_types::ServerName;

    use super::*;

    #[test]
    fn an_authority_is_told_from_a_server() {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        assert!(!is_authority(params.self_signed(&key).unwrap().der()));
        params.is_ca = IsCa::ExplicitNoCa;
        assert!(!is_authority(params.self_signed(&key).unwrap().der()));
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        assert!(is_authority(params.self_signed(&key).unwrap().der()));
    }

    #[test]
    fn problems_have_plain_words_and_a_remedy() {
        let said = |problem: CertificateError| {
            let refused = rustls::Error::InvalidCertificate(problem);
            let transport = io::Error::new(io::ErrorKind::InvalidData, refused);
            // The error of a transport may be inside another one.
            problem_in(&io::Error::other(transport)).unwrap()
        };
        let authority = OtherError(std::sync::Arc::new(webpki::Error::CaUsedAsEndEntity));
        assert_eq!(said(CertificateError::Other(authority)), IS_AUTHORITY);
        assert!(said(CertificateError::Expired).contains("has expired: renew it"));
        assert!(said(CertificateError::NotValidYet).contains("not valid yet"));
        assert!(said(CertificateError::UnknownIssuer).contains("with --tls-server-ca"));
        let other_name = |presented: &[&str]| {
            said(CertificateError::NotValidForNameContext {
                expected: ServerName::try_from("127.0.0.1").unwrap(),
                presented: presented.iter().map(|&name| name.to_owned()).collect(),
            })
        };
        assert_eq!(
            other_name(&["DnsName(\"localhost\")", "IpAddress(10.0.0.1)"]),
            "the server's certificate is not for the name 127.0.0.1: use one of its names: \
             localhost, 10.0.0.1"
        );
        assert!(other_name(&[]).contains("subjectAltName"));
        assert_eq!(problem_in(&io::Error::other("x")), None);
    }
}
