//! Names of hosts under which a server without tokens and TLS answers REST.
//!
//! A page can point its own host name at 127.0.0.1 (DNS rebinding). For a browser, this server then
//! is a part of that page's site, so that the header `origin` tells nothing. The name that the
//! browser asks for is the page's, so only known names are answered.

use std::net::IpAddr;

/// A name, or a group of names, under which REST is answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RestHost {
    /// Every name.
    Any,
    /// This name, in lower case.
    Name(String),
    /// Every name that ends with this, which begins with a dot and is in lower case.
    Below(String),
}

impl RestHost {
    /// Parses `NAME`, `*.NAME` or `*`. Returns `None` for other texts, e.g. a name with a port.
    pub fn parse(text: &str) -> Option<Self> {
        let is_name = |name: &str| {
            !name.is_empty()
                && !name.starts_with('.')
                && name
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
        };
        let text = text.to_ascii_lowercase();
        match text.strip_prefix("*.") {
            _ if text == "*" => Some(RestHost::Any),
            Some(name) if is_name(name) => Some(RestHost::Below(format!(".{name}"))),
            None if is_name(&text) => Some(RestHost::Name(text)),
            _ => None,
        }
    }

    fn has(&self, name: &str) -> bool {
        match self {
            RestHost::Any => true,
            RestHost::Name(own) => own == name,
            RestHost::Below(end) => name.ends_with(end.as_str()),
        }
    }
}

/// Returns true if a request that names `host`, perhaps with a port, may be answered: for an IP
/// address, which no page can choose as its name, for `localhost` and names below it, and for the
/// names in `known`.
pub(super) fn is_known(host: &str, known: &[RestHost]) -> bool {
    let host = host.to_ascii_lowercase();
    if let Some(rest) = host.strip_prefix('[') {
        let address = rest
            .split_once(']')
            .filter(|(_, port)| port.is_empty() || port.starts_with(':'))
            .and_then(|(address, _)| address.parse::<IpAddr>().ok());
        return address.is_some() || known.contains(&RestHost::Any);
    }
    let name = host.split_once(':').map_or(host.as_str(), |(name, _)| name);
    let name = name.strip_suffix('.').unwrap_or(name);
    name.parse::<IpAddr>().is_ok()
        || name == "localhost"
        || name.ends_with(".localhost")
        || known.iter().any(|known| known.has(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_and_known_names_are_answered() {
        let known: Vec<RestHost> = ["Bradley", "*.models.svc.cluster.local"]
            .into_iter()
            .filter_map(RestHost::parse)
            .collect();
        assert_eq!(known.len(), 2);
        for host in [
            "127.0.0.1:50051",
            "10.1.2.3",
            "[::1]:50051",
            "[fd00::7]",
            "localhost",
            "LOCALHOST:50051",
            "app.localhost:1",
            "localhost.",
            "bradley:50051",
            "BRADLEY",
            "bradley.models.svc.cluster.local:50051",
        ] {
            assert!(is_known(host, &known), "{host}");
        }
        for host in [
            "",
            "evil.example:50051",
            "127.0.0.1.evil.example",
            "localhost.evil.example",
            "notlocalhost",
            "bradley.evil.example",
            "evil-bradley",
            "models.svc.cluster.local",
            "user@localhost",
            "[::1].evil.example",
        ] {
            assert!(!is_known(host, &known), "{host}");
            assert!(is_known(host, &[RestHost::Any]), "{host}");
        }
    }

    #[test]
    fn a_setting_is_a_name_without_a_port() {
        assert_eq!(RestHost::parse("A.b"), Some(RestHost::Name("a.b".into())));
        assert_eq!(
            RestHost::parse("*.a.b"),
            Some(RestHost::Below(".a.b".into()))
        );
        assert_eq!(RestHost::parse("*"), Some(RestHost::Any));
        for wrong in ["", "a:1", "http://a", "*.", "**", "a.*", ".a", "a b", "é"] {
            assert_eq!(RestHost::parse(wrong), None, "{wrong}");
        }
    }
}
